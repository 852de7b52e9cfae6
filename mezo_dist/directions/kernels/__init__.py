"""Implementations of `mezo_dist.directions.add`: the plain-torch reference, compiled CPU code, Triton. Same bits."""

"""Directions: the random vectors of SPSA, their sums, and the one function that adds them to weights."""

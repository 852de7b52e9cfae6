"""Processes: the rank of this one, the rendezvous of ranks, and the collectives between them."""

"""The algorithms for loops of your own, and for any function of tensors."""

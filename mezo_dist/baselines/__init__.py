"""First-order training, the baseline that forward passes are held against: back-propagation, torch's optimisers."""

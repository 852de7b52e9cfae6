"""Engines own the weights: they evaluate variants without changing a bit, and add combinations in place."""

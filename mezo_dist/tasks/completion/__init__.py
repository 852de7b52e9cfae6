"""Completion: the model learns to write a text (instruction tuning, language modelling)."""

"""Regression: a number, by a fresh head of one output."""

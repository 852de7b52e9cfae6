"""Rewards: numbers for texts, from functions, programs and services that may hang, fail and die (torch-free)."""

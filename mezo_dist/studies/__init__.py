"""Scaling studies: a file of cases, each started by a real launcher, and what they took, in tables and plots."""

"""Demo models and data sets, fetched from PyPI."""

"""Hugging Face models: loaded whole or by the slice, with adapters, with frozen blocks remembered."""

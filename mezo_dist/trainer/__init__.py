"""The algorithms in Hugging Face's Trainer."""

"""A run: built from a config, trained, replayed, exported."""

"""Processes: which rank this one is, how ranks meet, what crosses between them."""

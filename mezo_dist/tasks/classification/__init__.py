"""Classification: one of a few classes, by label words or a fresh head."""

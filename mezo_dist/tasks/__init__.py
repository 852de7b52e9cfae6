"""Tasks: rows of data become samples, micro-batches and scores; a folder for each kind of task."""

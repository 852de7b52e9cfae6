"""What a run shows: console, TensorBoard, reports."""

"""Many forward passes of one model in lock step, each on weights of its own."""

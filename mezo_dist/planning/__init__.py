"""What a run will need, before anybody rents a machine: memory, traffic, work and time, by pure functions."""

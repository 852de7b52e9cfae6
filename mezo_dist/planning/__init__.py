"""What a run will need, before anybody rents a machine: memory, traffic, work and time, as pure functions (torch-free)."""

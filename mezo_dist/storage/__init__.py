"""What lies on disk: the trajectory, snapshots, the run folder."""

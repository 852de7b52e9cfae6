"""What a run gets done in days on up to thousands of hosts that fail, stall and come back: a discrete-event simulation
on the cost model of `mezo_dist.planning`."""

"""Many forward passes of one model in lock step, each on weights of its own."""

from mezo_dist.errors import needs

with needs("greenlet", "greenlet, by which the forward passes of a step run side by side"):
    import greenlet  # noqa: F401  # looked for before any module of this folder imports it

"""Balance a pole by trial and error: any function of named tensors will do, here a simulation without a gradient.

    python examples/minimize.py [--processes 2] [--steps 60] [--algorithm mezo-svrg]

A cart is pushed left or right, fifty times a second; which of the two is the sign of a weighted sum of its state. The
value to minimise is the share of ten seconds for which the pole was *not* upright. It is piecewise constant in the four
weights: its gradient is zero wherever there is one. Random starts are the data: a minibatch is eight of them, drawn
anew for every step; a full batch (for the anchors of MeZO-SVRG) is the same sixty-four every time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import random
from collections.abc import Callable, Iterable

import torch

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.optim.minimize import Draw, minimize

TICK, TICKS = 0.02, 500
GRAVITY, CART, POLE, HALF_LENGTH, PUSH = 9.8, 1.0, 0.1, 0.5, 10.0
ALGORITHMS = {
    "mezo": MeZO(lr=0.3, eps=0.3, directions=8, one_sided=True, scaling="normalised"),
    "mezo-svrg": MeZOSVRG(lr=1.0, anchor_lr=2.0, eps=0.3, q=2, directions=4, anchor_directions=4),
}


def fall(weights: dict[str, torch.Tensor], draw: Draw) -> float:
    """Share of the time for which the pole has fallen or the cart has left its track, over the draw's starts."""
    gains = weights["gains"].tolist()
    starts = random.Random(draw.step if draw.batch == "minibatch" else -1)
    number = 8 if draw.batch == "minibatch" else 64
    return sum(1 - upright(gains, starts) / TICKS for _ in range(number)) / number


def upright(gains: list[float], starts: random.Random) -> int:
    """Ticks until the pole leans by more than 12 degrees or the cart is 2.4 m away."""
    x, speed, angle, spin = (starts.uniform(-0.1, 0.1) for _ in range(4))
    for tick in range(TICKS):
        if abs(x) > 2.4 or abs(angle) > math.radians(12):
            return tick
        wanted = gains[0] * x + gains[1] * speed + gains[2] * angle + gains[3] * spin
        push = PUSH if wanted > 0 else -PUSH
        sine, cosine, mass = math.sin(angle), math.cos(angle), CART + POLE
        common = (push + POLE * HALF_LENGTH * spin**2 * sine) / mass
        turn = (GRAVITY * sine - cosine * common) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass))
        pull = common - POLE * HALF_LENGTH * turn * cosine / mass
        x, speed, angle, spin = x + TICK * speed, speed + TICK * pull, angle + TICK * spin, spin + TICK * turn
    return TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, default=0, help="evaluate variants in so many processes; 0: in this one"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="mezo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def show(step: int, weights: dict[str, torch.Tensor], metrics: dict[str, float]) -> None:
        if step % 10 == 0:
            print(f"step {step}: down for {metrics['loss']:.1%} of the time")

    def run(mapper: Callable[..., Iterable[float]] = map) -> None:
        start = {"gains": torch.zeros(4)}
        held_out = Draw(10**6)
        minimum = minimize(
            fall,
            start,
            ALGORITHMS[options.algorithm],
            steps=options.steps,
            seed=options.seed,
            mapper=mapper,
            after_step=show,
        )
        gains = ", ".join(f"{gain:.2f}" for gain in minimum.weights["gains"].tolist())
        print(f"gains {gains} after {minimum.calls} calls")
        print(f"new starts: down for {fall(start, held_out):.1%} before, {fall(minimum.weights, held_out):.1%} after")

    if not options.processes:
        run()
        return
    with concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        run(pool.map)


if __name__ == "__main__":
    main()

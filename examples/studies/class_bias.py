"""Why losses are calibrated: what a model's bias for a class does to gradients of prompted classification.

    python examples/studies/class_bias.py

Two norms of SmolLM2-135M, 256 movie sentences, at the start and on the way of AdamW (as in `estimator_quality.py`), by
back-propagation. For plain losses and for calibrated ones (`mezo_dist.objectives.calibration`):

    spread      E|g_i - g|^2 / |g|^2 of the gradients g_i of single samples around that of all, g
    one way     the share of that spread which lies along a single direction
    batch       E|g_B - g|^2 / |g|^2 of the exact gradients of batches of 16
    curvature   eigenvalue of largest size of the Hessian of the loss of all samples: rates beyond 2 / curvature diverge

Samples of a calibrated loss are here at the offsets of all; batches of it are at their own, as in training.

Writes class_bias.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from contenders import PRESETS
from estimator_quality import open_run, processor, put, trainable, way_of_adamw
from torch import Tensor
from torch.nn.functional import cross_entropy

import mezo_dist
from mezo_dist.objectives.calibration import best_offsets
from mezo_dist.runs.build import Run

BATCH, FAR = 16, 1e-3


def gradients(run: Run, rows: list[int] | None = None, *, calibrated: bool) -> Tensor:
    """fp64 [n, weights]: gradients of the samples' losses (at the offsets of all of them, if calibrated)."""
    parameters = [p for _, p in trainable(run)]
    batch = run.split("train")
    outputs = [run.evaluator.forward(run.pretrained.model, item).payload for item in batch]
    slots = torch.tensor([slot for item in batch for slot in item.slots]).argsort()
    logits, labels = torch.cat(outputs)[slots], torch.cat([item.targets["label"] for item in batch])[slots]
    if rows is not None:
        logits, labels = logits[rows], labels[rows]
    if calibrated:
        logits = logits + best_offsets(logits.detach().double(), labels).float()
    losses = cross_entropy(logits, labels, reduction="none")
    if rows is not None:  # their mean is enough
        losses = losses.mean().unsqueeze(0)
    rows_of = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows_of]).double()


def curvature(run: Run, power_steps: int, *, calibrated: bool) -> float:
    """The Hessian's eigenvalue of largest size, by power iteration on differences of gradients."""
    start = {name: p.detach().clone() for name, p in trainable(run)}
    direction = torch.randn(sum(p.numel() for p in start.values()), generator=torch.Generator().manual_seed(0))
    everything = list(range(len(run.splits["train"])))
    value = 0.0
    for _ in range(power_steps):
        direction = direction / direction.norm()
        ends = []
        for sign in (1, -1):
            parts = direction.split([p.numel() for p in start.values()])
            moved = zip(start.items(), parts, strict=True)
            put(run, {name: p + sign * FAR * part.view_as(p) for (name, p), part in moved})
            ends.append(gradients(run, everything, calibrated=calibrated)[0].float())
        product = (ends[0] - ends[1]) / (2 * FAR)
        value, direction = float(product @ direction), product
    put(run, start)
    return value


def look(run: Run, batches: int, power_steps: int, *, calibrated: bool) -> dict[str, float]:
    """The figures above, at the current weights."""
    each = gradients(run, calibrated=calibrated)
    whole = each.mean(0)
    squares = torch.linalg.svdvals(each - whole).square()
    draw, size = random.Random(0), float(whole @ whole)
    errors = []
    for _ in range(batches):
        gradient = gradients(run, draw.sample(range(len(each)), BATCH), calibrated=calibrated)[0]
        errors.append(float((gradient - whole).square().sum()) / size)
    return {
        "gradient": size**0.5,
        "spread": float(squares.sum()) / len(each) / size,
        "one way": float(squares[0] / squares.sum()),
        "batch": sum(errors) / batches,
        "curvature": curvature(run, power_steps, calibrated=calibrated),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-norms")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--power-steps", type=int, default=20)
    options = parser.parse_args()
    preset, rows, effort = PRESETS[options.preset], [], (options.batches, options.power_steps)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(preset, "gaussian", Path(folder))
        for point, weights in way_of_adamw(run, preset.adamw_lr, preset.points).items():
            for calibrated in (False, True):
                put(run, weights)
                rows.append({"point": point, "calibrated": calibrated, **look(run, *effort, calibrated=calibrated)})
                print({name: round(value, 3) for name, value in rows[-1].items()}, flush=True)
    about = {
        "command": f"python examples/studies/class_bias.py --preset {options.preset}",
        "machine": processor(),
        "versions": f"mezo_dist {mezo_dist.__version__}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "class_bias.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Weights that a checkpoint lacks, such as a fresh classification head: drawn by name.

They follow the law that the model class gives them, and are a function of (run seed, name of the weight): so they do
not depend on which other weights have data in this process, and all layouts have the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from mezo_dist.directions.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLAG = "_is_hf_initialized"
"""By this attribute transformers knows what it must not draw."""


def draw(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Draw the weights ``names`` of a transformers model, which have data, in place; no other weight changes.

    Args:
        model: whose other weights may have device meta.
        names: of parameters.
        seed: run seed.
    """
    weights = dict(model.named_parameters())
    for name in sorted(set(names) & weights.keys()):
        # The modules around the weight are the only ones that are asked: others may draw without looking at the flag.
        parts = name.split(".")
        around = {".".join(parts[:depth]) for depth in range(len(parts))}
        for path, module in model.named_modules():
            setattr(module, _FLAG, path not in around)
        for tensor in (*weights.values(), *model.buffers()):
            setattr(tensor, _FLAG, tensor is not weights[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "fresh weight", name) % 2**63)
            model.initialize_weights()

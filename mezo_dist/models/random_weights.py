"""Seeded random weights for any architecture, generated piece by piece: for benchmarks of shapes without a checkpoint
at hand.

Like directions, they are a function of (seed, parameter name, element index) alone, so every layout has the same model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from mezo_dist.directions.add import add
from mezo_dist.directions.bits import GAUSSIAN
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.seeds import derive_seed, param_id
from mezo_dist.json_types import JsonObject
from mezo_dist.models.sliced_checkpoint import class_of, without_data

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

STD_SETTINGS = ("initializer_range", "init_std")
"""Where configs of transformers keep the standard deviation of fresh weights; 0.02 if they do not."""


@final
class RandomWeights:
    """Matrices are normal with the standard deviation of the config, biases 0, other vectors 1.

    Args:
        std: standard deviation of matrices.
        seed: run seed.
        dims: number of dimensions of every parameter, by canonical name.
    """

    def __init__(self, std: float, seed: int, dims: dict[str, int]) -> None:
        """``dims``: the number of dimensions of every parameter, by canonical name."""
        self._matrix = Combination.single(derive_seed(seed, "random weights"), std)
        self._dims = dims

    def read(self, name: str, out: Tensor, offset: int = 0) -> None:
        """See `mezo_dist.models.sliced_checkpoint.WeightSource.read`."""
        flat = out.detach().view(-1)
        if self._dims[name] < 2:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        flat.zero_()
        add(flat, [self._matrix], [flat], param_id=param_id(name), bits=GAUSSIAN, offsets=[offset])


def open_random(
    auto_class: type[_BaseAutoModelClass],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, JsonObject, RandomWeights]:
    """A model of ``config`` without data, and what fills it; see `sliced_checkpoint.open_checkpoint`.

    Args:
        auto_class: ``transformers.AutoModelFor...``.
        config: the model's.
        dtype: of the weights.
        seed: run seed.
        trust_remote_code: let the checkpoint's own code define the class.
    """
    model_class = class_of(auto_class, config, trust_remote_code)
    with torch.device("meta"):
        whole = model_class(config)
    shapes = {name: (tensor.shape, dtype) for name, tensor in whole.named_parameters()}
    model, report = without_data(model_class, config, dtype, shapes)
    std = next((getattr(config, name) for name in STD_SETTINGS if hasattr(config, name)), 0.02)
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    return model, report, RandomWeights(float(std), seed, dims)

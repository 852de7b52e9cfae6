"""Models that are hard to get right, each for its own reason, and what a variant of one really is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.bits import GAUSSIAN, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.seeds import param_id
from mezo_dist.testing import tiny_model

KINDS = ("llama", "llama-tied", "opt", "gpt2", "bert", "roberta", "distilbert", "t5", "mixtral")
Forward = Callable[[nn.Module, Tensor], Tensor]

AROUND = Combination.of([(11, 3e-2)])
SHIFTS = (AROUND, -AROUND, AROUND + Combination.of([(5, -0.7), (2**64 - 1, 0.1)]), Combination())
VARIANTS = [Variant(shift) for shift in SHIFTS]


class Blocks(nn.Module):
    """A weight of its own beside a list of blocks, a block that is called twice, attention that uses the weights of
    a module inside it, and a tensor of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(1, 2, 8))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        attention, linear = self.blocks
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        x = x + attention(x, x, x)[0]
        for _ in range(2):
            x = self.norm(x + linear(x))
        return x * self.scale + self.prefix.mean()


class Table(nn.Module):
    """Gives away a view of its weight, inside a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self) -> tuple[Tensor, str]:
        return self.weight[:3], "three rows"


class Late(nn.Module):
    """Uses what `Table` gave after other weights were made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.then = nn.Linear(8, 64), Table(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows, _ = self.table()
        return self.then(x)[:, :3] + rows


class Recurrent(nn.Module):
    """torch's recurrent layers keep a second list of their weights, and look at `requires_grad` for their kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class TorchEncoder(nn.Module):
    """torch's encoder has a fast path, which uses the weights of inner modules without calling these."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


TOYS = (Blocks, Late, Recurrent, TorchEncoder)


def make(name: str) -> tuple[nn.Module, list[Tensor], Forward]:
    """A model, three micro-batches of different shapes, and its forward pass."""
    shapes = ((3, 7), (2, 5), (4, 7))
    draw = torch.Generator().manual_seed(1)
    toys = {toy.__name__: toy for toy in TOYS}
    if name in toys:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            toy = toys[name]()
        return toy, [torch.randn(*shape, 8, generator=draw) for shape in shapes], lambda m, x: m(x)
    ids = [torch.randint(4, 60, shape, generator=draw) for shape in shapes]
    if name == "classifier":
        return sequence_classifier(), ids, lambda m, x: m(input_ids=x, attention_mask=torch.ones_like(x)).logits
    extra = {"decoder_input_ids": torch.tensor([[0]])} if name == "t5" else {}
    return tiny_model(name), ids, lambda m, x: m(x, **{k: v.expand(len(x), -1) for k, v in extra.items()}).logits


def sequence_classifier() -> nn.Module:
    import transformers as t

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.BertConfig(**size, intermediate_size=48, max_position_embeddings=64, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = t.BertForSequenceClassification(config)
    return model.eval()


def changed(
    model: nn.Module, shift: Combination, bits: BitLayout = GAUSSIAN, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``model`` whose weights really are ``w + shift``, by the definition of that sum."""
    other = copy.deepcopy(model)
    for name, weight in other.named_parameters():
        flat = weight.data.view(1, -1)
        out = torch.empty_like(flat, dtype=dtype or weight.dtype)
        add_up = shift if weight.requires_grad else Combination()
        number = param_id(name)
        reference.add(flat, [add_up], [out], param_id=number, offsets=[0], bits=bits, rounding_seed=None)
        weight.data = out.view(weight.shape)
    return other


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor], modules: dict[str, set[str]]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert attributes(model) == modules


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """What hangs on each module: a replaced forward would show."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


def assert_same(results: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    for (i, row), other in zip(enumerate(results), wanted, strict=True):
        for (v, result), expected in zip(enumerate(row), other, strict=True):
            assert torch.equal(result, expected), f"micro-batch {i}, variant {v}"


every_model = pytest.mark.parametrize("name", [*KINDS, "classifier", *(toy.__name__ for toy in TOYS)])


class Broken(RuntimeError):
    pass


def explode(module: nn.Module, arguments: Any) -> None:
    if arguments[0].shape[0] == 4:  # the third micro-batch: by then other passes wait in other places
        raise Broken

"""The probe: every architecture is right or refused before training, and the message says what to leave out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import probe
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.fsdp import Fsdp
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.engines.probe import check_model
from mezo_dist.errors import UserError
from mezo_dist.testing import spawn
from tests.engines import zoo
from tests.engines.models import KINDS, TOYS, VARIANTS, assert_same, changed, make, state
from tests.parts import Parts, run_parts

STATEFUL = ("recurrent-gemma", "funnel")
MIXES_SAMPLES = {
    "lfm2": "model.layers.0.conv.conv.weight is used by other modules than its own",
    "mobilebert": "mobilebert.embeddings.word_embeddings.weight is used by other modules than its own",
    "deberta": "deberta.encoder.rel_embeddings.weight is used by other modules than its own",
    "deberta-v2": "deberta.encoder.rel_embeddings.weight is used by other modules than its own",
    "xlnet": "transformer.mask_emb belong to a module around",
    "longformer": "a direction per sample of longformer.encoder.layer.0.attention.self.query.bias does not reach",
    "bart": "a direction per sample of model.decoder.embed_positions.weight does not reach",
    "mpnet": "a direction per sample of mpnet.encoder.relative_attention_bias.weight does not reach",
    "t5-classifier": r"module \S*SelfAttention.relative_attention_bias gets a tensor \(9, 9, 2\)",
    "funnel": "a direction per sample of funnel.encoder.blocks.0.0.attention.r_w_bias does not reach",
}
BY_SAMPLE = ("mamba", "mamba2", "recurrent-gemma", "xglm", "openai-gpt", "qwen3-next", "ernie-moe")


@dataclass(frozen=True)
class Item:
    """A micro-batch as tasks have it."""

    ids: Tensor
    slots: tuple[int, ...]


def check(model: nn.Module, *, law: str = "gaussian", dtype: torch.dtype | None = None, **options: Any) -> Engine:
    """Probe a language model; its weights are untouched by it."""
    engine, before = Engine(model, Law(law), compute_dtype=dtype), state(model)
    item = Item(zoo.ids((4, 8)), (0, 1, 2, 3))  # four divides eight: rows of one sample cannot be told by counting
    try:
        check_model(engine, item, lambda m, item: zoo.forward(m, item.ids), **options)
    finally:
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    return engine


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "rwkv"])
def test_architectures_that_are_right(name: str) -> None:
    assert check(zoo.build(name)).one_by_one == (name in STATEFUL)


@pytest.mark.parametrize("name", zoo.HYBRIDS)
def test_hybrids_are_right_in_both_dtypes(name: str) -> None:
    model = zoo.build(name)
    for dtype in (None, torch.bfloat16):
        assert not check(model, law="lowrank", dtype=dtype).one_by_one


@pytest.mark.parametrize("name", [*KINDS, "classifier", *(toy.__name__ for toy in TOYS)])
def test_models_that_are_right(name: str) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Law("gaussian"))
    check_model(engine, items[0], forward)
    assert not engine.one_by_one


@pytest.mark.parametrize("name", STATEFUL)
def test_models_that_keep_state_run_pass_by_pass(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build(name)
    with caplog.at_level(logging.INFO):
        engine = check(model)
    assert "the model keeps state between calls (" in caplog.text
    items = [zoo.ids((3, 8)), zoo.ids((2, 5))]
    results = engine.evaluate(VARIANTS, items, zoo.forward)
    with torch.no_grad():
        models = [changed(model, variant.shift) for variant in VARIANTS]
        assert_same(results, [[zoo.forward(m, item) for m in models] for item in items])


def test_a_model_that_writes_to_its_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model.name: this model cannot be trained .* writes to its weight rwkv"):
        check(zoo.build("rwkv"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in MIXES_SAMPLES), ("longformer", torch.bfloat16), ("mpnet", torch.bfloat16)],
)
def test_directions_per_sample_that_cannot_be(name: str, dtype: torch.dtype | None) -> None:
    with pytest.raises(UserError, match=f"^algorithm.per_sample: {MIXES_SAMPLES[name]}") as error:
        check(zoo.build(name), law="lowrank", dtype=dtype, per_sample=True)
    assert "set it to false" in str(error.value)
    assert "model.freeze" in str(error.value)


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_directions_per_sample_that_are_right(name: str) -> None:
    check(zoo.build(name), law="lowrank", per_sample=True)


@pytest.mark.parametrize("name", ["xglm", "openai-gpt"])
def test_code_that_cannot_compute_in_another_dtype(name: str) -> None:
    with pytest.raises(UserError, match=r"^model.compute: .* cast to bfloat16 .*; leave it out, or set model.weights"):
        check(zoo.build(name), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["mobilebert", "t5-classifier", "deberta", "mamba2"])
def test_code_that_asks_for_a_dtype(name: str) -> None:
    check(zoo.build(name), law="lowrank", dtype=torch.bfloat16)


class Normalised(nn.Module):
    """Batch normalisation keeps fp32 buffers beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.first(x)))


def test_buffers_in_another_dtype_than_the_forward_pass() -> None:
    check_model(Engine(Normalised(), Law("gaussian")), X, lambda m, x: m(x))
    with pytest.raises(UserError, match=r"^model.compute: .* cast to bfloat16 .*; leave it out, or set model.weights"):
        check_model(
            Engine(Normalised(), Law("gaussian"), compute_dtype=torch.bfloat16), X.bfloat16(), lambda m, x: m(x)
        )


def test_weights_in_a_dtype_that_the_models_code_cannot_compute_in() -> None:
    """xLSTM computes its gates in fp32, whatever the dtype of its weights."""

    def forward(model: nn.Module, x: Tensor) -> Any:
        return model(x.float())

    with pytest.raises(UserError, match=r"^model.weights: the model's code fails on weights in bfloat16 \(.*float32"):
        check_model(Engine(nn.Linear(8, 8).bfloat16(), Law("gaussian")), X, forward)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another fault keeps its traceback
        check_model(Engine(nn.Linear(9, 8).bfloat16(), Law("gaussian")), X.bfloat16(), lambda m, x: m(x))


class Hiding(nn.Module):
    """Keeps a weight where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.hidden: list[Any] = [self.layers[3].weight]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x + F.linear(x, self.hidden[0])


X = torch.linspace(-1, 1, 24).view(3, 8)


def test_a_weight_that_cannot_be_followed_is_named() -> None:
    model = Hiding()
    message = (
        r"^model.name: losses under a shift of layers.3.weight are wrong, .*: model.freeze: \[\"layers.3.weight\"\]"
    )
    with pytest.raises(UserError, match=message):
        check_model(Engine(model, Law("gaussian")), X, lambda m, x: m(x))
    model.layers[3].weight.requires_grad_(False)
    check_model(Engine(model, Law("gaussian")), X, lambda m, x: m(x))


class Keeping(nn.Module):
    """Computes something of a weight in its first pass, and keeps it: on the module, or where nobody looks."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kept: Any = None
        self.is_hidden = hidden
        self.hide = functools.lru_cache(lambda: self.second.weight.softmax(-1))

    def forward(self, x: Tensor) -> Any:
        if self.is_hidden:
            return self.first(x) @ self.hide()
        if self.kept is None:
            self.kept = self.second.weight.softmax(-1)
        return self.first(x) @ self.kept


@pytest.mark.parametrize("hidden", [True, False])
def test_what_a_model_computes_of_a_weight_once_is_named(hidden: bool) -> None:
    engine = Engine(Keeping(hidden=hidden), Law("gaussian"))
    with pytest.raises(
        UserError, match=r"first forward pass used second.weight, .*: model.freeze: \[\"second.weight\"\]"
    ):
        check_model(engine, X, lambda m, x: m(x))


def test_weights_that_no_sample_uses_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Keeping(hidden=True)
    model(X)  # so the engine cannot know
    check_model(Engine(model, Law("gaussian")), X, lambda m, x: m(x))
    assert "the first micro-batch does not use second.weight, second.bias" in caplog.text


def test_weights_that_change_nothing_are_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.used = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.idle(x)

    with pytest.raises(UserError, match=r"^model.trainable: no loss depends on idle.weight, idle.bias, so there is"):
        check_model(Engine(Idle(), Law("gaussian")), X, lambda m, x: m(x))


def test_little_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Quarters of the weights are checked in turn, and what does not fit is said."""
    monkeypatch.setattr(probe, "free_bytes", lambda: 4 * 700)  # two linear layers at a time
    with pytest.raises(UserError, match=r"of layers.3.weight are wrong"):
        check_model(Engine(Hiding(), Law("gaussian")), X, lambda m, x: m(x))
    assert not caplog.text
    monkeypatch.setattr(probe, "free_bytes", lambda: 4 * 10)
    check_model(Engine(Hiding(), Law("gaussian")), X, lambda m, x: m(x))
    assert "too little memory is free to probe losses under a shift of layers.0.weight" in caplog.text


def test_little_memory_for_a_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose cast copies do not fit are changed, each rounded as a variant is, and put back."""
    model = zoo.build("deberta")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    monkeypatch.setattr(probe, "free_bytes", lambda: size)
    for law in ("gaussian", "lowrank"):
        assert not check(model, law=law, dtype=torch.bfloat16).one_by_one


def test_losses_that_are_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    check_model(Engine(nn.Linear(8, 8), Law("gaussian")), X, lambda m, x: m(x) / 0)
    assert "first losses are not finite" in caplog.text


# Sharded weights


LAYOUTS: dict[str, Callable[[nn.Module, Communicator], Layout]] = {
    "fsdp": Fsdp,
    "zero": lambda model, comm: Zero(model, comm, {}),
}
SHARDED = ("lfm2", "mobilebert", "deberta", "xlnet", "mamba")


def same_bits(comm: Communicator, layout: str, name: str) -> bool:
    engine = Engine(model := zoo.build(name), Law("gaussian"), LAYOUTS[layout](model, comm))
    before = engine.fingerprint()
    check_model(engine, zoo.ids(), zoo.forward)
    results = engine.evaluate(VARIANTS, [zoo.ids()], zoo.forward)
    assert_same(results, Engine(zoo.build(name), Law("gaussian")).evaluate(VARIANTS, [zoo.ids()], zoo.forward))
    return engine.fingerprint() == before


def message(comm: Communicator, layout: str, model: nn.Module, item: Any, forward: Any) -> str:
    try:
        check_model(Engine(model, Law("gaussian"), LAYOUTS[layout](model, comm)), item, forward)
    except UserError as error:
        return str(error)
    return ""


def in_bf16(comm: Communicator) -> str:
    """Gathered in bf16, and rounded to it once more by the variants."""
    model = zoo.build("deberta")
    layout = Fsdp(model, comm, gather_dtype=torch.bfloat16)
    engine = Engine(model, Law("lowrank"), layout, compute_dtype=torch.bfloat16)
    check_model(engine, zoo.ids(), zoo.forward)
    return str(engine.evaluate(VARIANTS[:1], [zoo.ids()], zoo.forward)[0][0].dtype)


def mixed_dtypes(comm: Communicator) -> tuple[str, str, list[torch.dtype]]:
    """bf16 weights, but for those of the routers; fingerprints on this layout and on whole weights."""

    def build() -> Any:
        model = zoo.build("ernie-moe").bfloat16()
        for module in model.modules():
            if "Router" in type(module).__name__:
                module.float()
        return model

    engine = Engine(model := build(), Law("gaussian"), Fsdp(model, comm))
    whole = Engine(build(), Law("gaussian"))
    assert_same(*(e.evaluate(VARIANTS, [zoo.ids()], zoo.forward) for e in (engine, whole)))
    dtypes = {shard.tensor.dtype for shard in engine.shards()}
    return engine.fingerprint(), whole.fingerprint(), sorted(dtypes, key=str)


def parts(comm: Communicator) -> Parts:
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[], Any]] = {}
    for layout in LAYOUTS:
        for name in SHARDED:
            tasks[f"{layout} {name}"] = lambda layout=layout, name=name: same_bits(comm, layout, name)  # type: ignore[misc]
        tasks[f"{layout} state"] = lambda layout=layout: message(  # type: ignore[misc]
            comm, layout, zoo.build("recurrent-gemma"), zoo.ids(), zoo.forward
        )
    tasks["bf16"] = lambda: in_bf16(comm)
    tasks["mixed"] = lambda: mixed_dtypes(comm)
    return run_parts(tasks)


@pytest.fixture(scope="module")
def sharded() -> list[Parts]:
    return spawn(parts, 2, timeout_s=280)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_right_however_they_are_read(sharded: list[Parts], layout: str, name: str) -> None:
    """The same bits as whole weights. XLNet's tied weights lie in several depths, and its base module owns weights."""
    assert all(reported[f"{layout} {name}"] for reported in sharded)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_models_that_keep_state_are_refused(sharded: list[Parts], layout: str) -> None:
    for reported in sharded:
        assert reported[f"{layout} state"].startswith(
            "layout.name: the model keeps state between calls (model.layers.0."
        )


@pytest.mark.distributed
def test_sharded_weights_that_are_gathered_in_another_dtype(sharded: list[Parts]) -> None:
    assert [reported["bf16"] for reported in sharded] == ["torch.bfloat16"] * 2


@pytest.mark.distributed
def test_units_with_weights_of_two_dtypes(sharded: list[Parts]) -> None:
    for reported in sharded:
        there, whole, dtypes = reported["mixed"]
        assert there == whole
        assert dtypes == [torch.bfloat16, torch.float32]

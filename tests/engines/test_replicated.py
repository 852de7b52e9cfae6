"""Engine `replicated`: what a variant's forward pass finds is what a really changed model would find, bit for bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions import reference
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.field import Field
from mezo_dist.directions.laws import GAUSSIAN, RADEMACHER, Law
from mezo_dist.directions.seeds import param_id
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.fingerprint import fingerprint_shard, to_text
from mezo_dist.engines.sites import find_sites
from mezo_dist.readout import Readout
from mezo_dist.testing import tiny_model

KINDS = ("llama", "llama-tied", "opt", "gpt2", "bert", "roberta", "distilbert", "t5", "mixtral")
Forward = Callable[[nn.Module, Tensor], Tensor]

AROUND = Combination.of([(11, 3e-2)])
SHIFTS = (AROUND, -AROUND, AROUND + Combination.of([(5, -0.7), (2**64 - 1, 0.1)]), Combination())
VARIANTS = [Variant(shift) for shift in SHIFTS]


# Models that are hard to get right, each for its own reason.


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


class Doubled(nn.Module):
    """An embedding whose lookup somebody replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 8), nn.Linear(8, 3)
        look_up = self.table.forward
        self.table.forward = lambda ids: 2 * look_up(ids) + self.table.weight[0]  # type: ignore[assignment, method-assign]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


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
        return classifier(), ids, lambda m, x: m(input_ids=x, attention_mask=torch.ones_like(x)).logits
    extra = {"decoder_input_ids": torch.tensor([[0]])} if name == "t5" else {}
    return tiny_model(name), ids, lambda m, x: m(x, **{k: v.expand(len(x), -1) for k, v in extra.items()}).logits


def classifier() -> nn.Module:
    import transformers as t

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.BertConfig(**size, intermediate_size=48, max_position_embeddings=64, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = t.BertForSequenceClassification(config)
    return model.eval()


def changed(model: nn.Module, shift: Combination, law: Law = GAUSSIAN, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``model`` whose weights really are ``w + shift``, by the definition of that sum."""
    other = copy.deepcopy(model)
    for name, weight in other.named_parameters():
        flat = weight.data.view(1, -1)
        out = torch.empty_like(flat, dtype=dtype or weight.dtype)
        add_up = shift if weight.requires_grad else Combination()
        number = param_id(name)
        reference.add(flat, [add_up], [out], param_id=number, offsets=[0], law=law, rounding_seed=None)
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


def assert_same(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    for (i, row), other in zip(enumerate(found), wanted, strict=True):
        for (v, result), expected in zip(enumerate(row), other, strict=True):
            assert torch.equal(result, expected), f"micro-batch {i}, variant {v}"


every_model = pytest.mark.parametrize("name", [*KINDS, "classifier", *(toy.__name__ for toy in TOYS)])


@every_model
def test_variants_are_bit_for_bit_changed_models(name: str) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Field("gaussian"), width=2)
    before, modules = state(model), attributes(model)
    found = engine.evaluate(VARIANTS, items, forward)
    assert_untouched(model, before, modules)
    with torch.no_grad():
        models = [changed(model, shift) for shift in SHIFTS]
        assert_same(found, [[forward(m, item) for m in models] for item in items])
    assert not torch.equal(found[0][0], found[0][1])  # the directions do matter
    assert engine.never_used() == []


@every_model
def test_bits_do_not_depend_on_what_else_is_evaluated(name: str) -> None:
    model, items, forward = make(name)
    together = Engine(model, Field("gaussian"), width=8).evaluate(VARIANTS, items, forward)
    one_by_one = Engine(model, Field("gaussian"), width=1)
    alone = [[one_by_one.evaluate([variant], [item], forward)[0][0] for variant in VARIANTS] for item in items]
    assert_same(together, alone)


def test_a_replaced_embedding_lookup_is_left_to_itself() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Doubled()
    ids = torch.tensor([[3, 9, 9], [1, 3, 2]])
    engine = Engine(model, Field("gaussian"))
    (found,) = engine.evaluate(VARIANTS, [ids], lambda m, x: m(x))
    for shift, result in zip(SHIFTS, found, strict=True):
        weight = dict(changed(_plain(model), shift).named_parameters())
        table = 2 * weight["table.weight"][ids] + weight["table.weight"][0]
        torch.testing.assert_close(result, table @ weight["head.weight"].T + weight["head.bias"])


def _plain(model: Doubled) -> nn.Module:
    plain = Doubled()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("law", [GAUSSIAN, RADEMACHER], ids=lambda law: law.name)
def test_apply_is_the_definition(law: Law) -> None:
    model, _, _ = make("mixtral")
    wanted = changed(model, SHIFTS[2], law)
    Engine(model, Field(law.name)).apply(SHIFTS[2], rounding_seed=0)
    assert_untouched(model, state(wanted), attributes(model))


def test_tied_weights_change_once() -> None:
    model, _, _ = make("llama-tied")
    wanted = changed(model, AROUND).get_parameter("model.embed_tokens.weight")
    Engine(model, Field("gaussian")).apply(AROUND, rounding_seed=0)
    embedding, head = model.get_parameter("model.embed_tokens.weight"), model.get_submodule("lm_head").weight
    assert head is embedding
    assert torch.equal(embedding, wanted)


def test_frozen_weights_stay() -> None:
    model, items, forward = make("opt")
    frozen = {name for name, _ in model.named_parameters() if "embed" in name or "fc1" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = state(model)
    engine = Engine(model, Field("gaussian"))
    found = engine.evaluate(VARIANTS, items, forward)
    with torch.no_grad():
        assert_same(found, [[forward(changed(model, shift), item) for shift in SHIFTS] for item in items])
    engine.apply(AROUND, rounding_seed=0)
    moved = {name for name, weight in state(model).items() if not torch.equal(weight, before[name])}
    assert moved == before.keys() - frozen
    assert not any(model.get_parameter(name).requires_grad for name in frozen)


@pytest.mark.parametrize("name", ["llama-tied", "opt", "bert", "mixtral"])
def test_forward_in_bf16_from_fp32_weights(name: str) -> None:
    """As if the changed model were cast, frozen weights too; the fp32 weights themselves are not."""
    model, items, forward = make(name)
    next(model.parameters()).requires_grad_(False)
    before, modules = state(model), attributes(model)
    engine = Engine(model, Field("gaussian"), compute_dtype=torch.bfloat16)
    found = engine.evaluate(VARIANTS, items, forward)
    assert_untouched(model, before, modules)
    assert found[0][0].dtype == torch.bfloat16
    with torch.no_grad():
        models = [changed(model, shift, dtype=torch.bfloat16) for shift in SHIFTS]
        assert_same(found, [[forward(m, item) for m in models] for item in items])


def test_bf16_weights_are_rounded_stochastically_by_updates_alone() -> None:
    model, items, forward = make("llama")
    model.bfloat16()
    tiny = Combination.of([(3, 1e-5)])  # far below half a step of bf16 for most weights
    to_nearest, before = changed(model, tiny), copy.deepcopy(model)
    engine = Engine(model, Field("gaussian"), stochastic_rounding=True)
    found = engine.evaluate([Variant(AROUND)], items[:1], forward)
    with torch.no_grad():
        assert torch.equal(found[0][0], forward(changed(model, AROUND), items[0]))
    engine.apply(tiny, rounding_seed=77)
    moved = 0
    for name, weight in model.named_parameters():
        old, wanted = before.get_parameter(name).data.view(1, -1), torch.empty(1, weight.numel(), dtype=torch.bfloat16)
        reference.add(old, [tiny], [wanted], param_id=param_id(name), offsets=[0], law=GAUSSIAN, rounding_seed=77)
        assert torch.equal(weight.data.view(1, -1), wanted)
        moved += int((wanted != to_nearest.get_parameter(name).data.view(1, -1)).sum())
    assert moved > 100


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + (self.sometimes(x) if x.shape[0] > 2 else 0)


def test_weights_that_no_forward_uses_are_named() -> None:
    model = Unused()
    engine = Engine(model, Field("gaussian"))
    assert engine.never_used() == ["used.weight", "used.bias", "idle.weight", "sometimes.weight"]
    engine.evaluate(VARIANTS, [torch.ones(2, 8)], lambda m, x: m(x))
    assert engine.never_used() == ["idle.weight", "sometimes.weight"]
    engine.evaluate(VARIANTS, [torch.ones(3, 8)], lambda m, x: m(x))
    assert engine.never_used() == ["idle.weight"]


# Errors


class Broken(RuntimeError):
    pass


def explode(module: nn.Module, arguments: Any) -> None:
    if arguments[0].shape[0] == 4:  # the third micro-batch: by then other passes wait in other places
        raise Broken


@pytest.mark.parametrize(("name", "place"), [("llama", "model.layers.1.mlp.up_proj"), ("Blocks", "norm")])
def test_an_error_in_the_middle_of_the_model_surfaces_and_leaves_it_whole(name: str, place: str) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Field("gaussian"))
    before, modules = state(model), attributes(model)
    wanted = engine.evaluate(VARIANTS, items, forward)
    handle = model.get_submodule(place).register_forward_pre_hook(explode)
    with pytest.raises(Broken) as caught:
        engine.evaluate(VARIANTS, items, forward)
    assert caught.traceback[-1].name == "explode"
    assert any(entry.name == "forward" for entry in caught.traceback)  # the model's own frames lead there
    handle.remove()
    assert_untouched(model, before, modules)
    assert_same(engine.evaluate(VARIANTS, items, forward), wanted)


def test_an_error_inside_a_layer_keeps_its_traceback() -> None:
    model, items, forward = make("Blocks")
    engine = Engine(model, Field("gaussian"))
    before, modules = state(model), attributes(model)

    def wrong(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) if len(x) < 4 else model(x[:, :, :3].repeat(1, 1, 3)[..., :8].double())

    with pytest.raises(RuntimeError) as caught:
        engine.evaluate(VARIANTS, items, wrong)
    names = [entry.name for entry in caught.traceback]
    assert "wrong" in names
    assert names.index("wrong") < names.index("on_tensors")  # from the pass, through the model, into the layer
    assert str(caught.traceback[-1].path).endswith("functional.py")
    assert_untouched(model, before, modules)
    assert len(engine.evaluate(VARIANTS, items, forward)) == 3


def test_a_pass_may_handle_an_error_and_go_on() -> None:
    """As in plain code: the error is raised where the layer is called, so the model can catch it."""
    model, items, _ = make("Blocks")

    def careful(model: nn.Module, x: Tensor) -> Tensor:
        try:
            model(x.double())
        except RuntimeError:
            return model(x)
        raise AssertionError("fp64 went through fp32 weights")

    engine = Engine(model, Field("gaussian"))
    assert_same(engine.evaluate(VARIANTS, items, careful), engine.evaluate(VARIANTS, items, lambda m, x: m(x)))


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        return self.then(x @ x.mT @ y.float())


def test_a_model_that_switches_autocast_is_refused() -> None:
    """Passes take turns within one thread, so what one of them switches on would change the numbers of the others."""
    model = Casting()
    before, modules = state(model), attributes(model)
    with pytest.raises(NotImplementedError, match="switches autocast around its layers"):
        Engine(model, Field("gaussian")).evaluate(VARIANTS, [torch.ones(3, 8)], lambda m, x: m(x))
    assert not torch.is_autocast_enabled("cpu")
    assert_untouched(model, before, modules)


# Fingerprint


def bits(weight: Tensor) -> Tensor:
    return weight.data.view(-1).view({4: torch.int32, 2: torch.int16}[weight.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_every_bit(dtype: torch.dtype) -> None:
    model = make("gpt2")[0].to(dtype)
    engine = Engine(model, Field("gaussian"))
    seen = {engine.fingerprint()}
    for weight in itertools.islice(model.parameters(), 0, None, 5):
        for place, bit in itertools.product((0, weight.numel() // 2, -1), (0, 7, 14)):
            bits(weight)[place] ^= 1 << bit
            seen.add(engine.fingerprint())
            bits(weight)[place] ^= 1 << bit
    number = len(list(itertools.islice(model.parameters(), 0, None, 5)))
    assert len(seen) == 1 + number * 9
    assert engine.fingerprint() in seen


def test_fingerprint_sees_frozen_weights_of_any_dtype() -> None:
    model, _, _ = make("Blocks")
    codes = torch.arange(-8, 8, dtype=torch.int8)
    model.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    model.get_parameter("norm.weight").requires_grad_(False)
    engine = Engine(model, Field("gaussian"))
    seen = [engine.fingerprint()]
    codes[3] += 1
    seen.append(engine.fingerprint())
    model.get_parameter("norm.weight").data[0] += 1
    seen.append(engine.fingerprint())
    assert len(set(seen)) == 3


def test_fingerprint_sees_order_and_parameter() -> None:
    model, _, _ = make("gpt2")
    engine = Engine(model, Field("gaussian"))
    first, second = (model.get_parameter(f"transformer.h.{i}.attn.c_attn.weight").data for i in (0, 1))
    before = engine.fingerprint()
    first[0], first[1] = first[1].clone(), first[0].clone()
    by_row = engine.fingerprint()
    first[0], first[1] = first[1].clone(), first[0].clone()
    assert engine.fingerprint() == before
    swapped = first.clone()
    first.copy_(second)
    second.copy_(swapped)
    assert len({before, by_row, engine.fingerprint()}) == 3


def test_fingerprint_adds_up_over_shards() -> None:
    weight = torch.randn(700_001, generator=torch.Generator().manual_seed(0))  # more than two of its blocks
    whole = fingerprint_shard(weight, 12345)
    for cuts in ([0, 1, 700_001], [0, 262_143, 262_145, 700_000, 700_001]):
        parts = [fingerprint_shard(weight[a:b], 12345, a) for a, b in itertools.pairwise(cuts)]
        assert to_text(sum(parts[::-1])) == to_text(whole)
    assert fingerprint_shard(weight, 12346) != whole


# Memory: what is made, and where


VOCABULARY, WIDTH = 5000, 16


class Lookup(nn.Module):
    """A large table, of which a batch needs a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of how many elements of each weight variants were made, over all calls."""
    names = {param_id(name): name for name, _ in Lookup().named_parameters()}
    found = dict.fromkeys(names.values(), 0)
    real = Field.add

    def add(self: Field, weight: Tensor, *args: Any, **options: Any) -> None:
        found[names[options["param_id"]]] += weight.numel()
        real(self, weight, *args, **options)

    monkeypatch.setattr(Field, "add", add)
    return found


IDS = [torch.tensor([[7, 4999, 7]]), torch.tensor([[0, 7, 3], [3, 3, 3]])]


def test_only_the_rows_that_are_looked_up_are_made(made: dict[str, int]) -> None:
    model = Lookup()
    needed = torch.tensor([0, 3, 7, 4999])
    wanted = changed(model, AROUND).get_parameter("table.weight")[IDS[1]]
    poisoned = torch.full_like(model.table.weight, torch.nan)
    poisoned[needed] = model.table.weight.data[needed]
    model.table.weight.data = poisoned
    engine = Engine(model, Field("gaussian"))
    found = engine.evaluate([Variant(AROUND), Variant(-AROUND)], IDS, lambda m, x: m.get_submodule("table")(x))
    assert torch.equal(found[1][0], wanted)
    assert made["table.weight"] == len(needed) * WIDTH  # once for both variants and both micro-batches


def test_only_the_rows_of_the_label_words_are_made(made: dict[str, int]) -> None:
    model = Lookup()
    readout = Readout(model.head, torch.tensor([40, 2]))
    engine = Engine(model, Field("gaussian"))
    (found,) = engine.evaluate(VARIANTS, IDS[:1], lambda m, x: m(x))
    assert made["head.weight"] == 2 * WIDTH
    readout.detach()
    for shift, result in zip(SHIFTS, found, strict=True):
        torch.testing.assert_close(result, changed(model, shift)(IDS[0])[..., [40, 2]])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_that_owns_its_bias_twice_is_made_by_rows_too(kind: str) -> None:
    """The module around it has the same bias, tied: that must not make the whole vocabulary one site with it."""
    _, items, _ = make(kind)
    model = tiny_model(kind)
    model.resize_token_embeddings(2000)
    readout = Readout(model.get_output_embeddings(), torch.tensor([40, 2]))
    engine = Engine(model, Field("gaussian"))
    engine.evaluate(VARIANTS, items, lambda m, x: m(x).logits)
    readout.detach()
    assert engine._materialise._scratch.numel() < 4 * 2000 * 32  # not even one variant of the table


def test_nothing_is_made_for_the_weights_as_they_are(made: dict[str, int]) -> None:
    engine = Engine(Lookup(), Field("gaussian"))
    engine.evaluate([Variant(), Variant()], IDS, lambda m, x: m(x))
    assert set(made.values()) == {0}
    assert engine._materialise._scratch.numel() == 0


def test_every_weight_is_made_once_for_all_variants_and_micro_batches(made: dict[str, int]) -> None:
    model = Lookup()
    Engine(model, Field("gaussian"), width=4).evaluate(VARIANTS[:3], IDS * 4, lambda m, x: m(x))
    groups = 2  # 8 micro-batches, 4 at a time
    assert made["body.weight"] == groups * model.body.weight.numel()
    assert made["head.weight"] == groups * model.head.weight.numel()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@every_model
def test_scratch_holds_one_site_for_all_variants(name: str, dtype: torch.dtype | None) -> None:
    model, items, forward = make(name)
    engine = Engine(model, Field("gaussian"), compute_dtype=dtype)
    if dtype is None or name not in ("t5", *(toy.__name__ for toy in TOYS)):  # those ask weights for their dtype
        engine.evaluate(VARIANTS, items, forward)
    padding = 64
    largest = max(
        sum((dtype or torch.float32).itemsize * weight.tensor.numel() + padding for weight in site.weights)
        for site in find_sites(model, include_frozen=False)
        if not site.spans_blocks
    )
    assert engine._materialise._scratch.numel() <= largest * len(VARIANTS)
    assert engine._materialise._scratch.numel() < 4 * sum(p.numel() for p in model.parameters()) * len(VARIANTS)


def test_scratch_never_holds_a_whole_table() -> None:
    model = Lookup()
    readout = Readout(model.head, torch.tensor([40, 2]))
    engine = Engine(model, Field("gaussian"))
    engine.evaluate(VARIANTS, IDS, lambda m, x: m(x))
    readout.detach()
    body = 4 * (model.body.weight.numel() + model.body.bias.numel())
    assert 0 < engine._materialise._scratch.numel() <= body * len(VARIANTS)

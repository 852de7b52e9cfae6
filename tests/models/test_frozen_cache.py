"""The frozen blocks: losses are the same with it, its blocks run once per sample, and it is off where it cannot be."""

from __future__ import annotations

import fnmatch
import functools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.units import find_blocks
from mezo_dist.models.frozen_cache import FrozenCache, attach_frozen_cache, run_whole
from mezo_dist.models.frozen_groups import Group
from mezo_dist.runs.split_groups import SplitGroups
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.label_words import LabelWords, classifier
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.testing import tiny_model
from tests.engines import zoo

LABELS = [40, 7, 22]
SAMPLES = [Sample(tuple(range(5 + n, 5 + 2 * n)), n % 3, n - 1) for n in (9, 4, 7, 6, 3, 8)]
GIB = 2**30


def batches(size: int = 2) -> list[MicroBatch]:
    return cut(SAMPLES, size, 0, collate)


def with_frozen_blocks(kind: str, trainable: int = 1) -> Any:
    """A model of which only the last ``trainable`` blocks are not frozen."""
    model = tiny_model(kind).requires_grad_(False)
    for block in find_blocks(model)[-trainable:]:
        block.requires_grad_(True)
    return model


def groups(size: int = 2, samples: Sequence[Sample] = SAMPLES) -> SplitGroups:
    def make(some: Sequence[Sample]) -> Group:
        batch = collate(some, tuple(range(len(some))), 0)
        return batch.inputs, batch.targets["position"]

    return SplitGroups([samples], size, make)


def attached(model: nn.Module, limit: int = GIB) -> Any:
    return attach_frozen_cache(model, groups(), limit)


def losses(model: nn.Module, run: Any, batches: list[MicroBatch], before: Sequence[MicroBatch] = ()) -> torch.Tensor:
    """Loss of every sample under two variants, after those of ``before``."""
    engine = Engine(model, Law("gaussian"))
    objective = LabelWords(model, LABELS, batches[0], run)
    engine.evaluate([Variant()], before, objective)
    shifts = [Combination.single(3, 0.05), Combination.single(4, -0.05)]
    scores = engine.evaluate([Variant(shift) for shift in shifts], batches, objective)
    table = torch.zeros(len(shifts), len(SAMPLES))
    for batch, row in zip(batches, scores, strict=True):
        for v, score in enumerate(row):
            table[v, list(batch.slots)] = score.loss
    return table


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "bert", "roberta", "distilbert"])
def test_losses_are_those_of_whole_passes(kind: str) -> None:
    wanted = losses(with_frozen_blocks(kind), run_whole, batches())
    model = with_frozen_blocks(kind)
    run = attached(model)
    assert isinstance(run, FrozenCache)
    torch.testing.assert_close(losses(model, run, batches()), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "trainable", "inner", "is_narrow"),
    [
        ("llama", "*layers.1.post_attention_layernorm*", 2, True),  # its first norm and its attention are remembered
        ("llama", "model.norm.*", 0, True),
        ("llama", "*layers.1.mlp*", 3, True),
        ("llama", "*layers.1.self_attn.v_proj*", 1, False),  # attention looks at all tokens
        ("opt", "*layers.1.fc1*", 2, True),  # what comes then has samples and tokens in one dimension
        ("bert", "*layer.1.output*", 2, True),
        ("roberta", "*layer.1.intermediate*", 1, True),
        ("distilbert", "*layer.1.ffn*", 2, True),
    ],
)
def test_what_is_left_to_do_on_one_token_is_done_on_one_token(
    kind: str, trainable: str, inner: int, is_narrow: bool
) -> None:
    def model() -> Any:
        tiny = tiny_model(kind).requires_grad_(False)
        for name, parameter in tiny.named_parameters():
            parameter.requires_grad_(fnmatch.fnmatch(name, trainable))
        assert any(parameter.requires_grad for parameter in tiny.parameters())
        return tiny

    run = attached(shortened := model())
    assert isinstance(run, FrozenCache)
    assert (len(run.frozen.ends), run.narrow) == (1 + inner, is_narrow)
    torch.testing.assert_close(
        losses(shortened, run, batches()), losses(model(), run_whole, batches()), rtol=1e-5, atol=1e-6
    )


def test_attention_to_one_token_is_noticed_where_it_hardly_moves_logits() -> None:
    """Logits of a model with small weights are small all over; and without padding no mask's shape tells."""
    run = attach_frozen_cache(with_frozen_blocks("bert"), groups(1), GIB)
    assert isinstance(run, FrozenCache)
    assert not run.narrow


def test_bits_do_not_depend_on_who_came_before_or_on_the_memory() -> None:
    """Micro-batches of another composition find, and leave, the same hidden states; so does a memory that forgets."""
    mixed = cut([SAMPLES[i] for i in (5, 1, 3, 0, 2, 4)], 3, 0, collate)
    results = []
    for limit in (GIB, 3000, 1):
        for before in ([], mixed):
            model = with_frozen_blocks("llama")
            results.append(losses(model, attached(model, limit), batches(), before))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_sample_that_is_there_twice_always_goes_with_the_same_group() -> None:
    """Else its bits would depend on which of its groups was needed first, and so on the number of ranks."""
    one, other, long = Sample((7, 8, 9), 0, 2), Sample((9, 8, 7), 1, 2), Sample((9,) * 30, 2, 29)
    seen = []
    for order in ([one], [other, one], [one, other], [long, other, one]):
        model = with_frozen_blocks("llama")
        run = attach_frozen_cache(model, groups(2, [one, other, one, long]), GIB)
        shapes: list[tuple[int, ...]] = []
        first: Any = find_blocks(model)[0]
        first.self_attn.register_forward_hook(lambda _, args, output, shapes=shapes: shapes.append(output[0].shape[:2]))
        for sample in order:
            shapes.clear()
            inputs, positions = groups(1, [sample]).group(0)
            with torch.no_grad():
                logits = run(model, inputs, positions)
            if sample is one:
                seen.append(logits)
                assert order[0] is long or shapes == [(2, 30)], "its last group, whatever was computed before"
    assert all(torch.equal(logits, seen[0]) for logits in seen)


def test_every_group_goes_through_the_prefix_once() -> None:
    model = with_frozen_blocks("llama")
    calls: list[int] = []
    first: Any = find_blocks(model)[0]
    run = attached(model)
    first.self_attn.register_forward_hook(lambda *_: calls.append(1))  # inner: the block itself is called, and skipped
    losses(model, run, batches(), before=batches() + batches())
    assert len(calls) == len(batches()), "each group once, whatever variants and rounds there are"


def test_memory_is_limited() -> None:
    model = with_frozen_blocks("llama")
    run = attached(model, 3000)
    with torch.no_grad():
        for batch in batches():
            run(model, batch.inputs, batch.targets["position"])
    assert 0 < run._used <= 3000


def test_detached_model_runs_whole() -> None:
    model, untouched = with_frozen_blocks("llama"), tiny_model("llama")
    run = attached(model)
    run.detach()
    inputs = batches()[0].inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)


@pytest.mark.parametrize("what", ["nothing is frozen", "embeddings are trainable"])
def test_whole_passes_without_a_frozen_prefix(what: str) -> None:
    model = with_frozen_blocks("llama")
    if what == "nothing is frozen":
        model.requires_grad_(True)
    elif what == "embeddings are trainable":
        model.get_input_embeddings().requires_grad_(True)
    assert attached(model) is run_whole


def test_blocks_that_give_several_tensors_are_computed_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = with_frozen_blocks("llama")
    first, second = find_blocks(model)
    whole, rest = first.forward, second.forward
    first.forward = lambda *args, **kwargs: (whole(*args, **kwargs), None)
    second.forward = lambda hidden, *args, **kwargs: rest(hidden[0], *args, **kwargs)
    with caplog.at_level(logging.INFO):
        assert attached(model) is run_whole
    assert "more than one tensor" in caplog.text


def test_a_prefix_that_changes_the_logits_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """A model that looks at an early block's output later on: skipping the block would change what it sees."""
    model = with_frozen_blocks("llama", trainable=0)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    seen: list[Any] = []
    first: Any = find_blocks(model)[0]
    first.mlp.register_forward_hook(lambda m, a, output: seen.append(output))
    model.lm_head.register_forward_pre_hook(lambda m, a: (a[0] + 1000 * len(seen),))
    with caplog.at_level(logging.INFO):
        assert attached(model) is run_whole
    assert "changes the logits" in caplog.text


def test_whatever_a_model_raises_with_one_token_per_sample_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    """XGLM raises a ValueError (its mask has another size than it wants), others a RuntimeError."""

    def build() -> Any:
        model = zoo.build("xglm").requires_grad_(False)
        find_blocks(model)[-1].requires_grad_(True)
        return model

    wanted = losses(build(), run_whole, batches())
    model = build()
    with caplog.at_level(logging.DEBUG, logger="mezo_dist.models.frozen_cache"):
        run = attached(model)
    assert "the frozen blocks failed: Attention mask should be of size" in caplog.text
    torch.testing.assert_close(losses(model, run, batches()), wanted, rtol=1e-5, atol=1e-6)


def a_classifier(kind: str, trainable: str) -> Any:
    """A random model with a classification head; weights that match ``trainable`` are not frozen."""
    torch.manual_seed(0)
    made = {
        "bert": transformers.BertForSequenceClassification,
        "roberta": transformers.RobertaForSequenceClassification,
        "distilbert": transformers.DistilBertForSequenceClassification,
        "llama": transformers.LlamaForSequenceClassification,
    }[kind]
    config = tiny_model(kind).config
    config.num_labels, config.pad_token_id = 3, 0
    model = made(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatch.fnmatch(name, trainable))
    assert any(parameter.requires_grad for parameter in model.parameters())
    return model


def without_positions() -> SplitGroups:
    def make(some: Sequence[Sample]) -> Group:
        return collate(some, tuple(range(len(some))), 0).inputs, None

    return SplitGroups([SAMPLES], 2, make)


def class_losses(model: nn.Module, run: Any) -> torch.Tensor:
    """Loss of every sample by a classification head, under two variants."""
    engine, table = Engine(model, Law("gaussian")), torch.zeros(2, len(SAMPLES))
    variants = [Variant(Combination.single(3, 0.05)), Variant(Combination.single(4, -0.05))]
    with torch.no_grad():
        scores = engine.evaluate(variants, batches(), functools.partial(classifier, run=run))
    for batch, row in zip(batches(), scores, strict=True):
        for v, score in enumerate(row):
            table[v, list(batch.slots)] = score.loss
    return table


@pytest.mark.parametrize(
    ("kind", "trainable", "is_narrow"),
    [
        ("bert", "classifier.*", True),
        ("bert", "*layer.1.output*", True),  # after attention
        ("bert", "*layer.1.attention*", False),  # the first token looks at all others
        ("roberta", "classifier.*", True),
        ("distilbert", "*classifier.*", True),
        ("llama", "score.*", False),  # reads the last token
    ],
)
def test_a_classifier_that_reads_the_first_token_runs_on_that_one(kind: str, trainable: str, is_narrow: bool) -> None:
    model = a_classifier(kind, trainable)
    run = attach_frozen_cache(model, without_positions(), GIB)
    assert isinstance(run, FrozenCache)
    assert run.narrow == is_narrow
    wanted = class_losses(a_classifier(kind, trainable), run_whole)
    torch.testing.assert_close(class_losses(model, run), wanted, rtol=1e-5, atol=1e-6)
    remembered = {state.shape[0] for states in run._known.values() for state in states}
    assert (remembered == {1}) == is_narrow


def test_a_head_that_says_nothing_yet_does_not_tell_where_it_reads() -> None:
    model = a_classifier("bert", "*layer.1.attention*")
    model.classifier.weight.data.zero_()
    run = attach_frozen_cache(model, without_positions(), GIB)
    assert isinstance(run, FrozenCache)
    assert not run.narrow

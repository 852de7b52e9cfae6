"""The parts of the cost model, each against what it is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mezo_dist import algorithms
from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import PAYLOAD_WORDS, Communicator
from mezo_dist.errors import UserError
from mezo_dist.planning.choice import find, largest, layouts, plan, recommended
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.first_order import first_order
from mezo_dist.planning.from_config import setting_of
from mezo_dist.planning.machine import GIB, Machine, parse_bytes, parse_flops, parse_rate
from mezo_dist.planning.memory import expected_rows, memory_of, scratch_bytes
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.rounds import MARKS, rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.traffic import ROUND_WORDS, traffic_of
from mezo_dist.planning.work import flops_of_pass, work_of
from mezo_dist.runs.build import build_run
from mezo_dist.runs.training import evaluate_step
from mezo_dist.runs.work_split import WorkSplit
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.testing import write_tiny_config


def named(name: str) -> ModelShape:
    shape = shape_of_config(NAMED[name], name)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("text", "wanted"), [("80GB", 80e9), ("80GiB", 80 * GIB), ("1.5 tb", 1.5e12), ("123", 123), (".5kB", 500)]
)
def test_quantities_of_bytes(text: str, wanted: float) -> None:
    assert parse_bytes(text, "--memory") == wanted


def test_rates_in_bits_and_bytes() -> None:
    assert parse_rate("100gbit", "--link") == parse_rate("12.5GB/s", "--link") == 12.5e9
    assert parse_flops("2pflops", "--flops") == 2e15


def test_a_rate_that_finds_itself_sends_the_losses_of_all_samples() -> None:
    plain, auto = (rounds_of(Setting(algorithm=MeZO(lr=lr)), 1)[0] for lr in (1e-6, "auto"))
    assert auto.passes == plain.passes
    assert auto.messages[0] - plain.messages[0] == 2 * 2 * (
        Setting().batch_size - 1
    )  # a loss and a weight, of two variants


@pytest.mark.parametrize("text", ["80", "80 QB", "-3GB", "0GB", "GB", "1e400GB", ""])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(UserError, match="--link"):
        parse_rate(text, "--link")


@pytest.mark.parametrize(
    "settings", [MeZO(), MeZO(directions=3, one_sided=True), MeZOSVRG(anchor="stored"), MeZOSVRG()]
)
@pytest.mark.parametrize(
    ("ranks", "layout", "replicate"),
    [(n, layout, copies) for n in (1, 2, 3, 4, 8, 16)
     for layout, copies in (("replicated", 1), ("fsdp", 1), ("fsdp", 2), ("zero", 1)) if n % copies == 0],
)  # fmt: skip
def test_work_is_dealt_as_a_run_deals_it(ranks: int, settings: MeZO | MeZOSVRG, layout: str, replicate: int) -> None:
    """Passes of the busiest rank in each round of a cycle, by the planner's own variants and the run's own work
    split."""
    setting = Setting(layout, replicate, algorithm=settings, batch_size=20, full_size=44, micro_batch=4)  # type: ignore[arg-type]
    planner = algorithms.build(settings.name, settings, Problem(0, 1000, 20, 44, True, eps=1e-3))
    split = WorkSplit(ranks, setting.copies(ranks), by_base=setting.is_sharded)
    ids, state = torch.zeros(4, 8, dtype=torch.long), planner.init()
    for step, planned in enumerate(rounds_of(setting, ranks)[:2]):
        variants = planner.plan(state, step).variants
        batch = [MicroBatch(tuple(range(i, i + 4)), {"input_ids": ids}, {}) for i in range(0, planned.samples, 4)]
        works = [split.of_rank(rank, variants, batch) for rank in range(ranks)]
        assert planned.passes == max(len(work.micro_batches) for work in works) * works[0].most_variants
        update = planner.update(state, step, [Losses(tuple(1.0 + n for n in range(len(variants))))])
        assert not isinstance(update, Evaluation)
        state = update.state


def test_a_cycle_of_svrg() -> None:
    steps = rounds_of(Setting(algorithm=MeZOSVRG(q=50)), 1)
    assert [step.what for step in steps[:2]] == ["anchor step", "inner step"]
    assert sum(step.steps for step in steps) == 50
    assert steps[0].samples == 512
    assert steps[1].copies_anchor  # 16-bit weights
    assert [base.copies for base in steps[1].bases] == [2, 2]


def test_a_rate_that_finds_itself_takes_the_losses_of_all_samples() -> None:
    plain, auto = (rounds_of(Setting(algorithm=MeZO(one_sided=True, lr=lr)), 1)[0] for lr in (1e-6, "auto"))
    assert auto.messages > plain.messages
    assert auto.passes >= plain.passes


@pytest.mark.parametrize("eta", [None, 0.1])
def test_a_long_cycle_is_planned_without_its_looks_back(eta: float | None) -> None:
    given, auto = (
        rounds_of(Setting(algorithm=MeZOSVRG(q=50, **rates)), 1)
        for rates in ({"lr": 1e-3, "anchor_lr": 1e-3}, {"lr": "auto", "anchor_lr": "auto", "eta": eta})
    )
    assert [(step.what, step.steps) for step in auto] == [(step.what, step.steps) for step in given]


def test_the_shortest_round() -> None:
    assert ROUND_WORDS == PAYLOAD_WORDS


def test_scalars_of_one_step_are_256_bytes() -> None:
    setting = Setting()
    traffic = traffic_of(named("opt-125m"), setting, Machine(ranks_per_host=2), rounds_of(setting, 2)[0], 1)
    assert (traffic.scalars, traffic.gathered, traffic.between_hosts) == (256, 0, 0)


def test_flops_are_two_for_each_active_weight_and_token() -> None:
    """Long samples add attention; experts that a token does not go through cost nothing."""
    shape, setting = named("mixtral-8x7b"), Setting(tokens=1, micro_batch=1, reads="tokens", targets=1)
    assert flops_of_pass(shape, setting) == pytest.approx(2 * shape.active_size, rel=1e-3)
    longer = flops_of_pass(shape, replace(setting, tokens=4096))
    assert longer > 4096 * 2 * (shape.active_size - 32000 * 4096)


def test_frozen_blocks_are_not_computed() -> None:
    shape, setting = named("llama-3-8b"), Setting()
    half = shape.trained(("model.layers.1[6-9].*",))
    assert flops_of_pass(half, setting) == pytest.approx(flops_of_pass(shape, setting) / 2, rel=0.02)
    assert memory_of(half, setting, Machine()).parts["frozen cache"] > 0
    sharded = replace(setting, layout="fsdp")
    assert flops_of_pass(half, sharded) == flops_of_pass(shape, sharded)


def test_directions_are_made_for_trainable_weights_alone() -> None:
    shape, setting = named("opt-1.3b"), Setting(algorithm=MeZO(directions=2))
    (step,) = rounds_of(setting, 1)
    few = work_of(shape.trained(("*layer_norm*",)), setting, 1, step, 2)
    assert few.generated == 2 * 2 * shape.trained(("*layer_norm*",)).num_trainable  # for the passes, and for the update


def test_scratch_on_a_gpu_holds_modules_that_are_made_together() -> None:
    """Up to 256 MiB of them; one module alone where it is larger; a whole block where that is compiled."""
    setting = Setting(micro_batch=1, tokens=1)
    (base,) = rounds_of(setting, 1)[0].bases
    sizes = {}
    for name in ("opt-125m", "opt-13b"):
        shape = named(name)
        compiled = replace(setting, compiled=True)
        cases = ((setting, False), (setting, True), (compiled, True))
        sizes[name] = [scratch_bytes(shape, some, base, 1, gpu=gpu) for some, gpu in cases]
    h = 768
    block = 2 * 2 * (12 * h * h + 13 * h)
    assert sizes["opt-125m"] == [2 * 2 * (4 * h * h + 4 * h), block, block]
    h = 5120
    assert sizes["opt-13b"][0] == sizes["opt-13b"][1] == 2 * 2 * (4 * h * h + 4 * h)
    assert sizes["opt-13b"][2] == 2 * 2 * (12 * h * h + 13 * h)


def test_rows_of_random_tokens() -> None:
    assert expected_rows(10, 1) == 1
    assert expected_rows(50_000, 10**7) == 50_000


def test_first_order_bytes_per_weight() -> None:
    """Mixed precision with AdamW takes 16 bytes a weight (arXiv 1910.02054); ZeRO-3 divides them."""
    shape, setting = named("opt-6.7b"), Setting(micro_batch=1, tokens=1)
    options = {(o.name, o.stage): o for o in first_order(shape, setting, Machine(ranks_per_host=8, runtime=0))}
    assert options["AdamW", "whole (DDP)"].memory == pytest.approx(16 * shape.size, rel=1e-3)
    assert not options["AdamW", "whole (DDP)"].fits
    assert options["AdamW", "ZeRO-3 / FSDP"].memory == pytest.approx(2 * shape.size, rel=0.1)
    assert options["SGD", "whole (DDP)"].traffic == 2 * 2 * shape.size * 7 // 8


@pytest.mark.parametrize("limit", range(1, 40))
@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 9, 31, 32, 33])
def test_the_largest_that_fits(limit: int, most: int) -> None:
    assert largest(lambda n: n <= most, limit) == min(most, limit)


def test_what_is_found_fits_and_one_more_does_not() -> None:
    machine, shape = Machine(memory=24 * 10**9), named("llama-3-8b")
    size, best = find("context", shape, [Setting()], machine)
    assert best is not None
    assert best.fits
    longer = replace(best.setting, tokens=int(size) + 1)
    assert memory_of(shape, longer, machine).total > machine.memory
    name, _ = find("model", None, [Setting()], machine)
    assert name == "qwen3-8b"


def test_what_is_recommended() -> None:
    machine, shape = Machine(ranks_per_host=8), named("llama-3-70b")
    plans = [plan(shape, setting, machine) for setting in layouts(Setting(), machine.ranks)]
    best = recommended(plans)
    assert best is not None
    assert best.setting.layout == "fsdp"
    assert best.seconds == pytest.approx(min(p.seconds for p in plans if p.fits), rel=0.02)
    small = [plan(named("opt-125m"), setting, machine) for setting in layouts(Setting(), machine.ranks)]
    assert recommended(small) is small[0]
    assert recommended([plan(shape, Setting(), machine)]) is None


JOINT = {
    "plain": [],
    "a rate that finds itself": ["algorithm.lr=auto"],
    "calibrated": ["train.calibrate=true"],
    "calibrated, with a rate that finds itself": ["train.calibrate=true", "algorithm.lr=auto"],
    "accuracy": ["train.objective=metric"],
    "f1": ["train.objective=metric", "task.metric=f1"],
}


def test_messages_are_those_that_a_run_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sent = write_tiny_config(tmp_path, "llama-tied", "mezo"), list[int]()
    exchange = Communicator.round

    def counting(comm: Communicator, values: Tensor, mark: int) -> Tensor:
        sent.append(values.numel() + MARKS)
        return exchange(comm, values, mark)

    monkeypatch.setattr(Communicator, "round", counting)
    for name, options in JOINT.items():
        config = reader.load(path, options)
        run = build_run(config, Communicator())
        sent.clear()
        evaluate_step(run, run.algorithm.init(), 0)
        assert tuple(sent) == rounds_of(setting_of(config, []), 1)[0].messages, name

"""`Optimizer`: a loop of one's own does what a run does, alone and on many processes, and can be gone on with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_dist import LostRankError, MeZO, MeZOSVRG, Optimizer, OutOfStepError, UserError, replay, shard
from mezo_dist.algorithms import auto_rate
from mezo_dist.algorithms.svrg import SVRGState
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.optim.losses import loss_and_weight
from mezo_dist.runs import training
from mezo_dist.runs.build import build_run
from mezo_dist.storage import trajectory
from mezo_dist.testing import spawn, tiny_model, write_tiny_config

IDS = torch.randint(4, 60, (16, 9), generator=torch.Generator().manual_seed(1))
Batch = dict[str, Tensor]
SETTINGS: dict[str, Any] = {
    "mezo": MeZO(lr=1e-3, directions=2),
    "svrg": MeZOSVRG(lr=1e-3, anchor_lr=1e-2, q=2),
    "stored": MeZOSVRG(lr=1e-3, anchor_lr=3e-3, q=3, anchor="stored", weight_decay=0.05),
    "auto": MeZOSVRG(lr="auto", anchor_lr="auto", q=3),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(*rows: int) -> Batch:
    return {"input_ids": IDS[list(rows)], "labels": IDS[list(rows)]}


BATCHES = [batch_of(*range(i, i + 4)) for i in range(0, 16, 4)]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def loss_per_sample(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").mean(1)


def make(name: str, **options: Any) -> Optimizer[Batch]:
    model = options.pop("model", None) or tiny_model("llama-tied")
    return Optimizer(model, SETTINGS[name], full_batch=options.pop("full_batch", BATCHES), **options)


def steps(opt: Optimizer[Batch], count: int, loss: Callable[..., Any] = loss_per_sample) -> list[float]:
    return [opt.step(loss, BATCHES[(opt.num_steps_done) % 4]) for _ in range(count)]


def test_it_makes_the_steps_of_a_run(tmp_path: Path) -> None:
    """The same settings, batches and losses: the same trajectory and weights, bit for bit."""
    path = write_tiny_config(tmp_path, "llama-tied", "mezo", steps=5)
    options = ["algorithm.lr=1e-3", "algorithm.directions=2", "train.frozen_cache_gib=0"]
    config = reader.load(path, [*options, "algorithm.schedule.kind=linear"])
    folder = training.train(config, Communicator(), quiet=True)
    run = build_run(config, Communicator())
    objective = run.evaluator.forward
    assert isinstance(config.algorithm, MeZO)
    opt: Optimizer[Any] = Optimizer(
        run.pretrained.model, config.algorithm, num_steps=5, trajectory=tmp_path / "own.jsonl"
    )
    for step in range(5):
        opt.step(lambda model, item: objective(model, item).loss, micro_batches=run.batch("minibatch", step))
    opt.close()
    logs = [trajectory.read(path) for path in (folder / "trajectory.jsonl", tmp_path / "own.jsonl")]
    assert logs[0].steps == logs[1].steps
    assert logs[0].marks == logs[1].marks == {5: trajectory.Mark(5, opt.fingerprint())}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_fall(name: str) -> None:
    opt = make(name)
    losses = steps(opt, 60)
    assert sum(losses[-16:]) < sum(losses[:16])
    assert opt.metrics["loss"] == losses[-1]


def test_micro_batches_are_one_batch() -> None:
    """Gradient accumulation: cut as one likes, with losses per sample, or with means that say of how many."""
    whole, cut, weighted = (make("svrg") for _ in range(3))
    whole.step(loss_per_sample, batch_of(0, 1, 2))
    whole.step(loss_per_sample, batch_of(3, 4, 5))

    def mean_and_count(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return loss_per_sample(model, batch).mean(), len(batch["labels"])

    for opt, loss in ((cut, loss_per_sample), (weighted, mean_and_count)):
        for rows in ((0, 1, 2), (3, 4, 5)):
            opt.step(loss, micro_batches=[batch_of(*rows[:2]), batch_of(rows[2])])
        for (_, a), (_, b) in zip(opt.named_weights(), whole.named_weights(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # a product over other samples may round otherwise


def everything(comm: Communicator, layouts: list[str]) -> dict[str, list[Any]]:
    """Losses and final weights of every layout and algorithm; each rank has its part of every batch."""
    results = {}
    for layout in layouts:
        for name in SETTINGS:
            model = tiny_model("llama-tied")
            parts = BATCHES[comm.rank :: comm.world_size]
            opt = make(name, model=model, layout=shard(model, layout, comm=comm), comm=comm, full_batch=parts)  # type: ignore[arg-type]
            losses = [opt.step(loss_per_sample, micro_batches=parts) for _ in range(4)]
            results[f"{layout} {name}"] = [losses, opt.fingerprint()]
    return results


@pytest.mark.distributed
def test_any_number_of_processes_and_any_layout_make_the_same_steps() -> None:
    alone = everything(Communicator(), ["replicated"])
    for rank in spawn(everything, 2, ["replicated", "fsdp", "zero"]):
        for case, result in rank.items():
            assert result == alone[f"replicated {case.split()[1]}"], case


def go_wrong(comm: Communicator) -> list[str]:
    """What each rank is told when one of them fails, comes with another step, or has a NaN."""

    def message(loss: Callable[..., Any], **options: Any) -> str:
        opt = make("mezo", comm=comm, **options)
        try:
            return f"loss {opt.step(loss, BATCHES[comm.rank])}"
        except (LostRankError, OutOfStepError, UserError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        return mean_loss(model, batch) if comm.rank == 0 else mean_loss(model, batch) / (1 // 0)

    def nan(model: nn.Module, batch: Batch) -> Tensor:
        return mean_loss(model, batch) * (1.0 if comm.rank == 0 else torch.nan)

    messages = [message(nan), message(fails)]
    opt = make("mezo", comm=comm)
    opt._progress.step = comm.rank
    try:
        opt.step(mean_loss, BATCHES[0])
    except OutOfStepError as error:
        messages.append(f"{type(error).__name__}: {error}")
    return messages


@pytest.mark.distributed
def test_an_error_on_one_process_ends_all_of_them() -> None:
    first, second = spawn(go_wrong, 2)
    assert first[0] == second[0] == "loss nan"
    assert first[1].startswith("LostRankError: step 1: another rank failed in its forward passes")
    assert second[1].startswith("ZeroDivisionError")
    assert all(message.startswith("OutOfStepError") for message in (first[2], second[2]))


def test_a_direction_per_sample() -> None:
    config = MeZOSVRG(lr=1e-3, anchor_lr=1e-3, per_sample=True)
    opt: Optimizer[Batch] = Optimizer(tiny_model("llama-tied"), config, full_batch=BATCHES, batch_size=4, law="lowrank")
    for _ in range(2):
        opt.step(loss_per_sample, micro_batches=[batch_of(0, 1), batch_of(2, 3)])
    assert isinstance(state := opt._progress.state, SVRGState)
    assert len(state.anchor_gradient) == 16
    with pytest.raises(UserError, match="the loss function returned 1 losses for 4 samples"):
        opt.step(mean_loss, BATCHES[0])
    opt.step(loss_per_sample, BATCHES[0])
    with pytest.raises(UserError, match="batch_size: directions for 4 samples, but the minibatch has 1"):
        opt.step(loss_per_sample, batch_of(0))


@pytest.mark.parametrize("name", ["mezo", "svrg"])
def test_it_goes_on_from_a_state_of_plain_json_types(name: str) -> None:
    undisturbed = make(name)
    steps(undisturbed, 7)
    first = make(name)
    steps(first, 3)
    state, weights = json.loads(json.dumps(first.state_dict())), copy.deepcopy(first.engine.model.state_dict())
    second = make(name)
    with pytest.raises(UserError, match="the model's weights have the fingerprint"):
        second.load_state_dict(state)
    second.engine.model.load_state_dict(weights)
    second.load_state_dict(state)
    assert second.num_steps_done == 3
    steps(second, 4)
    assert second.fingerprint() == undisturbed.fingerprint()
    with pytest.raises(UserError, match="saved with other settings: algorithm"):
        Optimizer(first.engine.model, MeZO(lr=1.0)).load_state_dict(state)
    with pytest.raises(UserError, match=r"no state of a mezo_dist\.Optimizer"):
        second.load_state_dict({"param_groups": []})


def test_a_state_does_not_hold_a_copied_anchor() -> None:
    opt = make("stored")
    steps(opt, 2)
    state = opt.state_dict()
    with pytest.raises(UserError, match="anchor: stored keeps a copy of the weights"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trajectory_is_gone_on_with_and_replayed(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    def model() -> nn.Module:
        fresh: nn.Module = tiny_model("llama-tied").to(dtype)
        return fresh

    undisturbed = make(name, model=model())
    steps(undisturbed, 8)
    path = tmp_path / "steps.jsonl"
    steps(make(name, model=model(), trajectory=path), 4)  # not closed: the process died
    with pytest.raises(UserError, match="exists; name another file, or go on with it"):
        make(name, model=model(), trajectory=path)
    with make(name, model=model(), trajectory=path, resume=True) as opt:
        assert opt.num_steps_done == 4
        steps(opt, 4)
    assert opt.fingerprint() == undisturbed.fingerprint()
    again = model()
    assert replay(again, path) == 8
    assert Optimizer(again, SETTINGS["mezo"]).fingerprint() == undisturbed.fingerprint()
    base = model()
    assert replay(base, path, 0) == 0
    for (_, a), (_, b) in zip(base.named_parameters(), model().named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trajectory_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with make("mezo", trajectory=path) as opt:
        steps(opt, 2)
    with pytest.raises(UserError, match="was made with other settings or weights: algorithm"):
        make("svrg", trajectory=path, resume=True)
    with pytest.raises(UserError, match="other settings or weights: base weights"):
        replay(tiny_model("llama-tied", seed=1), path)
    with pytest.raises(UserError, match="has 2 steps, not 3"):
        replay(tiny_model("llama-tied"), path, 3)
    with pytest.raises(UserError, match="does not exist"):
        replay(tiny_model("llama-tied"), tmp_path / "none.jsonl")
    folder = training.train(reader.load(write_tiny_config(tmp_path, steps=1)), Communicator(), quiet=True)
    with pytest.raises(UserError, match=r"not the trajectory of a mezo_dist.Optimizer"):
        replay(tiny_model("llama-tied"), folder / "trajectory.jsonl")


def test_losses_of_samples_may_say_how_many_tokens_they_are_means_of() -> None:
    losses, weights = loss_and_weight((torch.tensor([1.0, 2.0]), torch.tensor([3, 1])))
    assert (losses.tolist(), weights.tolist()) == ([3.0, 2.0], [3, 1])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "the loss function returned None; it must return the mean loss"),
        ({"loss": 1.0}, "returned a dict"),
        (torch.zeros(2, 3), r"returned a tensor \(2, 3\) of float32"),
        (torch.tensor([1, 2]), r"returned a tensor \(2,\) of int64"),
        (torch.zeros(0), r"returned a tensor \(0,\)"),
        ((torch.zeros(2), 3), "of a pair the first must be a scalar"),
        ((torch.zeros(2), torch.tensor([1, 0])), "of a pair the first must be a scalar"),
        ((torch.tensor(1.0), 0), "the whole number of samples or tokens"),
        ((1.0, 2.0, 3.0), "returned a tuple of"),
    ],
)
def test_what_is_no_loss_is_said(result: Any, message: str) -> None:
    opt = make("mezo")
    before = opt.fingerprint()
    with pytest.raises(UserError, match=message):
        opt.step(lambda model, batch: result, BATCHES[0])
    assert opt.fingerprint() == before
    assert opt.num_steps_done == 0


def test_steps_without_a_finite_loss_are_skipped_and_end_the_training() -> None:
    opt = make("mezo", max_skipped=3)
    before = opt.fingerprint()
    for _ in range(2):
        assert opt.step(lambda model, batch: mean_loss(model, batch) * torch.inf, BATCHES[0]) != 0.0
    assert (opt.fingerprint(), opt.num_steps_done, opt.metrics) == (before, 2, {})
    with pytest.raises(UserError, match="max_skipped: 3 steps in a row had no finite loss, the last one step 3"):
        opt.step(lambda model, batch: torch.nan, BATCHES[0])


def test_an_error_of_ones_own_surfaces_and_changes_nothing() -> None:
    opt = make("svrg")
    before = opt.fingerprint()

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        mean_loss(model, batch)
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        opt.step(broken, BATCHES[0])
    assert opt.fingerprint() == before
    assert opt.step(mean_loss, BATCHES[0]) == opt.metrics["loss"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("svrg", full_batch=None), "full_batch: mezo-svrg evaluates the full batch"),
        (lambda: Optimizer(tiny_model("llama"), MeZO(per_sample=True)), "needs law=.lowrank. and batch_size"),
        (lambda: make("auto").step(mean_loss, BATCHES[0]), "lr: auto: the loss function returned 1 losses for 4"),
        (lambda: make("mezo").step(mean_loss), "give a batch, or micro_batches"),
        (lambda: make("mezo").step(mean_loss, BATCHES[0], micro_batches=BATCHES), "and not both"),
        (lambda: shard(tiny_model("llama"), "fdsp"), "layout: 'fdsp' is not one of replicated, fsdp, zero"),  # type: ignore[arg-type]
        (lambda: shard(tiny_model("llama"), "zero", replicate=2), "replicate: is an option of layout 'fsdp'"),
    ],
)
def test_what_cannot_be_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_ten_lines_without_a_hugging_face_model() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(32, 3)
    opt: Optimizer[Tensor] = Optimizer(model, MeZO(lr=0.02, directions=8))
    losses = [opt.step(lambda m, x: (m(x) - x.sum(1, keepdim=True)).square().mean(), x) for _ in range(60)]
    assert losses[-1] < losses[0] / 2


def test_a_model_that_grows_sure_does_not_send_its_rate_to_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples that a line divides, losses and their curvature go to zero; the rate follows at a limited pace."""

    def train(num_steps: int) -> tuple[list[float], float]:
        generator = torch.Generator().manual_seed(0)
        model, x = nn.Linear(5, 2), torch.randn(32, 5, generator=generator)
        model.load_state_dict({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)})
        y = (x[:, 0] > 0).long()
        x[:, 0] += 2 * (2 * y - 1)
        opt: Optimizer[tuple[Tensor, Tensor]] = Optimizer(model, MeZO(lr="auto", eta=0.1, directions=4), probe=False)
        losses = []
        for step in range(num_steps):
            some = slice(step % 4 * 8, step % 4 * 8 + 8)
            losses.append(
                opt.step(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), (x[some], y[some]))
            )
        return losses, opt.metrics["rate/lr"]

    losses, rate = train(100)
    assert losses[-1] < 0.01
    assert max(losses[30:]) < 0.1
    monkeypatch.setattr(auto_rate, "RELEASE", 0.0)
    assert train(100)[1] > 100 * rate  # what it is held back from


def test_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making an engine changes nothing in somebody else's process."""
    from mezo_dist.engines import malloc

    def refuse(*_: object) -> None:
        raise AssertionError("malloc was set")

    monkeypatch.setattr(malloc, "_set", refuse)
    make("mezo")
    layout: Layout = shard(tiny_model("llama"), "replicated")
    assert not layout.is_sharded

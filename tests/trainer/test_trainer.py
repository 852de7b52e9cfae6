"""`MeZOTrainer`: what people do with a Trainer works, and its steps are those of MeZO."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from mezo_dist import MeZO, MeZOSVRG, MeZOTrainer, UserError, replay
from mezo_dist.algorithms.schedules import Annealing, Schedule
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.storage import trajectory
from mezo_dist.tasks.batches import BatchOrder
from mezo_dist.testing import tiny_model
from tests.trainer.trainers import DATA, arguments, fingerprint, losses, trainer, weights

ALGORITHMS: dict[str, Any] = {
    "mezo": MeZO(directions=2),
    "svrg": MeZOSVRG(anchor_lr=1e-2, q=3),
    "stored": MeZOSVRG(anchor_lr=3e-3, q=4, anchor="stored"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_going_on_from_a_checkpoint_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1} if name == "stored" else {}
    whole = trainer(tmp_path / "whole", ALGORITHMS[name], **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = trainer(tmp_path / "again", ALGORITHMS[name], **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert fingerprint(again) == fingerprint(whole)
    files = [tmp_path / "whole" / "trajectory.jsonl", tmp_path / "again" / "trajectory.jsonl"]
    files += [folder / "checkpoint-4" / "trajectory.jsonl" for folder in (tmp_path / "whole", tmp_path / "again")]
    assert len({path.read_bytes() for path in files}) == 1
    assert losses(again)[-2:] == losses(whole)[-2:]
    for folder, steps in ((checkpoint, 2), (tmp_path / "again" / "checkpoint-4", 4)):
        rebuilt = tiny_model("llama-tied")
        assert replay(rebuilt, folder / "trajectory.jsonl") == steps
        saved = AutoModelForCausalLM.from_pretrained(folder)
        for (_, one), (_, other) in zip(rebuilt.named_parameters(), saved.named_parameters(), strict=True):
            assert torch.equal(one, other), "base model + trajectory = the model beside it"


def per_token(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = nn.functional.cross_entropy(outputs.logits.transpose(1, 2), shifted, reduction="sum")
    return loss / num_items_in_batch


LOSSES: dict[str, dict[str, Any]] = {
    "the model's own": {},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "a function": {"compute_loss_func": per_token},
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_those_of_trainer(case: str, tmp_path: Path) -> None:
    """Of batches of several micro-batches with different numbers of tokens."""
    options = dict(LOSSES[case])
    function = options.pop("compute_loss_func", None)
    plain = Trainer(
        tiny_model("llama-tied"),
        arguments(tmp_path / "plain", learning_rate=0.0, save_strategy="no", **options),
        train_dataset=DATA,
        compute_loss_func=function,
    )
    plain.train()
    ours = trainer(tmp_path / "ours", MeZO(eps=1e-4), learning_rate=1e-12, save_strategy="no", **LOSSES[case])
    ours.train()
    expected = [line["loss"] for line in plain.state.log_history if "loss" in line]
    assert losses(ours) == pytest.approx(expected, abs=2e-5)


def test_micro_batches_make_one_step(tmp_path: Path) -> None:
    """However a batch is cut, it is the same loss along the same directions; the last one of an epoch is short."""
    options: dict[str, Any] = {"data": DATA[:14], "train_sampling_strategy": "sequential", "save_strategy": "no"}
    cut, whole = (
        trainer(
            tmp_path / str(size),
            MeZO(directions=2),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **options,
        )
        for size in (2, 4)
    )
    cut.train()
    whole.train()
    steps = [trajectory.read(Path(done.args.output_dir, "trajectory.jsonl")).steps for done in (cut, whole)]
    for one, other in zip(*steps, strict=True):
        assert one.rounds[0].mean == pytest.approx(other.rounds[0].mean, abs=1e-5)
    for one, other in zip(weights(cut).values(), weights(whole).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


class Watch(TrainerCallback):
    """Runs a function before every optimizer step."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._function(state.global_step, kwargs["optimizer"], kwargs["model"])


def test_every_group_moves_by_its_own_rate(tmp_path: Path) -> None:
    def hold_the_second(step: int, optimizer: Any, model: nn.Module) -> None:
        optimizer.param_groups[1]["lr"] = 0.0

    done = trainer(tmp_path, MeZO(), weight_decay=0.3, callbacks=[Watch(hold_the_second)], learning_rate=1e-2)
    before = weights(done)
    done.train()
    for name, parameter in weights(done).items():
        assert torch.equal(parameter, before[name]) == ("norm" in name), name
    read = trajectory.read(tmp_path / "trajectory.jsonl")
    assert [step.lr[1] for step in read.steps] == [0.0] * 4
    rebuilt = tiny_model("llama-tied")
    replay(rebuilt, tmp_path / "trajectory.jsonl")
    assert torch.equal(rebuilt.lm_head.weight, done.model.lm_head.weight)


def test_groups_that_part_need_a_stored_anchor(tmp_path: Path) -> None:
    def slow_the_second(step: int, optimizer: Any, model: nn.Module) -> None:
        optimizer.param_groups[1]["lr"] *= 0.5

    done = trainer(tmp_path, ALGORITHMS["svrg"], callbacks=[Watch(slow_the_second)])
    with pytest.raises(UserError, match="set anchor='stored'"):
        done.train()
    trainer(tmp_path, ALGORITHMS["stored"], callbacks=[Watch(slow_the_second)]).train()


def test_weight_decay_takes_off_what_it_says(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    plain, decayed = (trainer(tmp_path / str(decay), MeZO(), weight_decay=decay, **options) for decay in (0.0, 10.0))
    before = weights(plain)
    plain.train()
    decayed.train()
    for name, parameter in weights(decayed).items():
        gone = 0.0 if "norm" in name else 0.1 * before[name]
        torch.testing.assert_close(parameter, weights(plain)[name] - gone, rtol=1e-5, atol=1e-6)


def test_the_best_model_and_early_stopping(tmp_path: Path) -> None:
    """Of every step there is a checkpoint; the trajectory of a model that is saved is that of its weights."""
    worse = iter([3.0, 2.0, 4.0, 5.0, 6.0, 7.0])
    done = trainer(
        tmp_path / "run",
        MeZO(),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=lambda _: {"figure": next(worse)},
        max_steps=6,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="figure",
        greater_is_better=False,
        save_total_limit=2,
    )
    done.train()
    assert done.state.global_step == 4
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    done.save_model(str(tmp_path / "best"))
    rebuilt = tiny_model("llama-tied")
    assert replay(rebuilt, tmp_path / "best" / "trajectory.jsonl") == 2
    assert torch.equal(rebuilt.lm_head.weight, done.model.lm_head.weight)
    assert len(trajectory.read(tmp_path / "run" / "trajectory.jsonl").steps) == 4


def test_a_loss_that_is_not_finite_is_seen(tmp_path: Path) -> None:
    calls = {"evaluations": 0}

    def sometimes(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls["evaluations"] += 1
        loss = per_token(outputs, labels, num_items_in_batch)
        return loss * math.nan if 6 < calls["evaluations"] <= 10 else loss  # 2: whether they are divided

    done = trainer(tmp_path / "one", MeZO(), compute_loss_func=sometimes, probe=False)
    done.train()
    history = [line for line in done.state.log_history if "loss" in line]
    assert [math.isnan(line["loss"]) for line in history] == [False, True, False, False]
    assert [line["skipped_steps"] for line in history] == [0, 1, 1, 1]
    assert math.isnan(done.state.log_history[-1]["train_loss"]), "that of the whole run"
    assert [bool(step.skipped) for step in trajectory.read(tmp_path / "one" / "trajectory.jsonl").steps] == [
        False,
        True,
        False,
        False,
    ]
    always = trainer(
        tmp_path / "all", MeZO(), compute_loss_func=lambda *_, **__: torch.tensor(math.nan), probe=False, max_skipped=3
    )
    with pytest.raises(UserError, match="max_skipped: 3 steps in a row"):
        always.train()


def test_a_second_training_is_another_run(tmp_path: Path) -> None:
    done = trainer(tmp_path, MeZO(), max_steps=2, save_strategy="no")
    done.train()
    first, before = (tmp_path / "trajectory.jsonl").read_bytes(), weights(done)
    done.train()
    assert (tmp_path / "trajectory-1.jsonl").read_bytes() == first, "the first trajectory is not lost"
    rebuilt = tiny_model("llama-tied")
    rebuilt.load_state_dict(before, strict=False)
    assert replay(rebuilt, tmp_path / "trajectory.jsonl") == 2
    assert torch.equal(rebuilt.lm_head.weight, done.model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft, under transformers 5.23
@pytest.mark.parametrize("case", ["autocast", "bf16 weights", "lora"])
def test_other_weights(case: str, tmp_path: Path) -> None:
    """They train, and go on with the same bits."""

    def model() -> Any:
        if case == "lora":
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            torch.manual_seed(0)
            return peft.get_peft_model(tiny_model("llama-tied"), config)
        return tiny_model("llama-tied").to(torch.bfloat16 if case == "bf16 weights" else torch.float32)

    def make(folder: str) -> MeZOTrainer:
        return trainer(tmp_path / folder, MeZO(eps=1e-2), model=model(), bf16=case == "autocast", learning_rate=1e-2)

    whole, again = make("whole"), make("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert fingerprint(again) == fingerprint(whole) != fingerprint(make_untrained(make("untrained")))
    assert (tmp_path / "whole/checkpoint-4/adapter_model.safetensors").exists() == (case == "lora")
    assert math.isfinite(whole.evaluate()["eval_loss"])


def make_untrained(one: MeZOTrainer) -> MeZOTrainer:
    one.create_optimizer()
    return one


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fsdp": ({"fsdp": "full_shard"}, r"fsdp: .*mezo_dist\.shard\(model, 'fsdp'\)"),
    "compile": ({"torch_compile": True}, "torch_compile: .*leave it out"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: .*eval mode"),
    "norm": ({"max_grad_norm": 0.5}, r"max_grad_norm: .*MeZO\(clip=...\)"),
    "optimizer": ({"optim": "adafactor"}, "optim: MeZOTrainer has an optimizer of its own"),
    "betas": ({"adam_beta1": 0.5}, "adam_beta1: is for optimizers that take gradients"),
    "epsilon": ({"adam_epsilon": 1e-3}, "adam_epsilon: .*leave it out"),
    "arguments": ({"optim_args": "foreach=True"}, "optim_args: .*leave it out"),
    "no rate": ({"learning_rate": 0.0}, "learning_rate: must be above 0"),
    "lr": ({"algorithm": MeZO(lr=3e-7)}, r"algorithm.lr is 3e-07, but learning_rate 0.001"),
    "auto": ({"algorithm": MeZO(lr="auto")}, "algorithm.lr: auto needs the losses of single samples"),
    "schedule": ({"algorithm": MeZO(schedule=Schedule("linear"))}, "algorithm.schedule: .*lr_scheduler_type"),
    "decay": ({"algorithm": MeZO(weight_decay=0.1)}, r"algorithm.weight_decay: .*TrainingArguments\(weight_decay"),
    "algorithm": ({"algorithm": Annealing()}, r"algorithm: give MeZO\(...\) or MeZOSVRG\(...\), not a Annealing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **options)


def test_what_only_machines_with_gpus_can_ask_for_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True  # which TrainingArguments refuses on a CPU
    with pytest.raises(UserError, match="fp16: there are no gradients to scale; use bf16=True"):
        MeZOTrainer(tiny_model("llama-tied"), args, train_dataset=DATA)
    args.fp16, args.gradient_checkpointing = False, True  # given as such, it warns under transformers 5.23
    with pytest.raises(UserError, match="gradient_checkpointing: there is no backward pass"):
        MeZOTrainer(tiny_model("llama-tied"), args, train_dataset=DATA)
    args.gradient_checkpointing, args.activation_offloading = False, True  # of TRL's configs
    with pytest.raises(UserError, match="activation_offloading: nothing is kept for a backward pass"):
        MeZOTrainer(tiny_model("llama-tied"), args, train_dataset=DATA)
    args.gradient_checkpointing, args.deepspeed = False, {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"deepspeed: .*shard\(model, 'zero'\)"):
        MeZOTrainer(tiny_model("llama-tied"), args, train_dataset=DATA)


def test_checkpoints_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    trainer(tmp_path / "run", MeZO(), max_steps=2).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match=r"made with other settings: algorithm\.eps"):
        trainer(tmp_path / "run", MeZO(eps=1e-2)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match="made with other settings: learning_rate; give those again"):
        trainer(tmp_path / "run", MeZO(), learning_rate=0.5).train(resume_from_checkpoint=checkpoint)
    tiny_model("llama-tied", seed=1).save_pretrained(checkpoint)
    with pytest.raises(UserError, match=r"model and optimizer\.pt do not belong together"):
        trainer(tmp_path / "run", MeZO()).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="no optimizer state"):
        trainer(tmp_path / "run", MeZO()).train(resume_from_checkpoint=checkpoint)


def test_a_sample_for_the_anchor(tmp_path: Path) -> None:
    """Its size is stated, it is another one at each anchor, and the same after a restart."""
    done = trainer(tmp_path, ALGORITHMS["svrg"], full_size=6)
    done.train()
    full = done._mezo_full
    assert full is not None
    sets = [{tuple(row.tolist()) for inputs in full.at(step) for row in inputs["input_ids"]} for step in (0, 3, 3)]
    assert [len(rows) for rows in sets] == [6, 6, 6]
    assert sets[0] != sets[1] == sets[2]
    with pytest.raises(UserError, match="full_size: 99 is not between 1 and the 16 samples"):
        trainer(tmp_path, ALGORITHMS["svrg"], full_size=99).train()


def per_sample(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(outputs.logits.transpose(1, 2), shifted, reduction="none").mean(1)


@pytest.mark.parametrize("counted", [True, False], ids=["per token", "means"])
def test_the_loss_of_an_anchor_is_that_of_the_training_set(counted: bool, tmp_path: Path) -> None:
    """Its last micro-batch is short: tokens count alike, or samples where the model gives nothing but means."""
    done = trainer(
        tmp_path, MeZOSVRG(anchor_lr=1e-12, eps=1e-4), learning_rate=1e-12, data=DATA[:7], save_strategy="no"
    )
    done.model_accepts_loss_kwargs = counted
    model = done.model.eval()
    expected, weight = 0.0, 0
    order = BatchOrder(7, 7, derive_seed(done.args.seed, "full")).batch(0)
    for start in range(0, 7, 2):
        rows = [DATA[i] for i in order[start : start + 2]]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        count = int((batch["labels"][:, 1:] != -100).sum()) if counted else len(rows)
        with torch.no_grad():
            expected += float(model(**batch).loss) * count
        weight += count
    done.train()
    assert losses(done)[0] == pytest.approx(expected / weight, abs=2e-5)


@pytest.mark.parametrize("is_own", [True, False], ids=["compute_loss_func", "classifier"])
def test_an_anchor_of_losses_that_divide_by_nothing(is_own: bool, tmp_path: Path) -> None:
    """Many models take ``num_items_in_batch`` and give means all the same: the anchor's loss is a mean, too."""

    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels)

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **size))
    rows = [{"input_ids": torch.arange(4, 12) + k, "labels": torch.tensor(k % 2)} for k in range(16)]
    options: dict[str, Any] = {"compute_loss_func": mean} if is_own else {}
    options |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-12, "save_strategy": "no"}
    settings = MeZOSVRG(anchor_lr=1e-12, eps=1e-4)
    done = trainer(tmp_path, settings, data=rows, model=model, **options)
    done.train()
    assert losses(done)[0] == pytest.approx(losses(done)[1], rel=0.3), "of all samples, and of two"


def test_losses_that_divide_by_nothing_do_not_grow_with_accumulation(tmp_path: Path) -> None:
    """Trainer adds them up, and so its loss does."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rows = [{"input_ids": torch.arange(4, 12) + k, "labels": torch.tensor(k % 2)} for k in range(12)]
    first = []
    for number, accumulated in enumerate((1, 3)):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=64, **size))
        sizes = {"per_device_train_batch_size": 6 // accumulated, "gradient_accumulation_steps": accumulated}
        options: dict[str, Any] = {**sizes, "learning_rate": 1e-12, "save_strategy": "no", "max_steps": 1}
        done = trainer(tmp_path / str(number), data=rows, model=model, **options)
        done.train()
        first += losses(done)[:1]
    assert first[1] == pytest.approx(first[0], abs=1e-5)


def test_a_full_batch_whose_first_labels_do_not_count(tmp_path: Path) -> None:
    """It does not tell whether losses are divided by their number; the next anchor is asked again."""

    def sums(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits.mT, labels, reduction="sum") / num_items_in_batch

    order = BatchOrder(16, 16, derive_seed(42, "full")).batch(0)[:2]
    data = [{**row, "labels": torch.full_like(row["labels"], -100) if k in order else row["labels"]}
            for k, row in enumerate(DATA)]  # fmt: skip
    settings = MeZOSVRG(anchor_lr=1e-12, eps=1e-4)
    done = trainer(tmp_path, settings, data=data, learning_rate=1e-12, compute_loss_func=sums, save_strategy="no")
    assert done.args.seed == 42
    done.train()
    assert losses(done)[0] == pytest.approx(losses(done)[1], rel=0.2), "of all samples, and of four"


def test_numbers_out_of_range(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"full_size": 8}, "full_size: is for the anchors of MeZO-SVRG"),
        ({"max_skipped": 0}, "max_skipped: must be at least 1, not 0"),
        ({"width": 0}, "width: must be at least 1, not 0"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            MeZOTrainer(tiny_model("llama-tied"), arguments(tmp_path), algorithm=MeZO(), **options)


def test_a_direction_per_sample(tmp_path: Path) -> None:
    """From losses of samples, which are added up over micro-batches."""
    options: dict[str, Any] = {"compute_loss_func": per_sample, "law": "lowrank"}
    done = trainer(tmp_path, MeZO(per_sample=True), **options)
    done.train()
    first = trajectory.read(tmp_path / "trajectory.jsonl").steps[0]
    assert [len(row) for row in first.rounds[0].each] == [4, 4]
    with pytest.raises(UserError, match="directions for 4 samples, but the minibatch has 2"):
        trainer(tmp_path, MeZO(per_sample=True), data=DATA[:6], **options).train()
    with pytest.raises(UserError, match="per_sample: the loss function returned 1 losses for 2 samples"):
        trainer(tmp_path, MeZO(per_sample=True), law="lowrank").train()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    theirs = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(UserError, match="optimizers: MeZOTrainer has an optimizer of its own"):
        MeZOTrainer(model, arguments(tmp_path), train_dataset=DATA, optimizers=(theirs, None))


def test_processes_that_trainer_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without GPUs it takes each process of torchrun for the only one, unless use_cpu says otherwise."""
    monkeypatch.setattr("mezo_dist.trainer.trainer.join", lambda: Communicator(0, 2))
    with pytest.raises(UserError, match=r"started 2 processes, and Trainer knows of 1: .*use_cpu=True"):
        trainer(tmp_path, MeZO()).train()

"""What sections of a config say against each other (torch-free). Each section checks itself; see `schema`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mezo_dist.algorithms import FirstOrder
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.config.reward import check_reward

if TYPE_CHECKING:
    from mezo_dist.config.schema import RunConfig


def check_contradictions(config: RunConfig) -> None:
    """Check that the sections of a config go together.

    Raises:
        ValueError: two settings contradict each other; the message names them and what to change.
    """
    if getattr(config.algorithm, "per_sample", False) and config.law != "lowrank":
        raise ValueError(f"algorithm.per_sample: a direction per sample needs law: lowrank, not {config.law}")
    if getattr(config.algorithm, "per_sample", False) and config.train.calibrate:
        raise ValueError(
            "train.calibrate: needs directions that all samples of a batch share; set algorithm.per_sample to false"
        )
    if config.model.quantise is not None and config.layout.name != "replicated":
        raise ValueError(
            f"layout.name: {config.layout.name} cannot cut quantised weights (model.quantise); set it to replicated"
        )
    if isinstance(config.algorithm, MeZO):
        config.algorithm.check_members(config.train.batch_size)
    config.task.check_head(config.model.head)
    if config.train.calibrate:
        config.task.check_calibration()
    if config.layout.linear == "registers":
        _check_registers(config)
    _check_first_order(config)
    _check_compile(config)
    if config.train.objective == "metric":
        _check_metric_objective(config)
    check_reward(config.task, config.train.objective, config.reward)
    if config.train.objective != "loss" and getattr(config.algorithm, "eps", None) == "auto":
        raise ValueError(
            f"algorithm.eps: auto finds where a loss is straight, and train.objective: {config.train.objective} takes "
            "few values, which a larger size changes more often; give a number, such as 0.02"
        )


def _check_compile(config: RunConfig) -> None:
    if config.train.compile == "off":
        return
    fix = "set train.compile to off"
    if config.layout.name != "replicated":
        raise ValueError(
            f"train.compile: blocks of layout.name: {config.layout.name} are gathered by hooks that cannot be compiled;"
            f" {fix}, or layout.name to replicated"
        )
    if config.model.quantise is not None:
        raise ValueError(f"train.compile: is not for quantised weights (model.quantise); {fix}")
    if getattr(config.algorithm, "per_sample", False):
        raise ValueError(
            f"train.compile: directions per sample are applied inside of blocks; {fix}, or algorithm.per_sample to "
            "false"
        )
    if isinstance(config.algorithm, FirstOrder):
        raise ValueError(
            f"train.compile: compiles forward passes of variants, of which algorithm.name: {config.algorithm.name} has "
            f"none; {fix}"
        )
    if config.task.kind == "generation" and config.train.objective != "loss":
        raise ValueError(
            f"train.compile: texts are written by the model's own code (train.objective: {config.train.objective}); "
            f"{fix}"
        )


def _check_registers(config: RunConfig) -> None:
    reason = ""
    if isinstance(config.algorithm, FirstOrder):
        reason = f"is about variants of weights, of which algorithm.name: {config.algorithm.name} has none"
    elif config.model.quantise is not None:
        reason = f"perturbs linear layers, and model.quantise: {config.model.quantise} freezes them"
    elif config.model.peft.method is not None:
        reason = f"is for large matrices, and model.peft.method: {config.model.peft.method} trains small ones"
    elif config.law == "lowrank":
        reason = "makes the bits of law: gaussian and rademacher, and those of lowrank are products of thin factors"
    elif config.train.compile != "off":
        reason = f"computes linear layers one by one, and train.compile: {config.train.compile} compiles whole blocks"
    if reason:
        raise ValueError(f"layout.linear: registers {reason}; set it to materialised")


def _check_first_order(config: RunConfig) -> None:
    name = config.algorithm.name
    if not isinstance(config.algorithm, FirstOrder):
        if config.train.gradient_checkpointing:
            raise ValueError(
                f"train.gradient_checkpointing: is for algorithm.name: sgd and adamw; {name} keeps nothing for a "
                "backward pass"
            )
        return
    if config.train.objective != "loss":
        raise ValueError(
            f"train.objective: {config.train.objective} has no gradient, which algorithm.name: {name} needs; choose "
            "loss, or an algorithm that needs forward passes only, such as mezo"
        )
    if config.law != "gaussian" or config.direction_rank != 1:
        raise ValueError(f"law: is about random directions, of which algorithm.name: {name} has none; leave it out")
    if config.train.gradient_checkpointing and config.model.peft.method == "prefix":
        raise ValueError(
            "train.gradient_checkpointing: a block that is computed again would see its keys twice after the prefix of "
            "model.peft.method: prefix; set it to false, or the method to lora"
        )
    if config.layout.name == "zero" and config.model.compute not in (None, config.model.weights):
        raise ValueError(
            f"model.compute: DeepSpeed's engine (layout.name: zero) computes gradients for algorithm.name: {name} in "
            "the dtype of model.weights; leave it out and set model.weights to bfloat16, of which DeepSpeed updates a "
            "copy in float32, or set layout.name to fsdp"
        )
    if config.layout.gather not in (None, config.model.compute or config.model.weights):
        raise ValueError(
            f"layout.gather: must be left out for algorithm.name: {name}, whose weights are not perturbed and are "
            "gathered in the dtype of the passes (model.compute)"
        )


def _check_metric_objective(config: RunConfig) -> None:
    if config.train.calibrate:
        raise ValueError(
            "train.calibrate: changes the loss, which train.objective: metric does not look at; leave one out"
        )
    config.task.check_objective()
    if getattr(config.algorithm, "per_sample", False) and not config.task.metric_is_mean:
        raise ValueError(
            f"train.objective: metric gives one number per batch where task.metric is {config.task.metric}, and "
            "algorithm.per_sample needs one per sample; set it to false, or choose a metric that is a mean"
        )

"""What a `MeZOTrainer` refuses of its arguments, and what to use instead."""

from __future__ import annotations

import dataclasses
from typing import Any

from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.schedules import Schedule
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.errors import UserError

_NO_BACKWARD = "there is no backward pass for which activations are kept; leave it out"
_REFUSED = {
    "fsdp": "is made for gradients; give MeZOTrainer(..., layout=mezo_dist.shard(model, 'fsdp')) in its place",
    "deepspeed": "is made for gradients; give MeZOTrainer(..., layout=mezo_dist.shard(model, 'zero')) in its place",
    "gradient_checkpointing": _NO_BACKWARD,
    "activation_checkpointing": _NO_BACKWARD,
    "torch_compile": "forward passes of all variants run in lock step through the model's Python code; leave it out",
    "fp16": "there are no gradients to scale; use bf16=True, or load the model itself in 16 bits "
    "(from_pretrained(..., dtype='bfloat16'))",
    "neftune_noise_alpha": "forward passes run in eval mode, as noise would differ between the sides of an estimate; "
    "leave it out",
    "activation_offloading": "nothing is kept for a backward pass; leave it out",
    "parallelism_config": "weights are whole in every process, or cut by layout=mezo_dist.shard(...); leave it out",
}
"""Name of an argument that must not be set -> what to do instead."""


def check_arguments(args: Any) -> None:
    """Check the `transformers.TrainingArguments` of a `MeZOTrainer`.

    Raises:
        UserError: one of them cannot be used; the message names it and the replacement.
    """
    for name, instead in _REFUSED.items():
        if getattr(args, name, None):
            raise UserError(f"{name}: {instead}")
    if args.max_grad_norm not in (None, 0, _default(args, "max_grad_norm")):
        raise UserError(
            "max_grad_norm: there is no gradient whose norm could be cut; MeZO(clip=...) cuts projected gradients"
        )
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"):
        if getattr(args, name, None) != _default(args, name):
            raise UserError(f"{name}: is for optimizers that take gradients, and MeZOTrainer has none; leave it out")
    if str(getattr(args.optim, "value", args.optim)) != str(_default(args, "optim")):
        raise UserError("optim: MeZOTrainer has an optimizer of its own (algorithm=...); leave it out")
    if args.n_gpu > 1:
        raise UserError(
            f"this process sees {args.n_gpu} GPUs, over which Trainer would copy the model at every step; start one "
            "process for each of them (torchrun --nproc-per-node ...), or set CUDA_VISIBLE_DEVICES to one"
        )


def check_numbers(algorithm: object, full_size: int | None, width: int, max_skipped: int) -> None:
    """Check arguments of `MeZOTrainer` that Trainer does not have.

    Args:
        algorithm: its settings.
        full_size: of anchors.
        width: micro-batches in lock step.
        max_skipped: steps in a row.

    Raises:
        UserError: one is out of range, or nothing would use it.
    """
    for name, value in (("width", width), ("max_skipped", max_skipped)):
        if value < 1:
            raise UserError(f"{name}: must be at least 1, not {value}")
    if full_size is not None and not isinstance(algorithm, MeZOSVRG):
        raise UserError("full_size: is for the anchors of MeZO-SVRG; give algorithm=MeZOSVRG(...), or leave it out")


def settled(algorithm: object, args: Any) -> MeZO | MeZOSVRG:
    """The algorithm's settings with the learning rate of the ``args``, which decide on rates and weight decay.

    Raises:
        UserError: the algorithm is none, or says something else of what the arguments decide.
    """
    if not isinstance(algorithm, (MeZO, MeZOSVRG)):
        raise UserError(f"algorithm: give MeZO(...) or MeZOSVRG(...), not a {type(algorithm).__name__}")
    plain = type(algorithm)()
    if algorithm.lr == "auto":
        raise UserError(
            "algorithm.lr: auto needs the losses of single samples, where Trainer computes their mean; give a number, "
            "as TrainingArguments(learning_rate=...)"
        )
    if algorithm.lr not in (plain.lr, args.learning_rate):
        raise UserError(
            f"algorithm.lr is {algorithm.lr:g}, but learning_rate {args.learning_rate:g}; give the rate once, as "
            f"TrainingArguments(learning_rate={algorithm.lr:g})"
        )
    if algorithm.schedule != Schedule():
        raise UserError("algorithm.schedule: give it as TrainingArguments(lr_scheduler_type=..., warmup_steps=...)")
    if algorithm.weight_decay or algorithm.weight_decay_all:
        raise UserError("algorithm.weight_decay: give it as TrainingArguments(weight_decay=...)")
    if not args.learning_rate > 0:
        raise UserError(f"learning_rate: must be above 0, not {args.learning_rate!r}")
    try:
        return dataclasses.replace(algorithm, lr=args.learning_rate)
    except ValueError as error:
        raise UserError(str(error)) from error


def _default(args: Any, name: str) -> object:
    default = next(item.default for item in dataclasses.fields(args) if item.name == name)
    return getattr(default, "value", default)

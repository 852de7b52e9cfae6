"""`MeZOTrainer`: Hugging Face's Trainer, with steps of MeZO and MeZO-SVRG in place of a backward pass."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mezo_dist.algorithms.base import Batch, Problem
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.directions.law import Law, LawName
from mezo_dist.distributed.join import join
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.errors import UserError, needs
from mezo_dist.optim.checks import check_arguments as check_model
from mezo_dist.optim.losses import LossFunction
from mezo_dist.storage.trajectory import FILE
from mezo_dist.trainer import sharded
from mezo_dist.trainer.batches import FullBatches, Inputs, Share
from mezo_dist.trainer.checks import check_arguments, check_numbers, settled
from mezo_dist.trainer.losses import TrainerLosses
from mezo_dist.trainer.optimizer import StagedOptimizer

with needs("mezo_dist[trainer]", "accelerate, on which Trainer stands"):
    from accelerate.utils import AutocastKwargs

log = logging.getLogger(__name__)


class MeZOTrainer(Trainer):
    """A `transformers.Trainer` that fine-tunes by forward passes only.

    Everything that a script does with a Trainer stays as it is: data, collators, custom losses (``compute_loss_func``,
    label smoothing, an overridden ``compute_loss``), schedulers, evaluation, callbacks, checkpoints, the best model,
    ``push_to_hub``, ``report_to``. Losses go through ``compute_loss``, without gradients and in eval mode. The learning
    rate, its schedule and the weight decay are those of the arguments, whose defaults are meant for AdamW: rates of
    MeZO are smaller (1e-7 to 1e-5 where all weights are trained), and runs have more steps.

    With ``gradient_accumulation_steps`` the micro-batches of a step are evaluated along the same directions, and their
    losses add up as those of Trainer do (means stay means). Under torchrun or ``accelerate launch`` every process
    evaluates its part of the batch; only losses are exchanged, all processes make the same update, and nothing is
    wrapped around the model (no DDP). bf16 weights are rounded stochastically; ``bf16=True`` computes fp32 weights in
    autocast.

    ``trajectory.jsonl`` in ``output_dir`` logs every step, and lies beside every checkpoint: base model + this file =
    the trained model (`mezo_dist.replay`). Going on with ``resume_from_checkpoint`` gives the same bits as not having
    stopped. A step whose loss is not finite is skipped; the loss that is logged next is nan, and ``skipped_steps``
    counts. ``grad_norm`` is the size of the projected gradient; ``max_grad_norm`` does not apply.

    The class is a mix-in for trainers that say how a loss is computed, such as those of TRL:
    ``class MeZOSFTTrainer(MeZOTrainer, SFTTrainer): pass``, likewise with RewardTrainer and DPOTrainer. Figures that
    these collect in ``compute_loss`` are of all variants of the weights, and are named ``eval_...``, as the model is in
    eval mode.

    Args:
        args: the arguments of Trainer (model, `transformers.TrainingArguments`, collator, data, ...), by place or by
            name. Parameters of the model with ``requires_grad`` are trained.
        algorithm: settings of `mezo_dist.MeZO` or `mezo_dist.MeZOSVRG`, without ``lr``, ``schedule`` and
            ``weight_decay``; MeZO's by default. MeZO-SVRG's ``anchor_lr`` is that at the start, and changes with the
            learning rate.
        full_size: for MeZO-SVRG: samples of a full batch, drawn afresh from the training set for every anchor; the
            whole set if None.
        law: of the directions; ``lowrank`` for ``per_sample``.
        direction_rank: rank of ``lowrank`` directions.
        width: micro-batches that go through the model in lock step. More are faster, take memory for hidden states of
            ``width`` times the number of variants, and change no result.
        max_skipped: training ends with an error after so many steps in a row whose loss is not finite.
        probe: before the first step, hold losses under a shift against those of really changed weights; see
            `mezo_dist.Optimizer`.
        layout: from `mezo_dist.shard(model, "fsdp")` or ``"zero"``, to cut the weights over the processes; whole in
            every process if None. Trajectories and weights have the same bits on every layout. Checkpoints hold the
            whole model, written weight by weight, and the shards that a run goes on from; the file system must be one
            that all processes see. Nothing can be generated.
        kwargs: arguments of Trainer by name.

    Raises:
        UserError: an argument that a step without gradients cannot honour (``fsdp``, ``deepspeed``,
            ``gradient_checkpointing``, ``torch_compile``, ``fp16``, an optimizer, ...); the message names what to use
            instead.

    ``algorithm.per_sample`` needs one loss per sample, that is a ``compute_loss_func`` that returns a vector, and
    batches of one size (``dataloader_drop_last``). Losses of samples count equally, and are added up exactly over
    micro-batches and processes.

    The algorithms: MeZO (Malladi et al. 2023, arXiv 2305.17333), MeZO-SVRG (Gautam et al. 2024, arXiv 2404.08080).
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        algorithm: MeZO | MeZOSVRG | None = None,
        full_size: int | None = None,
        law: LawName = "gaussian",
        direction_rank: int = 1,
        width: int = 1,
        max_skipped: int = 10,
        probe: bool = True,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> None:
        self._mezo_layout = layout if layout is not None and layout.is_sharded else None
        if self._mezo_layout is not None and kwargs.get("model_init") is not None:
            raise UserError(
                "model_init: makes another model than the one that layout=... has cut; give model=... instead"
            )
        check_numbers(algorithm, full_size, width, max_skipped)
        for given in (*args, kwargs.get("args")):
            if isinstance(given, TrainingArguments):
                check_arguments(given)
                if self._mezo_layout is not None:
                    sharded.prepare(args[0] if args else kwargs.get("model"), given)
        self._mezo_algorithm = algorithm or MeZO()
        self._mezo_law, self._mezo_full_size = Law(law, direction_rank), full_size
        self._mezo_options: dict[str, Any] = {"max_skipped": max_skipped, "probe": probe}
        self._mezo_width, self._mezo_sharded_engine = width, cast("Engine | None", None)
        self._mezo_micro_batches: list[Inputs] = []
        self._mezo_full: FullBatches | None = None
        self._mezo_optimizer: StagedOptimizer | None = None
        self._mezo_skipped_before = 0  # the last log
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        for name in ("fsdp", "deepspeed"):  # accelerate's own config may ask for them, too
            if getattr(self, f"is_{name}_enabled", False):
                raise UserError(f"accelerate's config asks for {name}: give layout=mezo_dist.shard(model, ...) instead")
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise UserError("optimizers: MeZOTrainer has an optimizer of its own (algorithm=...); leave it out")
        settled(self._mezo_algorithm, self.args)
        self.add_callback(_StepsOfTrainer(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, but models are prepared as for evaluation: nothing is wrapped around them (DDP's buckets).

        Autocast does not keep what it has cast: a weight has many values in a step.
        """
        super().create_accelerator_and_postprocess()
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A `StagedOptimizer` in Trainer's two groups, with and without weight decay. Collective."""
        known = self._mezo_optimizer
        if self.optimizer is not None and known is not None and known.num_steps_done == 0:
            return self.optimizer
        model, comm, args = model or self.model, join(), self.args
        settings = settled(self._mezo_algorithm, args)
        if comm.world_size != args.world_size:
            raise UserError(
                f"the launcher started {comm.world_size} processes, and Trainer knows of {args.world_size}: without "
                "GPUs it needs TrainingArguments(use_cpu=True) to see the others"
            )
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * comm.world_size
        check_model(model, settings, self._mezo_law.name, batch_size, self.state.max_steps or None, None)
        self._mezo_full, self._mezo_losses = None, TrainerLosses(self, lambda: self._mezo_engine(self.model))
        if isinstance(settings, MeZOSVRG):
            loader = self.get_train_dataloader()
            place = {"rank": comm.rank, "world_size": comm.world_size}
            self._mezo_full = FullBatches(
                loader.dataset,
                loader.collate_fn,
                self._mezo_full_size,
                micro_batch=args.train_batch_size,
                seed=args.seed,
                **place,
            )
        self._mezo_micro_batches.clear()
        self._mezo_optimizer = StagedOptimizer(
            model,
            self._mezo_groups(model),
            settings,
            problem=self._mezo_problem(settings, model, batch_size),
            engine=self._mezo_engine(model),
            comm=comm,
            trajectory=Path(args.output_dir, FILE),
            **self._mezo_options,
        )
        self.optimizer = self._mezo_optimizer
        return self._mezo_optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        """Keep a micro-batch; at the last one of a step, evaluate the losses of all, and stage the estimate.

        Args:
            model: the model.
            inputs: a micro-batch.
            num_items_in_batch: what losses of the whole batch are divided by, if they are sums.
            kwargs: what a later version of Trainer may add.

        Returns:
            The mean loss of the step at its last micro-batch, and 0 at those before it. fp32 scalar.
        """
        optimizer = self._mezo_staged()
        self._mezo_micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        if optimizer.num_steps_done != self.state.global_step:
            raise UserError(
                f"the run is at step {self.state.global_step}, but its trajectory at {optimizer.num_steps_done}: the "
                "checkpoint has no optimizer state (save_only_model), so it cannot be gone on with; begin a new run "
                "from its weights (model=...)"
            )
        items = tuple(self._mezo_micro_batches)
        self._mezo_micro_batches.clear()
        share = Share(items, num_items_in_batch, most=len(items))

        def batch_of(batch: Batch, step: int) -> tuple[Sequence[Inputs], LossFunction[Inputs]]:
            chosen = share if batch == "minibatch" else self._mezo_full_share(step)
            return chosen.micro_batches, functools.partial(self._mezo_losses.loss, chosen)

        with self.compute_loss_context_manager(), self.accelerator.autocast():
            if len(items) > 1 or join().world_size > 1:  # or a sum of losses is their mean
                self._mezo_losses.learn(share)
            loss = optimizer.stage(batch_of)
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the scalars of the last step's estimate beside the loss.

        Args:
            logs: what is logged.
            args: passed on.
            kwargs: passed on.
        """
        optimizer = self._mezo_optimizer
        if optimizer is not None and "loss" in logs:
            more = {name: value for name, value in optimizer.metrics.items() if name not in ("loss", "lr")}
            logs = {**logs, **more, "skipped_steps": optimizer.num_skipped}
            if optimizer.num_skipped > self._mezo_skipped_before:  # logging_nan_inf_filter put a mean in its place
                logs["loss"] = math.nan
            self._mezo_skipped_before = optimizer.num_skipped
        if optimizer is not None and "train_loss" in logs and optimizer.num_skipped:  # the same, for the whole run
            logs["train_loss"] = math.nan  # in place, for it is returned as well
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, and the trajectory beside the model. Collective where weights are cut over the processes.

        Args:
            output_dir: where to; ``args.output_dir`` if None.
            _internal_call: Trainer's own.
        """
        folder, optimizer = Path(output_dir or self.args.output_dir), self._mezo_optimizer
        if self._mezo_layout is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._mezo_save(folder, is_checkpoint=_internal_call and folder != Path(self.args.output_dir))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        if optimizer is not None and optimizer.num_steps_done:
            optimizer.write_trajectory(folder)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with weights that are gathered unit by unit where they are cut over the processes.

        Args:
            model: the model.
            inputs: a batch.
            args: passed on.
            kwargs: passed on.
        """
        step = super().prediction_step
        if self._mezo_layout is None:
            return step(model, inputs, *args, **kwargs)
        return sharded.evaluate_one(self._mezo_engine(model), inputs, lambda m, i: step(m, dict(i), *args, **kwargs))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._mezo_layout is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            sharded.load_shards(self._mezo_engine(model or self.model), join(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._mezo_layout is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return abs(self._mezo_staged().metrics.get("projected_gradient", math.nan))

    def _mezo_staged(self) -> StagedOptimizer:
        if self._mezo_optimizer is None:
            raise UserError("MeZOTrainer.create_optimizer was overridden, or not called: there is no optimizer")
        return self._mezo_optimizer

    def _mezo_engine(self, model: nn.Module) -> Engine:
        """What evaluates variants of the model and owns its weights; there is one for good where these are sharded."""
        if self._mezo_sharded_engine is not None:
            return self._mezo_sharded_engine
        rounds = _has_16bit_weights(model)
        engine = Engine(model, self._mezo_law, self._mezo_layout, stochastic_rounding=rounds, width=self._mezo_width)
        if self._mezo_layout is not None:
            self._mezo_sharded_engine = engine
        return engine

    def _mezo_save(self, folder: Path, *, is_checkpoint: bool) -> None:
        """Save the whole model; and the shards, where a run may go on from here.

        Args:
            folder: where to.
            is_checkpoint: Trainer saves the rest of a checkpoint there.
        """
        engine, comm = self._mezo_engine(self.model), join()
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        sharded.save_whole(engine, comm, folder, tokenizer, self.args)
        if is_checkpoint and not self.args.save_only_model:
            sharded.save_shards(engine, comm, folder, self.state.global_step)

    def _mezo_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decaying = set(self.get_decay_parameter_names(model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        decays = {True: self.args.weight_decay, False: 0.0}
        return [
            {"params": [p for name, p in named if (name in decaying) == is_decaying], "weight_decay": weight_decay}
            for is_decaying, weight_decay in decays.items()
        ]

    def _mezo_problem(self, settings: MeZO | MeZOSVRG, model: nn.Module, batch_size: int) -> Problem:
        """What the algorithm may know; only facts that its settings ask for, as a checkpoint holds it to them.

        Args:
            settings: of the algorithm.
            model: with the weights.
            batch_size: samples of a batch over all processes.
        """
        has_epochs = settings.annealing.is_on and hasattr(self.train_dataset, "__len__")
        return Problem(
            seed=self.args.seed,
            num_steps=1 if settings.eps_schedule.kind == "constant" else max(1, self.state.max_steps),
            batch_size=batch_size if settings.per_sample or has_epochs else 1,
            full_size=self._mezo_full.size if self._mezo_full is not None else 1,
            has_16bit_weights=_has_16bit_weights(model),
            num_train=len(self.train_dataset) if has_epochs else None,
        )

    def _mezo_full_share(self, step: int) -> Share:
        assert self._mezo_full is not None  # planners ask for full batches of MeZO-SVRG alone
        inputs = self._mezo_full.at(step)
        batches, num_items = self.get_batch_samples(iter(inputs), len(inputs), self.args.device)
        most = self._mezo_full.num_micro_batches / join().world_size
        share = Share([self._prepare_inputs(batch) for batch in batches], num_items, most, is_full=True)
        self._mezo_losses.learn(share)
        return share


def _has_16bit_weights(model: nn.Module) -> bool:
    return any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


class _StepsOfTrainer(TrainerCallback):
    """Tells a trainer's optimizer what Trainer has no hook for."""

    def __init__(self, trainer: MeZOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._mezo_skipped_before = self._trainer._mezo_staged().num_skipped

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._mezo_micro_batches.clear()  # of a step that a callback broke off

    def on_save(self, *_: Any, **__: Any) -> None:
        self._trainer._mezo_staged().check_agreement()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._trainer._mezo_staged().mark()  # the last one comes before the best model's weights are loaded

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._mezo_staged().close()

"""Export to a Hugging Face folder, streamed: weights are gathered, converted and written one after another.

If a model has adapters (LoRA, prefixes), only these are written, as a folder that peft loads on top of the base model.

Names and shapes are those that ``save_pretrained`` gives them. Where transformers turns weights into other ones (the
experts of a mixture become single matrices), those of one unit are held together; otherwise one weight at a time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.models import adapters
from mezo_dist.objectives.calibration import FILE as CALIBRATION_FILE
from mezo_dist.objectives.calibration import Calibration
from mezo_dist.storage import safetensors_io
from mezo_dist.storage.files import remove

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_BYTES = 5_000_000_000
"""Largest size of one file, unless a single weight is larger."""


@dataclass(frozen=True)
class _Part:
    """Weights of the model that become tensors of the export."""

    inputs: tuple[str, ...]
    outputs: dict[str, tuple[torch.dtype, torch.Size]]
    is_renaming: bool
    """One weight becomes one tensor, unchanged."""


def export_model(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    comm: Communicator,
    *,
    file_bytes: int = FILE_BYTES,
    calibration: Calibration | None = None,
) -> None:
    """Write a folder that ``AutoModel*.from_pretrained`` loads; it appears under its name only when it is complete.

    Collective: all ranks must call it; rank 0 writes.

    Args:
        engine: whose weights, in the dtype in which they are kept.
        tokenizer: is saved beside them, if there is one.
        folder: is replaced if it exists.
        comm: connects the ranks.
        file_bytes: weights are split into files of at most this size.
        calibration: what predictions need beside the weights, if they were trained so. The bias of a classification
            head takes it up; otherwise it stands in ``calibration.json``.

    Raises:
        UserError: on all ranks, if the folder cannot be written (full disk, no permission).
    """

    def work() -> None:
        weights = engine.named_weights()
        try:
            if comm.rank == 0:
                _write(engine, weights, tokenizer, folder, file_bytes, calibration)
        except SafetensorError as error:  # raised by the tokenizer's or the model's code
            raise UserError(str(error)) from error
        finally:
            for _ in weights:  # other ranks gather with us to the end, also after an error
                pass

    try:
        comm.collect(work)
    except UserError as error:
        raise UserError(f"export to {folder} failed: {error}; the run folder is as it was") from error


def _write(
    engine: Engine,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    file_bytes: int,
    calibration: Calibration | None,
) -> None:
    """Write the folder on rank 0.

    Args:
        engine: see `export_model`.
        weights: name and whole tensor of every weight.
        tokenizer: see `export_model`.
        folder: see `export_model`.
        file_bytes: see `export_model`.
        calibration: see `export_model`.
    """
    part = folder.with_name(f".{folder.name}.part")
    remove(part)
    part.mkdir(parents=True)
    try:
        if calibration is not None:
            bias = _head_bias(engine.model, len(calibration.words)) if calibration.is_head else None
            (part / CALIBRATION_FILE).write_text(calibration.to_json(bias), encoding="utf-8")
            weights = _with_added(weights, bias, calibration.offsets)
        if adapters.is_adapted(engine.model):
            _write_adapters(engine.model, weights, part)
        else:
            _write_model(engine, weights, part, file_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        remove(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _head_bias(model: nn.Module, num_classes: int) -> str | None:
    """Name of the bias that is added to the classes' logits; None if the head has none, or is not exported."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    bias = heads[-1].bias if heads else None
    names = adapters.names_to_save(model) if adapters.is_adapted(model) else None
    matches = [n for n, p in model.named_parameters() if p is bias and (names is None or n in names)]
    return matches[0] if matches else None


def _with_added(
    weights: Iterator[tuple[str, Tensor]], bias: str | None, offsets: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The weights, with the offsets added to one of them.

    Args:
        weights: name and whole tensor of every weight.
        bias: name of the one; None: no weight takes them.
        offsets: fp32 [classes].
    """
    for name, tensor in weights:
        yield name, (tensor + offsets.to(tensor.device, tensor.dtype) if name == bias else tensor)


def _write_adapters(model: PeftModel, weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write the files of a folder that peft loads.

    Args:
        model: with adapters.
        weights: name and whole tensor of every weight.
        folder: where to.
    """
    names = adapters.names_to_save(model)
    held = {name: tensor.cpu().clone() for name, tensor in weights if name in names}  # they are few and small
    saved = adapters.saved_weights(model, held)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in saved.items()}
    safetensors_io.write(folder / adapters.FILE, layout, iter(saved.values()), {"format": "pt"})
    text = json.dumps(adapters.settings_to_json(model), indent=2, sort_keys=True) + "\n"
    (folder / adapters.SETTINGS).write_text(text, encoding="utf-8")


def _write_model(engine: Engine, weights: Iterator[tuple[str, Tensor]], folder: Path, file_bytes: int) -> None:
    """Write the files of a folder that transformers loads.

    Args:
        engine: whose model.
        weights: name and whole tensor of every weight.
        folder: where to.
        file_bytes: largest size of a file.
    """
    parts, buffers = _plan(engine), _saved_buffers(engine.model)
    layout = {name: kind for p in parts for name, kind in p.outputs.items()}
    layout |= {name: (tensor.dtype, tensor.shape) for name, tensor in buffers.items()}
    _write_files(folder, layout, _tensors(engine.model, weights, parts, buffers), file_bytes)
    _write_settings(engine.model, next(iter(layout.values()))[0], folder)


def _plan(engine: Engine) -> list[_Part]:
    """What becomes of every weight, in the order in which the tensors are there when weights come one by one.

    Found by reverting transformers' conversions on tensors without data, unit by unit: no conversion crosses units.
    """
    ignored = set(getattr(engine.model, "_keys_to_ignore_on_save", None) or ())
    order = [shard.name for shard in engine.shards() if shard.name not in ignored]
    no_data = {s.name: torch.empty(s.shape, dtype=s.tensor.dtype, device="meta") for s in engine.shards()}
    place = {name: number for number, name in enumerate(order)}
    parts: list[_Part] = []
    for unit in engine.layout.units:
        names = dict.fromkeys(w.name for hooked in unit.hooked_modules for w in hooked.weights if w.name in place)
        weights = {name: no_data[name] for name in names}
        reverted = _revert(engine.model, weights)
        name_of = {id(tensor): name for name, tensor in weights.items()}
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in reverted.items()}
        kept = {output: name_of[id(tensor)] for output, tensor in reverted.items() if id(tensor) in name_of}
        parts += [_Part((name,), {output: kinds[output]}, True) for output, name in kept.items()]
        changed = tuple(name for name in names if name not in kept.values())
        if changed:
            parts.append(_Part(changed, {o: kind for o, kind in kinds.items() if o not in kept}, False))
    return sorted(parts, key=lambda p: max(place[name] for name in p.inputs))


def _revert(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights)


def _tensors(
    model: PreTrainedModel, weights: Iterator[tuple[str, Tensor]], parts: Sequence[_Part], buffers: dict[str, Tensor]
) -> Iterator[Tensor]:
    """The contents of all parts, in order, then the buffers.

    Args:
        model: whose conversions are reverted.
        weights: name and whole tensor of every weight.
        parts: from `_plan`.
        buffers: those that are saved.
    """
    part_of = {name: part for part in parts for name in part.inputs}
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        part = part_of.get(name)
        if part is None:
            continue
        if part.is_renaming:
            yield tensor
            continue
        held[name] = tensor.clone()  # it is gone when the next one comes
        if all(needed in held for needed in part.inputs):
            reverted = _revert(model, {needed: held.pop(needed) for needed in part.inputs})
            for output in part.outputs:
                yield reverted.pop(output)
    yield from buffers.values()


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    names = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _write_files(
    folder: Path, layout: dict[str, tuple[torch.dtype, torch.Size]], tensors: Iterator[Tensor], file_bytes: int
) -> None:
    """Write tensors into files of limited size, and an index if there are several.

    Args:
        folder: where to.
        layout: dtype and shape of every tensor, by name, in order.
        tensors: in that order.
        file_bytes: largest size of a file.
    """
    files: list[dict[str, tuple[torch.dtype, torch.Size]]] = [{}]
    used = total = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * shape.numel()
        if files[-1] and used + size > file_bytes:
            files.append({})
            used = 0
        files[-1][name] = (dtype, shape)
        used += size
        total += size
    where: dict[str, str] = {}
    for number, content in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        safetensors_io.write(folder / name, content, (next(tensors) for _ in content), {"format": "pt"})
        where |= dict.fromkeys(content, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_settings(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Everything of the model that is no weight.

    Args:
        model: the model.
        dtype: of its weights.
        folder: where to.
    """
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # torch renames the classes that it shards
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # it was turned off at loading, since nothing is generated in training
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)

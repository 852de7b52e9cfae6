"""Loading a Hugging Face checkpoint by the slice: a model without data, and a reader that fills any piece of it.

The model comes out of ``from_pretrained`` of transformers, which is given tensors that have a shape and no data. So
the model class itself takes care of names, renamings, tied weights, dtypes, fresh heads, buffers and the report of what
is missing, and no rank ever holds more weights than it asks `CheckpointReader.read` for. The one exception are weights
that transformers assembles from several tensors of the checkpoint (the experts of a mixture, say): those are made
whole, one at a time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor, nn

from mezo_dist.engines.layouts.base import Shard
from mezo_dist.engines.payload import parameter_parts
from mezo_dist.json_types import JsonObject
from mezo_dist.models.checkpoint_files import checkpoint_files
from mezo_dist.storage import safetensors_io
from mezo_dist.storage.safetensors_io import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


class WeightSource(Protocol):
    """Where the weights of a model without data come from."""

    def read(self, name: str, out: Tensor, offset: int = 0) -> None:
        """Fill ``out`` (contiguous) with the elements of parameter ``name`` (canonical) from flat index ``offset``.

        Args:
            name: canonical name of the parameter.
            out: contiguous; gets the elements.
            offset: flat index of the first element.
        """


class NotSliceableError(Exception):
    """The checkpoint can only be loaded whole; the message says why."""


@final
class WholeModel:
    """See `WeightSource`: the weights of a model that was loaded whole."""

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters()
        self._weights = {name: part for whole, tensor in named for name, part in parameter_parts(whole, tensor)}

    def read(self, name: str, out: Tensor, offset: int = 0) -> None:
        """See `WeightSource.read`."""
        flat = self._weights[name].detach().reshape(-1)
        out.detach().view(-1).copy_(flat[offset : offset + out.numel()])


def fill(source: WeightSource, shards: Iterable[Shard]) -> None:
    """Fill the shards of an engine whose model came without data."""
    for shard in shards:
        if shard.tensor.numel():
            source.read(shard.name, shard.tensor, shard.offset)


def materialise(model: nn.Module, source: WeightSource) -> None:
    """Give every parameter of a model without data its whole contents, in host memory, tied ones tied."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            whole = torch.empty_like(parameter, device="cpu", memory_format=torch.contiguous_format)
            source.read(name, whole.detach())
            replace(model, parameter, nn.Parameter(whole.detach(), requires_grad=parameter.requires_grad))


def replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` wherever ``model`` uses ``old``.

    Args:
        model: changed in place.
        old: a parameter of the model.
        new: what takes its place.
    """
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[attribute] = new


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How one or several weights are made from tensors of the checkpoint."""

    keys: tuple[str, ...]
    """Names in the checkpoint."""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None
    """From those tensors to weights by name; None: the weight is the tensor."""


@final
class CheckpointReader:
    """Reads pieces of the weights of one model from one checkpoint; see `open_checkpoint`.

    Args:
        model: without data.
        entries: the checkpoint's tensors, by name.
        recipes: how each weight of the model is made of them.
    """

    def __init__(self, model: PreTrainedModel, entries: dict[str, Entry], recipes: dict[str, _Recipe]) -> None:
        self._entries = entries
        self._recipes = recipes
        self._key: dict[str, str] = {}
        """Canonical name of a parameter -> the one of its names under which ``recipes`` has it."""
        canonical = {id(tensor): name for name, tensor in _tensors(model)}
        for name, tensor in _tensors(model, with_aliases=True):
            if name in recipes:
                self._key.setdefault(canonical[id(tensor)], name)
        tensors = dict(_tensors(model))
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._fresh = {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta}
        assert self._key.keys() | self._fresh.keys() == tensors.keys()
        self._made: tuple[_Recipe | None, dict[str, Tensor]] = (None, {})
        """The weights that were converted last: the next read is most often of the same ones."""

    def read(self, name: str, out: Tensor, offset: int = 0) -> None:
        """See `WeightSource.read`; also reads buffers that are in the checkpoint.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if name not in self._key:
            whole = self._fresh[name]
        else:
            recipe = self._recipes[self._key[name]]
            if recipe.convert is None:
                self._entries[recipe.keys[0]].read(out, offset)
                return
            whole = self._make(recipe, self._dtypes[name])[self._key[name]]
        out.detach().view(-1).copy_(whole.reshape(-1)[offset : offset + out.numel()])

    def _make(self, recipe: _Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
        if self._made[0] is not recipe:
            self._made = (None, {})  # the old ones go before the new ones come
            assert recipe.convert is not None
            tensors = {}
            for key in recipe.keys:
                tensors[key] = torch.empty(self._entries[key].shape, dtype=dtype)
                self._entries[key].read(tensors[key])
            self._made = (recipe, recipe.convert(tensors))
        return self._made[1]


def open_checkpoint(
    auto_class: type[_BaseAutoModelClass], source: str, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, JsonObject, CheckpointReader]:
    """A model without data, and what fills it.

    Buffers are there in full, and so are weights that the checkpoint lacks (a fresh head). Everything else has device
    meta. Only the headers of the files are read.

    Args:
        auto_class: ``transformers.AutoModelFor...``.
        source: folder or hub name.
        config: the model's config.
        dtype: of the weights.
        options: ``revision``, ``trust_remote_code``.

    Returns:
        Model, transformers' report of what the checkpoint lacks (as ``output_loading_info`` gives it), reader.

    Raises:
        NotSliceableError: the checkpoint is quantised, or its tensors have to be seen before they can be converted.
        UserError: it has no safetensors files, or damaged ones.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise NotSliceableError("it is quantised")
    files = checkpoint_files(source, config, options.get("revision"))
    entries = {key: entry for path in files for key, entry in safetensors_io.read_header(path).items()}
    model_class = class_of(auto_class, config, options.get("trust_remote_code", False))
    try:
        shapes = {key: (torch.Size(entry.shape), entry.dtype) for key, entry in entries.items()}
        model, report = without_data(model_class, config, dtype, shapes)
        recipes = _recipes(model, entries)
    except NotImplementedError as error:  # what torch raises where data are needed that are not there
        raise NotSliceableError(f"it is converted in ways that need its data ({error})") from error
    model.config.name_or_path = source
    if model.can_generate():
        with contextlib.suppress(OSError):  # few checkpoints have one
            model.generation_config = type(model.generation_config).from_pretrained(
                source, revision=options.get("revision")
            )
    _tie_equal(model, recipes, entries)
    reader = CheckpointReader(model, entries, recipes)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            path, _, attribute = name.rpartition(".")
            whole = torch.empty_like(buffer, device="cpu")
            reader.read(name, whole)
            model.get_submodule(path)._buffers[attribute] = whole
    return model, report, reader


def _tensors(model: nn.Module, *, with_aliases: bool = False) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=not with_aliases)
    yield from model.named_buffers(remove_duplicate=not with_aliases)


def _tie_equal(model: PreTrainedModel, recipes: dict[str, _Recipe], entries: dict[str, Entry]) -> None:
    """Tie weights that are in the checkpoint twice, if they are equal there; transformers would compare their data.

    Args:
        model: without data.
        recipes: how each weight is made.
        entries: the checkpoint's tensors.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in recipes and source in recipes:
            pair = [recipes[name] for name in (target, source)]
            if any(recipe.convert for recipe in pair):
                raise NotSliceableError(f"{target} and {source} are tied and converted")
            if not safetensors_io.equal(*(entries[recipe.keys[0]] for recipe in pair)):
                del model.all_tied_weights_keys[target]
    model.tie_weights(recompute_mapping=False)


def class_of(
    auto_class: type[_BaseAutoModelClass], config: PreTrainedConfig, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The model class that ``auto_class`` picks for ``config``.

    Args:
        auto_class: such as ``AutoModelForCausalLM``.
        config: of the model.
        trust_remote_code: let the checkpoint's own code define the class.
    """
    with torch.device("meta"):
        return type(auto_class.from_config(config, trust_remote_code=trust_remote_code))


def without_data(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> tuple[PreTrainedModel, JsonObject]:
    """``model_class.from_pretrained`` of a checkpoint of which only names, shapes and dtypes are known.

    Args:
        model_class: of transformers.
        config: the model's.
        dtype: of the weights.
        tensors: shape and dtype of the checkpoint's tensors, by name.

    Returns:
        Model with ``tensors`` on device meta and everything else made by the model class; transformers' report.
    """
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict={key: _NoData(shape, kept) for key, (shape, kept) in tensors.items()},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return model, report


@dataclass(frozen=True)
class _NoData:
    """A tensor of a checkpoint as `from_pretrained` sees it: it can be "read" and cast, and comes without data."""

    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, _: object) -> _NoData:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def _recipes(model: PreTrainedModel, entries: dict[str, Entry]) -> dict[str, _Recipe]:
    """How each weight in ``model.state_dict()`` is made, by transformers' rules for this model class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    weights = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    recipes: dict[str, _Recipe] = {}
    to_convert: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
        if name not in weights and key in weights:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, weights)
        if name in weights and pattern is None:
            recipes[name] = _Recipe((key,), None)
        elif name in weights:
            to_convert.setdefault(name, []).append((key, pattern))
    for name, sources in to_convert.items():

        def convert(
            tensors: dict[str, Tensor], name: str = name, sources: list[tuple[str, str]] = sources
        ) -> dict[str, Tensor]:
            rule = copy.deepcopy(by_pattern[sources[0][1]])
            for key, pattern in sources:
                rule.add_tensor(name, key, pattern, tensors[key])
            weights = rule.convert(name, model=model, config=model.config)
            return {target: value[0] if isinstance(value, list) else value for target, value in weights.items()}

        recipe = _Recipe(tuple(key for key, _ in sources), convert)
        no_data = {key: torch.empty(entries[key].shape, dtype=entries[key].dtype, device="meta") for key in recipe.keys}
        recipes |= dict.fromkeys(convert(no_data), recipe)
    return recipes

"""LoRA and prefix tuning: the few weights that peft adds to a model are trained, those of the model are frozen.

peft makes the modules, and reads what is saved. Two things are done here: fresh values are a function of (run seed,
name of the weight), so that all ranks and layouts have the same ones, whether a model comes with data or without; and
no dtype is cast inside LoRA's modules, for weights of all variants come in the dtype of the forward pass already.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from mezo_dist.config.schema import ModelKind, PeftConfig
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.distributed.communicator import OutOfStepError
from mezo_dist.engines.probe import FlatLossError
from mezo_dist.errors import LostRankError, UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.models.sliced_checkpoint import WeightSource

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel, PrefixTuningConfig
    from transformers import PreTrainedModel

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX_STD = 0.02
"""Standard deviation of fresh prefixes (keys and values of virtual tokens)."""
_ADAPTER = "default"
_INSTEAD = "use model.peft.method: lora"
_COPY = f".modules_to_save.{_ADAPTER}."
LOADERS: Mapping[ModelKind, str] = {
    "causal": "AutoPeftModelForCausalLM",
    "masked": "AutoPeftModel",
    "classifier": "AutoPeftModelForSequenceClassification",
}
"""Classes of peft that load what is exported."""
_TASK_TYPES: Mapping[ModelKind, str | None] = {"causal": "CAUSAL_LM", "masked": None, "classifier": "SEQ_CLS"}


def attach(
    model: PreTrainedModel,
    settings: PeftConfig,
    kind: ModelKind,
    source: WeightSource | None,
    seed: int,
    *,
    fresh: Iterable[str] = (),
    revision: str | None = None,
) -> tuple[PeftModel, WeightSource | None]:
    """``model`` with adapters, which are all that has ``requires_grad``, but for a fresh classification head.

    Args:
        model: of transformers; it is changed. Its weights may have device meta.
        settings: which adapters; ``method`` is set.
        kind: of model.
        source: what fills the weights, if they come without data.
        seed: run seed.
        fresh: names of weights of a classifier that are not from the checkpoint: they are trained, and saved.
        revision: of the model, to be named in what is saved.

    Returns:
        A model that is called as before, whose weights have other names, and what fills them under these.

    Raises:
        UserError: peft is not there, or cannot do this to this model.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"model.peft: needs peft: pip install 'mezo_dist[peft]' ({error})") from error
    base = list(model.named_parameters())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    config = _peft_config(model, settings, kind, fresh)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in ways of the past
            warnings.filterwarnings("ignore", ".*ensure_weight_tying")  # refused below
            adapted = peft.get_peft_model(model, config, _ADAPTER, autocast_adapter_dtype=False, revision=revision)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        setting = "target_modules" if settings.method == "lora" else "method"
        instead = "" if settings.method == "lora" else f"; {_INSTEAD}"
        raise UserError(
            f"model.peft.{setting}: peft cannot do this to a {type(model).__name__}: {error}{instead}"
        ) from error
    config.base_model_name_or_path = model.config.name_or_path or None
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False
            if uses[id(getattr(module.get_base_layer(), "weight", None))] > 1:
                raise UserError(
                    f"model.peft.target_modules: {name.rpartition('.')[2]} shares its weight with another module "
                    "(tie_word_embeddings); merged, its adapters would change that one, too: leave it out"
                )
    return adapted, _filled(adapted, base, source, seed)


@contextlib.contextmanager
def prefix_failures_explained(model: Any) -> Iterator[None]:
    """Within, what a model makes of a prefix that it cannot use becomes a UserError.

    A prefix is keys and values of all heads of every layer. Models whose layers keep something else between tokens
    (states of recurrences and convolutions, compressed keys, heads of other sizes) fail in their own code, each in its
    own way, or ignore it.

    Args:
        model: any; nothing happens within for models without a prefix.
    """
    if not (is_adapted(model) and model.peft_config[_ADAPTER].is_prompt_learning):
        yield
        return
    base = _class_name(model.get_base_model())
    try:
        yield
    except FlatLossError as error:
        raise UserError(
            f"model.peft.method: a {base} takes a prefix and ignores it: no loss depends on it; {_INSTEAD}"
        ) from error
    except (UserError, LostRankError, OutOfStepError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # model code may raise anything
        raise UserError(
            f"model.peft.method: a {base} has layers that keep something else than keys and values of all heads, so "
            f"that a prefix does not fit in ({type(error).__name__}: {str(error).partition(chr(10))[0]}); {_INSTEAD}"
        ) from error


def _peft_config(
    model: PreTrainedModel, settings: PeftConfig, kind: ModelKind, fresh: Iterable[str]
) -> LoraConfig | PrefixTuningConfig:
    """peft's settings.

    Args:
        model: of transformers.
        settings: of the config.
        kind: of model.
        fresh: names of weights that are not from the checkpoint.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    if settings.method == "prefix":
        if kind != "causal":
            raise UserError(f"model.peft.method: prefix needs a causal language model, and this one is {kind}")
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.num_virtual_tokens)
    modules = {name.rpartition(".")[0] for name in fresh}
    return peft.LoraConfig(
        task_type=_TASK_TYPES[kind],
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules) or None,
        # peft adds those that it knows itself, with all that is inside
        modules_to_save=sorted(m for m in modules if not {"classifier", "score"} & set(m.split("."))) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _filled(
    adapted: nn.Module, base: list[tuple[str, nn.Parameter]], source: WeightSource | None, seed: int
) -> WeightSource | None:
    """Give the weights that peft added their values, now or when `WeightSource.read` asks for them.

    Args:
        adapted: the model with adapters.
        base: names and parameters of the model before.
        source: what fills the weights, if they come without data.
        seed: run seed.
    """
    name_of = {id(parameter): name for name, parameter in base}
    dtype = base[0][1].dtype
    known: dict[str, str] = {}
    fresh: dict[str, torch.Size] = {}
    for name, parameter in adapted.named_parameters():
        original = name.replace(_COPY, ".original_module.")
        before = parameter if original == name else adapted.get_parameter(original)
        if id(before) in name_of:
            known[name] = name_of[id(before)]
            continue
        fresh[name] = parameter.shape
        parameter.data = parameter.data.to(dtype)
        if not parameter.is_meta:
            parameter.data.copy_(_initial(name, parameter.shape, seed))
    for module in adapted.modules():
        if isinstance(module, nn.ParameterDict) and len(module):  # weights that no forward of a module applies
            raise UserError("model.peft.target_modules: embeddings cannot have adapters here; leave them out")
    return None if source is None else _AdaptedSource(source, known, fresh, seed)


@final
class _AdaptedSource:
    """See `WeightSource`: ``known`` weights are those of another name in ``source``, ``fresh`` ones are made.

    Args:
        source: that of the model before.
        known: name of a weight -> its name in ``source``.
        fresh: name and shape of the weights that are drawn.
        seed: run seed.
    """

    def __init__(
        self, source: WeightSource, known: Mapping[str, str], fresh: Mapping[str, torch.Size], seed: int
    ) -> None:
        self._source, self._known, self._fresh, self._seed = source, known, fresh, seed

    def read(self, name: str, out: Tensor, offset: int = 0) -> None:
        """See `WeightSource.read`."""
        if name in self._known:
            self._source.read(self._known[name], out, offset)
            return
        whole = _initial(name, self._fresh[name], self._seed)
        out.detach().view(-1).copy_(whole.view(-1)[offset : offset + out.numel()])


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A fresh weight, fp32. LoRA begins as in peft: A uniform within 1 / sqrt(inputs), B zero, so it adds nothing.

    Args:
        name: of the weight.
        shape: of the weight.
        seed: run seed.
    """
    draw = torch.Generator().manual_seed(derive_seed(seed, "adapter", name) % 2**63)
    if "lora_B" in name:
        return torch.zeros(shape)
    if "lora_A" in name:
        return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=draw) * PREFIX_STD


def is_adapted(model: nn.Module) -> bool:
    """Whether the model comes from `attach`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def saved_weights(model: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' weights under the names that peft reads.

    Args:
        model: from `attach`.
        trained: whole weights by canonical name, those of `names_to_save`.
    """
    import peft

    if model.peft_config[_ADAPTER].is_prompt_learning:
        (prefix,) = trained.values()
        return {"prompt_embeddings": prefix}
    saved: dict[str, Tensor] = peft.get_peft_model_state_dict(model, dict(trained), save_embedding_layers=False)
    return saved


def names_to_save(model: nn.Module) -> list[str]:
    """Canonical names of all weights that are saved: adapters and a fresh head, also where they are frozen."""
    parts = ("lora_A", "lora_B", "prompt_encoder", _COPY.strip("."))
    return [name for name, _ in model.named_parameters() if any(part in name for part in parts)]


def settings_to_json(model: PeftModel) -> JsonObject:
    """The contents of ``adapter_config.json``, which names the base model."""
    config, base = model.peft_config[_ADAPTER], model.get_base_model()
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if config.task_type is None:  # peft cannot guess which class to load
        base_class = {"base_model_class": _class_name(base), "parent_library": type(base).__module__}
        data["auto_mapping"] = base_class
    return data | {"inference_mode": True}


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")  # torch renames the classes that it shards

"""Loading unmodified Hugging Face models and their tokenizers."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from mezo_dist.assets.registry import is_demo, resolve_model
from mezo_dist.config.schema import ModelConfig, ModelKind
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.errors import UserError
from mezo_dist.imports import imports_at_once
from mezo_dist.json_types import JsonObject
from mezo_dist.models import adapters, fresh_weights
from mezo_dist.models.checkpoint_files import checkpoint_files
from mezo_dist.models.identity import config_digest, tokenizer_digest
from mezo_dist.models.quantised import check_checkpoint, quantisation, settle
from mezo_dist.models.random_weights import open_random
from mezo_dist.models.sliced_checkpoint import NotSliceableError, WeightSource, materialise, open_checkpoint
from mezo_dist.models.window import num_tokens_of, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
RANDOM = "random:"
AUTO_CLASSES: dict[ModelKind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    kind: ModelKind
    window: int
    """Longest sequence that the model takes, in tokens."""
    num_tokens: int | None
    """Tokens that the model knows; None if it does not say."""
    pad_id: int
    config_digest: str
    """See `mezo_dist.models.identity`."""
    tokenizer_digest: str
    """See `mezo_dist.models.identity`."""
    source: WeightSource | None = None
    """If the parameters have device meta: what fills them (`checkpoint_reader.fill`), once an engine has cut them."""

    @property
    def loader(self) -> tuple[str, str]:
        """Package and class that load what is exported of such a model."""
        if adapters.is_adapted(self.model):
            return "peft", adapters.LOADERS[self.kind]
        return "transformers", AUTO_CLASSES[self.kind]


def load_model(config: ModelConfig, *, num_labels: int, seed: int, whole: bool = True) -> Pretrained:
    """Load model and tokenizer in ``config.weights``.

    Args:
        config: which model.
        num_labels: size of a fresh classification head.
        seed: run seed; fresh weights are drawn from it, so that all ranks draw the same.
        whole: with all weights. Without, for engines that shard, `Pretrained.source` fills what a rank owns; should the
            checkpoint have a layout that cannot be read so, it is loaded whole nevertheless, which the log says.

    Raises:
        UserError: the model cannot be found or loaded, or has no head of the wanted kind.
    """
    import_models()
    source = _source(config.name.removeprefix(RANDOM))
    options: JsonObject = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = _config(source, options)
        tokenizer = _tokenizer(source, options)
        check_checkpoint(config, hf_config, whole=whole)
        digests = config_digest(hf_config), tokenizer_digest(tokenizer)
        hf_config.return_dict = True  # outputs are asked for by name
        kind = _kind(config, hf_config)
        if kind == "masked" and tokenizer.mask_token is None:
            raise UserError(f"model.kind: the tokenizer of {config.name!r} has no mask token, which kind: masked needs")
        if kind == "classifier":
            hf_config.num_labels = num_labels
        model, report, weights = _build(config, source, kind, hf_config, seed, whole=whole)
        settle(config, model)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        where = "its folder" if Path(source).is_dir() else "the hub (no folder has that name)"
        raise UserError(
            f"model.name: {config.name!r} could not be loaded from {where} as head: {config.head}, "
            f"kind: {config.kind}: {_shortened(str(error))}"
        ) from error
    _check_complete(report, kind, config.name)
    fresh_weights.draw(model, report["missing_keys"], seed)
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    num_tokens = num_tokens_of(model)
    if num_tokens is not None and pad_id >= num_tokens:
        raise UserError(
            f"model.name: the padding token of {config.name!r} has the id {pad_id}, but the model knows {num_tokens} "
            "tokens: resize its embeddings (resize_token_embeddings), or let the tokenizer pad with another token"
        )
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    window = window_of(tokenizer, model, hf_config)
    if config.peft.method is not None:
        fresh = report["missing_keys"]
        model, weights = adapters.attach(model, config.peft, kind, weights, seed, fresh=fresh, revision=config.revision)
    if config.peft.method == "prefix":
        window -= config.peft.num_virtual_tokens
        if window < 1:
            raise UserError(f"model.peft.num_virtual_tokens: {config.peft.num_virtual_tokens} fill the model's window")
    _freeze(model, config)
    return Pretrained(model.eval(), tokenizer, kind, window, num_tokens, pad_id, *digests, weights)


def import_models() -> None:
    """Import what all models need of transformers.

    Other packages say nothing that mezo_dist says itself, or that nobody can act upon.
    """
    # Before transformers imports them, which it does where they are installed, whatever the layout and the model.
    for name in ("DeepSpeed", "torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_is_no_news)
    with imports_at_once():
        import transformers
        import transformers.modeling_utils

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what a checkpoint lacks is checked and said by `load_model`


_NO_NEWS = (
    "Setting accelerator to CPU",  # DeepSpeed
    "**** You are using ZeRO with an untested optimizer",  # DeepSpeed, of torch's SGD, which is tested here
    "Failed to load ",  # kernels of torchao and bitsandbytes for other devices
    "<enum '",  # torchao's enumerations are registered in a way of the past
)


def _is_no_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone.

    Raises:
        UserError: there is none.
    """
    try:
        options: JsonObject = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        return _tokenizer(_source(config.name.removeprefix(RANDOM)), options)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.name: {config.name!r} could not be loaded: {_shortened(str(error))}") from error


def norms_and_window(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], int]:
    """Shell patterns for the weights of a model's norms (none if it has no norms), and the longest sequence that it
    takes, from its config alone.

    Raises:
        UserError: it has no language-model head.
    """
    import transformers

    source = _source(config.name.removeprefix(RANDOM))
    hf_config = _config(source, {"revision": config.revision, "trust_remote_code": config.trust_remote_code})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(hf_config, trust_remote_code=config.trust_remote_code)
    _kind(config, hf_config)
    window = window_of(tokenizer, model, hf_config)
    names = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    if names and all("norm" in name.rpartition(".")[2] for name in names):
        return ["*norm*"], window
    return sorted({f"*{name.rpartition('.')[2]}.*" for name in names if not name.rpartition(".")[2].isdigit()}), window


def is_on_hub(config: ModelConfig) -> bool:
    """The model is in no local folder; the hub's cache holds it, or will."""
    return not Path(_source(config.name.removeprefix(RANDOM))).exists()


def fetch(config: ModelConfig) -> None:
    """Put what a model on the hub consists of into the hub's cache; `load_model` tells of what is wrong with it."""
    source = config.name.removeprefix(RANDOM)
    options: JsonObject = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with contextlib.suppress(UserError, OSError, ValueError):
        hf_config = _config(source, options)
        _tokenizer(source, options)
        if source == config.name:
            checkpoint_files(source, hf_config, config.revision)


def _source(name: str) -> str:
    """What ``from_pretrained`` takes: a folder or a hub name."""
    if is_demo(name):
        return str(resolve_model(name))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth"):
        raise UserError(
            f"model.name: {name} is a single file; name a folder with config.json, tokenizer and model.safetensors, as "
            "save_pretrained writes it"
        )
    if path.is_dir() or path.suffix == ".json":
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no hub name looks like that
        where = "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"
        raise UserError(f"model.name: folder {name} does not exist{where}")
    return name


def _config(source: str, options: JsonObject) -> PreTrainedConfig:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # whatever it stumbles on in files from anywhere
        raise ValueError(f"its config: {error}") from error


def _tokenizer(source: str, options: JsonObject) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; for random weights with a config alone, one that takes every byte for a token."""
    import transformers

    if Path(source).is_file():
        log.info("%s is a config alone: texts are cut into bytes", source)
        return transformers.ByT5Tokenizer()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # as above
        raise ValueError(f"its tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one for some architectures
        raise ValueError("it has no tokenizer: save the model's tokenizer there, too (tokenizer.save_pretrained)")
    if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
        raise ValueError(
            "its tokenizer leaves out merges at random (BPE dropout), so that a text has other tokens each time; "
            "set model.dropout to null in tokenizer.json"
        )
    return tokenizer


def _build(
    config: ModelConfig, source: str, kind: ModelKind, hf_config: PreTrainedConfig, seed: int, *, whole: bool
) -> tuple[PreTrainedModel, JsonObject, WeightSource | None]:
    """The model; transformers' report of weights that the checkpoint lacks, which were drawn from ``seed``; its source.

    A shape that does not match is reported, not raised: the caller's message can tell names.

    Args:
        config: which model.
        source: folder or hub name.
        kind: of model.
        hf_config: config of transformers.
        seed: run seed.
        whole: with all weights.
    """
    import transformers

    auto_class = getattr(transformers, AUTO_CLASSES[kind])
    dtype = getattr(torch, config.weights)
    if config.name.startswith(RANDOM):
        model, report, weights = open_random(auto_class, hf_config, dtype, seed, config.trust_remote_code)
        if whole:
            materialise(model, weights)
        return model, report, None if whole else weights
    options: JsonObject = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "fresh head") % 2**63)
        if not whole:
            try:
                return open_checkpoint(auto_class, source, hf_config, dtype, **options)
            except NotSliceableError as reason:
                log.warning("%s is loaded whole on every rank before it is cut: %s", config.name, reason)
        checkpoint_files(source, hf_config, config.revision)  # only to check them: transformers looks for itself
        options |= {"config": hf_config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if (how := quantisation(config)) is not None:
            options["quantization_config"] = how
        options["use_safetensors"] = True  # a checkpoint may come from anybody, and a .bin file is a pickle
        return *auto_class.from_pretrained(source, **options), None


def _check_complete(report: JsonObject, kind: ModelKind, name: str) -> None:
    """Raises UserError if a checkpoint lacks weights, or has some of another shape.

    Args:
        report: transformers'.
        kind: of model.
        name: of the checkpoint, for messages.
    """
    missing = _shortened(", ".join(sorted(report["missing_keys"])))
    misshapen = _shortened(", ".join(sorted(key for key, *_ in report["mismatched_keys"])))
    if misshapen:
        fix = "; a head has as many outputs as classes: give the task as many labels, or start from the base model"
        raise UserError(
            f"model.name: in the checkpoint {name!r} these weights have another shape than needed: {misshapen}"
            f"{fix if kind == 'classifier' else ''}"
        )
    if missing and kind != "classifier":
        raise UserError(f"model.kind: the checkpoint {name!r} lacks weights that kind: {kind} needs: {missing}")
    if missing:
        log.info("fresh weights, drawn from the run seed: %s", missing)


def _freeze(model: nn.Module, config: ModelConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    for setting, patterns in (("trainable", config.trainable), ("freeze", config.freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UserError(f"model.{setting}: {pattern!r} matches no weight; names look like {names[:3]}")
    for name, tensor in model.named_parameters():
        is_base = config.peft.method is not None and not tensor.requires_grad
        tensor.requires_grad_(not is_base and _matches(name, config.trainable) and not _matches(name, config.freeze))
    if not any(tensor.requires_grad for tensor in model.parameters()):
        raise UserError(
            f"model.freeze: {list(config.freeze)} freezes every weight of model.trainable {list(config.trainable)}; "
            "nothing is left to train"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kind(config: ModelConfig, hf_config: PreTrainedConfig) -> ModelKind:
    if config.head == "classifier":
        return "classifier"
    if config.kind != "auto":
        return config.kind
    architectures = getattr(hf_config, "architectures", None) or []
    if any("MaskedLM" in name for name in architectures):
        return "masked"
    if any("CausalLM" in name or "LMHead" in name for name in architectures):
        return "causal"
    raise UserError(
        f"model.kind: the checkpoint {config.name!r} ({', '.join(architectures) or 'of unknown kind'}) is neither a "
        "causal nor a masked language model; set model.head: classifier, or model.kind if it is one nevertheless"
    )


def _shortened(text: str) -> str:
    """At most 400 characters: messages of transformers can name every model that it knows."""
    return textwrap.shorten(text, 400, placeholder=" ...")

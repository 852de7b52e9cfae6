"""Shapes of models whose blocks are all alike, from a line of text for each of their units, and a config.json.

A template lists modules as the model's class in transformers names them, with their weights in letters:

    self_attn.q_proj=q,h!attention_bias   a linear layer of q x h, with a bias if the config says ``attention_bias``
    attn.c_attn=h>3h!                     a layer whose weight is stored transposed (``Conv1D``), with a bias always
    input_layernorm=h                     a norm, here without a bias
    embed_tokens=@v,h                     an embedding (``@@``: of a class of its own, of which variants are made whole)
    ?embeddings_project=h,w!              a unit that is there if w is not h

The letters are `LETTERS`; ``q+2k`` is a sum. What a template does not say makes it unusable for a config: if a size
is left to the class's defaults, or one of the settings in ``plain`` is changed, transformers must be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mezo_dist.errors import UserError
from mezo_dist.planning.shapes import ModelShape, ModuleKind, ModuleShape, UnitShape, WeightShape, widest_layer

Config = Mapping[str, Any]
MOST_LAYERS = 2_000
LETTERS: dict[str, tuple[str, ...]] = {
    "h": ("hidden_size", "n_embd", "n_embed", "dim"),
    "v": ("vocab_size",),
    "p": ("max_position_embeddings", "n_positions"),
    "t": ("type_vocab_size",),
    "w": ("embedding_size",),
    "b": ("position_buckets",),
}
"""Sizes that templates use, and their names in a config. Besides: f, features inside the feed-forward part; d,
features of a head; q and k, those of all heads of queries and of keys."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
_MODULE = re.compile(r"([\w.]+)=(@*)([\w+,>]+)(!\w*)?")
_TERM = re.compile(r"(\d*)([a-z])")


@dataclass(frozen=True)
class Template:
    """A family of models."""

    units: tuple[str, ...]
    """Modules of each unit in front of the blocks; the first one has the embedding of tokens."""
    blocks: str
    """Name of the list of blocks."""
    block: str
    """Modules of a block."""
    last: tuple[str, ...]
    """Units after the blocks, but for the output head."""
    head: str = "lm_head=v,h"
    """The layer that is tied to the embedding, or is the last unit."""
    tied: bool = False
    """``tie_word_embeddings``, where a config does not say it."""
    inner: str | None = "intermediate_size"
    """The config's name of f; None: templates do not use it."""
    needs: tuple[str, ...] = ()
    """Further settings that a config must say, for the class has defaults of its own."""
    bias_apart: bool = False
    """The bias of a tied head is a weight of the module around it."""
    head_first: bool = False
    """The class names the tied head before the embedding."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """Settings that switch biases, where a config does not say them."""
    plain: Mapping[str, object] = field(default_factory=dict)
    """Settings, and the values that they must have where a config says them."""


def number(config: Config, key: str, default: int | None = None) -> int:
    """A size: a whole number above zero.

    Args:
        config: contents of a config.json.
        key: name of the size.
        default: what it is if it is not given, or null.

    Raises:
        UserError: it is none.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"MODEL: its config says {key}: {value!r}, which must be a whole number above 0")
    return value


def num_layers(config: Config, key: str = "num_hidden_layers") -> int:
    """The number of blocks.

    Args:
        config: contents of a config.json.
        key: its name there.

    Raises:
        UserError: more than any model has, whose weights would be listed for minutes.
    """
    layers = number(config, key)
    if layers > MOST_LAYERS:
        raise UserError(f"MODEL: its config says {key}: {layers:,}, and plans are made for {MOST_LAYERS:,}")
    return layers


def num_heads(config: Config, key: str = "num_attention_heads") -> tuple[int, int]:
    """Heads of queries, and of keys and values.

    Args:
        config: contents of a config.json.
        key: name of the heads of queries there.

    Raises:
        UserError: they do not go together.
    """
    heads = number(config, key)
    kv_heads = number(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"MODEL: its config says num_key_value_heads: {kv_heads}, which must divide "
                        f"{key}: {heads}")  # fmt: skip
    return heads, kv_heads


def shape_by_template(template: Template, config: Config, name: str) -> ModelShape | None:
    """The shape of a model; None if the template does not say enough for this config.

    Args:
        template: of its family.
        config: contents of its config.json.
        name: of the model, for people.

    Raises:
        UserError: a size is no whole number above zero.
    """
    layers_at, heads_at = _name(config, LAYERS), _name(config, HEADS)
    if layers_at is None or heads_at is None or not _covers(template, config):
        return None
    layers, (heads, kv_heads) = num_layers(config, layers_at), num_heads(config, heads_at)
    sizes = _sizes(template, config, heads, kv_heads)
    if config.get("head_dim") is None and sizes["h"] % heads:
        return None  # refused by some classes, rounded down by others
    flags = {key: bool(usual if config.get(key) is None else config[key]) for key, usual in template.flags.items()}

    def unit(text: str, prefix: str = "", *, is_block: bool = False) -> UnitShape:
        return UnitShape(tuple(_modules(text, prefix, sizes, flags)), is_block=is_block)

    first, *others = (unit(text) for text in template.units if not text.startswith("?"))
    if sizes.get("w") not in (None, sizes["h"]):
        others += [unit(text[1:]) for text in template.units if text.startswith("?")]
    blocks = [unit(template.block, f"{template.blocks}.{i}.", is_block=True) for i in range(layers)]
    ends = [*(unit(text) for text in template.last), unit(template.head)]
    if config.get("tie_word_embeddings", template.tied):
        (head,) = ends.pop().modules
        first = _tied(first, head, template)
    units = (first, *others, *blocks, *ends)
    return ModelShape(
        name, units, hidden=sizes["h"], inner=widest_layer(units, sizes["h"]), layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=sizes["d"], vocabulary=sizes["v"], window=sizes.get("p", 2**20),
    )  # fmt: skip


def _covers(template: Template, config: Config) -> bool:
    """Whether ``config`` says all that ``template`` needs, and nothing that would change the model beyond it."""
    letters = _letters(template)
    needs = [*template.needs, *([template.inner] if template.inner else [])]
    needs += ["num_key_value_heads"] if "k" in letters else []
    sizes = [LAYERS, HEADS, *(names for letter, names in LETTERS.items() if letter in letters)]
    has_sizes = all(sum(config.get(name) is not None for name in names) == 1 for names in sizes)  # not two names of one
    is_plain = all(config.get(key, value) in (value, None) for key, value in template.plain.items())
    return has_sizes and is_plain and all(config.get(key) is not None for key in needs)


def _sizes(template: Template, config: Config, heads: int, kv_heads: int) -> dict[str, int]:
    """By letter: those that ``template`` uses, and p if the config says it.

    Args:
        template: of the model's family.
        config: contents of its config.json.
        heads: of queries.
        kv_heads: of keys and values.
    """
    used = [(letter, _name(config, names)) for letter, names in LETTERS.items() if letter in {"p", *_letters(template)}]
    sizes = {letter: number(config, key) for letter, key in used if key is not None}
    d = number(config, "head_dim", max(1, sizes["h"] // heads))
    inner = {"f": number(config, template.inner)} if template.inner else {}
    return {**sizes, **inner, "d": d, "q": heads * d, "k": kv_heads * d}


def _name(config: Config, names: Iterable[str]) -> str | None:
    """The first of ``names`` that the config says."""
    return next((name for name in names if config.get(name) is not None), None)


def _letters(template: Template) -> set[str]:
    """The letters of all sizes in a template, h and v among them."""
    text = " ".join((*template.units, template.block, *template.last, template.head))
    return {"h", "v"} | {term[2] for match in _MODULE.finditer(text) for term in _TERM.finditer(match[3])}


def _tied(first: UnitShape, head: ModuleShape, template: Template) -> UnitShape:
    """The unit of the embedding, which is the matrix of the head, too.

    Args:
        first: the unit of the embedding.
        head: what the head would be without it.
        template: of the model's family.
    """
    table, bias = first.modules[0].weights[0], head.weights[1:]
    around = [ModuleShape("vector", bias)] if template.bias_apart else []
    end = (*around, ModuleShape("linear", (table, *bias)))
    return UnitShape((*end, *first.modules) if template.head_first else (*first.modules, *end), stays=True)


def _modules(text: str, prefix: str, sizes: Mapping[str, int], flags: Mapping[str, bool]) -> Iterable[ModuleShape]:
    """The modules that a line of a template lists.

    Args:
        text: the line.
        prefix: that all names begin with.
        sizes: by letter.
        flags: settings that switch biases.
    """
    for entry in text.split():
        match = _MODULE.fullmatch(entry)
        assert match, entry
        name, mark, letters, bias = match[1], match[2], match[3], match[4]
        shape = tuple(
            sum(int(m[1] or 1) * sizes[m[2]] for m in _TERM.finditer(size)) for size in re.split("[,>]", letters)
        )
        kind: ModuleKind = "linear" if len(shape) > 1 else "vector"
        if mark:
            kind = "embedding" if mark == "@" else "other"
        weights = [WeightShape(f"{prefix}{name}.weight", shape)]
        if bias and (bias == "!" or flags[bias[1:]]):
            weights.append(WeightShape(f"{prefix}{name}.bias", shape[-1:] if ">" in letters else shape[:1]))
        yield ModuleShape(kind, tuple(weights))

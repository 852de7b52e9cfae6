"""What forward passes in lock step hold, place by place: read off the code of transformers' blocks, and measured.

While a module is served, the passes that wait for it hold what their code has not let go of, and those that have gone
on hold what they computed since, and the arguments of this call (the hub keeps those of all calls until the last one is
served). One pass runs, with the temporaries of the code between this module and the next. So with P passes a place
takes ``(P - 1) * max(waiting, gone on) + running``, and a block the most of its places.

Assumptions: attention is torch's scaled_dot_product_attention, without a matrix of scores; experts are computed by
grouped products over sorted tokens (transformers' default), so that routing does not matter; a mask of one byte per
pair of tokens exists where samples are padded, and attention copies it as numbers; CUDA kernels have no more
temporaries than those of the CPU, on which this was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mezo_dist.engines.waiting import numbers_held
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape

FP32 = 4


@dataclass(frozen=True)
class Place:
    """One module of a block, in bytes per token of a pass."""

    name: str
    """The end of the module's name."""
    waiting: float
    """Of a pass that waits for it."""
    running: float
    """Of the pass that is being served, at most, until it gets to the next module."""
    output: float
    """Of what the module gives."""
    kept: float = 0.0
    """Of arguments that a pass that has gone on would have let go of."""
    gone_on: float = 0.0
    """Of a pass that was served, while others still wait; filled in by `block_places`."""

    def bytes_of(self, passes: int) -> float:
        """Bytes per token with so many passes in lock step."""
        return (passes - 1) * max(self.waiting, self.gone_on) + self.running


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token of the vectors that a pass holds."""

    h: float
    """Of the residual stream."""
    f: float
    """Inside the feed-forward part."""
    q: float
    """Queries."""
    k: float
    """Keys, or values."""
    mask: float
    """The row of the mask; 0 without one."""
    mask_copy: float
    """The same as numbers, for the attention kernel."""
    rotary: float
    """Sine and cosine, which all samples of a pass share."""
    norm: float
    """Temporaries of an RMS norm, beside its output: fp32 copies."""


def _sizes(shape: ModelShape, setting: Setting) -> _Sizes:
    c = setting.pass_bytes
    is_masked = setting.is_padded and setting.micro_batch > 1
    is_rotary = shape.block_kind == "gated"
    return _Sizes(
        h=shape.hidden * c,
        f=shape.inner * c,
        q=shape.heads * shape.head_dim * c,
        k=shape.kv_heads * shape.head_dim * c,
        mask=setting.tokens if is_masked else 0,
        mask_copy=setting.tokens * c if is_masked else 0,
        rotary=2 * shape.head_dim * c / setting.micro_batch if is_rotary else 0,
        norm=2 * shape.hidden * FP32 if c < FP32 else shape.hidden * FP32,
    )


def block_places(shape: ModelShape, setting: Setting) -> list[Place]:
    """The places of one block of ``shape``, at the sizes of ``setting``.

    For the blocks of Llama (with grouped-query attention, experts, norms of queries) and OPT these are exact up to
    small tensors. For any other architecture: one place, an upper estimate.

    Passes wait only for modules that the engine has hooked: where weights are whole and computed with as they are,
    those with trainable weights. The code between two of them runs in one go.
    """
    s = _sizes(shape, setting)
    if shape.block_kind == "unknown":
        held = numbers_held(shape.hidden, shape.inner) * setting.pass_bytes + s.mask
        return [Place("block (estimated)", held, held + 3 * s.f + s.mask_copy, s.f, gone_on=held)]
    places = list(_gated(shape, s) if shape.block_kind == "gated" else _plain(s))
    if getattr(setting.algorithm, "per_sample", False):
        places = [_per_sample(place, has_bias=shape.block_kind == "plain") for place in places]
    hooked = _merged(places, _hooked(shape, setting))
    following = [*hooked[1:], *hooked[:1]]
    return [replace(p, gone_on=n.waiting + p.kept) for p, n in zip(hooked, following, strict=True)]


def _hooked(shape: ModelShape, setting: Setting) -> set[str] | None:
    """Ends of the names of a block's modules that passes wait for; None: all."""
    if setting.is_sharded or setting.compute is not None:
        return None
    blocks = [unit for unit in shape.units if unit.is_block]
    weights = [m.weights[0] for unit in blocks for m in unit.modules if any(w.trainable for w in m.weights)]
    return {weight.name.rsplit(".", 2)[-2] for weight in weights}


def _merged(places: list[Place], hooked: set[str] | None) -> list[Place]:
    """Only the places that passes wait for, with what runs between them. If there are none in a block, its first place
    stands for the end of the block before."""
    if hooked is None or not any(place.name in hooked for place in places):
        return places if hooked is None else [_run_through(places)]
    first = next(i for i, place in enumerate(places) if place.name in hooked)
    merged: list[Place] = []
    for place in (*places[first:], *places[:first]):
        if place.name in hooked:
            merged.append(place)
        else:
            merged[-1] = replace(merged[-1], running=max(merged[-1].running, place.running))
    return merged


def _run_through(places: list[Place]) -> Place:
    """A block without a place to wait: it runs in one go."""
    return replace(places[0], name="block", kept=0.0, running=max(place.running for place in places))


def _per_sample(place: Place, *, has_bias: bool) -> Place:
    """The same with directions per sample, whose part is added to what the module gives: out of place, for the matrix
    and for the bias, while the output of the pass before is still held."""
    additions = 3 + has_bias
    return replace(place, running=max(place.running, place.waiting + additions * place.output))


def at_boundary(shape: ModelShape, setting: Setting) -> float:
    """Bytes per token of a pass that waits for the first module of a block: the embeddings, which the model's forward
    keeps to its end, and the block's input."""
    s = _sizes(shape, setting)
    embeddings = 1 if shape.block_kind == "gated" else 2
    input_ = s.h if shape.layers > 1 or embeddings > 1 else 0.0  # a first block's input is the embedding itself
    return embeddings * s.h + input_ + s.rotary + s.mask


def _gated(shape: ModelShape, s: _Sizes) -> Iterator[Place]:
    """Llama's block: norm, attention with rotary positions, norm, and gate, up and down projections or experts."""
    base = (2 if shape.layers > 1 else 1) * s.h + s.rotary + s.mask  # the embeddings and the block's input
    repeated = 2 * s.q if s.mask and s.k < s.q else 0.0  # with a mask, keys and values are repeated for every query
    yield Place("input_layernorm", base, base + s.h + s.norm, s.h)
    inside = base + s.h
    yield Place("q_proj", inside, inside + s.q, s.q)
    yield Place("k_proj", inside + s.q, inside + s.q + s.k, s.k)
    qkv = inside + s.q + 2 * s.k
    yield Place("v_proj", qkv - s.k, qkv + max(3 * s.q, repeated + s.q + s.mask_copy), s.k)
    yield Place("o_proj", qkv + s.q, qkv + s.q + s.h, s.h, kept=s.q)
    yield Place("post_attention_layernorm", base + s.h, base + 2 * s.h + s.norm, s.h)
    inside = base + 2 * s.h
    if shape.experts > 1:
        through = shape.active_experts * (s.h + 4 * s.f)  # sorted tokens, gate and up, their activation, the product
        yield Place("gate", inside, inside, 0)
        yield Place("experts", inside, inside + through, s.h)
        return
    yield Place("gate_proj", inside, inside + 2 * s.f, s.f)
    yield Place("up_proj", inside + s.f, inside + 3 * s.f, s.f)
    yield Place("down_proj", inside + s.f, inside + s.f + 2 * s.h, s.h, kept=s.f)


def _plain(s: _Sizes) -> Iterator[Place]:
    """OPT's block: norm, attention, norm, and two layers."""
    base = 3 * s.h + s.mask  # token and position embeddings, and the block's input
    yield Place("self_attn_layer_norm", base, base + s.h, s.h)
    inside = base + s.h
    yield Place("q_proj", inside, inside + 2 * s.q, s.q)
    yield Place("k_proj", inside + s.q, inside + s.q + s.k, s.k)
    qkv = inside + s.q + 2 * s.k
    yield Place("v_proj", qkv - s.k, qkv + s.q + s.mask_copy, s.k)
    yield Place("out_proj", qkv + s.q, qkv + s.q + s.h, s.h, kept=s.q)
    inside = base + s.h
    yield Place("final_layer_norm", inside, inside + s.h, s.h)
    yield Place("fc1", inside + s.h, inside + s.h + 2 * s.f, s.f, kept=s.h)
    yield Place("fc2", inside + s.f, inside + s.f + 2 * s.h, s.h, kept=s.f)

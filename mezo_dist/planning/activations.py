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
from dataclasses import dataclass

from mezo_dist.engines.waiting import numbers_held
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape

FP32 = 4


@dataclass(frozen=True)
class Place:
    """One module of a block, in bytes per token of a pass."""

    name: str
    waiting: float
    """Of a pass that waits for it."""
    gone_on: float
    """Of a pass that was served, while others still wait."""
    running: float
    """Of the pass that is being served, at most, until it waits again."""

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
    """
    s = _sizes(shape, setting)
    if shape.block_kind == "gated":
        return list(_gated(shape, s))
    if shape.block_kind == "plain":
        return list(_plain(s))
    held = numbers_held(shape.hidden, shape.inner) * setting.pass_bytes + s.mask
    return [Place("block (estimated)", held, held, held + 3 * s.f + s.mask_copy)]


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
    yield Place("input norm", base, base + s.h, base + s.h + s.norm)
    qkv = base + s.h + s.q + 2 * s.k
    rotating = 3 * s.q
    attending = repeated + s.q + s.mask_copy
    attended = qkv + s.q
    yield Place("values", qkv - s.k, attended, qkv + max(rotating, attending))
    yield Place("output", attended, base + s.h + s.q, attended + s.h)
    yield Place("second norm", base + s.h, base + 2 * s.h, base + 2 * s.h + s.norm)
    inside = base + 2 * s.h
    if shape.experts > 1:
        through = shape.active_experts * (s.h + 4 * s.f)  # sorted tokens, gate and up, their activation, the product
        yield Place("experts", inside, inside, inside + through)
        return
    yield Place("gate", inside, inside + s.f, inside + 2 * s.f)
    yield Place("up", inside + s.f, inside + s.f, inside + 3 * s.f)
    yield Place("down", inside + s.f, 2 * s.h + s.f, inside + s.f + 2 * s.h)


def _plain(s: _Sizes) -> Iterator[Place]:
    """OPT's block: norm, attention, norm, and two layers."""
    base = 3 * s.h + s.mask  # token and position embeddings, and the block's input
    yield Place("attention norm", base, base + s.h, base + s.h)
    qkv = base + s.h + s.q + 2 * s.k
    attended = qkv + s.q
    yield Place("values", qkv - s.k, attended, qkv + s.q + s.mask_copy)
    yield Place("output", attended, base + s.h + s.q, attended + s.h)
    yield Place("second norm", base + s.h, base + 2 * s.h, base + 2 * s.h)
    inside = base + s.h
    yield Place("first layer", inside + s.h, inside + s.h + s.f, inside + s.h + 2 * s.f)
    yield Place("second layer", inside + s.f, 3 * s.h + s.f, inside + s.f + 2 * s.h)

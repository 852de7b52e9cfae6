"""Decoding: token by token, in lock step with other forward passes, by ``generate`` of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mezo_dist.directions import devices
from mezo_dist.directions.seeds import derive_seed
from mezo_dist.engines.lockstep.passes import any_goes_on
from mezo_dist.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and when a text ends."""

    max_new_tokens: int
    """A text has no more."""
    eos_ids: tuple[int, ...]
    """A text ends before the first of these."""
    pad_id: int
    """Stands after the end of a text."""
    temperature: float = 0.0
    """0: the likeliest token is taken. Otherwise tokens are drawn from the softmax of logits / temperature."""
    top_k: int = 0
    """If not 0: tokens are drawn from the likeliest ones, so many."""


Ended = Callable[[Sequence[int]], bool]
"""Whether a text ends with these tokens, for other reasons than `Decoding.eos_ids` (a stop string)."""


def decode(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    decoding: Decoding,
    *,
    seeds: Sequence[int] = (),
    ended: Ended = lambda tokens: False,
) -> list[list[int]]:
    """The tokens that ``model`` writes after each prompt.

    To be called as a forward pass of an engine (or by itself). All passes that run in lock step with it, on all ranks
    that gather weights together, decode until the last of them is done, so none runs ahead of a gather.

    Args:
        model: a causal or encoder-decoder model of transformers that has ``generate``.
        inputs: ``input_ids`` and ``attention_mask``, int64 [n, length], padded on the left.
        decoding: how tokens are chosen.
        seeds: where they are drawn, one for each sample: its text is a function of seed and logits.
        ended: whether a text ends here.

    Returns:
        For each sample its new tokens, without those that end it.

    Raises:
        UserError: the model cannot generate.
    """
    if not callable(getattr(model, "generate", None)) or not getattr(model, "can_generate", lambda: True)():
        raise UserError(f"task.kind: {type(model).__name__} cannot generate text; use a causal language model")
    start = 1 if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
    texts = _Texts(decoding, start, len(inputs["input_ids"]), ended)
    choose: list[LogitsProcessor] = []
    if decoding.temperature > 0:
        choose.append(_Draw(decoding, start, seeds))
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, do_sample=False, pad_token_id=decoding.pad_id, use_cache=True
    )
    with _own_settings_aside(model):
        model.generate(  # type: ignore[operator]
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList(choose),
            stopping_criteria=StoppingCriteriaList([texts]),
            synced_gpus=False,
        )
    return texts.cut()


_aside: WeakKeyDictionary[nn.Module, tuple[GenerationConfig, int]] = WeakKeyDictionary()
"""What was put aside, and how many passes in lock step are generating now."""


@contextlib.contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Within, ``generate`` does as it is told and no more.

    It takes what it is not told (penalties, beams, a second end-of-text token) from the model's ``generation_config``.
    An end of its own would let a pass run ahead of those in lock step with it.
    """
    before: GenerationConfig
    before, passes = _aside.get(model, (getattr(model, "generation_config", None), 0))
    start = getattr(before, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    _aside[model] = before, passes + 1
    try:
        yield
    finally:
        before, passes = _aside.pop(model)
        if passes > 1:
            _aside[model] = before, passes - 1
        else:
            model.generation_config = before


class _Texts(StoppingCriteria):
    """Knows which texts have ended. To ``generate`` all of them end together, once every pass in lock step is done.

    Args:
        decoding: its settings.
        start: length of the prompts.
        num_samples: number of texts.
        ended: says whether a text has ended.
    """

    def __init__(self, decoding: Decoding, start: int, num_samples: int, ended: Ended) -> None:
        self._decoding, self._start, self._ended = decoding, start, ended
        self._lengths: list[int | None] = [None] * num_samples
        self._texts: list[list[int]] = [[] for _ in range(num_samples)]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        # The one read of a token: which text ends is for the host to say. (``generate`` then asks the device whether
        # all have ended, by a second one, behind nothing but this answer.)
        written = self._start + len(self._texts[0])
        (new,) = devices.read([input_ids[:, written:]])
        for i, tokens in enumerate(new.tolist()):
            self._texts[i] += tokens
            if self._lengths[i] is None:
                self._lengths[i] = self._length(self._texts[i])
        is_full = len(self._texts[0]) >= self._decoding.max_new_tokens
        done = not any_goes_on(not is_full and None in self._lengths)
        return torch.full((len(new),), done, dtype=torch.bool, device=input_ids.device)

    def _length(self, tokens: Sequence[int]) -> int | None:
        if tokens[-1] in self._decoding.eos_ids:
            return len(tokens) - 1
        return len(tokens) if self._ended(tokens) else None

    def cut(self) -> list[list[int]]:
        """The new tokens of each text up to its end."""
        return [tokens[:length] for tokens, length in zip(self._texts, self._lengths, strict=True)]


class _Draw(LogitsProcessor):
    """Draws tokens by Gumbel noise: the largest of logits / temperature + noise has the probability of the softmax.

    The noise is a function of the sample's seed and the place in its text, so a text does not depend on the other
    samples, nor on the number of ranks.

    Args:
        decoding: its settings.
        start: length of the prompts.
        seeds: one per sample.
    """

    def __init__(self, decoding: Decoding, start: int, seeds: Sequence[int]) -> None:
        self._decoding, self._start, self._seeds = decoding, start, seeds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._start
        logits = scores.float() / self._decoding.temperature
        if self._decoding.top_k:
            least = logits.topk(min(self._decoding.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        noise = [_gumbel(derive_seed(seed, "token", place), logits.shape[-1]) for seed in self._seeds]
        return logits + devices.upload([torch.stack(noise)], logits.device)[0]


def _gumbel(seed: int, size: int) -> Tensor:
    """fp32 [size], on the CPU, whose generator gives the same numbers everywhere."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return (-(-uniform.log()).log()).float()

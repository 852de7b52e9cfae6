"""REINFORCE in plain torch, for `rewards.py`: texts drawn from the model, whose log-probabilities have gradients.

The gradient of a prompt's expected reward E[R(text)] is E[(R(text) - b) grad log p(text)] for any b that does not
depend on the text (Williams 1992). Here k texts are drawn for each prompt, at temperature 1, and b is the mean reward
of the other k - 1 (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"). An end that the model draws
is part of its text.

`Prompts` keeps what attention remembers of a prompt (its keys and values): where all trained weights come after the
last attention of the model, no step changes it. Prompts are then computed once, for all contenders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mezo_dist.runs.build import Run
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.generation.decode import Decoding, decode
from mezo_dist.tasks.kind import Forward, Scores


@dataclass(frozen=True)
class Ends:
    """When a text ends."""

    limit: int
    """It has no more tokens."""
    tokens: frozenset[int]
    """Tokens that end it."""
    is_stopped: Callable[[Sequence[int]], bool]
    """Whether it ends with these tokens for other reasons."""

    @staticmethod
    def of(run: Run) -> Ends:
        """Those of a run's task, as `mezo_dist.tasks.generation.kind` has them."""
        task, tokenizer = run.config.task, run.pretrained.tokenizer
        named = getattr(getattr(run.pretrained.model, "generation_config", None), "eos_token_id", None)
        ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}

        def is_stopped(tokens: Sequence[int]) -> bool:
            text = tokenizer.decode(tokens, skip_special_tokens=True) if task.stop else ""
            return any(stop in text for stop in task.stop)

        return Ends(task.max_new_tokens, frozenset(ids), is_stopped)


Known = dict[tuple[int, ...], Tensor]
"""Tokens of a prompt -> keys and values of all of them but the last, [layers, 2, heads, tokens - 1, size]."""


class Prompts:
    """Keys and values of all tokens of a prompt but the last.

    Args:
        model: a causal model of transformers.
        known: what is remembered, by prompt; None: each prompt is computed every time, with gradients where they are
            enabled.
    """

    def __init__(self, model: nn.Module, known: Known | None) -> None:
        self._model, self._known = model, known

    @property
    def remembers(self) -> bool:
        """Each prompt is computed once."""
        return self._known is not None

    def cache(self, item: MicroBatch) -> DynamicCache:
        """A cache of its own for these prompts."""
        if self._known is None:
            return self._computed(item)
        self.remember([item])
        length = item.targets["prompt"].shape[1] - 1
        layers = torch.stack([_padded_left(self._known[key], length) for key in _keys(item)], dim=2)
        return DynamicCache([(keys, values) for keys, values in layers])

    @torch.no_grad()
    def remember(self, items: Sequence[MicroBatch]) -> None:
        """Compute what is not known of them."""
        for item in items:
            if self._known is None or all(key in self._known for key in _keys(item)):
                continue
            layers = self._computed(item).layers
            for row, key in enumerate(_keys(item)):
                pair = [(layer.keys[row], layer.values[row]) for layer in layers]
                table = torch.stack([torch.stack(both) for both in pair])
                self._known[key] = table[..., table.shape[-2] - len(key) + 1 :, :].clone()

    def _computed(self, item: MicroBatch) -> DynamicCache:
        ids, mask = item.targets["prompt"][:, :-1], item.targets["prompt_mask"][:, :-1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        decoder = self._model.base_model  # no logits are needed
        return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values


def _keys(item: MicroBatch) -> list[tuple[int, ...]]:
    prompts, masks = item.targets["prompt"].tolist(), item.targets["prompt_mask"].tolist()
    return [tuple(prompt[len(prompt) - sum(mask) :]) for prompt, mask in zip(prompts, masks, strict=True)]


def _padded_left(table: Tensor, length: int) -> Tensor:
    """[layers, 2, heads, length, size], zeros before what is there."""
    return nn.functional.pad(table, (0, 0, length - table.shape[-2], 0))


@dataclass
class Written:
    """Texts and tokens that training wrote, ends not counted."""

    texts: int = 0
    tokens: int = 0

    def add(self, texts: Sequence[Sequence[int]]) -> None:
        """Count these."""
        self.texts, self.tokens = self.texts + len(texts), self.tokens + sum(map(len, texts))


def writer(run: Run, prompts: Prompts, written: Written) -> Forward:
    """Writes the likeliest texts, by the package's decoding (`mezo_dist.tasks.kind.TaskKind.writer`).

    Args:
        run: its task says when texts end.
        prompts: remembers them.
        written: counts.
    """
    ends, pad_id = Ends.of(run), run.pretrained.pad_id
    decoding = Decoding(ends.limit, tuple(sorted(ends.tokens)), pad_id)

    def write(model: nn.Module, item: MicroBatch) -> Scores:
        inputs = {"input_ids": item.targets["prompt"], "attention_mask": item.targets["prompt_mask"]}
        past = {"past_key_values": prompts.cache(item)} if prompts.remembers else {}
        texts = decode(model, {**inputs, **past}, decoding, ended=ends.is_stopped)
        written.add(texts)
        nothing = torch.zeros(len(texts))
        return Scores(nothing, nothing.long(), payload(texts, ends.limit))

    return write


def payload(texts: Sequence[Sequence[int]], columns: int) -> Tensor:
    """Tokens as `mezo_dist.tasks.generation.kind.Generation` has them: fp32 [n, columns], each + 1."""
    table = torch.zeros(len(texts), columns)
    for row, tokens in zip(table, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens) + 1
    return table


def draw(
    model: nn.Module, item: MicroBatch, prompts: Prompts, repeats: int, ends: Ends, generator: torch.Generator
) -> tuple[list[list[int]], Tensor]:
    """Draw texts at temperature 1.

    Args:
        model: is called once per token; gradients flow where they are enabled.
        item: n prompts.
        prompts: gives what attention remembers of them.
        repeats: texts per prompt.
        ends: when a text ends.
        generator: of what is drawn.

    Returns:
        The tokens of ``n * repeats`` texts, those of a prompt in a row, without those that end them; and the logarithms
        of the texts' probabilities, fp32 [n * repeats].
    """
    mask, token = item.targets["prompt_mask"], item.targets["prompt"][:, -1:]
    cache, total = prompts.cache(item), torch.zeros(len(mask) * repeats)
    texts: list[list[int]] = [[] for _ in total]
    goes_on = [True] * len(texts)
    for place in range(ends.limit):
        positions = mask.sum(1, keepdim=True) - 1
        inputs = {"input_ids": token, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        log_p = model(**inputs, use_cache=True).logits[:, -1].float().log_softmax(-1)
        if place == 0:  # up to here, all texts of a prompt are the same
            cache.batch_repeat_interleave(repeats)
            mask, log_p = (tensor.repeat_interleave(repeats, dim=0) for tensor in (mask, log_p))
        token = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        total = total + torch.where(torch.tensor(goes_on), log_p.gather(1, token).squeeze(1), 0.0)
        for i, new in enumerate(token.squeeze(1).tolist()):
            if goes_on[i] and new not in ends.tokens:
                texts[i].append(new)
            goes_on[i] = goes_on[i] and new not in ends.tokens and not ends.is_stopped(texts[i])
        if not any(goes_on):
            break
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    return texts, total


def surrogate(log_probabilities: Tensor, rewards: Tensor) -> Tensor:
    """What has minus the estimate as its gradient: -mean (R - b) log p, with b the mean reward of the prompt's others.

    Args:
        log_probabilities: of texts, [k, prompts].
        rewards: of the same texts.
    """
    k = len(rewards)
    advantages = (rewards - rewards.mean(0)) * k / (k - 1)  # equals R - (sum of the others) / (k - 1)
    return -(advantages.to(log_probabilities) * log_probabilities).mean()


def reinforce(run: Run, prompts: Prompts, written: Written, lr: float, seed: int, repeats: int) -> Iterator[None]:
    """Steps of REINFORCE by Adam on the trainable weights, with the schedule and the batches of ``run``.

    Args:
        run: its joint loss is minus the reward.
        prompts: of its model.
        written: counts.
        lr: learning rate.
        seed: of what is drawn.
        repeats: texts per prompt.
    """
    model, joint, schedule = run.pretrained.model, run.evaluator.joint, run.config.algorithm.schedule
    assert joint is not None
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr)
    generator, ends = torch.Generator().manual_seed(seed), Ends.of(run)
    for step in range(run.config.train.steps):
        (item,) = run.batch("minibatch", step)
        texts, log_p = draw(model, item, prompts, repeats, ends, generator)
        written.add(texts)
        # By prompt and slot: the judge sees the k-th texts of all prompts as those of one variant.
        table = torch.zeros(repeats, len(item.slots), ends.limit)
        table[:, list(item.slots)] = payload(texts, ends.limit).unflatten(0, (-1, repeats)).transpose(0, 1)
        rewards = -joint.losses(table, [item])[:, list(item.slots)]
        optimizer.param_groups[0]["lr"] = lr * schedule.factor(step, run.config.train.steps)
        optimizer.zero_grad()
        loss = surrogate(log_p.unflatten(0, (-1, repeats)).T, rewards)
        loss.backward()
        optimizer.step()
        yield

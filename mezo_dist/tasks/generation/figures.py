"""What written texts are worth, against right ones: by torchmetrics, the best over the references of a text."""

from __future__ import annotations

from collections.abc import Sequence

from mezo_dist.config.kinds.generation import GenerationMetric
from mezo_dist.errors import needs

MEANS: tuple[GenerationMetric, ...] = ("exact-match", "f1", "rouge-l")
"""Figures that are means over texts."""


def of_text(metric: GenerationMetric, text: str, references: Sequence[str]) -> float:
    """A figure of one text, from 0 to 1.

    Args:
        metric: one of `MEANS`.
        text: what was written.
        references: the right texts.
    """
    with needs("torchmetrics", f"task.metric: torchmetrics, which computes {metric}"):
        from torchmetrics.functional import text as tm

    if metric == "rouge-l":
        return max(float(tm.rouge_score(text, one, rouge_keys="rougeL")["rougeL_fmeasure"]) for one in references)
    answers: dict[str, list[str] | list[int]] = {"answer_start": [0] * len(references), "text": list(references)}
    scores = tm.squad([{"prediction_text": text, "id": "0"}], [{"answers": answers, "id": "0"}])
    return float(scores["exact_match" if metric == "exact-match" else "f1"]) / 100


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SacreBLEU's figure of all texts together, from 0 to 1.

    Args:
        texts: what was written.
        references: the right texts of each.
    """
    with needs("torchmetrics", "task.metric: torchmetrics, which computes bleu"):
        from torchmetrics.functional.text import sacre_bleu_score

    return float(sacre_bleu_score(list(texts), [list(some) for some in references]))

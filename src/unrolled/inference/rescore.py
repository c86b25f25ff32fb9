"""Scores put to use: the best of several hypotheses for each utterance, and the oddest lines of a text."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unrolled.inference.score import Score


@dataclass(frozen=True)
class Hypothesis:
    """One of several texts for the utterance `id`; `other` is its score elsewhere, as a recogniser's acoustic one."""

    id: Any
    other: float
    score: Score

    def total(self, weight: float, other_weight: float, token_bonus: float) -> float:
        """The weighted sum: other_weight * other + weight * log_prob + token_bonus * tokens."""
        return other_weight * self.other + weight * self.score.log_prob + token_bonus * self.score.tokens


def rescore(
    hypotheses: Iterable[Hypothesis], weight: float = 1.0, other_weight: float = 1.0, token_bonus: float = 0.0
) -> dict[Any, list[tuple[float, Hypothesis]]]:
    """For each utterance, in the order in which they first came, its hypotheses with their totals, the best first.

    Hypotheses of the same total stay in their order.
    """
    groups: dict[Any, list[tuple[float, Hypothesis]]] = {}
    for hypothesis in hypotheses:
        total = hypothesis.total(weight, other_weight, token_bonus)
        groups.setdefault(hypothesis.id, []).append((total, hypothesis))
    for group in groups.values():
        group.sort(key=lambda pair: -pair[0])
    return groups


def oddest(
    scores: Iterable[tuple[Any, Score]], lines: int, words: int = 3
) -> list[tuple[Any, Score, list[tuple[str, float]]]]:
    """The lines with the highest nats per token, the oddest first, each with its oddest tokens.

    Only so many are held, however many there are. Of lines that are as odd the earlier comes first, of equal ones only
    the first, and those without tokens not at all.
    """
    held: list[tuple[float, int, Any, Score]] = []
    for number, (id, score) in enumerate(scores):
        if score.text.strip() and score.tokens and not any(score.text == other.text for *_, other in held):
            heapq.heappush(held, (-score.log_prob / score.tokens, -number, id, score))
            if len(held) > lines:
                heapq.heappop(held)
    found = sorted(held, key=lambda entry: entry[:2], reverse=True)
    return [(id, score, sorted(score.per_token, key=lambda pair: pair[1])[:words]) for _, _, id, score in found]

"""Choosing among finished solutions by their answers and scores.

A vote takes canonical answers, one per candidate in the order they were drawn; None is an answer that could not be
read: it forms no group and counts in N. It gives the chosen answer, None when nobody voted. Ties go to the answer
seen first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mmrl.registry import register
from mmrl.rollout import Prompt
from mmrl.search.core import best

Answers = Sequence[str | None]


@register("answer_forms", "whole_text")
def whole_text(prompt: Prompt, text: str) -> str:
    """The whole text without blanks around it, for solutions that state no answer apart."""
    return text.strip()


def best_of_n(answers: Answers, scores: Sequence[float]) -> str | None:
    """The answer of the candidate with the highest score, the first one on ties; it may be unreadable."""
    return _aligned(answers, scores)[best(scores)]


def majority(answers: Answers) -> str | None:
    """The most frequent answer (self-consistency)."""
    counts = Counter(answer for answer in answers if answer is not None)
    # Counter and max both keep the order of first appearance, so ties go to the answer seen first.
    return max(counts, key=counts.__getitem__, default=None)


def weighted(answers: Answers, scores: Sequence[float]) -> str | None:
    """The answer with the largest sum of scores."""
    sums = support(answers, scores)
    return max(sums, key=sums.__getitem__, default=None)


def hmr(answers: Answers, scores: Sequence[float], *, share: float = 0.5) -> str | None:
    """The majority's answer if more than `share` of all N candidates gave it, else best-of-N.

    UnPRM's vote by name; its form as defined here.
    """
    chosen = majority(answers)
    if chosen and list(answers).count(chosen) > share * len(answers):
        return chosen
    return best_of_n(answers, scores)


def wrf(
    answers: Answers, scores: Sequence[float], *, weight: float = 0.5, reward: Literal["sum", "max", "mean"] = "sum"
) -> str | None:
    """The answer with the largest `wrf_support`."""
    supports = wrf_support(answers, scores, weight=weight, reward=reward)
    return max(supports, key=supports.__getitem__, default=None)


def wrf_support(
    answers: Answers, scores: Sequence[float], *, weight: float = 0.5, reward: Literal["sum", "max", "mean"] = "sum"
) -> dict[str, float]:
    """S(a) = weight n_a / N + (1 - weight) R_a / sum R, R_a the sum, maximum or mean of the scores of answer a.

    UnPRM's vote by name; its form as defined here. When all R are 0 frequency alone decides.

    Raises:
        ValueError: a negative score.
    """
    if min(scores, default=0.0) < 0:
        raise ValueError(f"wrf: score {min(scores):g} is negative; shares need scores >= 0, take a sigmoid first")
    counts = Counter(answers)
    # Answer -> R_a of the formula.
    rewards = support(answers, scores)
    if reward == "mean":
        rewards = {answer: total / counts[answer] for answer, total in rewards.items()}
    elif reward == "max":
        rewards = dict.fromkeys(rewards, -math.inf)
        for answer, score in zip(answers, scores, strict=True):
            if answer is not None:
                rewards[answer] = max(rewards[answer], score)
    sum_rewards = sum(rewards.values()) or 1.0
    supports = {}
    for answer, own_reward in rewards.items():
        supports[answer] = weight * counts[answer] / len(answers) + (1 - weight) * own_reward / sum_rewards
    return supports


def support(answers: Answers, scores: Sequence[float]) -> dict[str, float]:
    """Answer -> sum of its scores, in the order first seen."""
    sums: dict[str, float] = {}
    for answer, score in zip(_aligned(answers, scores), scores, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + score
    return sums


def _aligned(answers: Answers, scores: Sequence[float]) -> Answers:
    """The answers; raises ValueError when there is not one score for each."""
    if len(answers) != len(scores):
        raise ValueError(f"{len(answers)} answers for {len(scores)} scores; give one of each per candidate")
    return answers

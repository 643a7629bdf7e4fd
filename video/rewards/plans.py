"""Plans beside a reference plan: order-preserving matching with graded similarity (REVER)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmrl.registry import declares
from mmrl.rollout import Sample
from video.rewards.answers import video_reference
from video.rewards.turns import last_answer, turns_of

_SKILL = re.compile(r"\b(\w++)\s*+\(([^()]*+)\)")


@dataclass(frozen=True)
class Skill:
    """A verb and its arguments, such as place(cup, tray)."""

    verb: str
    arguments: tuple[str, ...] = ()


def parse_plan(text: str) -> list[Skill]:
    """The `verb(argument, ..)` of a text, in order, lower-cased."""
    found = _SKILL.findall(text.lower())
    return [Skill(verb, tuple(a.strip() for a in inside.split(",") if a.strip())) for verb, inside in found]


def similarity(a: Skill, b: Skill) -> float:
    """0 when the verbs differ, else 0.5 + 0.5 Jaccard(arguments), in [0, 1] (as defined here); empty sets agree."""
    if a.verb != b.verb:
        return 0.0
    mine, theirs = set(a.arguments), set(b.arguments)
    union = mine | theirs
    return 0.5 + 0.5 * (len(mine & theirs) / len(union) if union else 1.0)


def ordered_match(
    plan: Sequence[Skill], reference: Sequence[Skill], score: Callable[[Skill, Skill], float] = similarity
) -> float:
    """Weight M of the best matching that keeps the order: M[i,j] = max(M[i-1,j], M[i,j-1], M[i-1,j-1] + s_ij)."""
    best = [0.0] * (len(reference) + 1)
    for skill in plan:
        diagonal = 0.0
        for j, want in enumerate(reference, 1):
            above = best[j]
            best[j] = max(above, best[j - 1], diagonal + score(skill, want))
            diagonal = above
    return best[-1]


def plan_score(plan: Sequence[Skill], reference: Sequence[Skill]) -> float:
    """2 M / (len(plan) + len(reference)), in [0, 1]; 1 for equal plans (REVER; similarity as defined here).

    M / len(reference) alone could be raised by writing a longer plan.

    Raises:
        ValueError: an empty reference.
    """
    if not reference:
        raise ValueError("plan_score needs a reference of at least one skill")
    return 2 * ordered_match(plan, reference) / (len(plan) + len(reference))


@declares(reads=("texts",))
class PlanOverlap:
    """`plan_score` of the plan in `<answer>..</answer>` against `reference["plan"]`, texts such as "pick(cup)"."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample in [0, 1], 0 without an answer, None where the reference has no plan."""
        return [self._score(s) for s in samples]

    def _score(self, sample: Sample) -> float | None:
        right = video_reference(sample.prompt).get("plan")
        if right is None:
            return None
        reference = parse_plan(right if isinstance(right, str) else " ".join(right))
        if not reference:
            raise ValueError(f"prompt {sample.prompt.id!r}: no verb(arguments) in the reference plan {right!r}")
        return plan_score(parse_plan(last_answer(turns_of(sample), "tags") or ""), reference)

"""Plans beside a reference plan: order-preserving matching with graded similarity (REVER).

plan = parse_plan("pick(cup), place(cup, tray)")
plan_score(plan, parse_plan("pick(cup), place(cup, table)"))   # (1 + 0.667) / 2
"""

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
    skills = []
    for verb, inside in _SKILL.findall(text.lower()):
        arguments = [argument.strip() for argument in inside.split(",")]
        skills.append(Skill(verb, tuple(filter(None, arguments))))
    return skills


def similarity(a: Skill, b: Skill) -> float:
    """0 when the verbs differ, else 0.5 + 0.5 Jaccard(arguments), in [0, 1] (as defined here); empty sets agree."""
    if a.verb != b.verb:
        return 0.0
    union = {*a.arguments, *b.arguments}
    if not union:
        return 1.0
    shared = set(a.arguments) & set(b.arguments)
    return 0.5 + 0.5 * (len(shared) / len(union))


def ordered_match(
    plan: Sequence[Skill], reference: Sequence[Skill], score: Callable[[Skill, Skill], float] = similarity
) -> float:
    """Weight M of the best matching that keeps the order: M[i,j] = max(M[i-1,j], M[i,j-1], M[i-1,j-1] + s_ij)."""
    # best is one row of M: of the skills so far and the first j of the reference; `diagonal` is M[i-1,j-1]
    best = [0.0] * (len(reference) + 1)
    for skill in plan:
        diagonal = 0.0
        for j, reference_skill in enumerate(reference, 1):
            above = best[j]
            best[j] = max(above, best[j - 1], diagonal + score(skill, reference_skill))
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
        written = video_reference(sample.prompt).get("plan")
        if written is None:
            return None
        # a text or a list of skills
        reference = parse_plan(written if isinstance(written, str) else " ".join(written))
        if not reference:
            raise ValueError(f"prompt {sample.prompt.id!r}: no verb(arguments) in the reference plan {written!r}")
        answer = last_answer(turns_of(sample), "tags") or ""
        return plan_score(parse_plan(answer), reference)

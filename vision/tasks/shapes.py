"""Task `shapes`: count coloured shapes in a picture and reason over the counts. Every written step can be checked.

A trace is one step a line: `red = 3`, `circle = 2`, `3 + 2 = 5`, `answer 5`. Scenes of the three splits (train,
held-out, the base model's own) share no layout. Difficulty: grid, density, number of terms, conjunctions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmrl.cache import cache_root, made_once
from mmrl.registry import declares
from mmrl.rollout import Answer, Prompt, Rollout, Sample
from mmrl.seeding import numpy_generator
from vision.tasks.shapes_scene import (
    KINDS,
    WORDS,
    Question,
    count,
    count_kinds,
    draw,
    sample_question,
    sample_scene,
    solve,
)

VERSION = 1  # raise when scenes, drawing or prompts change
Kind = Literal["perception", "reasoning", "answer", "unknown"]

_N = "([0-9]{1,6})"  # bounded: Python refuses to read integers of thousands of digits
_PERCEPTION = re.compile(f"([a-z]+(?: [a-z]+)?) = {_N}")
_SUM = re.compile(rf"{_N}(?: \+ {_N})+ = {_N}")
_GAP = re.compile(rf"\| {_N} - {_N} \| = {_N}")
_ANSWER = re.compile(f"answer {_N}")


@dataclass(frozen=True)
class CheckedStep:
    """One written line: what it is by its form, and whether it holds."""

    kind: Kind
    right: bool


class ShapesTask:
    """`train` and `held_out` questions, each about a picture of its own (PNG, written once into the cache).

    grid: cells on a side, 16 pixels each. filled: least and most sprites. terms: counts that a question combines;
    two give sums and gaps, more give sums. conjunctions: terms such as `red circle` too.

    Raises:
        ValueError: sizes that do not fit.
        RuntimeError: the cached pictures are damaged.
    """

    rewards = ("shapes_answer",)
    step_rewards = ("shapes_steps",)  # the name of the reward per step that fits

    def __init__(
        self,
        train: int = 2000,
        held_out: int = 256,
        grid: int = 4,
        filled: tuple[int, int] = (10, 14),
        terms: int = 2,
        seed: int = 0,
        conjunctions: bool = False,
    ) -> None:
        if not 2 <= terms <= len(WORDS):
            raise ValueError(f"task.terms={terms}: a question combines 2 to {len(WORDS)} counts")
        settings = {
            "grid": grid, "filled": list(filled), "terms": terms, "seed": seed, "conjunctions": conjunctions,
            "train": train, "held_out": held_out, "version": VERSION,
        }  # fmt: skip
        folder = _scenes(settings)
        self.prompts, self.eval_prompts = (_read_prompts(folder, split) for split in ("train", "held_out"))

    def answer(self, prompt: Prompt) -> Answer:
        """The last line of a right trace."""
        return Answer("answer ", str(prompt.reference["answer"]))

    @staticmethod
    def step_kind(text: str) -> Kind:
        """What a line is by its form."""
        return _kind(text.strip())

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """accuracy: share of right answers. steps: share of written steps that are right. format: share of traces
        of the asked form (each count, the arithmetic, the answer)."""
        checked = [check_steps(split_steps(s.output), s.prompt.reference) for s in samples]
        written = [step.right for trace in checked for step in trace]
        formed = [is_well_formed(c, s.prompt.reference) for c, s in zip(checked, samples, strict=True)]
        right = ShapesAnswer()(samples)
        return {
            "accuracy": sum(right) / max(len(right), 1),
            "steps": sum(written) / max(len(written), 1),
            "format": sum(formed) / max(len(formed), 1),
        }


@declares(reads=("texts",))
class ShapesAnswer:
    """Outcome reward: 1 if the last line is the right answer, else 0."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One number per sample; `output` is the trace as text."""
        return [float(final_answer(s.output) == s.prompt.reference["answer"]) for s in samples]


@declares(reads=("texts",))
class ShapesSteps:
    """Step reward: 1 for a right step, 0 for a wrong one, by program."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64. Raises ValueError if the rollout carries no texts."""
        tree = rollout.tree
        if len(rollout.texts) != len(tree):
            raise ValueError(
                f"shapes steps: the rollout has {len(rollout.texts)} texts for {len(tree)} steps; this reward needs a "
                "policy that writes (rollout.texts)"
            )
        references = [p.reference for p in rollout.prompts]
        return tree_rewards(rollout.texts, tree.parent.tolist(), [references[g] for g in tree.group.tolist()])


def tree_rewards(texts: Sequence[str], parent: Sequence[int], references: Sequence[Mapping[str, Any]]) -> Tensor:
    """(N,) float64, 1 where the step's text is right after its ancestors' texts. `parent` is -1 at roots and comes
    before its children; `references` holds each step's own."""
    before: list[list[str]] = []
    out = torch.zeros(len(texts), dtype=torch.float64)
    for i, (text, above) in enumerate(zip(texts, parent, strict=True)):
        before.append([*before[above], texts[above]] if above >= 0 else [])
        out[i] = check_step(before[i], text, references[i]).right
    return out


def check_steps(steps: Sequence[str], reference: Mapping[str, Any]) -> list[CheckedStep]:
    """Judge every line of a trace, each after those before it; see `check_step`."""
    return [check_step(steps[:i], step, reference) for i, step in enumerate(steps)]


def check_step(before: Sequence[str], step: str, reference: Mapping[str, Any]) -> CheckedStep:
    """Judge one line by its form and, locally, by what came before it.

    perception `red = 3`: the picture has that count, the question asks for the term, and no line before states it
        (otherwise true but useless lines would earn step rewards).
    reasoning `3 + 2 = 5`, `| 3 - 2 | = 1`: the question's operation, on the counts written before in the question's
        order, arithmetically right, and the first of its kind. It may rest on a wrong count: that line is at fault.
    answer `answer 5`: the reference's answer, and no answer before it.
    Nothing is right after an answer. A trailing newline is ignored; any other form is unknown, never right.
    """
    line = step.removesuffix("\n")
    kind = _kind(line)
    seen = [text.removesuffix("\n") for text in before]
    kinds = [_kind(text) for text in seen]
    if kind == "unknown" or "answer" in kinds:
        return CheckedStep(kind, False)
    if kind == "answer":
        return CheckedStep(kind, final_answer(line) == reference["answer"])
    if kind == "reasoning":
        return CheckedStep(kind, "reasoning" not in kinds and _follows(line, seen, reference))
    term, _, number = line.partition(" = ")
    fresh = term in reference["terms"] and not any(text.startswith(f"{term} = ") for text in seen)
    return CheckedStep(kind, fresh and int(number) == count(reference["scene"], term))


def is_well_formed(checked: Sequence[CheckedStep], reference: Mapping[str, Any]) -> bool:
    """Whether a trace has the asked form: as many counts as terms, one line of arithmetic, the answer."""
    return [c.kind for c in checked] == ["perception"] * len(reference["terms"]) + ["reasoning", "answer"]


def final_answer(text: str) -> str | None:
    """The number on the last line if that is an answer line, without leading zeros."""
    found = _ANSWER.fullmatch(split_steps(text)[-1]) if text.strip("\n") else None
    return str(int(found[1])) if found else None


def split_steps(text: str) -> list[str]:
    """A trace as its lines; an empty text has none."""
    body = text.removesuffix("\n")
    return body.split("\n") if body else []


def _kind(line: str) -> Kind:
    if _ANSWER.fullmatch(line):
        return "answer"
    if _SUM.fullmatch(line) or _GAP.fullmatch(line):
        return "reasoning"
    found = _PERCEPTION.fullmatch(line)
    return "perception" if found and found[1] in WORDS + KINDS else "unknown"


def _follows(line: str, seen: Sequence[str], reference: Mapping[str, Any]) -> bool:
    """Whether the line is what `solve` would write from the counts stated so far."""
    stated = {m[1]: int(m[2]) for m in map(_PERCEPTION.fullmatch, reversed(seen)) if m}  # the first statement counts
    counts = [stated[term] for term in reference["terms"] if term in stated]
    if len(counts) < len(reference["terms"]):
        return False
    question = Question(reference["operation"], tuple(reference["terms"]))
    return solve(question, counts)[-2] == line


def _scenes(settings: Mapping[str, Any]) -> Path:
    """The folder of pictures and prompts made from `settings`; one process makes it, others wait."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return made_once(cache_root() / f"shapes-scenes-{key}", partial(_write_scenes, settings))


def _write_scenes(settings: Mapping[str, Any], work: Path) -> None:
    for split in ("train", "held_out"):
        rows = []
        for i in range(settings[split]):
            rng = numpy_generator("scene", settings["seed"], split, i)
            cells = sample_scene(rng, split, grid=settings["grid"], filled=tuple(settings["filled"]))
            question = sample_question(rng, terms=settings["terms"], conjunctions=settings["conjunctions"])
            Image.fromarray(draw(cells)).save(work / f"{split}-{i:05d}.png")
            rows.append(_row(split, i, question, count_kinds(cells)))
        (work / f"{split}.json").write_text(json.dumps(rows))
    (work / "settings.json").write_text(json.dumps(dict(settings), indent=1) + "\n")


def _row(split: str, index: int, question: Question, scene: Mapping[str, int]) -> dict[str, Any]:
    """One prompt as JSON, its picture by file name."""
    steps = solve(question, [count(scene, term) for term in question.terms])
    return {
        "id": f"shapes/{split}/{index}",
        "question": str(question),
        "image": f"{split}-{index:05d}.png",
        "reference": {
            "answer": steps[-1].removeprefix("answer "), "steps": steps, "operation": question.operation,
            "terms": list(question.terms), "scene": dict(scene),
        },
    }  # fmt: skip


def _read_prompts(folder: Path, split: str) -> list[Prompt]:
    try:
        rows = json.loads((folder / f"{split}.json").read_text())
        missing = [row["image"] for row in rows if not (folder / row["image"]).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} pictures are missing, the first is {missing[0]}")
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"the cached scenes in {folder} are damaged ({error}); delete that folder and run again, "
            "it is made anew in seconds"
        ) from error
    return [
        Prompt(r["id"], {"question": r["question"], "images": [str(folder / r["image"])]}, r["reference"])
        for r in rows
    ]

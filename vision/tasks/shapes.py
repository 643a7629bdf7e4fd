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

# Raise when scenes, drawing or prompts change.
VERSION = 1
Kind = Literal["perception", "reasoning", "answer", "unknown"]

# A number, bounded because Python refuses to read integers of thousands of digits.
_N = "([0-9]{1,6})"
_PERCEPTION = re.compile(f"([a-z]+(?: [a-z]+)?) = {_N}")
_SUM = re.compile(rf"{_N}(?: \+ {_N})+ = {_N}")
_GAP = re.compile(rf"\| {_N} - {_N} \| = {_N}")
_ANSWER = re.compile(f"answer {_N}")


@dataclass(frozen=True)
class CheckedStep:
    """One written line: its kind, by its form, and whether it is right."""

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
    step_rewards = ("shapes_steps",)

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
        # More terms than words could not all be distinct.
        if not 2 <= terms <= len(WORDS):
            raise ValueError(f"task.terms={terms}: a question combines 2 to {len(WORDS)} counts")
        settings = {
            "grid": grid,
            "filled": list(filled),
            "terms": terms,
            "seed": seed,
            "conjunctions": conjunctions,
            "train": train,
            "held_out": held_out,
            "version": VERSION,
        }
        folder = _scenes(settings)
        self.prompts = _read_prompts(folder, "train")
        self.eval_prompts = _read_prompts(folder, "held_out")

    def answer(self, prompt: Prompt) -> Answer:
        """The last line of a right trace."""
        return Answer("answer ", str(prompt.reference["answer"]))

    @staticmethod
    def step_kind(text: str) -> Kind:
        """The kind of a line, by its form."""
        return _kind(text.strip())

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """accuracy: share of right answers. steps: share of written steps that are right. format: share of traces
        of the asked form (each count, the arithmetic, the answer)."""
        num_steps = num_right = num_well_formed = 0
        for sample in samples:
            checked = check_steps(split_steps(sample.output), sample.prompt.reference)
            num_steps += len(checked)
            num_right += sum(step.right for step in checked)
            num_well_formed += is_well_formed(checked, sample.prompt.reference)
        return {
            "accuracy": sum(ShapesAnswer()(samples)) / max(len(samples), 1),
            "steps": num_right / max(num_steps, 1),
            "format": num_well_formed / max(len(samples), 1),
        }


@declares(reads=("texts",))
class ShapesAnswer:
    """Outcome reward: 1 if the last line is the right answer, else 0."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One number per sample; `output` is the trace as text."""
        return [float(final_answer(sample.output) == sample.prompt.reference["answer"]) for sample in samples]


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
        references = [rollout.prompts[group].reference for group in tree.group.tolist()]
        return tree_rewards(rollout.texts, tree.parent.tolist(), references)


def tree_rewards(texts: Sequence[str], parent: Sequence[int], references: Sequence[Mapping[str, Any]]) -> Tensor:
    """(N,) float64, 1 where a step's text is right after the texts before it.

    Args:
        parent: (N,) parent of each step, -1 at roots; parents come before children.
        references: the reference of each step's prompt.
    """
    texts_before: list[list[str]] = []
    rewards = torch.zeros(len(texts), dtype=torch.float64)
    for step, (text, above) in enumerate(zip(texts, parent, strict=True)):
        before = [*texts_before[above], texts[above]] if above >= 0 else []
        texts_before.append(before)
        rewards[step] = check_step(before, text, references[step]).right
    return rewards


def check_steps(steps: Sequence[str], reference: Mapping[str, Any]) -> list[CheckedStep]:
    """Judge every line of a trace, each after those before it; see `check_step`."""
    return [check_step(steps[:number], step, reference) for number, step in enumerate(steps)]


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
    earlier = [text.removesuffix("\n") for text in before]
    kinds = [_kind(text) for text in earlier]
    if kind == "unknown" or "answer" in kinds:
        return CheckedStep(kind, False)
    if kind == "answer":
        return CheckedStep(kind, final_answer(line) == reference["answer"])
    if kind == "reasoning":
        return CheckedStep(kind, "reasoning" not in kinds and _follows(line, earlier, reference))
    term, _, number = line.partition(" = ")
    is_new = not any(text.startswith(f"{term} = ") for text in earlier)
    is_right = term in reference["terms"] and is_new and int(number) == count(reference["scene"], term)
    return CheckedStep(kind, is_right)


def is_well_formed(checked: Sequence[CheckedStep], reference: Mapping[str, Any]) -> bool:
    """True for a trace of the form of the task: as many counts as terms, one line of arithmetic, the answer."""
    kinds = [step.kind for step in checked]
    return kinds == ["perception"] * len(reference["terms"]) + ["reasoning", "answer"]


def final_answer(text: str) -> str | None:
    """The number on the last line if that is an answer line, without leading zeros."""
    if not text.strip("\n"):
        return None
    match = _ANSWER.fullmatch(split_steps(text)[-1])
    return str(int(match[1])) if match else None


def split_steps(text: str) -> list[str]:
    """A trace as its lines; an empty text has none."""
    body = text.removesuffix("\n")
    return body.split("\n") if body else []


def _kind(line: str) -> Kind:
    if _ANSWER.fullmatch(line):
        return "answer"
    if _SUM.fullmatch(line) or _GAP.fullmatch(line):
        return "reasoning"
    match = _PERCEPTION.fullmatch(line)
    return "perception" if match and match[1] in WORDS + KINDS else "unknown"


def _follows(line: str, earlier: Sequence[str], reference: Mapping[str, Any]) -> bool:
    """True for a line that is the one that `solve` would write from the counts stated before."""
    stated: dict[str, int] = {}
    for text in earlier:
        match = _PERCEPTION.fullmatch(text)
        if match:
            stated.setdefault(match[1], int(match[2]))  # the first statement counts
    counts = [stated[term] for term in reference["terms"] if term in stated]
    if len(counts) < len(reference["terms"]):
        return False
    # The line before the answer, from these counts, whether they are right or not.
    question = Question(reference["operation"], tuple(reference["terms"]))
    return solve(question, counts)[-2] == line


def _scenes(settings: Mapping[str, Any]) -> Path:
    """The folder of pictures and prompts made from `settings`; one process makes it, others wait."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return made_once(cache_root() / f"shapes-scenes-{key}", partial(_write_scenes, settings))


def _write_scenes(settings: Mapping[str, Any], work: Path) -> None:
    """Write the pictures and prompts of both splits into a folder."""
    for split in ("train", "held_out"):
        rows = []
        for index in range(settings[split]):
            rng = numpy_generator("scene", settings["seed"], split, index)
            cells = sample_scene(rng, split, grid=settings["grid"], filled=tuple(settings["filled"]))
            question = sample_question(rng, terms=settings["terms"], conjunctions=settings["conjunctions"])
            Image.fromarray(draw(cells)).save(work / f"{split}-{index:05d}.png")
            rows.append(_row(split, index, question, count_kinds(cells)))
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
            "answer": steps[-1].removeprefix("answer "),
            "steps": steps,
            "operation": question.operation,
            "terms": list(question.terms),
            "scene": dict(scene),
        },
    }


def _read_prompts(folder: Path, split: str) -> list[Prompt]:
    """The prompts of a split.

    Raises:
        RuntimeError: the folder is damaged.
    """
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
    prompts = []
    for row in rows:
        inputs = {"question": row["question"], "images": [str(folder / row["image"])]}
        prompts.append(Prompt(row["id"], inputs, row["reference"]))
    return prompts

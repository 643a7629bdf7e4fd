"""Task `puzzles`: PuzzleVQA and AlgoPuzzleVQA, multiple-choice questions on pictures of patterns and algorithms."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, RowError
from mmrl.reasoning.answers import right_answer
from mmrl.reasoning.questions import Columns
from mmrl.rollout import Answer, Prompt, Sample
from vision.tasks.jsonl import answered, load_prompts, row_prompt

_COLUMNS = Columns(images="image")


class PuzzleTask:
    """Rows of either set: `id, task, image, question, options, answer` and the set's own ground truth.

    The question ends with its options as lines `(A) ..`. The reference holds `answer` (the letter), `text` (the
    option's text), `options`, and the other columns: caption, explanation, deduction (PuzzleVQA), solution (Algo).
    The split hangs on the id and the seed alone, so it stays when rows are added.

    Args:
        file: JSON-lines file of one of the sets.
        media_root: folder of the pictures, None for the file's own folder.
        eval_share: expected share of evaluation prompts, in (0, 1).
        seed: another seed, another split.
    Raises:
        ValueError: no file, no usable row, more than 5 % of bad rows, or a split with an empty side.
    """

    rewards = ("multiple_choice",)

    def __init__(self, file: str, media_root: str | None = None, eval_share: float = 0.2, seed: int = 0) -> None:
        if not 0 < eval_share < 1:
            raise ValueError(f"eval_share={eval_share}: a share between 0 and 1 leaves rows on both sides")
        root = Path(file).parent if media_root is None else Path(media_root)
        sizes: dict[Path, tuple[int, int]] = {}

        def make(row: Mapping[str, Any], name: str) -> Prompt:
            return puzzle_prompt(row, name, root, sizes)

        prompts, bad = load_prompts(file, make, max_bad=0.05)
        self.quarantined: list[Quarantined] = bad
        self.prompts: list[Prompt] = []
        self.eval_prompts: list[Prompt] = []
        for prompt in prompts:
            is_held_out = split_position(prompt.id, seed) < eval_share
            (self.eval_prompts if is_held_out else self.prompts).append(prompt)
        if not self.prompts or not self.eval_prompts:
            raise ValueError(
                f"{file}: {len(self.prompts)} training and {len(self.eval_prompts)} evaluation puzzles at "
                f"eval_share={eval_share}, seed={seed}; both sides need some, use more rows or another share or seed"
            )

    def answer(self, prompt: Prompt) -> Answer:
        """The reference's answer behind `Answer:`."""
        return Answer("Answer: ", right_answer(prompt))

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """answered: share of outputs that state an answer."""
        return {"answered": answered(samples)}


def puzzle_prompt(row: Mapping[str, Any], name: str, root: Path, sizes: dict[Path, tuple[int, int]]) -> Prompt:
    """The prompt of one puzzle.

    Raises:
        RowError: the row cannot be used, also when the answer is not exactly one of the options.
    """
    prompt = row_prompt(row, name, _COLUMNS, root, sizes)
    options, answer = prompt.inputs.get("options", []), str(prompt.reference["answer"])
    if options.count(answer) != 1:
        raise RowError(f"the answer {answer!r} is {options.count(answer)} times among the options {options}")
    if not prompt.inputs["images"]:
        raise RowError("a puzzle without picture")
    letter = string.ascii_uppercase[options.index(answer)]
    reference = {**prompt.reference, "answer": letter, "text": answer, "options": options}
    return Prompt(prompt.id, prompt.inputs, reference)


def split_position(id: str, seed: int) -> float:
    """The place of an id in [0, 1), by SHA-256 of seed and id: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{id}".encode()).digest()
    # 48 bits, which a float holds exactly
    return int.from_bytes(digest[:6], "big") / 2**48

"""Task `jsonl`: questions with pictures from JSON-lines files. Bad rows are set aside, named and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, read_rows
from mmrl.reasoning.answer_text import choice_letter, extract_answer, final_line
from mmrl.reasoning.answers import right_answer
from mmrl.reasoning.pictures import check_image, resolve
from mmrl.reasoning.questions import Columns, check_answer, read_question, told_columns
from mmrl.reasoning.rows import row_id
from mmrl.rollout import Answer, Prompt, Sample

log = logging.getLogger(__name__)


class JsonlTask:
    """Questions, pictures and answers from two files: JSON lines, `.json` or parquet.

    A row becomes `inputs = {question, images, options, history}` (paths absolute; the last two only if the row has
    some; options are lettered lines at the question's end) and `reference = {answer, every other column}`. `id` is the
    row's id, else `file:row`. The shapes of rows are `mmrl.reasoning.questions.read_question`'s;
    docs/reference/data.md shows them.

    Set aside (`quarantined`) are rows without question, with a missing or unreadable picture, an id seen before, more
    or fewer `<image>` than pictures, media or turns that no policy of pictures shows, or a model's own placeholder in
    the text.

    Args:
        train, eval: files, UTF-8.
        media_root: folder that pictures are relative to, and may not leave; embedded ones become files of the cache.
        question: column with a text or with turns; `messages`, `conversations` or `prompt` when it is missing.
        images: column with a path or a list of paths; the column `image` is read when it is missing.
        rewards: names used when the recipe lists none.
        max_bad: share of bad rows of a file, in [0, 1], above which loading fails.
        limit: usable rows to take from the start of each file, None for all.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """

    def __init__(
        self,
        train: str,
        eval: str,
        media_root: str = ".",
        question: str = "question",
        images: str = "images",
        answer: str = "answer",
        options: str = "options",
        rewards: Sequence[str] = ("math_answer",),
        max_bad: float = 0.05,
        limit: int | None = None,
    ) -> None:
        columns = Columns(question, images, answer, options)
        self.rewards = tuple(rewards)
        # Rows often share pictures, whose headers are read once.
        sizes: dict[Path, tuple[int, int]] = {}

        def make(row: Mapping[str, Any], name: str) -> Prompt:
            """The prompt of a row whose answer can be read."""
            prompt = row_prompt(row, name, columns, media_root, sizes)
            check_answer(prompt.reference["answer"], prompt.inputs.get("options", ()))
            return prompt

        self.prompts, bad_train = load_prompts(train, make, max_bad=max_bad, limit=limit)
        self.eval_prompts, bad_eval = load_prompts(eval, make, max_bad=max_bad, limit=limit)
        self.quarantined = bad_train + bad_eval
        for line in told_columns([*self.prompts, *self.eval_prompts], columns):
            log.warning("%s: %s", train, line)

    def answer(self, prompt: Prompt) -> Answer:
        """The reference's answer behind `Answer:`."""
        return Answer("Answer: ", right_answer(prompt))

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """answered: share of outputs that state an answer."""
        return {"answered": answered(samples)}


def answered(samples: Sequence[Sample]) -> float:
    """Share of outputs that state an answer, right or wrong, in [0, 1]; 0 without samples."""
    return sum(map(states_answer, samples)) / max(len(samples), 1)


def states_answer(sample: Sample) -> bool:
    """The output has an answer that rewards can read (`extract_answer`), or chooses one of the prompt's options."""
    text = str(sample.output)
    if extract_answer(text) is not None:
        return True
    options = sample.prompt.inputs.get("options")
    return bool(options and choice_letter(final_line(text), options))


def load_prompts(
    file: str | Path, make: Callable[[Mapping[str, Any], str], Prompt], *, max_bad: float, limit: int | None = None
) -> tuple[list[Prompt], list[Quarantined]]:
    """Prompts of a JSON-lines file and the rows set aside. `make(row, "file:row")` raises RowError.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """

    def prompts_of(row: Mapping[str, Any], name: str) -> list[Prompt]:
        return [make(row, name)]

    return read_rows(file, prompts_of, max_bad=max_bad, key=lambda prompt: prompt.id, limit=limit)


def row_prompt(
    row: Mapping[str, Any], name: str, columns: Columns, root: str | Path, sizes: dict[Path, tuple[int, int]]
) -> Prompt:
    """The prompt of one row.

    Args:
        name: its `file:row`. root: folder of pictures. sizes: of pictures whose header was read; new ones are added.
    Raises:
        RowError: the row cannot be used; the message says why.
    """
    question = read_question(row, columns)
    paths = [resolve(image, root) for image in question.images]
    for path in paths:
        if path not in sizes:
            sizes[path] = check_image(path)
    inputs = question.inputs | {"images": [str(path) for path in paths]}
    return Prompt(row_id(row, name), inputs, question.reference)

"""Task `jsonl`: questions with pictures from JSON-lines files. Bad rows are set aside, named and counted."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, RowError, read_rows
from mmrl.rewards.answers import right_answer
from mmrl.rollout import Answer, Prompt, Sample
from mmrl.rows import without_image_marks
from vision.images import ImageError, check_image, resolve

# texts that models read as a picture, a video or a turn of the conversation; in a question they would shift the images
_PLACEHOLDER = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad|image|im_start|im_end)\|>"
    r"|</?img>|<IMG_CONTEXT>|<video>|<image_soft_token>|<(?:start|end)_of_image>"
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns; every other column is kept in the reference."""

    question: str = "question"
    images: str = "images"
    answer: str = "answer"
    options: str = "options"


class JsonlTask:
    """Questions, pictures and answers from two JSON-lines files.

    A row becomes `inputs = {question, images, options}` (paths absolute; options only if the row has some, and then
    the question ends with them as lettered lines) and `reference = {answer, every other column}`. `id` is the row's
    id, else `file:row`. `<image>` at the ends of a question is removed, since policies put pictures before it.

    Set aside (`quarantined`) are rows without question, with a missing or unreadable picture, an id seen before, more
    or fewer `<image>` than pictures, `<image>` inside a sentence, or a model's own placeholder in the text.

    Args:
        train, eval: files, one JSON object per line, UTF-8.
        media_root: folder that pictures are relative to, and may not leave.
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
        sizes: dict[Path, tuple[int, int]] = {}

        def make(row: Mapping[str, Any], name: str) -> Prompt:
            return row_prompt(row, name, columns, media_root, sizes)

        self.prompts, bad_train = load_prompts(train, make, max_bad=max_bad, limit=limit)
        self.eval_prompts, bad_eval = load_prompts(eval, make, max_bad=max_bad, limit=limit)
        self.quarantined = bad_train + bad_eval

    def answer(self, prompt: Prompt) -> Answer:
        """The reference's answer behind `Answer:`."""
        return Answer("Answer: ", right_answer(prompt))

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """answered: share of outputs that are not empty."""
        return {"answered": answered(samples)}


def answered(samples: Sequence[Sample]) -> float:
    """Share of outputs with any text, in [0, 1]; 0 without samples."""
    return sum(bool(str(s.output).strip()) for s in samples) / max(len(samples), 1)


def load_prompts(
    file: str | Path, make: Callable[[Mapping[str, Any], str], Prompt], *, max_bad: float, limit: int | None = None
) -> tuple[list[Prompt], list[Quarantined]]:
    """Prompts of a JSON-lines file and the rows set aside. `make(row, "file:row")` raises RowError or ImageError.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """
    errors = (RowError, ImageError)
    return read_rows(file, lambda *row: [make(*row)], max_bad=max_bad, key=lambda p: p.id, limit=limit, errors=errors)


def row_prompt(
    row: Mapping[str, Any], name: str, columns: Columns, root: str | Path, sizes: dict[Path, tuple[int, int]]
) -> Prompt:
    """The prompt of one row; `sizes` remembers pictures whose header was read.

    Raises:
        RowError, ImageError: why the row cannot be used.
    """
    question = row.get(columns.question)
    if not isinstance(question, str) or not question.strip():
        raise RowError(f"no text in column {columns.question!r}; columns are {sorted(row)}")
    images_column = _images_column(row, columns.images)
    paths = [resolve(p, root) for p in _path_list(row.get(images_column), images_column)]
    for path in paths:
        if path not in sizes:
            sizes[path] = check_image(path)
    options = _option_list(row.get(columns.options), columns.options)
    text = _without_image_marks(question, len(paths))
    check_text("\n".join([text, *options]))
    inputs: dict[str, Any] = {"question": with_options(text, options), "images": [str(p) for p in paths]}
    if options:
        inputs["options"] = options
    used = {"id", columns.question, images_column, columns.options, columns.answer}
    reference = {k: v for k, v in row.items() if k not in used} | {"answer": row.get(columns.answer)}
    own = row.get("id")
    return Prompt(name if own is None or own == "" else str(own), inputs, reference)


# Columns in which public data sets name pictures and films.
_MEDIA = ("image", "images", "image_path", "image_paths", "img", "img_path", "picture", "pictures", "photo")
_FILMS = ("video", "videos", "video_path", "clip", "film")


def _images_column(row: Mapping[str, Any], named: str) -> str:
    """The column that holds the row's pictures: the named one, or `image` where that is empty.

    Raises:
        RowError: another column looks like pictures or films, which nobody would see.
    """
    filled = [c for c in (named, "image") if row.get(c)]
    column = filled[0] if filled else named
    unread = [c for c in (*_MEDIA, *_FILMS) if c != column and row.get(c)]
    if not unread:
        return column
    if unread[0] in _FILMS:
        raise RowError(
            f"unread column {unread[0]!r}: it looks like a film, and this task shows pictures; take task: "
            "{name: video_jsonl}, or remove the column"
        )
    raise RowError(
        f"unread column {unread[0]!r}: it looks like pictures; name it as task.images: {unread[0]}, or remove it"
    )


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, then `(A) ..`, `(B) ..` on lines of their own; options that have their letters keep one."""
    lettered = [
        f"({letter}) {_unlettered(text, letter)}"
        for letter, text in zip(string.ascii_uppercase, options, strict=False)
    ]
    return "\n".join([question, *lettered])


def _unlettered(option: str, letter: str) -> str:
    """The option without its own letter in front: `A. red`, `(A) red`, `A) red` and `A: red` are red."""
    return re.sub(rf"\A\s*(?:\({letter}\)|{letter}[.):])\s+", "", option)


def check_text(text: str) -> None:
    """Raises RowError when a text holds what a model reads as a picture, a video or a turn."""
    found = _PLACEHOLDER.search(text) or re.search("<image>", text)
    if found:
        raise RowError(f"the text holds the placeholder {found[0]!r}; remove it, pictures are given by their column")


def _path_list(value: Any, column: str) -> list[str]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise RowError(f"column {column!r} is neither a path nor a list of paths: {str(value)[:80]!r}")
    return paths


def _option_list(value: Any, column: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(o, str | int | float) and str(o).strip() for o in value):
        raise RowError(f"column {column!r} is no list of texts or numbers: {str(value)[:80]!r}")
    if len(value) > len(string.ascii_uppercase):
        raise RowError(f"{len(value)} options; there are letters for {len(string.ascii_uppercase)}")
    return [str(o) for o in value]


def _without_image_marks(question: str, images: int) -> str:
    marks = question.count("<image>")
    if marks not in (0, images):
        raise RowError(f"{marks} <image> in the text for {images} pictures")
    text = without_image_marks(question)
    if "<image>" in text:
        raise RowError("<image> inside the text; pictures stand before it, so write e.g. 'the first picture'")
    if not text.strip():
        raise RowError("the question holds nothing but <image>")
    return text

"""Task `text_prompts`: prompts for text-to-image models from files. Bad rows are set aside, named and counted."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Annotated

from diffusion.tasks import prompt_formats
from mmrl.jsonl import Quarantined, read_rows
from mmrl.reasoning.questions import IMAGE_COLUMNS, VIDEO_COLUMNS
from mmrl.registry import build, find, of_kind
from mmrl.rollout import Prompt

log = logging.getLogger(__name__)


class TextPrompts:
    """Prompts of two files: plain text (`.txt`, one prompt a line), JSON lines, `.json`, `.csv`, `.tsv` or parquet.

    A row becomes `inputs = {prompt}` and a `reference`, by its format; with `rows` that is every other column, and
    `id` the row's id, else `file:row`. A prompt may be TRL's list of one turn. Set aside (`quarantined`) are rows
    without text, with turns or media in the prompt, with columns that no run folder can hold, and ids seen before.
    Pictures in other columns are for rewards and told, since no policy here shows them. The task has no reward of its
    own.

    Args:
        train, eval: files, UTF-8.
        prompt: the column of the text, for `format: rows`.
        format: a row of `mmrl list prompt_formats`, for files as they are published.
        max_bad: share of bad rows of a file, in [0, 1], above which loading fails.
        limit: usable rows to take from the start of each file, None for all.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """

    def __init__(
        self,
        train: str,
        eval: str,
        prompt: str = "prompt",
        format: Annotated[str, of_kind("prompt_formats", options=False)] = "rows",
        max_bad: float = 0.05,
        limit: int | None = None,
    ) -> None:
        self.prompts, bad_train = load_prompts(train, prompt, format=format, max_bad=max_bad, limit=limit)
        self.eval_prompts, bad_eval = load_prompts(eval, prompt, format=format, max_bad=max_bad, limit=limit)
        self.quarantined = bad_train + bad_eval


def load_prompts(
    file: str | Path, column: str, *, format: str = "rows", max_bad: float, limit: int | None = None
) -> tuple[list[Prompt], list[Quarantined]]:
    """Prompts of a file and the rows set aside.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {path}; give a text file, one prompt per line, JSON lines or a table")
    row_format = find("prompt_formats", format)
    make = build("prompt_formats", "task.format", format, {"column": column} if format == "rows" else {})
    repeats = bool(row_format.facts.get("repeats"))
    prompts, bad = read_rows(
        path,
        partial(_as_list, make),
        max_bad=max_bad,
        key=lambda p: p.id,
        # where rows share a prompt, only the whole file says which are new
        limit=None if repeats else limit,
        text_as=column if format == "rows" else "prompt",
    )
    if repeats:
        prompts = _first_of_each_text(prompts, path)[:limit]
    media = sorted({k for p in prompts for k in (*IMAGE_COLUMNS, *VIDEO_COLUMNS) if p.reference.get(k)})
    if media:
        log.warning("%s: columns %s look like media; rewards see them, but no policy of texts shows them", path, media)
    return prompts, bad


def _as_list(make: prompt_formats.PromptFormat, row: prompt_formats.Row, place: str) -> list[Prompt]:
    return [make(row, place)]


def _first_of_each_text(prompts: list[Prompt], path: Path) -> list[Prompt]:
    """The prompts whose text none before them has."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.inputs["prompt"], prompt)
    if len(first) < len(prompts):
        log.info("%s: %d prompts, of which %d repeat an earlier one", path, len(prompts), len(prompts) - len(first))
    return list(first.values())

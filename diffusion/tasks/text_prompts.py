"""Task `text_prompts`: prompts for text-to-image models from files. Bad rows are set aside, named and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, check_share, lines, read_rows, set_aside
from mmrl.reasoning.questions import IMAGE_COLUMNS, VIDEO_COLUMNS, check_json, last_question
from mmrl.reasoning.rows import rest, row_id, text
from mmrl.rollout import Prompt

log = logging.getLogger(__name__)


class TextPrompts:
    """Prompts of two files: plain text (`.txt`, one prompt a line), or JSON lines, `.json` or parquet with a column.

    A row becomes `inputs = {prompt}` and `reference` = every other column. `id` is the row's id, else `file:row`. A
    prompt may be TRL's list of one turn. Set aside (`quarantined`) are rows without text, with turns or media in the
    prompt, with columns that no run folder can hold, and ids seen before. Pictures in other columns are for rewards
    and told, since no policy here shows them. The task has no reward of its own.

    Args:
        train, eval: files, UTF-8.
        prompt: the column of the text.
        max_bad: share of bad rows of a file, in [0, 1], above which loading fails.
        limit: usable rows to take from the start of each file, None for all.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """

    def __init__(
        self, train: str, eval: str, prompt: str = "prompt", max_bad: float = 0.05, limit: int | None = None
    ) -> None:
        self.prompts, bad_train = load_prompts(train, prompt, max_bad=max_bad, limit=limit)
        self.eval_prompts, bad_eval = load_prompts(eval, prompt, max_bad=max_bad, limit=limit)
        self.quarantined = bad_train + bad_eval


def load_prompts(
    file: str | Path, column: str, *, max_bad: float, limit: int | None = None
) -> tuple[list[Prompt], list[Quarantined]]:
    """Prompts of a file and the rows set aside.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """
    path = Path(file)
    if path.suffix == ".txt":
        return _plain(path, max_bad, limit)

    def make(row: Mapping[str, Any], name: str) -> list[Prompt]:
        value = row.get(column)
        prompt = last_question(value, column) if isinstance(value, list) else text(row, column).strip()
        others = rest(row, "id", column)
        check_json(others)
        return [Prompt(row_id(row, name), {"prompt": prompt}, others)]

    prompts, bad = read_rows(path, make, max_bad=max_bad, key=lambda p: p.id, limit=limit)
    media = sorted({k for p in prompts for k in (*IMAGE_COLUMNS, *VIDEO_COLUMNS) if p.reference.get(k)})
    if media:
        log.warning("%s: columns %s look like media; rewards see them, but no policy of texts shows them", path, media)
    return prompts, bad


def _plain(path: Path, max_bad: float, limit: int | None) -> tuple[list[Prompt], list[Quarantined]]:
    """One prompt per line that is not blank."""
    if not path.is_file():
        raise ValueError(f"no file {path}; give a text file, one prompt per line, or JSON lines")
    found: list[Prompt] = []
    bad: list[Quarantined] = []
    for number, line in lines(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            found.append(Prompt(f"{path.name}:{number}", {"prompt": line.decode("utf-8-sig").strip()}, {}))
        except UnicodeDecodeError as error:
            bad.append(set_aside(path, number, f"no UTF-8: {error}"))
    check_share(path, bad, len(found), max_bad)
    if not found:
        raise ValueError(f"{path} has no usable row; one prompt per line is expected")
    return found, bad

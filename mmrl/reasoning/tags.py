"""Parts of a text between an opening and a closing mark, found in linear time whatever the text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator


def between(
    text: str, opening: str, closing: str, start: int = 0, end: int | None = None
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (start, end)) of what stands between an opening mark and the next closing one of the same name, in order.

    A mark that is never closed is passed over, and marks inside a part are part of it, as in the pattern
    `<(name)>(.*?)</\\1>`. That takes quadratic time on a text of many opening marks; this does not.

    Args:
        opening, closing: patterns whose first group is the name; without a group all marks have the same.
        start, end: where in the text to look.
    """
    end = len(text) if end is None else end
    closings: defaultdict[str, list[re.Match[str]]] = defaultdict(list)
    for mark in re.compile(closing).finditer(text, start, end):
        closings[_name(mark)].append(mark)
    done = start
    for mark in re.compile(opening).finditer(text, start, end):
        candidates = closings[_name(mark)]
        place = bisect_left(candidates, mark.end(), key=re.Match.start)
        if mark.start() >= done and place < len(candidates):
            yield _name(mark), (mark.end(), candidates[place].start())
            done = candidates[place].end()


def _name(mark: re.Match[str]) -> str:
    return mark[1] if mark.re.groups else ""

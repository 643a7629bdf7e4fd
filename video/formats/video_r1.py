"""Video-R1-260k and COT-165k: rows `problem, data_type, problem_type, options, path, solution`, and `process`."""

from __future__ import annotations

from mmrl.jsonl import RowError
from mmrl.reasoning.questions import plain_options
from mmrl.reasoning.rows import optional_text, rest, row_id, text
from mmrl.registry import register
from video.formats._values import Row, typed, without_media_marks
from video.records import VideoSample

_OPEN, _CLOSE = "<answer>", "</answer>"
_COLUMNS = ("problem_id", "problem", "data_type", "problem_type", "options", "path", "solution", "process")


@register("video_formats", "video_r1")
def video_r1(row: Row, name: str) -> list[VideoSample]:
    """One question about a video or a picture; `process` and `solution` together are its written solution."""
    # not by a pattern: that would look for the end once per mark of a beginning
    _, opened, behind = text(row, "solution").partition(_OPEN)
    answer, closed, _ = behind.partition(_CLOSE)
    if not (opened and closed and answer.strip()):
        raise RowError("no answer: 'solution' holds no <answer>..</answer>")
    medium, path = row.get("data_type"), text(row, "path")
    if medium not in ("video", "image"):
        raise RowError(f"bad data_type: {medium!r} is neither 'video' nor 'image'")
    process = optional_text(row, "process")
    turns: tuple[str, ...] = ()
    if process:
        turns = (f"{process.strip()}\n{_OPEN}{answer}{_CLOSE}",)
    sample = VideoSample(
        id=row_id(row, name, "problem_id"),
        question=without_media_marks(text(row, "problem")),
        video=path if medium == "video" else None,
        images=(path,) if medium == "image" else (),
        options=plain_options([str(option) for option in typed(row, "options", list, [])]),
        answer=answer.strip(),
        answer_type=text(row, "problem_type"),
        turns=turns,
        meta=rest(row, *_COLUMNS),
    )
    return [sample]

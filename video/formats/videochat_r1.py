"""VideoChat-R1 grounding (Charades-STA, ActivityNet): one object, `{video: {duration, timestamps, sentences}}`."""

from __future__ import annotations

from mmrl.jsonl import RowError
from mmrl.reasoning.rows import rest, rows, text
from mmrl.registry import register
from video.formats._values import Row, optional, pairs, real
from video.records import VideoSample

QUESTION = 'When does this happen in the video: "{}"?'


# one JSON object per file; its keys become the field `video` of the rows
@register("video_formats", "videochat_r1", keyed="video")
def videochat_r1(row: Row, name: str) -> list[VideoSample]:
    """A question per sentence, its [start, end] seconds the answer. `row` holds its key in the file under `video`."""
    video, sentences = text(row, "video"), rows(row, "sentences")
    times = pairs(row, "timestamps", real)
    if len(times) != len(sentences) or not sentences:
        raise RowError(f"timestamps and sentences differ: {len(times)} timestamps for {len(sentences)} sentences")
    duration = optional(row.get("duration"), "duration", real)
    meta = rest(row, "video", "timestamps", "sentences", "duration")
    samples = []
    for i, (sentence, (start, end)) in enumerate(zip(sentences, times, strict=True)):
        sample = VideoSample(
            id=f"{video}#{i}",
            question=QUESTION.format(sentence.strip().rstrip(".")),
            video=video,
            answer=f"{_seconds(start)} to {_seconds(end)}",
            answer_type="interval",
            segments=((start, end),),
            duration=duration,
            meta=meta | {"sentence": sentence},
        )
        samples.append(sample)
    return samples


def _seconds(value: float) -> str:
    """A time with at most three decimals, such as 2.5."""
    return f"{value:.3f}".rstrip("0").rstrip(".")

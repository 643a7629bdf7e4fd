"""Task `video_jsonl`: questions about videos from files in a published format. Bad rows are set aside and counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from mmrl.jsonl import RowError
from mmrl.reasoning.answers import right_answer
from mmrl.registry import of_kind
from mmrl.rollout import Answer, Prompt, Sample
from video.formats import read_format
from video.reading.reader import VideoDecodeError, VideoReader
from video.reading.sampling import smart_resize
from video.records import VideoSample, to_prompt, with_info, with_seen
from video.rewards.turns import AnswerSyntax, last_answer, turns_of
from vision import states_answer

_SYNTAXES: tuple[AnswerSyntax, ...] = ("tags", "videocom", "tool_call")


class VideoJsonlTask:
    """Questions about videos (or pictures) from two files; for the fields of prompts see `video.records.to_prompt`.

    Every medium has to exist. A clip is opened only where its labels need it (boxes in pixels or at a time), or all of
    them with `probe`, which also sets clips aside that cannot be read, and labels that do not fit their clip.

    Args:
        train, eval: files, JSON lines or one JSON list; of videochat_r1 one JSON object.
        format: a row of `video_formats`, or the dotted path of a function as `video.formats.canonical`.
        media_root: folder that videos are relative to, and may not leave.
        rewards: names used when the recipe lists none.
        max_bad: share of bad rows of a file, in [0, 1], above which loading fails.
        limit: usable samples to take from the start of each file, None for all.
        probe: open every clip now.
        frame_pixels, factor: most pixels of a frame that the policy shows, and side of its tokens: boxes in written
            solutions are rewritten for frames of that size. As `policy.views.frame_pixels`; 32 for Qwen3-VL.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """

    def __init__(
        self,
        train: str,
        eval: str,
        format: Annotated[str, of_kind("video_formats")] = "canonical",
        media_root: str = ".",
        rewards: Sequence[str] = ("video_answer",),
        max_bad: float = 0.05,
        limit: int | None = None,
        probe: bool = False,
        frame_pixels: int = 128 * 28**2,
        factor: int = 28,
    ) -> None:
        self.rewards = tuple(rewards)
        self._probe, self._frame_pixels, self._factor = probe, frame_pixels, factor
        read = partial(
            read_format, name=format, media_root=media_root, max_bad=max_bad, limit=limit, finish=self._finish
        )
        # frames are not kept: only times and sizes of clips are asked for
        with VideoReader(cache_bytes=0) as self._reader:
            samples, bad = read(train)
            eval_samples, bad_eval = read(eval)
        self.prompts: list[Prompt] = [to_prompt(sample) for sample in samples]
        self.eval_prompts: list[Prompt] = [to_prompt(sample) for sample in eval_samples]
        self.quarantined = bad + bad_eval

    def answer(self, prompt: Prompt) -> Answer:
        """The reference's answer behind `FINAL_ANSWER:`."""
        return Answer("FINAL_ANSWER: ", right_answer(prompt))

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """answered: share of outputs that state an answer, in words or in any of the action syntaxes."""
        num_answered = sum(states_answer(sample) or _has_answer(sample) for sample in samples)
        return {"answered": num_answered / max(len(samples), 1)}

    def _finish(self, sample: VideoSample) -> VideoSample:
        """The sample with all boxes as shares of numbered frames, with a look into the clip where that needs one."""
        if sample.video is not None and (self._probe or not sample.is_located):
            try:
                sample = with_info(sample, self._reader.info(sample.video))
            except VideoDecodeError as error:
                raise RowError(f"video unreadable ({error.reason}): {error}") from error
        # written solutions speak of pixels of the frame as the policy sees it
        if sample.turn_boxes == "pixels" and sample.size is not None:
            least, most = min(4 * self._factor**2, self._frame_pixels), self._frame_pixels
            try:
                seen = smart_resize(*sample.size, factor=self._factor, min_pixels=least, max_pixels=most)
            except ValueError as error:
                raise RowError(f"bad size: {error}") from error
            sample = with_seen(sample, seen)
        if not sample.is_located:
            raise RowError("boxes not located: they are in pixels of one of several pictures; give shares instead")
        return sample


def _has_answer(sample: Sample) -> bool:
    """True when the output holds an answer in any of the syntaxes of agents."""
    return any(last_answer(turns_of(sample, syntax), syntax) for syntax in _SYNTAXES)

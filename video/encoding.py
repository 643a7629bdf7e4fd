"""Clips and looks as tokens: placeholders, patches and rotary positions of the Qwen-VL families.

A first view and a segment are films, a frame and a crop are still images. A film of 8 frames at 56 x 84 pixels, with
patches of 14 x 14 and 2 x 2 of them a token, becomes

    text    <|vision_start|> + 4 * (2 * 3) placeholders + <|vision_end|>     two frames are one temporal patch
    pixels  (4 * 4 * 6, 3 * 2 * 14 * 14) rows, and their grid (4, 4, 6)

(Qwen3-VL writes the seconds before each temporal patch.) How many frames are shown, and how large, is in `Views`.
Every distinct look is decoded once, by the reader's cache, and patched once per observation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from mmrl.rollout import Prompt
from mmrl.seeding import named_generator
from video.acting.actions import Look, UnshowableError, pixel_box
from video.reading.patches import Norm, patchify, resize
from video.reading.reader import Frames, VideoDecodeError, VideoInfo, VideoReader
from video.reading.sampling import clip_range, frame_index, frame_size, second_marks, seconds_per_grid, smart_resize
from vision import Pixels, PolicyOptions, PromptEncoder, PromptError, PromptTokens, Turn, size_in_bytes, turns_of

# side in pixels: below, decord's own scaling fails at times
SMALLEST_DECODED = 64
# of observations kept: group members often look at the same place
OBSERVED_BYTES = 2**28
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Views:
    """Number and size of the frames that the model sees at once.

    frames, segment_frames: of the first view and of a segment; fewer where there are not as many.
    video_pixels: most per frame of these two. frame_pixels, crop_pixels: most of a still. min_pixels: least of any
    (a crop is enlarged up to it), None = the family's own.
    """

    frames: int = 32
    segment_frames: int = 16
    video_pixels: int = 360 * 420
    frame_pixels: int = 128 * 28**2
    crop_pixels: int = 128 * 28**2
    min_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "segment_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.views.{name}={getattr(self, name)}: at least 1")


class VideoEncoder(PromptEncoder):
    """Encodes prompts whose inputs name one clip under `videos`, others as its base does; and observations.

    Args:
        hf: a model of one of `FAMILIES`.
        reader: gives the frames.

    Raises:
        ValueError: a model that takes no films in this form.
    """

    def __init__(self, hf: Any, processor: Any, options: PolicyOptions, reader: VideoReader, views: Views) -> None:
        super().__init__(hf, processor, options)
        config = bare(hf).config
        if config.model_type not in FAMILIES:
            raise ValueError(f"video agents need a model of {', '.join(FAMILIES)}; this one is {config.model_type}")
        self.reader, self.views = reader, views
        # Qwen3-VL tells times by text, the others by rotary positions
        self._has_time_marks = config.model_type == "qwen3_vl"
        vision, pictures = config.vision_config, processor.image_processor
        self._patch, self._merge = vision.patch_size, vision.spatial_merge_size
        self._temporal = vision.temporal_patch_size
        self._norm = Norm(tuple(pictures.image_mean), tuple(pictures.image_std))
        self._observations = ByteCache(OBSERVED_BYTES, name="looks into clips")
        # the template's text around an observation; the policy's turn has written its end mark already
        self._closing, between = self.turns()
        self._between = between.removeprefix(str(self.tokenizer.eos_token))
        ids = (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id)
        self._open, self._close, self._image, self._video = self.tokenizer.convert_ids_to_tokens(ids)

    @property
    def factor(self) -> int:
        """Side of one token in pixels."""
        return int(self._patch * self._merge)

    def begin_iteration(self) -> None:
        """Begin an iteration of all caches, that of looks into clips included."""
        super().begin_iteration()
        self._observations.begin_iteration()

    def key(self, prompt: Prompt) -> tuple[str, ...]:
        """The parts of a prompt that decide its tokens."""
        key = super().key(prompt)
        # the order of shuffled frames follows from the id
        return (*key, prompt.id) if prompt.inputs.get("shuffled") else key

    def shuffled(self, prompt: Prompt) -> Prompt:
        """The prompt with the frames of its clip in the random order fixed by its id."""
        if not prompt.inputs.get("videos"):
            return super().shuffled(prompt)
        return replace(prompt, inputs={**prompt.inputs, "shuffled": True})

    def info(self, prompt: Prompt) -> VideoInfo:
        """The prompt's clip; with `shuffled: true` among its inputs, in an order fixed by the prompt's id.

        Raises:
            PromptError: it cannot be read.
        """
        try:
            info = self.reader.info(str(prompt.inputs["videos"][0]))
        except VideoDecodeError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error
        return shuffled(info, self._first_view(info), prompt.id) if prompt.inputs.get("shuffled") else info

    def _first_view(self, info: VideoInfo) -> np.ndarray:
        return _evenly(info, 0.0, math.inf, self.views.frames)

    def _encode(self, prompt: Prompt) -> PromptTokens:
        videos = prompt.inputs.get("videos") or []
        if not videos:
            return super()._encode(prompt)
        if len(videos) > 1 or prompt.inputs.get("images"):
            raise PromptError(f"prompt {prompt.id!r}: give one clip under `videos` and no `images`, or images alone")
        question = self._question(prompt)
        info = self.info(prompt)
        try:
            marks, pixels = self._film(info, self._first_view(info))
        except VideoDecodeError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error
        turns = turns_of(prompt, question, 0)
        # the film stands before all words, thus in the first turn of the user
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (marks + "".join(turns[first].texts),))
        tokens = self.tokens(self._render(turns, prompt.id), pixels)
        self._check_length(prompt.id, tokens.types, "the clip's first view")
        return tokens

    # ---- looks -----------------------------------------------------------------------------------------------------

    def observe(self, info: VideoInfo, looks: Sequence[Look], text: str) -> PromptTokens:
        """The observation's tokens: what the chat template writes behind the turn's end mark, the media of `looks`
        (one segment after the other as one film, or stills), their texts, `text`, and the opening of the next turn.

        Raises:
            VideoDecodeError: a frame cannot be read.
            UnshowableError: segments beside stills, a change of pixels that fails, or a text with tokens of the model.
        """
        key = (info.path, info.order, tuple(looks), text)
        observation: PromptTokens | None = self._observations.get(key)
        if observation is None:
            words = [self._plain_text(look.text) for look in looks if look.kind == "text"]
            media = [look for look in looks if look.kind != "text"]
            marks, pixels = self._media(info, media) if media else ("", None)
            body = "\n".join(filter(None, [*words, text]))
            observation = self.tokens(self._between + marks + body + self._closing, pixels)
            self._observations.put(key, observation, size_in_bytes(observation))
        return observation

    def _plain_text(self, text: str) -> str:
        """The text itself; a placeholder or mark of the template in it would be read as one."""
        for token in {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}:
            if token in text:
                raise UnshowableError(f"the text holds {token!r}, a token of the model")
        return text

    def _media(self, info: VideoInfo, looks: Sequence[Look]) -> tuple[str, Pixels]:
        """Placeholders and pixels of looks: all segments as one film, or each frame and crop as a still."""
        num_segments = sum(look.kind == "segment" for look in looks)
        if num_segments == len(looks):
            return self._segments(info, looks)
        if num_segments:
            raise UnshowableError("segments and stills cannot be shown in one turn; look at them one after the other")
        marks, pixels = zip(*(self._still(info, look) for look in looks), strict=True)
        return "".join(marks), _joined(pixels)

    def _segments(self, info: VideoInfo, looks: Sequence[Look]) -> tuple[str, Pixels]:
        """Placeholders and pixels of segments, one after the other as one film."""
        parts = []
        for look in looks:
            parts.append(_evenly(info, look.start, look.end, look.frames or self.views.segment_frames))
        index = np.concatenate(parts)
        if not any(look.change for look in looks):
            return self._film(info, index)
        # changes are made at full size, as those of stills
        frames = frames_at(self.reader, info, index)
        changed: list[np.ndarray] = []
        for look, part in zip(looks, parts, strict=True):
            for pixels in frames.pixels[len(changed) : len(changed) + len(part)]:
                changed.append(look.change.apply(pixels) if look.change else pixels)
        shapes = {pixels.shape for pixels in changed}
        if len(shapes) > 1:
            raise UnshowableError(
                f"the frames of a film have shapes {sorted(shapes)} after their change; one is needed"
            )
        return self._film(info, index, replace(frames, pixels=np.stack(changed)))

    def _film(self, info: VideoInfo, index: np.ndarray, changed: Frames | None = None) -> tuple[str, Pixels]:
        """Placeholders and pixels of the (n,) frames `index` as one film; `changed`: in place of those of the file."""
        if changed is None:
            size = self.film_size(info.height, info.width, len(index))
            # scaled while decoding where that works, which spares most of the bytes; `resize` does the rest
            decoded_size = size if min(size) >= SMALLEST_DECODED else None
            frames = frames_at(self.reader, info, index, decoded_size)
        else:
            frames = changed
            size = self.film_size(*_sides(frames.pixels[0]), len(index))
        # rows: (t h w, 3 temporal patch^2), grid: (t, h, w) in patches
        rows, grid = self._patched(resize(frames.pixels, size))
        pads = self._video * (grid[1] * grid[2] // self._merge**2)
        if self._has_time_marks:
            marks = "".join(f"{mark}{self._open}{pads}{self._close}" for mark in second_marks(frames.times))
        else:
            marks = f"{self._open}{pads * grid[0]}{self._close}"
        key = _key(info, index, size, None if changed is None else rows)
        return marks, Pixels(key, _tensors(rows, grid), _spacing(info, frames))

    def film_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) of the frames of a film of a clip of this size."""
        most = self.views.video_pixels
        least = self.views.min_pixels
        if least is None:
            least = min(most, 128 * self.factor**2)
        return frame_size(height, width, frames, factor=self.factor, min_pixels=least, max_pixels=most)

    def still_size(self, height: int, width: int, most: int) -> tuple[int, int]:
        """(height, width) of a still of `most` pixels."""
        least = self.views.min_pixels
        if least is None:
            least = 4 * self.factor**2
        return smart_resize(height, width, factor=self.factor, min_pixels=min(least, most), max_pixels=most)

    def _still(self, info: VideoInfo, look: Look) -> tuple[str, Pixels]:
        """A frame, or a part of one cut out at full size: boxes are shares of the frame, whatever size was shown."""
        assert look.frame is not None
        # decoded at full size, so that zooms into a frame that was shown take it from the reader's cache
        whole = frames_at(self.reader, info, [look.frame]).pixels
        box = pixel_box(look.box or (0.0, 0.0, 1.0, 1.0), (info.height, info.width))
        x1, y1, x2, y2 = box
        cut = whole[0, y1:y2, x1:x2]
        if look.change is not None:
            cut = look.change.apply(cut)
        most = self.views.frame_pixels if look.box is None else self.views.crop_pixels
        size = self.still_size(*_sides(cut), most)
        # rows: (h w, 3 temporal patch^2); a still fills its temporal patch with copies of itself
        rows, grid = self._patched(resize(cut[None], size))
        pads = self._image * (grid[1] * grid[2] // self._merge**2)
        key = _key(info, (look.frame, *box), size, None if look.change is None else rows)
        return f"{self._open}{pads}{self._close}", Pixels(key, _tensors(rows, grid))

    def _patched(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        return patchify(pixels, patch=self._patch, merge=self._merge, temporal=self._temporal, norm=self._norm)


def shuffled(info: VideoInfo, view: np.ndarray, name: str) -> VideoInfo:
    """The clip in a random order fixed by `name`: the frames of `view` change places among themselves (T-GRPO's
    shuffled first view), the others too, so that later looks are into the same shuffled clip."""
    generator = named_generator("shuffled", name)
    order = np.arange(info.frames)
    in_view = np.unique(view)
    out_of_view = np.setdiff1d(order, view)
    for places in (in_view, out_of_view):
        order[places] = places[torch.randperm(len(places), generator=generator).numpy()]
    return replace(info, order=tuple(order.tolist()))


def frames_at(
    reader: VideoReader, info: VideoInfo, index: Sequence[int] | np.ndarray, size: tuple[int, int] | None = None
) -> Frames:
    """The frames at the (n,) places `index` of a clip, with the times of these places; as `VideoReader.read`.

    Of a shuffled clip they are other frames of the file than those numbers name.
    """
    places = np.asarray(index, np.int64)
    file_index = places if info.order is None else np.array(info.order)[places]
    frames = reader.read(info.path, file_index.tolist(), size)
    return replace(frames, index=places, times=info.starts[places])


def picture(reader: VideoReader, info: VideoInfo, looks: Sequence[Look], height: int = 96) -> Image.Image:
    """A picture for people: four frames of a segment side by side, or the frame with its boxes drawn; unchanged ones.

    looks: at least one of the clip, texts apart.
    """
    size = (height, max(1, round(info.width * height / info.height)))
    first = looks[0]
    if first.kind == "segment":
        film = frames_at(reader, info, _evenly(info, first.start, looks[-1].end, 4), size).pixels
        return Image.fromarray(np.concatenate(list(film), axis=1))
    assert first.frame is not None
    still = Image.fromarray(frames_at(reader, info, [first.frame], size).pixels[0])
    pen = ImageDraw.Draw(still)
    for look in looks:
        if look.box is not None:
            pen.rectangle(pixel_box(look.box, size), outline=(255, 64, 64), width=2)
    return still


def _evenly(info: VideoInfo, start: float, end: float, count: int) -> np.ndarray:
    """(n,) int64: `count` frames evenly from the seconds [start, end), fewer where there are not as many."""
    first, last = clip_range(info.starts, start, end)
    total = last - first + 1
    return frame_index(total, min(count, total), first=first)


def _spacing(info: VideoInfo, frames: Frames) -> float:
    """Seconds between the film's temporal patches, by the clock of its frames."""
    count = len(frames.index)
    if count == 1:
        return max(info.duration / info.frames, 1e-3)
    step = float(frames.times[-1] - frames.times[0]) / (count - 1)
    # frames of equal times, which damaged files have, would give no distance at all
    return seconds_per_grid(count, max(step, 1e-3) * count)


def _tensors(rows: np.ndarray, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.from_numpy(rows), "image_grid_thw": torch.tensor([grid])}


def _joined(parts: Sequence[Pixels]) -> Pixels:
    """Several stills of one observation."""
    if len(parts) == 1:
        return parts[0]
    tensors = {}
    for name in parts[0].tensors:
        tensors[name] = torch.cat([part.tensors[name] for part in parts])
    return Pixels("/".join(part.key for part in parts), tensors)


def _key(
    info: VideoInfo, place: Sequence[int] | np.ndarray, size: tuple[int, int], changed: np.ndarray | None = None
) -> str:
    """A name of the pixels: equal pixels of a clip pass the vision tower once. changed: those that a change made."""
    description = f"{info.path}|{info.frames}|{info.duration}|{list(map(int, place))}|{size}|{info.order or ''}"
    digest = hashlib.sha256(description.encode())
    if changed is not None:
        digest.update(np.ascontiguousarray(changed).data)
    return digest.hexdigest()


def _sides(pixels: np.ndarray) -> tuple[int, int]:
    """(height, width) of (H, W, 3) pixels, refused where no family takes that shape."""
    height, width = pixels.shape[:2]
    if max(height, width) > 200 * min(height, width):
        raise UnshowableError(f"pixels of {height} x {width}: sides may be at most 200:1")
    return height, width

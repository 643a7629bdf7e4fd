"""The tiny Qwen2.5-VL of the clips task: its words, its looks, and a fast forward over drawn clips.

A patch is one token. A prompt is the overview and a question; each manipulation adds a look:

    overview  16 frames, two of each segment, at 16 x 16 pixels     8 video tokens
    segment    4 frames at 16 x 16                                  2 video tokens
    frame      a still of 32 x 32                                   4 image tokens
    crop       a still of 16 x 16, from native pixels               1 image token

so that a whole episode about a colour is 49 tokens long. `VIEWS` asks the agent's encoder for these sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from video.acting.actions import Code, Look, VideoState, act, parse_turn, pixel_box
from video.reading.patches import patchify
from video.tasks.clips_scene import (
    ANSWER,
    COLOURS,
    FPS,
    FRAME,
    FRAMES,
    GRID,
    PER_SEGMENT,
    QUESTIONS,
    SECONDS,
    SEGMENT,
    SEGMENTS,
    SIZE,
    ZOOM,
    Clip,
    Pixels,
    cell_name,
    draw,
    second_of,
)
from vision import tiny_models
from vision.tiny_models import END, IMAGE, PATCH, SPECIAL, VIDEO, Vocabulary, tower_features


def _vocabulary() -> Vocabulary:
    """Every word of prompts, turns and observations, once; their order decides the ids."""
    # corners of boxes in thousandths: all but the last coordinate of a box are followed by a comma
    sides = [1000 * k // GRID for k in range(GRID + 1)]
    words = [*SPECIAL, "\n", *QUESTIONS, "?"]
    # names of looks in the first stage of training, and the codes of refused turns
    # (`failed_action` apart, which the built-in manipulations never give)
    words += ["lit", "dark", "first", "second", "empty"]
    words += [code for code in get_args(Code) if code != "failed_action"]
    words += [SEGMENT, FRAME, ZOOM, ANSWER, "=", "[", "]"]
    words += [f"{side}," for side in sides]
    words += map(str, sides[1:])
    words += [*COLOURS, *map(cell_name, range(GRID**2))]
    words += [*map(str, range(1, FRAMES + 1)), *map(second_of, range(FRAMES))]
    return Vocabulary(tuple(dict.fromkeys(words)))


WORDS = _vocabulary()
CHAT_TEMPLATE = tiny_models.chat_template("image", "video")
# temporal patches of the overview lie 10 positions apart, those of a segment 5
TOKENS_PER_SECOND = 1
# one more than a colour needs
TURNS = 5
VIEWS = {
    "frames": 2 * SEGMENTS,
    "segment_frames": PER_SEGMENT,
    "video_pixels": PATCH**2,
    "frame_pixels": 4 * PATCH**2,
    "crop_pixels": PATCH**2,
    "min_pixels": PATCH**2,
}
_START = VideoState.start(
    [i / float(FPS) for i in range(FRAMES)], SECONDS, (SIZE, SIZE), coords="norm1000", turns=TURNS
)


@dataclass(frozen=True)
class View:
    """A look as tokens. kind: IMAGE or VIDEO. times: temporal patches. side: patches down and across. seconds: between
    temporal patches, by the clock of the frames."""

    kind: str
    times: int
    side: int
    seconds: float = 0.0

    @property
    def ids(self) -> list[int]:
        """Placeholders and the marks around them."""
        return WORDS.encode_media(self.kind, self.times * self.side**2)


OVERVIEW = View(VIDEO, SEGMENTS, 1, SECONDS / SEGMENTS)
SEGMENT_VIEW = View(VIDEO, PER_SEGMENT // 2, 1, 2 * SECONDS / FRAMES)
FRAME_VIEW = View(IMAGE, 1, 2)
CROP_VIEW = View(IMAGE, 1, 1)


def new_processor() -> Any:
    """Tokenizer and picture part; nothing of 1 to 64 patches is resized."""
    return tiny_models.new_processor(WORDS, CHAT_TEMPLATE)


def new_model(width: int = 128, layers: int = 3) -> Any:
    """Untrained, float32, 0.6 M parameters."""
    return tiny_models.new_model(WORDS, width=width, layers=layers, tokens_per_second=TOKENS_PER_SECOND)


# ---- looks: (2 * times, 16 * side, 16 * side, 3) pixels each, a still twice


def overview(clip: Clip) -> Pixels:
    """Frames 0, 2, 4 ... of the whole clip."""
    return _film(clip, range(0, FRAMES, 2))


def segment_look(clip: Clip, segment: int) -> Pixels:
    """All frames of a segment, 0..7."""
    return _film(clip, range(PER_SEGMENT * segment, PER_SEGMENT * (segment + 1)))


def frame_look(clip: Clip, frame: int) -> Pixels:
    """A frame, 0..31."""
    return _twice(_resize(draw(clip, [frame], 4 * PATCH), 2 * PATCH))


def crop_look(clip: Clip, frame: int, box: Sequence[int]) -> Pixels:
    """A box of a frame, (x1, y1, x2, y2) in pixels."""
    x1, y1, x2, y2 = box
    return _twice(_resize(draw(clip, [frame])[:, y1:y2, x1:x2], PATCH, Image.Resampling.BICUBIC))


def _film(clip: Clip, frames: Sequence[int]) -> Pixels:
    """Drawn at twice the size: what 128 pixels would give, at an eighth of the cost."""
    return _resize(draw(clip, frames, 2 * PATCH), PATCH)


def _resize(frames: Pixels, side: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> Pixels:
    """As the reader shrinks whole frames and (bicubic) the encoder resizes crops."""
    return np.stack([np.asarray(Image.fromarray(frame).resize((side, side), how)) for frame in frames])


def _twice(still: Pixels) -> Pixels:
    return np.repeat(still, 2, axis=0)


# ---- conversation


@dataclass
class Episode:
    """A question about a drawn clip and the turns that followed, as the agent's environment would answer.

    ids: T tokens so far. positions: (3, T) of M-RoPE, text goes on at `next`. is_written: True for tokens of the
    model. views, looks: the looks so far, and their pixels. turns: the model's texts. done: it has answered, or used
    up its turns.
    """

    clip: Clip
    question: str
    ids: list[int] = field(default_factory=list)
    is_written: list[bool] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.empty(3, 0, dtype=torch.long))
    next: int = 0
    views: list[View] = field(default_factory=list)
    looks: list[Pixels] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    state: VideoState = _START
    done: bool = False

    def __post_init__(self) -> None:
        self._show(OVERVIEW, overview(self.clip))
        self._write(f"{self.question} ?\n", by_model=False)

    def say(self, text: str) -> None:
        """Add a turn of the model, and the environment's answer. Several calls in one turn end the episode here."""
        self.turns.append(text)
        self._write(text, by_model=True)
        turn = parse_turn(text, "videocom")
        self.state, looks, problem = act(self.state, turn)
        self.done = turn.answer is not None or self.state.turns_left == 0 or len(looks) > 1
        if not self.done:
            for look in looks:
                self._show(*_view_and_pixels(self.clip, look))
            self._write(f"{problem.code}\n" if problem else "\n", by_model=False)

    def _show(self, view: View, look: Pixels) -> None:
        self.views.append(view)
        self.looks.append(look)
        opening, *pads, closing = view.ids
        self._add([opening])
        positions = look_positions(view, self.next)
        self._add(pads, positions)
        # behind the largest position, also for a film: see PromptEncoder.rope
        self.next = int(positions.max()) + 1
        self._add([closing])

    def _write(self, text: str, *, by_model: bool) -> None:
        ids = list(WORDS.encode(text))
        if by_model:
            ids.append(WORDS.ids[END])
        self._add(ids, by_model=by_model)

    def _add(self, ids: Sequence[int], positions: Tensor | None = None, *, by_model: bool = False) -> None:
        """Add tokens; those of text, which come without positions, go on at `next`."""
        if positions is None:
            positions = text_positions(len(ids), self.next)
            self.next += len(ids)
        self.ids += ids
        self.is_written += [by_model] * len(ids)
        self.positions = torch.cat([self.positions, positions], dim=1)


def _view_and_pixels(clip: Clip, look: Look) -> tuple[View, Pixels]:
    if look.kind == "segment":
        return SEGMENT_VIEW, segment_look(clip, round(look.start * SEGMENTS / SECONDS))
    assert look.frame is not None
    if look.box is None:
        return FRAME_VIEW, frame_look(clip, look.frame)
    return CROP_VIEW, crop_look(clip, look.frame, pixel_box(look.box, (SIZE, SIZE)))


# ---- forward


def look_features(model: Any, looks: Sequence[Pixels]) -> Tensor:
    """Looks in order of appearance -> (their tokens, width), as the tower's own forward gives them.

    Looks of one size are a batch: in the tower a temporal patch sees itself alone.
    """
    # (width, pixels of a patch): a product is faster than the tower's convolution
    kernel = model.model.visual.patch_embed.proj.weight.flatten(1)
    features: list[Tensor] = [torch.empty(0)] * len(looks)
    for side in sorted({look.shape[1] // PATCH for look in looks}):
        indices = [i for i, look in enumerate(looks) if look.shape[1] == side * PATCH]
        rows, _ = patchify(np.concatenate([looks[i] for i in indices]), patch=PATCH, merge=1)
        # (temporal patches of all these looks, side^2, width)
        embedded = (torch.from_numpy(rows) @ kernel.T).view(len(rows) // side**2, side**2, -1)
        tokens = tower_features(model, embedded).flatten(0, 1)
        parts = tokens.split([len(looks[i]) // 2 * side**2 for i in indices])
        for i, part in zip(indices, parts, strict=True):
            features[i] = part
    return torch.cat(features)


def hidden_states(model: Any, ids: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """(B, T) ids, (3, B, T) positions, features of all rows' looks in order -> (B, T, width), before the output
    matrix."""
    embeds = model.get_input_embeddings()(ids)
    # the features stand in the places of the placeholders, row by row
    is_placeholder = (ids == WORDS.ids[IMAGE]) | (ids == WORDS.ids[VIDEO])
    embeds = embeds.masked_scatter(is_placeholder[..., None], features)
    return model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def look_positions(view: View, start: int) -> Tensor:
    """(3, tokens) M-RoPE positions (time, row, column) of a look behind `start` positions; text goes on behind the
    largest, as `vision.PromptEncoder.rope` has it."""
    seconds = torch.arange(view.times) * TOKENS_PER_SECOND * view.seconds
    times = seconds.long().repeat_interleave(view.side**2)
    rows, columns = tiny_models.rows_and_columns(view.side)
    return torch.stack([times, rows.repeat(view.times), columns.repeat(view.times)]) + start


def text_positions(tokens: int, start: int) -> Tensor:
    """(3, tokens) M-RoPE positions of text."""
    return (torch.arange(tokens) + start).expand(3, -1)

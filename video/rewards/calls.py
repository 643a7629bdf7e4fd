"""Manipulations of a policy beside those of the reference, in one unit: what a call asks for and what it hits.

Turns are replayed on the clip of the reference (`frame_count`, `duration`, `size`), with frames evenly in time, so a
call that the environment refuses is known here as well.
"""

# annotations stay objects here: recipes check the options of `Reading` in the modules of its subclasses

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from mmrl.rollout import Prompt, Rollout
from video.acting.actions import Coords, Syntax, VideoAction, VideoState, act, parse_turn
from video.acting.segments import frame_at
from video.reading.sampling import smart_resize
from video.rewards.answers import interval_iou, video_reference
from vision import Box, iou

Kind = Literal["segment", "frame", "box"]
Span = tuple[float, float]

KINDS: tuple[Kind, ...] = ("segment", "frame", "box")
SAME = 0.9  # IoU from which two stretches or boxes count as the same look
_ENDLESS = 10**6  # turns: how many there were is the environment's business


@dataclass(frozen=True)
class Call:
    """One manipulation. A segment has a 1-based id or a span in seconds, a frame is 0-based, a box in unit floats.

    The frame of a box is the one that the call names, else the one named last; None before any.
    """

    kind: Kind
    segment: int | None = None
    span: Span | None = None
    frame: int | None = None
    box: Box | None = None

    def repeats(self, other: "Call") -> bool:
        """Asks for the same look: equal, or of the same kind and frame with IoU >= 0.9."""
        if self == other:
            return True
        if self.span and other.span:
            return interval_iou(self.span, other.span) >= SAME
        same_frame = self.box is not None and other.box is not None and self.frame == other.frame
        return same_frame and iou(self.box or (), other.box or ()) >= SAME


@dataclass(frozen=True)
class TurnCalls:
    """The calls of one turn. problem: the code with which the turn was refused, None when it was carried out.

    answered: the turn gave the answer.
    """

    calls: tuple[Call, ...] = ()
    problem: str | None = None
    answered: bool = False


@dataclass(frozen=True)
class Truth:
    """The manipulations of a reference; the items of a kind are numbered in its order.

    ids: 1-based segments, spans: seconds (of these two the items are the ids, where there are any). frames: inclusive
    0-based ranges. boxes: (0-based frame, unit box). table: the span of every segment id.
    """

    ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    frames: tuple[tuple[int, int], ...] = ()
    boxes: tuple[tuple[int, Box], ...] = ()
    table: tuple[Span, ...] = ()

    def count(self, kind: Kind) -> int:
        """Items of a kind."""
        return len({"segment": self.ids or self.spans, "frame": self.frames, "box": self.boxes}[kind])

    @property
    def total(self) -> int:
        """Items of all kinds."""
        return sum(map(self.count, KINDS))

    def beside(self, calls: Sequence[Call]) -> "Truth":
        """The truth that these calls are held against: seconds, where it has them and some call gives seconds."""
        in_seconds = bool(self.spans) and any(c.span is not None for c in calls)
        return replace(self, ids=()) if in_seconds else self

    def overlaps(self, call: Call) -> dict[int, float]:
        """Item -> how well the call meets it, above 0: IoU in seconds or of boxes, else 1."""
        if call.kind == "segment":
            scores = [self._segment(call, i) for i in range(self.count("segment"))]
        elif call.kind == "frame":
            scores = [float(call.frame is not None and a <= call.frame <= b) for a, b in self.frames]
        else:
            scores = [iou(call.box, b) if call.box and call.frame == f else 0.0 for f, b in self.boxes]
        return {i: x for i, x in enumerate(scores) if x > 0}

    def _segment(self, call: Call, item: int) -> float:
        if self.ids and call.segment is not None:
            return float(call.segment == self.ids[item])
        right = self._span(self.ids[item]) if self.ids else self.spans[item]
        given = call.span if call.segment is None else self._span(call.segment)
        return interval_iou(given, right) if given and right else 0.0

    def _span(self, segment: int) -> Span | None:
        return self.table[segment - 1] if 1 <= segment <= len(self.table) else None


@dataclass(frozen=True)
class Reading:
    """How turns are read; as the agent's policy has it.

    Args:
        syntax: videocom or tool_call. coords: unit of boxes.
        frame_pixels, factor: most pixels of a still and the multiple of its sides (28 for Qwen2.5-VL, 32 for
            Qwen3-VL); both only matter for `coords: pixels`, which count on the frame as the model saw it.
    """

    syntax: Syntax = "videocom"
    coords: Coords = "pixels"
    frame_pixels: int = 128 * 28**2
    factor: int = 28

    def start(self, prompt: Prompt) -> VideoState:
        """The state before the first turn.

        Raises:
            ValueError: the reference does not tell the clip's frames, duration or size.
        """
        clip = video_reference(prompt)
        missing = [k for k in ("frame_count", "duration", "size") if clip.get(k) is None]
        if missing:
            raise ValueError(
                f"prompt {prompt.id!r}: its reference names manipulations but lacks {', '.join(missing)}; without the "
                "clip's frames, seconds and (height, width) they cannot be compared"
            )
        frames, seconds = int(clip["frame_count"]), float(clip["duration"])
        height, width = (int(x) for x in clip["size"])
        least = min(4 * self.factor**2, self.frame_pixels)
        seen = smart_resize(height, width, factor=self.factor, min_pixels=least, max_pixels=self.frame_pixels)
        starts = [i * seconds / frames for i in range(frames)]
        return VideoState.start(starts, seconds, (height, width), coords=self.coords, seen=seen, turns=_ENDLESS)

    def truth(self, prompt: Prompt) -> Truth | None:
        """The reference's manipulations, None where it names none and for pictures, in which nothing is looked up."""
        r = video_reference(prompt)
        if prompt.inputs.get("images") or not any(r.get(k) for k in ("segment_ids", "segments", "frames", "boxes")):
            return None
        return Truth(
            ids=tuple(int(i) for i in r.get("segment_ids") or ()),
            spans=tuple((float(a), float(b)) for a, b in r.get("segments") or ()),
            frames=tuple((int(a), int(b)) for a, b in r.get("frames") or ()),
            boxes=tuple((int(b["frame"]), _box(b["box"])) for b in r.get("boxes") or ()),
            table=tuple((s.start, s.end) for s in self.start(prompt).segments),
        )

    def replay(self, prompt: Prompt, texts: Sequence[str]) -> list[TurnCalls]:
        """The calls of consecutive turns."""
        place = _Place(self.start(prompt))
        for text in texts:
            place = self._after(place, text)
        return list(place.turns)

    def paths(self, rollout: Rollout) -> list[Sequence[TurnCalls] | None]:
        """Per step, the turns from the first to itself; None for prompts whose reference names no manipulations.

        A step with tags["error"] counts as refused, whatever the replay says.
        """
        tree = rollout.tree
        if len(rollout.texts) != len(tree):
            raise ValueError(
                f"the rollout has {len(rollout.texts)} texts for {len(tree)} steps; rewards on manipulations need a "
                "policy that writes"
            )
        error = tree.tags.get("error", torch.zeros(len(tree))).bool().tolist()
        starts = [None if self.truth(p) is None else _Place(self.start(p)) for p in rollout.prompts]
        places: list[_Place | None] = []
        rows = zip(tree.parent.tolist(), tree.group.tolist(), rollout.texts, error, strict=True)
        for parent, group, text, wrong in rows:
            before = places[parent] if parent >= 0 else starts[group]
            places.append(None if before is None else self._after(before, text, wrong=wrong))
        return [None if p is None else p.turns for p in places]

    def _after(self, before: "_Place", text: str, *, wrong: bool = False) -> "_Place":
        turn, named = parse_turn(text, self.syntax), before.named
        calls: list[Call] = []
        for action in turn.actions:
            calls += _calls(before.state, named, action)
            named = calls[-1].frame if calls and calls[-1].frame is not None else named
        state, _, problem = act(before.state, turn)
        code = "error" if wrong else None if problem is None else problem.code
        return _Place(state, named, (*before.turns, TurnCalls(tuple(calls), code, turn.answer is not None)))


class _Place(NamedTuple):
    """Where a path stands: the clip's state, the frame named last, the turns so far."""

    state: VideoState
    named: int | None = None
    turns: tuple[TurnCalls, ...] = ()


READING = Reading()


def _calls(state: VideoState, named: int | None, action: VideoAction) -> list[Call]:
    """What one action asks for; of the user's own manipulations nothing is known."""
    args: Mapping[str, Any] = action.args
    if action.name == "find_segment":
        if "segments" in args:
            return [Call("segment", segment=i) for i in args["segments"]]
        return [Call("segment", span=(float(args["start"]), float(args["end"])))]
    if action.name == "find_frame":
        frame = args["frame"] - 1 if "frame" in args else frame_at(state.starts, args["time"])
        return [Call("frame", frame=frame)]
    if action.name == "spatial_zoom":
        frame = args["frame"] - 1 if "frame" in args else named
        return [Call("box", frame=frame, box=state.unit_box(args["bbox"]))]
    return []


def _box(values: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (float(v) for v in values)
    return x1, y1, x2, y2

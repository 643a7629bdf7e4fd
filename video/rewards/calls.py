"""Manipulations of a policy beside those of the reference, in one unit: what a call asks for and what it hits.

    reading = Reading(syntax="videocom", coords="pixels")
    turns = reading.replay(prompt, ["FIND_SEGMENT(dog) = 3", "FINAL_ANSWER: B"])
    turns[0].calls                             # (Call("segment", segment=3),)
    reading.truth(prompt).overlaps(turns[0].calls[0])   # {0: 1.0} if segment 3 is the reference's first one

Turns are replayed on the clip of the reference (`frame_count`, `duration`, `size`), with frames evenly in time: a call
that the environment refuses is refused here as well, and no pixels are needed.
"""

# annotations stay objects here: recipes check the options of `Reading` in the modules of its subclasses

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch

from mmrl.rollout import Prompt, Rollout
from video.acting.actions import Coords, Syntax, VideoAction, VideoState, act, parse_turn
from video.acting.segments import frame_at
from video.reading.sampling import smart_resize
from video.rewards.answers import interval_iou, video_reference
from video.rewards.turns import turn_options
from vision import Box, iou

Kind = Literal["segment", "frame", "box"]
Span = tuple[float, float]

KINDS: tuple[Kind, ...] = ("segment", "frame", "box")
# IoU from which two stretches or boxes count as the same look
SAME = 0.9
# turns of a replay: how many may be taken is the environment's business
_ENDLESS = 10**6
# fields of a reference that name manipulations
_TRUTH_FIELDS = ("segment_ids", "segments", "frames", "boxes")


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
        if self.span is not None and other.span is not None:
            return interval_iou(self.span, other.span) >= SAME
        if self.box is None or other.box is None or self.frame != other.frame:
            return False
        return iou(self.box, other.box) >= SAME


@dataclass(frozen=True)
class TurnCalls:
    """The calls of one turn. problem: the code with which the turn was refused, None when it was carried out.

    answered: the turn gave the answer.
    """

    calls: tuple[Call, ...] = ()
    problem: str | None = None
    answered: bool = False


def all_calls(turns: Sequence[TurnCalls]) -> list[Call]:
    """The calls of all turns, in order."""
    calls: list[Call] = []
    for turn in turns:
        calls += turn.calls
    return calls


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
        """The number of items of a kind."""
        if kind == "segment":
            return len(self.ids or self.spans)
        return len(self.frames) if kind == "frame" else len(self.boxes)

    @property
    def total(self) -> int:
        """The number of items of all kinds."""
        return sum(map(self.count, KINDS))

    def beside(self, calls: Sequence[Call]) -> "Truth":
        """The truth that these calls are held against: seconds, where it has them and some call gives seconds."""
        # a reference with ids and seconds has one item per id otherwise, and seconds would be held against its table
        if self.spans and any(call.span is not None for call in calls):
            return replace(self, ids=())
        return self

    def overlaps(self, call: Call) -> dict[int, float]:
        """Item -> its overlap with the call, where it is above 0: IoU in seconds or of boxes, else 1."""
        overlap_of = {"segment": self._segment_overlap, "frame": self._frame_overlap, "box": self._box_overlap}
        overlaps = {}
        for item in range(self.count(call.kind)):
            overlap = overlap_of[call.kind](call, item)
            if overlap > 0:
                overlaps[item] = overlap
        return overlaps

    def _segment_overlap(self, call: Call, item: int) -> float:
        if self.ids and call.segment is not None:
            return float(call.segment == self.ids[item])
        # one of both is in seconds, so both are compared in seconds
        right_span = self._span(self.ids[item]) if self.ids else self.spans[item]
        span = call.span if call.segment is None else self._span(call.segment)
        if span is None or right_span is None:
            return 0.0
        return interval_iou(span, right_span)

    def _frame_overlap(self, call: Call, item: int) -> float:
        first, last = self.frames[item]
        return float(call.frame is not None and first <= call.frame <= last)

    def _box_overlap(self, call: Call, item: int) -> float:
        frame, box = self.boxes[item]
        if call.box is None or call.frame != frame:
            return 0.0
        return iou(call.box, box)

    def _span(self, segment: int) -> Span | None:
        """Seconds of a 1-based segment, None where the clip has no such segment."""
        return self.table[segment - 1] if 1 <= segment <= len(self.table) else None


@dataclass(frozen=True)
class Reading:
    """The form of turns. A run takes all options from the agent's policy; they are for use without one.

    Args:
        syntax: videocom or tool_call. coords: unit of boxes.
        frame_pixels, factor: most pixels of a still and the multiple of its sides (28 for Qwen2.5-VL, 32 for
            Qwen3-VL); both only matter for `coords: pixels`, which count on the frame as the model saw it.
    """

    syntax: Syntax = "videocom"
    coords: Coords = "pixels"
    frame_pixels: int = 128 * 28**2
    factor: int = 28

    def following(self, policy: object) -> Self:
        """The same with the options of a video agent; itself for other policies."""
        return replace(self, **turn_options(policy))

    def start(self, prompt: Prompt) -> VideoState:
        """The state before the first turn.

        Raises:
            ValueError: the reference does not tell the clip's frames, duration or size.
        """
        clip = video_reference(prompt)
        missing = [name for name in ("frame_count", "duration", "size") if clip.get(name) is None]
        if missing:
            raise ValueError(
                f"prompt {prompt.id!r}: its reference names manipulations but lacks {', '.join(missing)}; without the "
                "clip's frames, seconds and (height, width) they cannot be compared"
            )
        frames, seconds = int(clip["frame_count"]), float(clip["duration"])
        height, width = (int(side) for side in clip["size"])
        # the size in which the policy saw a still, as `video.encoding.VideoEncoder.still_size`: the unit of its boxes
        least = min(4 * self.factor**2, self.frame_pixels)
        seen = smart_resize(height, width, factor=self.factor, min_pixels=least, max_pixels=self.frame_pixels)
        starts = [i * seconds / frames for i in range(frames)]
        return VideoState.start(starts, seconds, (height, width), coords=self.coords, seen=seen, turns=_ENDLESS)

    def truth(self, prompt: Prompt) -> Truth | None:
        """The reference's manipulations, None where it names none and for pictures, in which nothing is looked up."""
        reference = video_reference(prompt)
        labels = {name: reference.get(name) or () for name in _TRUTH_FIELDS}
        if prompt.inputs.get("images") or not any(labels.values()):
            return None
        return Truth(
            ids=tuple(int(segment) for segment in labels["segment_ids"]),
            spans=tuple((float(start), float(end)) for start, end in labels["segments"]),
            frames=tuple((int(first), int(last)) for first, last in labels["frames"]),
            boxes=tuple((int(label["frame"]), _box(label["box"])) for label in labels["boxes"]),
            table=tuple((segment.start, segment.end) for segment in self.start(prompt).segments),
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
        starts: list[_Place | None] = []
        for prompt in rollout.prompts:
            starts.append(None if self.truth(prompt) is None else _Place(self.start(prompt)))
        # parents stand before their children, so a step goes on from the place of its parent: every turn is read once
        has_error = tree.tags.get("error", torch.zeros(len(tree))).bool().tolist()
        places: list[_Place | None] = []
        steps = zip(tree.parent.tolist(), tree.group.tolist(), rollout.texts, has_error, strict=True)
        for parent, group, text, refused in steps:
            before = places[parent] if parent >= 0 else starts[group]
            places.append(None if before is None else self._after(before, text, refused=refused))
        return [None if place is None else place.turns for place in places]

    def _after(self, before: "_Place", text: str, *, refused: bool = False) -> "_Place":
        """The place behind one more turn. refused: the environment refused it, whatever the replay says."""
        turn = parse_turn(text, self.syntax)
        last_frame = before.last_frame
        calls: list[Call] = []
        for action in turn.actions:
            calls += _calls(before.state, last_frame, action)
            # a box without a frame of its own lies on the frame that was named before it
            if calls and calls[-1].frame is not None:
                last_frame = calls[-1].frame
        state, _, problem = act(before.state, turn)
        code: str | None = "error" if refused else None
        if problem is not None and not refused:
            code = problem.code
        record = TurnCalls(tuple(calls), code, turn.answer is not None)
        return _Place(state, last_frame, (*before.turns, record))


class _Place(NamedTuple):
    """A point of a path: the clip's state, the frame named last, the turns so far."""

    state: VideoState
    last_frame: int | None = None
    turns: tuple[TurnCalls, ...] = ()


READING = Reading()


def _calls(state: VideoState, last_frame: int | None, action: VideoAction) -> list[Call]:
    """The looks that one action asks for; none for the user's own manipulations, which no reference names."""
    args: Mapping[str, Any] = action.args
    if action.name == "find_segment":
        if "segments" in args:
            return [Call("segment", segment=segment) for segment in args["segments"]]
        return [Call("segment", span=(float(args["start"]), float(args["end"])))]
    # policies count frames from 1, `Call` from 0
    named_frame = args["frame"] - 1 if "frame" in args else None
    if action.name == "find_frame":
        if named_frame is None:
            named_frame = frame_at(state.starts, args["time"])
        return [Call("frame", frame=named_frame)]
    if action.name == "spatial_zoom":
        frame = last_frame if named_frame is None else named_frame
        return [Call("box", frame=frame, box=state.unit_box(args["bbox"]))]
    return []


def _box(values: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (float(v) for v in values)
    return x1, y1, x2, y2

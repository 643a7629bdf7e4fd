"""Slots, the positions at which a process reward model is read: one per step, recorded while ids are joined.

    prompt | step 1 | marker | joiner | step 2 | marker
                           ^                          ^

A slot is the last token of a step's marker, or the token before it, where the marker is predicted.

Nothing is ever searched for in finished ids: a marker may also occur in the question, and padding may equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from mmrl.registry import of_kind

IGNORED = -100.0

# Text -> token ids, no special tokens added.
Encode = Callable[[str], list[int]]


class SlotError(ValueError):
    """A solution that cannot be laid out; the message names the step."""


class FormatOptions(TypedDict, total=False):
    """Fields of `StepFormat` that a recipe names."""

    marker: str
    joiner: str
    markers: Literal["inline", "turns"]
    read_offset: int
    positive: str
    negative: str
    opening: str
    aggregate: Annotated[str, of_kind("aggregates")]


@dataclass(frozen=True)
class StepFormat:
    """The layout in which a checkpoint reads steps. Saved with it, as another one gives plausible, meaningless scores.

    marker: text after every step, tokenised apart from it. joiner: text between a marker and the next step.
    markers: "inline", all steps stand in the model's turn (Math-Shepherd, MM-PRM, Qwen2.5-Math-PRM); "turns", each
        step is a turn of the user and the marker is the model's one-token answer (VisualPRM, RLHFlow).
    read_offset: 0 reads at the last token of the marker (of the step, if there is no marker); -1 one token before,
        where the marker is predicted.
    positive, negative: tokens whose logits are compared; empty where a head on the hidden state scores.
    opening: turns only, text between question and first step.
    aggregate: how step scores become the score of a solution, by name of `mmrl.scorers.aggregate`.

    Raises:
        ValueError: read_offset besides 0 and -1, turns without read_offset -1, or one of two tokens missing.
    """

    marker: str = "\n"
    joiner: str = ""
    markers: Literal["inline", "turns"] = "inline"
    read_offset: int = 0
    positive: str = ""
    negative: str = ""
    opening: str = ""
    aggregate: str = "min"

    def __post_init__(self) -> None:
        if self.read_offset not in (0, -1):
            raise ValueError(f"read_offset={self.read_offset}: 0 reads at the marker, -1 one token before it")
        if self.markers == "turns" and (self.read_offset != -1 or self.marker != self.positive):
            raise ValueError("markers: turns predicts the answer: read_offset is -1 and the marker is `positive`")
        if self.read_offset == -1 and not self.marker:
            raise ValueError("read_offset -1 reads before a marker; name the marker")
        if bool(self.positive) != bool(self.negative):
            raise ValueError("two tokens are compared: give both positive and negative, or neither")

    def to_json(self) -> dict[str, Any]:
        """For the record beside a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class SlotIds:
    """A format in token ids.

    between: before every step but the first. closing: after every step; its last token is the marker. read: the slot
    counted from the end of a step's run, -1 = its last token.
    """

    between: tuple[int, ...]
    closing: tuple[int, ...]
    read: int

    def run(self, step: Sequence[int], first: bool) -> list[int]:
        """Everything that a step puts into the context."""
        return [*(() if first else self.between), *step, *self.closing]


@dataclass(frozen=True)
class Slots:
    """One laid-out solution of L tokens; T is the number of steps that fit, `dropped` that of the others.

    ids: (L,). starts: (T + 1,) the first position of each step's run, then L. slots: (T,) the position at which each
    step is read. labels: (T,), None = unlabelled.
    """

    ids: list[int]
    starts: list[int]
    slots: list[int]
    labels: list[float | None]
    dropped: int = 0

    @property
    def label_row(self) -> list[float]:
        """(L,) labels at the last token of each step's run (prm.md A2), `IGNORED` elsewhere."""
        row = [IGNORED] * len(self.ids)
        for end, label in zip(self.starts[1:], self.labels, strict=True):
            row[end - 1] = IGNORED if label is None else label
        return row


def slot_ids(format: StepFormat, encode: Encode, between: str = "", closing: str | None = None) -> SlotIds:
    """A format in ids. between, closing: the chat template's own text around an answer turn (turns only).

    Raises:
        ValueError: a predicted marker or a verdict that is not exactly one id, or two verdicts with the same one.
    """
    for text in (format.positive, format.negative):
        if text and len(encode(text)) != 1:
            raise ValueError(f"{text!r} becomes {len(encode(text))} tokens; a verdict must be one, add it as a token")
    if format.positive and encode(format.positive) == encode(format.negative):
        raise ValueError(f"{format.positive!r} and {format.negative!r} are the same token; add them to the tokenizer")
    marker = encode(format.marker) if format.marker else []
    if format.read_offset == -1 and len(marker) != 1:
        raise ValueError(f"the marker {format.marker!r} becomes {len(marker)} tokens; to be predicted it must be one")
    ahead = encode(closing) if closing else []
    return SlotIds(tuple(encode(between or format.joiner)), (*ahead, *marker), -1 + format.read_offset)


def lay_out(
    prompt: Sequence[int],
    steps: Sequence[Sequence[int]],
    format: SlotIds,
    labels: Sequence[float | None] | None = None,
    *,
    bos: int | None = None,
    max_length: int | None = None,
    last_only: bool = False,
) -> Slots:
    """Join a prompt and the ids of its steps; whole steps are left out from the end where `max_length` is passed.

    Args:
        labels: one per step, None = unlabelled; default all unlabelled.
        bos: put in front. last_only: keep only the label of the last step that fits (TRL).
    Raises:
        SlotError: no step, an empty step, another number of labels than steps, or not even the first step fits.
    """
    if not steps:
        raise SlotError("the solution has no step")
    step_labels: Sequence[float | None] = labels if labels is not None else [None] * len(steps)
    if len(step_labels) != len(steps):
        raise SlotError(f"{len(step_labels)} labels for {len(steps)} steps")
    ids = list(prompt) if bos is None else [bos, *prompt]
    starts, slots = [], []
    for t, step in enumerate(steps):
        if not step:
            raise SlotError(f"step {t} is empty")
        run = format.run(step, first=t == 0)
        if max_length is not None and len(ids) + len(run) > max_length:
            break
        starts.append(len(ids))
        ids += run
        slots.append(len(ids) + format.read)
    if not slots:
        raise SlotError(f"the prompt ({len(prompt)} tokens) and the first step do not fit in max_length={max_length}")
    kept = list(step_labels[: len(slots)])
    if last_only:
        kept[:-1] = [None] * (len(slots) - 1)
    return Slots(ids, [*starts, len(ids)], slots, kept, len(steps) - len(slots))

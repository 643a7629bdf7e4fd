"""Readings of the texts of steps: events by regular expressions, and evidence beside a prompt's gold texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Prompt, Rollout

_WORD = re.compile(r"\w+")


@register(
    "readings", "events", reads=("texts",), writes=("tags.events",), source="events of Hierarchies of Reward Machines"
)
class Events:
    """tags.events (N, E): True where an event's regular expression matches in a step's text, for `reward_machine`.

    Args:
        patterns: event -> expression, searched in the step's text (one line break and case matter; write (?i) or
            (?s) to change that). Columns stand in this order, which must be that of the machine's `events`.
    Raises:
        ValueError: no event, or an expression that does not compile.
    """

    def __init__(self, patterns: Annotated[Mapping[str, str], Field(min_length=1)]) -> None:
        self.patterns: dict[str, re.Pattern[str]] = {}
        for event, expression in patterns.items():
            try:
                self.patterns[event] = re.compile(expression)
            except re.error as error:
                raise ValueError(f"patterns.{event}={expression!r} is no regular expression: {error}") from None

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """tags.events."""
        events = torch.zeros((len(rollout.tree), len(self.patterns)), dtype=torch.bool)
        for step, text in enumerate(rollout.texts):
            for column, expression in enumerate(self.patterns.values()):
                events[step, column] = expression.search(text) is not None
        return {"tags.events": events}


@register(
    "readings",
    "evidence",
    reads=("texts",),
    writes=("tags.similarity", "tags.documents"),
    source="StepSearch; similarity without its inverse document frequencies",
)
class Evidence:
    """Similarity of each step to the gold texts of its prompt, and the retrieved items in it.

    tags.similarity (N, max_golds): cosine of word counts of the step and each gold text, in [0, 1]; NaN in the columns
    that a prompt with fewer gold texts does not use. tags.documents (N, max_items): the prompt's items in the order in
    which they first occur.

    Args:
        golds: key of the prompt's reference that lists the gold texts.
        item: a regular expression; each match in a step is an item, named by its first group or as a whole.
        max_golds, max_items: columns. A prompt that needs more is set aside: nothing is cut off.
    Raises:
        ValueError: an expression that does not compile.
    """

    def __init__(
        self,
        golds: str = "evidence",
        item: str = r"<document id=\"?([\w.-]+)",
        max_golds: Annotated[int, Field(ge=1)] = 8,
        max_items: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        try:
            self.item = re.compile(item)
        except re.error as error:
            raise ValueError(f"item={item!r} is no regular expression: {error}") from None
        self.golds, self.max_golds, self.max_items = golds, max_golds, max_items

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """tags.similarity and tags.documents."""
        tree = rollout.tree
        golds = [self._golds(prompt) for prompt in rollout.prompts]
        # Per prompt the names of its items so far: an item's column is its place there.
        items: list[list[str]] = [[] for _ in rollout.prompts]
        # (step, column) of every occurrence of an item.
        rows: list[int] = []
        columns: list[int] = []
        similarity = torch.full((len(tree), self.max_golds), torch.nan, dtype=torch.float64)
        for step, (group, text) in enumerate(zip(tree.group.tolist(), rollout.texts, strict=True)):
            words = word_counts(text)
            for column, gold in enumerate(golds[group]):
                similarity[step, column] = cosine(words, gold)
            for match in self.item.finditer(text):
                name = match.group(1) if self.item.groups else match.group()
                if name not in items[group]:
                    items[group].append(name)
                rows.append(step)
                columns.append(items[group].index(name))
        return {"tags.similarity": similarity, "tags.documents": item_table(len(tree), self.max_items, rows, columns)}

    def _golds(self, prompt: Prompt) -> list[Counter[str]]:
        """Word counts of the prompt's gold texts; none where its reference lists none."""
        reference = prompt.reference
        texts = reference.get(self.golds) if isinstance(reference, Mapping) else None
        if texts is None:
            return []
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt {prompt.id!r}: reference.{self.golds} is no list of texts: {str(texts)[:60]!r}")
        if len(texts) > self.max_golds:
            raise ValueError(f"prompt {prompt.id!r} has {len(texts)} gold texts; raise max_golds={self.max_golds}")
        return [word_counts(text) for text in texts]


def item_table(steps: int, columns: int, rows: list[int], places: list[int]) -> Tensor:
    """(N, columns) bool, True at (rows[i], places[i]).

    Raises:
        ValueError: a place beyond the columns.
    """
    if places and max(places) >= columns:
        raise ValueError(f"a prompt's steps show {max(places) + 1} different items; raise max_items={columns}")
    table = torch.zeros((steps, columns), dtype=torch.bool)
    table[rows, places] = True
    return table


def word_counts(text: str) -> Counter[str]:
    """Words in lower case with how often they occur."""
    return Counter(_WORD.findall(text.lower()))


def cosine(a: Counter[str], b: Counter[str]) -> float:
    """Cosine of two word counts, 0 where one has no words."""
    product = sum(count * b[word] for word, count in a.items())
    length = math.sqrt(sum(count**2 for count in a.values()) * sum(count**2 for count in b.values()))
    return min(product / length, 1.0) if length else 0.0

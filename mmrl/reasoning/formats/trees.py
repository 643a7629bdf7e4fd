"""Trees of solution prefixes with Monte-Carlo values: MM-PRM (tree and training row) and MATH-APS (tree and flat).

A tree becomes one record per path; a path ends at the first node of value 0 or at a leaf, and a node is one step.
Filters of training sets (root value 0 or 1, short texts, balance) are no part of reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.records import Counts, SolutionRecord, plain_steps
from mmrl.reasoning.records_io import check_markers
from mmrl.reasoning.rows import Row, images, integer, number, optional_text, rest, row_id, rows, same_length, text
from mmrl.registry import register

PRM = "<prm>"
# Text, value, and counts where the tree has them.
Node = tuple[str, float, Counts | None]


@register("formats", "mm_prm")
def mm_prm(row: Row, name: str) -> list[SolutionRecord]:
    """MM-PRM training row: `Question: q\\nProcess: s1<prm>\\n\\ns2<prm>` and a list of values, one per marker."""
    turns = rows(row, "conversations", dict)
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise RowError("bad turns: expected one human and one gpt turn")
    question, mark, process = text(turns[0], "value").partition("\nProcess: ")
    if not mark or not question.startswith("Question: "):
        raise RowError("no question: the human turn lacks 'Question: ' or '\\nProcess: '")
    *steps, tail = process.split(PRM)
    if tail.strip():
        raise RowError(f"text after the last marker: {tail[:40]!r}")
    values = [number(value, "value") for value in rows(turns[1], "value", (int, float))]
    same_length(values, steps)
    # Steps after the first are written behind an empty line.
    texts = [steps[0], *(step.removeprefix("\n\n") for step in steps[1:])] if steps else []
    record = SolutionRecord(
        row_id(row, name),
        question.removeprefix("Question: "),
        plain_steps(texts),
        images=images(row, "image"),
        labels=tuple(values),
        label_kind="soft",
        scope="prefix",
        source="mm_prm",
        meta=rest(row, "id", "image", "conversations"),
    )
    return [record]


@register("exporters", "mm_prm")
def mm_prm_row(record: SolutionRecord) -> dict[str, Any]:
    """The training row of a fully labelled record; RowError for a missing label or a marker in the text."""
    check_markers(record, [PRM])
    if "\nProcess: " in record.question:
        raise RowError("marker in the text: the question holds a line 'Process: ', where this format ends it")
    if record.labels is None or None in record.labels:
        raise RowError(f"unlabelled steps: {record.id!r} has some; MM-PRM rows need a value per step")
    process = "\n\n".join(step + PRM for step in record.texts)
    image: Any = record.images[0] if len(record.images) == 1 else list(record.images)
    turns = [
        {"from": "human", "value": f"Question: {record.question}\nProcess: {process}"},
        {"from": "gpt", "value": list(record.labels)},
    ]
    return {"id": record.id, "image": image, "conversations": turns} | dict(record.meta)


@register("formats", "mm_prm_tree")
def mm_prm_tree(row: Row, name: str) -> list[SolutionRecord]:
    """MM-PRM tree: nodes `partial_solution, mc_value, children`; the root adds question, answer, image_path, id."""
    meta = {"root_value": number(row.get("mc_value"), "mc_value")}
    paths = _paths([(_mm_node(child), child) for child in rows(row, "children", dict)], _mm_node)
    record_id, question = row_id(row, name), text(row, "question")
    return _records(
        record_id, question, paths, "mm_prm_tree", optional_text(row, "answer"), images(row, "image_path"), meta
    )


@register("formats", "math_aps_tree")
def math_aps_tree(row: Row, name: str) -> list[SolutionRecord]:
    """MATH-APS / OmegaPRM tree: `question, final_answer, reasoning_steps{text, mc_value, children}`."""
    root = row.get("reasoning_steps")
    if not isinstance(root, dict):
        raise RowError("no tree: 'reasoning_steps' is no node with text, mc_value, children")
    meta = {"root_value": number(root.get("mc_value"), "mc_value")}
    paths = _paths([(_aps_node(child), child) for child in rows(root, "children", dict)], _aps_node)
    record_id, answer = row_id(row, name), optional_text(row, "final_answer")
    return _records(record_id, text(row, "question"), paths, "math_aps_tree", answer, (), meta)


@register("formats", "math_aps_flat")
def math_aps_flat(row: Row, name: str) -> list[SolutionRecord]:
    """MATH-APS flat: a list of `solution_prefix, mc_value`; one prefix extends another where it starts with it.

    Text between two listed prefixes is one step. A prefix listed again was estimated again: its value is the mean.
    """
    question = text(row, "question")
    estimates: dict[str, list[float]] = {}
    for entry in rows(row, "reasoning_steps", dict):
        prefix, value = text(entry, "solution_prefix"), number(entry.get("mc_value"), "mc_value")
        if not prefix.startswith(question):
            raise RowError("prefix without question: a solution_prefix does not start with the question")
        estimates.setdefault(prefix[len(question) :].strip(), []).append(value)
    values = {prefix: sum(of_prefix) / len(of_prefix) for prefix, of_prefix in estimates.items()}
    meta = {"root_value": values.pop("", None)}
    leaves = _leaves(values)
    # Longest first, in the order of the list where lengths are equal; paths that end at one node of value 0 once.
    distinct = dict.fromkeys(leaves[prefix] for prefix in values if prefix in leaves)
    paths = sorted(distinct, key=len, reverse=True)
    record_id, answer = row_id(row, name), optional_text(row, "final_answer")
    return _records(record_id, question, paths, "math_aps_flat", answer, (), meta)


def _paths(children: Sequence[tuple[Node, Row]], read: Any) -> Iterator[list[Node]]:
    """Paths, depth first; an explicit stack, since trees are as deep as solutions are long."""
    stack = [[child] for child in reversed(children)]
    while stack:
        path = stack.pop()
        (_, value, _), node = path[-1]
        below = rows(node, "children", dict) if value > 0 else []
        if not below:
            yield [step for step, _ in path]
        for child in reversed(below):
            stack.append([*path, (read(child), child)])


def _leaves(values: dict[str, float]) -> dict[str, tuple[Node, ...]]:
    """Prefix -> the listed prefixes that it goes on from and itself as steps, up to the first of value 0.

    Of every prefix that no other one extends.
    """
    # In this order the prefixes that extend another follow it at once.
    order = sorted(values)
    path: list[str] = []
    leaves: dict[str, tuple[Node, ...]] = {}
    for prefix, following in zip_longest(order, order[1:]):
        while path and not prefix.startswith(path[-1]):
            path.pop()
        path.append(prefix)
        if following is None or not following.startswith(prefix):
            leaves[prefix] = _steps(path, values)
    return leaves


def _steps(path: Sequence[str], values: dict[str, float]) -> tuple[Node, ...]:
    nodes: list[Node] = []
    done = 0
    for prefix in path:
        nodes.append((prefix[done:].strip(), values[prefix], None))
        done = len(prefix)
        if values[prefix] <= 0:
            break
    return tuple(nodes)


def _records(
    record_id: str, question: str, paths: Any, source: str, answer: str | None, pictures: tuple[str, ...], meta: Row
) -> list[SolutionRecord]:
    records = []
    for i, path in enumerate(paths):
        texts, values, counts = zip(*path, strict=True)
        record = SolutionRecord(
            f"{record_id}#{i}",
            question,
            plain_steps(texts),
            images=pictures,
            answer=answer,
            labels=values,
            label_kind="soft",
            scope="prefix",
            mc=None if None in counts else counts,
            source=source,
            meta=meta,
        )
        records.append(record)
    if not records:
        raise RowError("no step: the tree has no node below its root")
    return records


def _mm_node(node: Row) -> Node:
    counts = None
    if node.get("counts") is not None:
        pair = [integer(count, "counts") for count in rows(node, "counts", int)]
        if len(pair) != 2:
            raise RowError(f"bad counts: {str(pair)[:80]} is no pair of correct and total")
        counts = Counts(*pair)
    value = number(node.get("mc_value"), "mc_value")
    return "\n\n".join(rows(node, "partial_solution")), value, counts


def _aps_node(node: Row) -> Node:
    return text(node, "text"), number(node.get("mc_value"), "mc_value"), None

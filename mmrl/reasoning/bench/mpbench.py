"""MPBench: step correctness, answer aggregation, reasoning process search; overall = mean of the three.

The published files are `step_correctness.json`, `answer_aggregation.json` and `reasoning_process_search.json`, which
name the paradigm here too. Their columns are not documented publicly; assumed are rows with `id`, `question`, `image`
(a path or several) and
- step_correctness: `steps` (texts), `labels` (1 right, 0 or -1 wrong, one per step);
- answer_aggregation: `candidates` of `{steps, answer, correct}`;
- reasoning_process_search: `prefix` (texts, may be empty), `candidates` of `{step, correct}`.
Rename columns of another layout before use; a missing column is reported with file and row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.answer_text import normalise
from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, Steps, mean, of_groups, total
from mmrl.reasoning.records import SolutionRecord, plain_steps
from mmrl.reasoning.rows import Row, check_total, first_zero, images, row_id, rows, same_length, text
from mmrl.registry import register
from mmrl.scorers.metrics import f1, first_error, macro_f1, mcc
from mmrl.search.votes import best_of_n, weighted


def read_row(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """An item of the paradigm that the file is named after; truth is per step or per candidate."""
    readers = {
        "step_correctness": _correctness,
        "answer_aggregation": _aggregation,
        "reasoning_process_search": _search,
    }
    if stem not in readers:
        raise RowError(f"unknown paradigm: file {stem!r} is none of {', '.join(readers)}")
    return [readers[stem](row, f"{stem}/{row_id(row, name)}", stem)]


def _correctness(row: Row, own: str, group: str) -> Item:
    steps, given = rows(row, "steps"), rows(row, "labels", int)
    same_length(given, steps)
    if not set(given) <= {1, 0, -1}:
        raise RowError(f"bad label: labels hold other numbers than 1, 0, -1: {given}")
    labels = tuple(float(y == 1) for y in given)
    return Item((_record(row, own, steps, labels),), group, first_zero(labels))


def _aggregation(row: Row, own: str, group: str) -> Item:
    candidates = _candidates(row)
    records = tuple(_record(row, f"{own}/{i}", _texts(c, i)) for i, c in enumerate(candidates))
    return Item(records, group, [(normalise(str(c.get("answer", ""))), c["correct"]) for c in candidates])


def _search(row: Row, own: str, group: str) -> Item:
    candidates, prefix = _candidates(row), rows(row, "prefix")
    check_total(len(candidates) * (len(prefix) + 1))
    records = tuple(_record(row, f"{own}/{i}", [*prefix, text(c, "step")]) for i, c in enumerate(candidates))
    return Item(records, group, [c["correct"] for c in candidates])


def _candidates(row: Row) -> list[dict[str, Any]]:
    found = rows(row, "candidates", dict)
    if not found or any(not isinstance(c.get("correct"), bool) for c in found):
        raise RowError("bad candidates: there must be some, each with a true or false 'correct'")
    return found


def _texts(candidate: Row, i: int) -> list[str]:
    steps = rows(candidate, "steps")
    if not steps or not all(s.strip() for s in steps):
        raise RowError(f"empty candidate: candidate {i} has no step or an empty one")
    return steps


def _record(row: Row, own: str, steps: Sequence[str], labels: tuple[float, ...] | None = None) -> SolutionRecord:
    return SolutionRecord(
        own, text(row, "question"), plain_steps(steps), images=images(row, "image"), labels=labels, source="mpbench"
    )


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """overall = mean of the paradigms that are there (a note names missing ones), each the mean of its two measures.

    step_correctness: fei (share of solutions whose first error, or its absence, is found exactly), aei (0.5 F1 of
    right + 0.5 F1 of wrong steps). answer_aggregation: accuracy of best-of-N and of the score-weighted vote.
    reasoning_process_search: F1 and MCC of next steps called right, by their own score. Right iff p >= threshold.
    """
    parts = of_groups(scored)
    groups: dict[str, dict[str, float]] = {}
    if "step_correctness" in parts:
        groups["step_correctness"] = correctness(parts["step_correctness"], threshold)
    if "answer_aggregation" in parts:
        groups["answer_aggregation"] = aggregation(parts["answer_aggregation"], aggregate)
    if "reasoning_process_search" in parts:
        groups["reasoning_process_search"] = search(parts["reasoning_process_search"], threshold)
    names = ("step_correctness", "answer_aggregation", "reasoning_process_search")
    missing = [n for n in names if n not in groups]
    notes = (f"overall leaves out {', '.join(missing)}: no such file",) if missing else ()
    metrics = {"overall": mean([g["average"] for g in groups.values()])}
    return Result(metrics | {n: g["average"] for n, g in groups.items()}, groups, notes)


def correctness(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """fei, aei and their average."""
    fei = mean([first_error(_known(s.scores[0]), tau=threshold) == s.item.truth for s in scored])
    called = [p >= threshold for s in scored for p in _known(s.scores[0])]
    aei = macro_f1(called, [y == 1 for s in scored for y in s.item.records[0].labels or ()])
    return {"average": (fei + aei) / 2, "fei": fei, "aei": aei, "items": len(scored)}


def aggregation(scored: Sequence[Scored], aggregate: str) -> dict[str, float]:
    """Accuracy of best-of-N and of the score-weighted vote; the vote is right iff its answer is one of a right one."""
    best, vote = [], []
    for s in scored:
        scores = [total(p, aggregate) for p in s.scores]
        answers = [a or None for a, _ in s.item.truth]
        right = {a for a, correct in s.item.truth if correct and a}
        flags = [str(int(correct)) for _, correct in s.item.truth]
        best.append(best_of_n(flags, scores) == "1")
        vote.append(weighted(answers, scores) in right)
    average = (mean(best) + mean(vote)) / 2
    return {"average": average, "best_of_n": mean(best), "weighted_vote": mean(vote), "items": len(scored)}


def search(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """F1 and MCC over all next steps, their average, and how often the best-scored next step is right."""
    last = [[_known(p)[-1] for p in s.scores] for s in scored]
    called = [p >= threshold for own in last for p in own]
    right = [y for s in scored for y in s.item.truth]
    chosen = mean([s.item.truth[own.index(max(own))] for s, own in zip(scored, last, strict=True)])
    f, m = f1(called, right), mcc(called, right)
    return {"average": (f + m) / 2, "f1": f, "mcc": m, "selected": chosen, "items": len(scored)}


def _known(scores: Steps) -> Sequence[float]:
    assert scores is not None  # only lenient benchmarks let unscored solutions pass
    return scores


BENCH = register("benchmarks", "mpbench")(Benchmark(read_row, measure, "overall", stepwise=False))

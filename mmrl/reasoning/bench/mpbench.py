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


def _correctness(row: Row, record_id: str, group: str) -> Item:
    """One solution with a label per step; the truth is its first error."""
    steps, verdicts = rows(row, "steps"), rows(row, "labels", int)
    same_length(verdicts, steps)
    if not set(verdicts) <= {1, 0, -1}:
        raise RowError(f"bad label: labels hold other numbers than 1, 0, -1: {verdicts}")
    labels = tuple(float(verdict == 1) for verdict in verdicts)
    return Item((_record(row, record_id, steps, labels),), group, first_zero(labels))


def _aggregation(row: Row, record_id: str, group: str) -> Item:
    """Several solutions; the truth is (answer, correct) of each."""
    records, truth = [], []
    for i, candidate in enumerate(_candidates(row)):
        records.append(_record(row, f"{record_id}/{i}", _texts(candidate, i)))
        truth.append((normalise(str(candidate.get("answer", ""))), candidate["correct"]))
    return Item(tuple(records), group, truth)


def _search(row: Row, record_id: str, group: str) -> Item:
    """Several next steps after one prefix; the truth is whether each is right."""
    candidates, prefix = _candidates(row), rows(row, "prefix")
    check_total(len(candidates) * (len(prefix) + 1))
    records, truth = [], []
    for i, candidate in enumerate(candidates):
        records.append(_record(row, f"{record_id}/{i}", [*prefix, text(candidate, "step")]))
        truth.append(candidate["correct"])
    return Item(tuple(records), group, truth)


def _candidates(row: Row) -> list[dict[str, Any]]:
    candidates = rows(row, "candidates", dict)
    if not candidates or any(not isinstance(candidate.get("correct"), bool) for candidate in candidates):
        raise RowError("bad candidates: there must be some, each with a true or false 'correct'")
    return candidates


def _texts(candidate: Row, i: int) -> list[str]:
    steps = rows(candidate, "steps")
    if not steps or not all(step.strip() for step in steps):
        raise RowError(f"empty candidate: candidate {i} has no step or an empty one")
    return steps


def _record(row: Row, record_id: str, steps: Sequence[str], labels: tuple[float, ...] | None = None) -> SolutionRecord:
    return SolutionRecord(
        record_id,
        text(row, "question"),
        plain_steps(steps),
        images=images(row, "image"),
        labels=labels,
        source="mpbench",
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
    missing = [name for name in names if name not in groups]
    notes = (f"overall leaves out {', '.join(missing)}: no such file",) if missing else ()
    averages = {name: measures["average"] for name, measures in groups.items()}
    return Result({"overall": mean(list(averages.values()))} | averages, groups, notes)


def correctness(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """fei, aei and their average."""
    exact: list[bool] = []
    called_right: list[bool] = []
    truly_right: list[bool] = []
    for entry in scored:
        scores = _known(entry.scores[0])
        exact.append(first_error(scores, tau=threshold) == entry.item.truth)
        called_right += [score >= threshold for score in scores]
        truly_right += [label == 1 for label in entry.item.records[0].labels or ()]
    fei, aei = mean(exact), macro_f1(called_right, truly_right)
    return {"average": (fei + aei) / 2, "fei": fei, "aei": aei, "items": len(scored)}


def aggregation(scored: Sequence[Scored], aggregate: str) -> dict[str, float]:
    """Accuracy of best-of-N and of the score-weighted vote; the vote is right iff its answer is one of a right one."""
    best, vote = [], []
    for entry in scored:
        totals = [total(scores, aggregate) for scores in entry.scores]
        # Voted on are answers, and an empty one has no vote; best-of-N chooses a candidate by its verdict as a text.
        answers, verdicts, right_answers = [], [], set()
        for answer, correct in entry.item.truth:
            answers.append(answer or None)
            verdicts.append(str(int(correct)))
            if correct and answer:
                right_answers.add(answer)
        best.append(best_of_n(verdicts, totals) == "1")
        vote.append(weighted(answers, totals) in right_answers)
    average = (mean(best) + mean(vote)) / 2
    return {"average": average, "best_of_n": mean(best), "weighted_vote": mean(vote), "items": len(scored)}


def search(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """F1 and MCC over all next steps, their average, and how often the best-scored next step is right."""
    called_right: list[bool] = []
    truly_right: list[bool] = []
    selected: list[float] = []
    for entry in scored:
        # The candidate step is the last one of its record, behind the prefix.
        scores = [_known(row)[-1] for row in entry.scores]
        called_right += [score >= threshold for score in scores]
        truly_right += entry.item.truth
        selected.append(entry.item.truth[scores.index(max(scores))])
    f1_score, mcc_score = f1(called_right, truly_right), mcc(called_right, truly_right)
    return {
        "average": (f1_score + mcc_score) / 2,
        "f1": f1_score,
        "mcc": mcc_score,
        "selected": mean(selected),
        "items": len(scored),
    }


def _known(scores: Steps) -> Sequence[float]:
    # Only lenient benchmarks let unscored solutions pass, and this one is not.
    assert scores is not None
    return scores


BENCH = register("benchmarks", "mpbench")(Benchmark(read_row, measure, "overall", stepwise=False))

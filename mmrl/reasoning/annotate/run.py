"""Labels from completions: questions or solutions in, labelled records, the store and a report out.

A prefix of a solution is completed k times; the share of completions that reach the right answer is its value, and a
label rule turns the values into labels:

    prefix of 0, 1, 2 steps  ->  4 of 8, 3 of 8, 0 of 8 right  ->  hard_gt: labels 1, 0  (first error: step 1)

`annotate` works on a batch of items at a time. All that it pays for lies in `store.sqlite`, so a run that was killed
samples only what is missing, and the files at the end are written from the store.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmrl.capabilities import Extender, begin_iteration
from mmrl.growth import GrowingTree, rollout_for
from mmrl.jsonl import RowError
from mmrl.reasoning.annotate.labels import After, label_mc
from mmrl.reasoning.annotate.monte_carlo import MonteCarlo, Solution, as_state, estimate_steps, sample_solutions
from mmrl.reasoning.annotate.omega import Omega, omega_trees, traverse, tree_json
from mmrl.reasoning.annotate.output import progress_bar, summary
from mmrl.reasoning.annotate.store import STORE, CompletionStore, Estimator, prefix_key
from mmrl.reasoning.annotate.trees import solution_trees
from mmrl.reasoning.records import SolutionRecord, record_of
from mmrl.reasoning.records_io import check_record, record_to_json
from mmrl.registry import find
from mmrl.rollout import OutcomeReward, Prompt, State
from mmrl.rollout_folder import RolloutFolder
from mmrl.workdir import WorkDir, publish_lines, write_json

Item = Prompt | SolutionRecord

# An item or record that was set aside: its "id" and the "reason".
SetAside = dict[str, str]

# The file of a row ("records" or "trees"), and the row: a record with counts, or a tree as JSON.
Row = tuple[str, SolutionRecord | dict[str, Any]]


@dataclass(frozen=True)
class LabelRule:
    """Record with counts -> record with labels, by a row of `mmrl list label_rules` and its numbers.

    `hard_gt` (threshold 0: VisualPRM, Math-Shepherd), `hard_ge` (tau), `soft` (MM-PRM), `log_boost` (a), and those
    that compare a step with the one before it: `relative_progress` (ratio), `rel_effective` (gamma, threshold).
    after: what becomes of the steps after the first error.

    Raises:
        ComponentError: an unknown rule, or an option that it does not take.
    """

    name: str = "hard_gt"
    after: After = "mask"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find("label_rules", self.name).check(self.options, "label")

    @property
    def needs_start(self) -> bool:
        """True for rules that compare with the value of the empty prefix, in `meta["root"]`."""
        return "start" in inspect.signature(find("label_rules", self.name).target).parameters

    def __call__(self, record: SolutionRecord) -> SolutionRecord:
        """The labelled record.

        Raises:
            RowError: the empty prefix has no value.
        """
        start = {}
        if self.needs_start:
            correct, total = record.meta["root"]
            if not total:
                raise RowError("no value before the first step: no completion of the question could be scored")
            start["start"] = correct / total
        rule = find("label_rules", self.name).build(self.options, "label", **start)
        # The first error is where the value is 0; only hard_gt moves that limit together with its labels.
        threshold = 0.0
        if self.name == "hard_gt":
            threshold = self.options.get("threshold", 0.0)
        return label_mc(record, rule, after=self.after, threshold=threshold)


def annotate(
    extender: Extender,
    verifier: OutcomeReward,
    items: Sequence[Prompt] | Sequence[SolutionRecord],
    method: MonteCarlo | Omega,
    folder: str | Path,
    *,
    rule: LabelRule = LabelRule(),
    fingerprint: str = "",
    seed: int = 0,
    temperature: float | None = None,
    separator: str = "\n",
    batch: int = 64,
    keep: bool = True,
    max_bad: float = 0.05,
    max_unscored: float = 0.2,
    rank: int = 0,
    world: int = 1,
    rollouts: RolloutFolder | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Label the steps of solutions by completing their prefixes; started again, it goes on where it was.

    Writes into `folder`: `store.sqlite` (all completions, the state of a stopped run), and at its end `store.jsonl`
    (the same), `records.jsonl`, `report.json`, and `trees.jsonl` for OmegaPRM. Of several ranks each pays for the
    questions of its own and writes nothing else: called once more for one rank, it goes through all of them with
    nothing left to pay.

    Args:
        items: questions, from which `method.solutions` solutions each are sampled (Monte Carlo) or a tree is grown
            (OmegaPRM); or solutions, whose steps are labelled (Monte Carlo alone).
        rule: counts -> labels.
        fingerprint: names policy, sampling settings and verifier; what was stored under another one, or at another
            `temperature`, is not used.
        separator: what the policy writes between steps; it is not part of a record's texts.
        batch: most prefixes per call of the policy, and items worked on side by side.
        keep: keep the texts of completions in the store; OmegaPRM and `rollouts` need them.
        max_bad: share of items that may be set aside for their form (id used twice, no step, no question).
        max_unscored: share of completions that may stay without a verdict.
        rollouts: where the trees of completions go, a batch at a time: values, visits and outcomes.
    Returns:
        The report: items, records, quarantined (id, reason), labels, cost of this run (`run`) and of the whole folder
        (`paid`). Of one rank of several, the cost.
    Raises:
        ValueError: OmegaPRM for solutions, nothing to do, too many bad items, a rank beyond `world`.
        RewardError: the verifier broke its contract or left too many completions unscored.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside 0..{world - 1}")
    usable, bad = _admit(items, method, max_bad)
    total = len(usable) + len(bad)
    usable = [item for item in usable if _rank_of(item, world) == rank]
    folder = Path(folder)
    sampling = fingerprint if temperature is None else f"{fingerprint} temperature {temperature}"
    keep = keep or isinstance(method, Omega) or rollouts is not None
    with (
        WorkDir(folder, rank).owned(),
        CompletionStore(folder / STORE, fingerprint=sampling, keep=keep, rank=rank) as store,
        progress_bar(len(usable), progress and rank == 0) as advance,
    ):
        estimator = Estimator(
            extender,
            verifier,
            store,
            seed=seed,
            temperature=temperature,
            batch=batch,
            max_unscored=max_unscored,
            on_call=lambda: advance(0, estimator.cost),
        )
        results = _results(estimator, usable, method, rule, separator, advance)
        if world > 1:
            # This rank only pays: its results lie in the store, from which one rank writes the files of all.
            for _ in results:
                pass
            return {"cost": {"run": estimator.cost, "paid": store.spent}}
        _publish(results, estimator, method, folder, rule, bad, rollouts)
        report = _report(estimator, method, folder, rule, total, bad)
    return report


def _rank_of(item: Item, world: int) -> int:
    """The rank that pays for an item. Solutions of one question go to one rank, since they share prefixes."""
    return int(prefix_key(State(_prompt(item)))[:8], 16) % world


def _publish(
    results: Iterable[BatchResult],
    estimator: Estimator,
    method: MonteCarlo | Omega,
    folder: Path,
    rule: LabelRule,
    bad: list[SetAside],
    rollouts: RolloutFolder | None,
) -> None:
    """Write the results batch by batch: labelled records and trees as lines, and a rollout of each batch.

    Records without any label are added to `bad`.
    """
    # A report tells that an annotation is complete, so an earlier one must not stand beside unfinished files.
    (folder / "report.json").unlink(missing_ok=True)
    names = ("records", "trees") if isinstance(method, Omega) else ("records",)
    origin: dict[str, Any] = {"grown_by": type(method).__name__.lower(), "seed": estimator.seed}
    if estimator.temperature is not None:
        origin["temperature"] = estimator.temperature
    num_batches = 0
    with ExitStack() as files:
        add_line = {name: files.enter_context(publish_lines(folder / f"{name}.jsonl")) for name in names}
        for index, result in enumerate(results):
            _write(add_line, result.rows, rule, bad)
            num_batches = index + 1
            if rollouts is None:
                continue
            trees = result.trees + solution_trees(estimator.store, result.solutions)
            if trees:
                rollouts.save(rollout_for(estimator.extender, trees, origin), index)
    if rollouts is not None:
        # An earlier run of more items has left batches behind the last one of this run.
        rollouts.trim(num_batches)


def _write(
    add_line: Mapping[str, Callable[[str], None]], rows: Iterable[Row], rule: LabelRule, bad: list[SetAside]
) -> None:
    """Add rows to their files, records with their labels; records without any label go to `bad`."""
    for name, content in rows:
        row = _labelled(content, rule, bad) if isinstance(content, SolutionRecord) else content
        if row is not None:
            add_line[name](json.dumps(row, allow_nan=False))


def _report(
    estimator: Estimator,
    method: MonteCarlo | Omega,
    folder: Path,
    rule: LabelRule,
    total: int,
    bad: Sequence[SetAside],
) -> dict[str, Any]:
    """Export the store, and write and return the report over `records.jsonl`."""
    estimator.store.export(folder / "store.jsonl")
    settings = {"method": type(method).__name__, **asdict(method), "rule": asdict(rule)}
    costs = {"run": estimator.cost, "paid": estimator.store.spent}
    with (folder / "records.jsonl").open() as lines:
        report = summary(settings, total, lines, bad, costs)
    write_json(folder / "report.json", report)
    return report


# ---- the work on one batch of items ---------------------------------------------------------------------------------


def _prompt(item: Item) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _admit(items: Sequence[Item], method: MonteCarlo | Omega, max_bad: float) -> tuple[list[Item], list[SetAside]]:
    """The items that can be annotated, and the others with their reason; ValueError when those are too many."""
    usable: list[Item] = []
    bad: list[SetAside] = []
    ids: set[str] = set()
    for item in items:
        if isinstance(method, Omega) and not isinstance(item, Prompt):
            raise ValueError(f"{item.id!r} is a solution; omega grows trees from questions, use monte_carlo for it")
        try:
            if item.id in ids:
                raise RowError("its id occurs before")
            if isinstance(item, Prompt):
                record_of(item, ())
            else:
                check_record(item, unlabelled=True)
            ids.add(item.id)
            usable.append(item)
        except ValueError as error:
            bad.append({"id": item.id, "reason": str(error)})
    if len(bad) > max_bad * len(items) or not items:
        first = "; ".join(f"{row['id']}: {row['reason']}" for row in bad[:3]) or "no items were given"
        raise ValueError(f"{len(bad)} of {len(items)} items cannot be annotated (max_bad={max_bad}); {first}")
    return usable, bad


class BatchResult(NamedTuple):
    """One batch of items after its completions are paid for.

    solutions: those that Monte Carlo labelled, with their counts. trees: those that OmegaPRM grew.
    """

    rows: list[Row]
    solutions: list[Solution]
    trees: list[GrowingTree]


def _results(
    estimator: Estimator,
    items: Sequence[Item],
    method: MonteCarlo | Omega,
    rule: LabelRule,
    separator: str,
    advance: Callable[[int, Mapping[str, int]], None],
) -> Iterator[BatchResult]:
    """Work on the items, `estimator.batch` of them side by side, and move the progress bar."""
    for start in range(0, len(items), estimator.batch):
        part = items[start : start + estimator.batch]
        begin_iteration(estimator.extender)
        if isinstance(method, Omega):
            questions = [item for item in part if isinstance(item, Prompt)]
            result = _grow_trees(estimator, questions, method, separator)
        else:
            result = _label_solutions(estimator, part, method, rule, separator)
        advance(len(part), estimator.cost)
        yield result


def _grow_trees(estimator: Estimator, prompts: Sequence[Prompt], method: Omega, separator: str) -> BatchResult:
    """OmegaPRM: a tree per question, and the training records along its paths."""
    rows: list[Row] = []
    trees = []
    for tree in omega_trees(estimator, prompts, method, separator=separator):
        rows.append(("trees", tree_json(tree, separator)))
        for record in traverse(tree, min_words=method.min_words, seed=estimator.seed, separator=separator):
            rows.append(("records", record))
        # A question for which nothing was written has a tree without a step, which no rollout can hold.
        if len(tree.steps):
            trees.append(tree.steps)
    return BatchResult(rows, [], trees)


def _label_solutions(
    estimator: Estimator, items: Sequence[Item], method: MonteCarlo, rule: LabelRule, separator: str
) -> BatchResult:
    """Monte Carlo: counts for every step of the solutions, sampled ones of the questions among the items first."""
    prompts = [item for item in items if isinstance(item, Prompt)]
    solutions: list[Solution] = []
    for sampled in sample_solutions(estimator, prompts, method.solutions, separator=separator):
        solutions += sampled
    given = [(item, as_state(item, separator)) for item in items if isinstance(item, SolutionRecord)]
    if rule.needs_start:
        # Sampled solutions have the counts of the empty prefix already: they are its completions.
        given = _with_roots(estimator, given, method.k)
    solutions += given
    records = estimate_steps(estimator, solutions, method.k, early_stop=method.early_stop)
    states = [state for _, state in solutions]
    rows: list[Row] = [("records", record) for record in records]
    return BatchResult(rows, list(zip(records, states, strict=True)), [])


def _with_roots(estimator: Estimator, solutions: Sequence[Solution], k: int) -> list[Solution]:
    """The solutions with the counts of their empty prefix in `meta`."""
    tallies = estimator.estimate([State(state.prompt) for _, state in solutions], k)
    with_roots = []
    for (record, state), tally in zip(solutions, tallies, strict=True):
        meta = dict(record.meta) | {"root": [tally.correct, tally.total]}
        with_roots.append((replace(record, meta=meta), state))
    return with_roots


def _labelled(record: SolutionRecord, rule: LabelRule, bad: list[SetAside]) -> dict[str, Any] | None:
    """The row of a record, or None when it was set aside."""
    try:
        if record.steps and not any(counts.total for counts in record.mc or ()):
            raise RowError("the verifier could score neither the solution nor a completion of it")
        return record_to_json(check_record(rule(check_record(record, unlabelled=True))))
    except RowError as error:
        bad.append({"id": record.id, "reason": str(error)})
        return None

"""What `mmrl annotate` does: questions or solutions in, labelled solution records, the store and a report out."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
Bad = dict[str, str]  # id, reason


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
        """Whether it needs the value of the empty prefix, in `meta["root"]`."""
        return "start" in inspect.signature(find("label_rules", self.name).target).parameters

    def __call__(self, record: SolutionRecord) -> SolutionRecord:
        """The labelled record.

        Raises:
            RowError: the empty prefix has no value.
        """
        given = {}
        if self.needs_start:
            correct, total = record.meta["root"]
            if not total:
                raise RowError("no value before the first step: no completion of the question could be scored")
            given["start"] = correct / total
        rule = find("label_rules", self.name).build(self.options, "label", **given)
        threshold = self.options.get("threshold", 0.0) if self.name == "hard_gt" else 0.0
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
    good, bad = _admit(items, method, max_bad)
    good = [i for i in good if int(prefix_key(State(_prompt(i)))[:8], 16) % world == rank]
    folder, records = Path(folder), Path(folder) / "records.jsonl"
    sampling = fingerprint if temperature is None else f"{fingerprint} temperature {temperature}"
    keep = keep or isinstance(method, Omega) or rollouts is not None
    with (
        WorkDir(folder, rank).owned(),
        CompletionStore(folder / STORE, fingerprint=sampling, keep=keep, rank=rank) as store,
        progress_bar(len(good), progress and rank == 0) as advance,
        ExitStack() as files,
    ):
        estimator = Estimator(
            extender, verifier, store, seed=seed, temperature=temperature, batch=batch, max_unscored=max_unscored,
            on_call=lambda: advance(0, estimator.cost),
        )  # fmt: skip
        adders = {}
        if world == 1:
            (folder / "report.json").unlink(missing_ok=True)
            for name in ("records", "trees") if isinstance(method, Omega) else ("records",):
                adders[name] = files.enter_context(publish_lines(folder / f"{name}.jsonl"))
        for i in range(0, len(good), batch):
            part = good[i : i + batch]
            begin_iteration(extender)
            rows, solutions, trees = _work(estimator, part, method, rule, separator)
            advance(len(part), estimator.cost)
            if world > 1:
                continue
            _write(adders, rows, rule, bad)
            if rollouts is not None:
                trees += solution_trees(store, solutions)
            if rollouts is not None and trees:
                told: dict[str, Any] = {"grown_by": type(method).__name__.lower(), "seed": seed}
                told |= {} if temperature is None else {"temperature": temperature}
                rollouts.save(rollout_for(extender, trees, told), i // batch)
        costs = {"run": estimator.cost, "paid": store.spent}
        if world > 1:
            return {"cost": costs}
        files.close()
        if rollouts is not None:
            rollouts.trim(math.ceil(len(good) / batch))
        store.export(folder / "store.jsonl")
        about = {"method": type(method).__name__, **asdict(method), "rule": asdict(rule)}
        with records.open() as lines:
            report = summary(about, len(good) + len(bad), lines, bad, costs)
        write_json(folder / "report.json", report)
    return report


def _write(
    adders: Mapping[str, Callable[[str], None]], rows: Iterable[tuple[str, Any]], rule: LabelRule, bad: list[Bad]
) -> None:
    """What was made into its files, records with their labels; those without any go to `bad`."""
    for name, item in rows:
        row = _labelled(item, rule, bad) if isinstance(item, SolutionRecord) else item
        if row is not None:
            adders[name](json.dumps(row, allow_nan=False))


# ---- the work on one batch of items ---------------------------------------------------------------------------------


def _prompt(item: Item) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _admit(items: Sequence[Item], method: MonteCarlo | Omega, max_bad: float) -> tuple[list[Item], list[Bad]]:
    """The items that can be annotated, and the others with their reason; ValueError when those are too many."""
    good: list[Item] = []
    bad: list[Bad] = []
    seen: set[str] = set()
    for item in items:
        if isinstance(method, Omega) and not isinstance(item, Prompt):
            raise ValueError(f"{item.id!r} is a solution; omega grows trees from questions, use monte_carlo for it")
        try:
            if item.id in seen:
                raise RowError("its id occurs before")
            if isinstance(item, Prompt):
                record_of(item, ())
            else:
                check_record(item, unlabelled=True)
            seen.add(item.id)
            good.append(item)
        except ValueError as error:  # RowError is one
            bad.append({"id": item.id, "reason": str(error)})
    if len(bad) > max_bad * len(items) or not items:
        first = "; ".join(f"{b['id']}: {b['reason']}" for b in bad[:3]) or "no items were given"
        raise ValueError(f"{len(bad)} of {len(items)} items cannot be annotated (max_bad={max_bad}); {first}")
    return good, bad


def _work(
    estimator: Estimator, items: Sequence[Item], method: MonteCarlo | Omega, rule: LabelRule, separator: str
) -> tuple[list[tuple[str, SolutionRecord | dict[str, Any]]], list[Solution], list[GrowingTree]]:
    """(file, what to write there): records with counts, and trees as JSON; the solutions; the trees that grew."""
    prompts = [i for i in items if isinstance(i, Prompt)]
    rows: list[tuple[str, SolutionRecord | dict[str, Any]]] = []
    if isinstance(method, Omega):
        grown = omega_trees(estimator, prompts, method, separator=separator)
        for tree in grown:
            rows.append(("trees", tree_json(tree, separator)))
            records = traverse(tree, min_words=method.min_words, seed=estimator.seed, separator=separator)
            rows += [("records", r) for r in records]
        return rows, [], [tree.steps for tree in grown if len(tree.steps)]
    found = sample_solutions(estimator, prompts, method.solutions, separator=separator)
    solutions = [s for of_one in found for s in of_one]
    given = [(i, as_state(i, separator)) for i in items if isinstance(i, SolutionRecord)]
    if rule.needs_start:
        given = _with_roots(estimator, given, method.k)
    solutions += given
    labelled = estimate_steps(estimator, solutions, method.k, early_stop=method.early_stop)
    rows += [("records", r) for r in labelled]
    return rows, [(r, state) for r, (_, state) in zip(labelled, solutions, strict=True)], []


def _with_roots(estimator: Estimator, solutions: Sequence[Solution], k: int) -> list[Solution]:
    """The solutions with the counts of their empty prefix in `meta`."""
    tallies = estimator.estimate([State(s.prompt) for _, s in solutions], k)
    out = []
    for (record, state), tally in zip(solutions, tallies, strict=True):
        meta = dict(record.meta) | {"root": [tally.correct, tally.total]}
        out.append((replace(record, meta=meta), state))
    return out


def _labelled(record: SolutionRecord, rule: LabelRule, bad: list[Bad]) -> dict[str, Any] | None:
    """The row of a record, or None when it was set aside."""
    try:
        if record.steps and not any(c.total for c in record.mc or ()):
            raise RowError("the verifier could score neither the solution nor a completion of it")
        return record_to_json(check_record(rule(check_record(record, unlabelled=True))))
    except RowError as error:
        bad.append({"id": record.id, "reason": str(error)})
        return None

"""`mmrl annotate`: a recipe in, records.jsonl and report.json out.

`run_annotate` checks the names of the recipe, reads the solutions it has, has them labelled (by `run.annotate` for
methods that sample completions, by `direct.annotate_directly` for those that have an opinion on solutions), and
finishes the records: kinds of steps, a second look at the labels (`refine`), planted errors (`inject`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from pydantic import PositiveInt

from mmrl.capabilities import Extender, StepClassifier
from mmrl.config import ConfigError, Section, parse_config
from mmrl.job import Job
from mmrl.jsonl import Quarantined, count_reasons
from mmrl.reasoning.annotate.direct import annotate_directly
from mmrl.reasoning.annotate.inject import with_errors
from mmrl.reasoning.annotate.monte_carlo import MonteCarlo
from mmrl.reasoning.annotate.omega import Omega
from mmrl.reasoning.annotate.output import summary
from mmrl.reasoning.annotate.recipe import AnnotateConfig
from mmrl.reasoning.annotate.run import LabelRule, annotate
from mmrl.reasoning.annotate.select import unsure
from mmrl.reasoning.annotate.store import STORE, CompletionStore
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.records_io import read_records, write_records
from mmrl.registry import build, find
from mmrl.scorers.scoring import check_trained
from mmrl.workdir import WorkDir, write_json


class AnnotationJob(Job):
    """A job that reads solutions too, and keeps the replies of a judge about them."""

    def takes(self, records: Sequence[SolutionRecord]) -> list[SolutionRecord]:
        """The solutions whose question the policy can take."""
        admitted_ids = {prompt.id for prompt in self.policy.admit([record.prompt for record in records])}
        usable = [record for record in records if record.id in admitted_ids]
        self.lost += len(records) - len(usable)
        return usable

    @cached_property
    def readings(self) -> CompletionStore:
        """The store of a judge's replies."""
        store = CompletionStore(self.config.output / "judge" / STORE, fingerprint=self.fingerprint)
        return self.files.enter_context(store)


def run_annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Label steps as the recipe says; writes records.jsonl and report.json below its output.

    Returns:
        The report (main process only).
    Raises:
        ValueError: a name or file that does not exist, or no solution got a label (report.json says why).
    """
    _check_names(config)
    rule = LabelRule(config.label.name, config.label.after, config.label.options)
    solutions, bad = _solutions(config)
    job = AnnotationJob(config, Extender)
    active = {}
    if config.active is not None and solutions is not None:
        num_solutions = len(solutions)
        scorers = [job.scorer(scorer) for scorer in config.active.scorers]
        solutions = unsure(solutions, scorers, d_p=config.active.d_p, d_std=config.active.d_std)
        active = {"active": {"solutions": num_solutions, "unsure": len(solutions)}}
        if not solutions:
            raise ValueError("active: the scorers are sure of every solution; lower active.d_std or raise active.d_p")
    with job.files, WorkDir(config.output, job.rank).owned():
        if _completes(config.method.name):
            report = _annotate_on_all_ranks(config, job, solutions, rule)
        else:
            report = _annotate_directly(config, job, solutions)
        if job.rank == 0:
            report |= active | {"unusable_prompts": job.lost, "unreadable_rows": count_reasons(bad)}
            report = _finish(config, job, report)
    return report


def _annotate_directly(
    config: AnnotateConfig, job: AnnotationJob, solutions: list[SolutionRecord] | None
) -> dict[str, Any]:
    """Labels by a method that has an opinion on solutions; the policy writes them where the recipe names none."""
    name, options = config.method.name, config.method.options
    job.alone(f"method.name={name!r}")
    # `solutions` is read here and leaves the section; all other options belong to the method.
    written = {"solutions": options.pop("solutions")} if "solutions" in options else {}
    num_solutions = parse_config(written, "method", SolutionOptions).solutions
    return annotate_directly(
        job.policy,
        job.verifier,
        job.prompts if solutions is None else solutions,
        build("annotations", "method", name, options, context=job),
        config.output,
        solutions=num_solutions,
        about={"method": name, "solutions": num_solutions, **options},
        fingerprint=job.fingerprint,
        seed=config.seed,
        batch=config.batch,
        rollouts=job.rollouts({"records": str(config.records)}),
    )


def _completes(method: str) -> bool:
    """True for an annotation method that samples completions; the others have an opinion on solutions."""
    target = find("annotations", method).target
    return isinstance(target, type) and issubclass(target, (MonteCarlo, Omega))


class SolutionOptions(Section):
    """Options of a method that reads solutions, beside its own."""

    solutions: PositiveInt = 4  # per question, where the policy has to write them


def _solutions(config: AnnotateConfig) -> tuple[list[SolutionRecord] | None, list[Quarantined]]:
    """The solutions a recipe names, None when the policy is to write them; and the rows that could not be read."""
    if config.records is None:
        return None, []
    records, bad = read_format(config.records, config.format, unlabelled=True)
    return records[: config.prompts], bad


def _check_names(config: AnnotateConfig) -> None:
    """Check all names of the recipe before anything is paid for."""
    completes = _completes(config.method.name)
    options = dict(config.method.options)
    if not completes:
        # An option of `SolutionOptions`, which the method does not take.
        options.pop("solutions", None)
    row = find("annotations", config.method.name)
    row.check(options, "method")
    # The row says which of its options names a scorer, if any.
    scorer = options.get(row.facts.get("scorer", ""))
    if scorer is not None:
        check_trained(scorer, "method.scorer")
    if config.active is not None and config.records is None:
        raise ConfigError("active chooses among given solutions; name their file in `records`")
    if config.active is not None:
        for i, scorer in enumerate(config.active.scorers):
            check_trained(scorer, f"active.scorers.{i}")
    if config.refine is None:
        return
    options = find("refinements", config.refine.name).check(config.refine.options, "refine")
    if config.refine.name == "consensus":
        judge = str(options.get("judge", {"name": "judge"}).get("name", ""))
        if _completes(judge):
            raise ConfigError(f"refine.judge.name={judge!r} samples completions; take one that reads solutions: judge")
    if not completes and config.records is None:
        raise ConfigError(
            f"refine.name={config.refine.name!r} looks at Monte-Carlo counts, which method.name="
            f"{config.method.name!r} does not make; annotate by monte_carlo, or leave refine out"
        )


def _annotate_on_all_ranks(
    config: AnnotateConfig, job: AnnotationJob, solutions: list[SolutionRecord] | None, rule: LabelRule
) -> Any:
    """Each rank pays for questions of its own; then the first one writes the files over all of them."""
    items: Any = job.prompts if solutions is None else job.takes(solutions)
    method = build("annotations", "method", config.method.name, config.method.options)
    rollouts = job.rollouts({"records": str(config.records)}) if job.rank == 0 else None
    run = partial(
        annotate,
        job.policy,
        job.verifier,
        items,
        method,
        config.output,
        rule=rule,
        fingerprint=job.fingerprint,
        seed=config.seed,
        batch=config.batch,
    )
    if job.world == 1:
        return run(rollouts=rollouts)
    from accelerate.utils import gather_object

    costs = gather_object([run(rank=job.rank, world=job.world)["cost"]["run"]])
    if job.rank:
        return {}
    # Everything is in the store by now, so that this call pays for nothing.
    report = run(rollouts=rollouts)
    report["cost"]["run"] = {name: sum(cost[name] for cost in costs) for name in costs[0]}
    return report


def _finish(config: AnnotateConfig, job: AnnotationJob, report: dict[str, Any]) -> dict[str, Any]:
    """Add kinds of steps where the task has them, refine, plant errors, and write the report of all that."""
    file, report_file = config.output / "records.jsonl", config.output / "report.json"
    kind_of = job.task.step_kind if isinstance(job.task, StepClassifier) else None
    changes = kind_of is not None or config.refine is not None or config.inject is not None
    if changes and report["records"]:
        # killed from here on, the records are not yet what the recipe asks for: no report says that they are
        report_file.unlink(missing_ok=True)
        records, _ = read_records(file, unlabelled=True)
        if kind_of is not None:
            records = [_with_kinds(record, kind_of) for record in records]
        if config.refine is not None:
            refine = build("refinements", "refine", config.refine.name, config.refine.options, context=job)
            records, report["refined"] = refine(records)
        if config.inject is not None:
            planted = with_errors(records, seed=config.seed, **config.inject.model_dump())
            records, report["injected"] = [*records, *planted], len(planted)
        write_records(file, records)
        with file.open() as lines:
            changed = summary({}, report["items"], lines, [], {})
        for name in ("records", "steps", "labels", "first_error", "final_correct_frac"):
            report[name] = changed[name]
    # A cached property is among the attributes once it was used, that is where a judge was asked.
    if "readings" in vars(job):
        report["cost"]["judge"] = job.readings.spent
    write_json(report_file, report)
    if not report["records"]:
        reason = "; ".join(f"{row['id']}: {row['reason']}" for row in report["quarantined"][:3])
        if not reason:
            reason = "refine left none" if "refined" in report else "the method found no question to learn from"
        raise ValueError(f"no solution was labelled or kept; {reason}. See {report_file}")
    return report


def _with_kinds(record: SolutionRecord, kind_of: Callable[[str], Any]) -> SolutionRecord:
    """The record with the kind of every step, by its text."""
    steps = [Step(step.text, kind_of(step.text)) for step in record.steps]
    return replace(record, steps=tuple(steps))

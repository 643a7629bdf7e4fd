"""`mmrl annotate`: a recipe in, records.jsonl and report.json out."""

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
    """A job that reads solutions too, and keeps what a judge has said of them."""

    def takes(self, records: Sequence[SolutionRecord]) -> list[SolutionRecord]:
        """The solutions whose question the policy can take."""
        good = {p.id for p in self.policy.admit([r.prompt for r in records])}
        self.lost += sum(r.id not in good for r in records)
        return [r for r in records if r.id in good]

    @cached_property
    def readings(self) -> CompletionStore:
        """What a judge has said so far."""
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
    given, bad = _solutions(config)
    job = AnnotationJob(config, Extender)
    chosen = {}
    if config.active is not None and given is not None:
        scorers = [job.scorer(s) for s in config.active.scorers]
        solutions, given = given, unsure(given, scorers, d_p=config.active.d_p, d_std=config.active.d_std)
        chosen = {"active": {"solutions": len(solutions), "unsure": len(given)}}
        if not given:
            raise ValueError("active: the scorers are sure of every solution; lower active.d_std or raise active.d_p")
    name, options = config.method.name, config.method.options
    with job.files, WorkDir(config.output, job.rank).owned():
        if _completes(name):
            items: Any = job.prompts if given is None else job.takes(given)
            report = _annotate_on_all_ranks(config, job, items, build("annotations", "method", name, options), rule)
        else:
            job.alone(f"method.name={name!r}")
            written = {k: options.pop(k) for k in ("solutions",) if k in options}
            count = parse_config(written, "method", SolutionOptions).solutions
            report = annotate_directly(
                job.policy, job.verifier, job.prompts if given is None else given,
                build("annotations", "method", name, options, context=job), config.output, solutions=count,
                about={"method": name, "solutions": count, **options}, fingerprint=job.fingerprint,
                seed=config.seed, batch=config.batch,
                rollouts=job.rollouts({"records": str(config.records)}),
            )  # fmt: skip
        if job.rank == 0:
            report |= chosen | {"unusable_prompts": job.lost, "unreadable_rows": count_reasons(bad)}
            report = _finish(config, job, report)
    return report


def _completes(method: str) -> bool:
    """Whether an annotation method samples completions; the others have an opinion on solutions."""
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
    """All names of the recipe, before anything is paid for."""
    completes = _completes(config.method.name)
    options = {k: v for k, v in config.method.options.items() if completes or k != "solutions"}
    row = find("annotations", config.method.name)
    row.check(options, "method")
    if (scorer := options.get(row.facts.get("scorer", ""))) is not None:
        check_trained(scorer, "method.scorer")
    if config.active is not None and config.records is None:
        raise ConfigError("active chooses among given solutions; name their file in `records`")
    for i, scorer in enumerate(config.active.scorers if config.active is not None else ()):
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
    config: AnnotateConfig, job: AnnotationJob, items: Any, method: Any, rule: LabelRule
) -> Any:
    """Each rank pays for questions of its own; then the first one writes what there is to all of them."""
    rollouts = job.rollouts({"records": str(config.records)}) if job.rank == 0 else None
    run = partial(
        annotate, job.policy, job.verifier, items, method, config.output, rule=rule, fingerprint=job.fingerprint,
        seed=config.seed, batch=config.batch,
    )  # fmt: skip
    if job.world == 1:
        return run(rollouts=rollouts)
    from accelerate.utils import gather_object

    costs = gather_object([run(rank=job.rank, world=job.world)["cost"]["run"]])
    if job.rank:
        return {}
    report = run(rollouts=rollouts)
    report["cost"]["run"] = {name: sum(cost[name] for cost in costs) for name in costs[0]}
    return report


def _finish(config: AnnotateConfig, job: AnnotationJob, report: dict[str, Any]) -> dict[str, Any]:
    """Kinds of steps where the task knows them, the second look, planted errors, and the report of all that."""
    file, told = config.output / "records.jsonl", config.output / "report.json"
    kind_of = job.task.step_kind if isinstance(job.task, StepClassifier) else None
    changes = kind_of is not None or config.refine is not None or config.inject is not None
    if changes and report["records"]:
        records, _ = read_records(file, unlabelled=True)
        if kind_of is not None:
            records = [_with_kinds(r, kind_of) for r in records]
        if config.refine is not None:
            refine = build("refinements", "refine", config.refine.name, config.refine.options, context=job)
            records, report["refined"] = refine(records)
        if config.inject is not None:
            planted = with_errors(records, seed=config.seed, **config.inject.model_dump())
            records, report["injected"] = [*records, *planted], len(planted)
        write_records(file, records)
        with file.open() as lines:
            made = summary({}, report["items"], lines, [], {})
        report |= {k: made[k] for k in ("records", "steps", "labels", "first_error", "final_correct_frac")}
    if "readings" in vars(job):
        report["cost"]["judge"] = job.readings.spent
    write_json(told, report)
    if not report["records"]:
        first = "; ".join(f"{q['id']}: {q['reason']}" for q in report["quarantined"][:3])
        what = "refine left none" if "refined" in report else "the method found no question to learn from"
        raise ValueError(f"no solution was labelled or kept; {first or what}. See {told}")
    return report


def _with_kinds(record: SolutionRecord, kind_of: Callable[[str], Any]) -> SolutionRecord:
    return replace(record, steps=tuple(Step(s.text, kind_of(s.text)) for s in record.steps))

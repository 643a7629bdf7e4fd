"""The verbs that are not training: annotate, rollouts, score, search, bench. A recipe in, files and a report out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from mmrl.capabilities import (
    Extender,
    PromptEncoder,
    RewardNamer,
    SampleJudge,
    StepClassifier,
    admitted,
    build_with,
    model_of,
    refuse_row,
)
from mmrl.config import ConfigError, Section, parse_config
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
from mmrl.reasoning.canonical import canonical_answer
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.records_io import read_records, write_records
from mmrl.reasoning.solutions import score_records
from mmrl.recipe import JobConfig, PolicyConfig, RewardConfig, TrainingConfig
from mmrl.registry import build, find, names
from mmrl.report.search_panel import disagreements
from mmrl.rollout import OutcomeReward, Prompt, State, StepReward
from mmrl.rollout_folder import RolloutFolder
from mmrl.scorers.scoring import check_scorer, check_trained, load_scorer, score_states, scorer_row
from mmrl.search.budget import Budget
from mmrl.search.recipe import SearchConfig
from mmrl.search.run import search
from mmrl.search.samples import search_samples
from mmrl.trainers.task import Task, build_reward
from mmrl.workdir import WorkDir, write_json, write_lines

log = logging.getLogger(__name__)


# ---- annotate -------------------------------------------------------------------------------------------------------


def run_annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Label steps as the recipe says; writes records.jsonl and report.json below its output, returns the report
    (main process only).

    Raises:
        ValueError: a name or file that does not exist, or no solution got a label (report.json says why).
    """
    _check_names(config)
    rule = LabelRule(config.label.name, config.label.after, config.label.options)
    given, bad = _solutions(config)
    job = _Job(config, Extender)
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
            count = parse_config(written, "method", _Written).solutions
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


class _Written(Section):
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


def _annotate_on_all_ranks(config: AnnotateConfig, job: _Job, items: Any, method: Any, rule: LabelRule) -> Any:
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


def _finish(config: AnnotateConfig, job: _Job, report: dict[str, Any]) -> dict[str, Any]:
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


# ---- rollouts -------------------------------------------------------------------------------------------------------


def run_rollouts(config: TrainingConfig, out: Path) -> dict[str, Any]:
    """Store the rollouts of `run.iterations` iterations of a recipe; numbers on all of them (main process only).

    Raises:
        ConfigError: a recipe that samples nothing, or a folder with rollouts of another one.
    """
    from mmrl.trainers.run import Run
    from mmrl.trainers.stored import store_rollouts
    from mmrl.tree import StepTree

    if not isinstance(config, PolicyConfig):
        raise ConfigError(
            f"mmrl rollouts takes a recipe with a policy and a plan; trainer={config.trainer!r} has none"
        )
    run, model = Run(config), _stamp(str(config.policy.options.get("model", "")))
    store_rollouts(run, out, config.run.iterations, model=model)
    if not run.loop.is_main:
        return {}
    trees = [StepTree.load(f.parent) for f in sorted(out.glob("[!.]*/rollout.json"))]
    outcome = [x for t in trees for x in t.outcome[t.is_finished].tolist()]
    return {
        "rollouts": len(trees), "prompts": sum(t.num_groups for t in trees),
        "leaves": sum(int(t.is_leaf.sum()) for t in trees), "reward": sum(outcome) / max(len(outcome), 1),
    }  # fmt: skip


# ---- score, search, bench -------------------------------------------------------------------------------------------


def run_score(
    scorer: str | Mapping[str, Any], data: Path, out: Path, format: str | Mapping[str, Any] = "records"
) -> dict[str, Any]:
    """Scores of the solutions in a file, one row each: id, scores (null where a question cannot be taken)."""
    records, bad = read_format(data, format, unlabelled=True)
    out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before anything is scored
    scores = score_records(on_device(load_scorer(scorer)), records)
    rows = []
    for record, values in zip(records, scores, strict=True):
        known = None if values is None else [None if x != x else x for x in values]
        rows.append(json.dumps({"id": record.id, "scores": known}))
    write_lines(out, rows)
    return {
        "records": len(records), "unscored": sum(s is None for s in scores), "quarantined": len(bad),
        "unreadable_rows": count_reasons(bad),
    }  # fmt: skip


def run_search(config: SearchConfig) -> dict[str, Any]:
    """Search every prompt as the recipe says; writes results.jsonl and report.json below its output.

    Raises:
        ConfigError: another process writes into the output.
    """
    if config.method.name in names("sample_searches"):
        return _search_samples(config)
    if config.scorer is not None:
        check_trained(check_scorer(config.scorer))
    find("searches", config.method.name).check(config.method.options, "method")
    job = _Job(config, Extender, f"{', '.join(names('sample_searches'))}: for policies without text")
    job.alone("mmrl search")
    scorer = job.scorer(config.scorer) if config.scorer else None
    prompts = admitted(scorer, job.prompts) if scorer else job.prompts

    unread = 0

    def scores(states: Sequence[State]) -> list[list[float]]:
        nonlocal unread
        assert scorer is not None
        rows = score_states(scorer, states)
        unread += sum(x != x for row in rows for x in row)
        return [[0.0 if x != x else x for x in row] for row in rows]  # too long, or a marker inside: ranks last

    encode = job.policy.encode if isinstance(job.policy, PromptEncoder) else None
    with job.files, WorkDir(config.output).owned():
        report = search(
            prompts, job.policy, scores if scorer else None, job.verifier, folder=config.output,
            method=config.method.name, settings=config.method.options, aggregations=config.aggregates,
            seed=config.seed, prompts_per_batch=config.batch,
            budget=Budget(config.max_tokens, parameters(job.policy), parameters(scorer)),
            prompt_tokens=(lambda p: len(encode(p).ids)) if encode else None,
            about={"policy": job.fingerprint, "scorer": _stamp(config.scorer or "")},
            canonical=canonical_answer, rollouts=job.rollouts({"scorer": config.scorer}),
        )  # fmt: skip
        report["unusable_prompts"] = job.lost + len(job.prompts) - len(prompts)
        rows = [json.loads(line) for line in (config.output / "results.jsonl").read_text().splitlines()]
        report["unreadable_steps"] = unread  # met in this run; they count as score 0
        report["examples"] = disagreements(rows, prompts)
        write_json(config.output / "report.json", report)
    return report


class _Candidates(Section):
    """Options of a search of samples: samples per prompt, and numbers of candidates at every noisy step to compare."""

    n: PositiveInt = 8
    k: tuple[PositiveInt, ...] = (4,)


def _search_samples(config: SearchConfig) -> dict[str, Any]:
    """`run_search` for a policy that searches along its own steps."""
    if config.scorer is None or config.max_tokens is not None:
        raise ConfigError(
            f"method.name={config.method.name!r} needs a `scorer` that ranks candidates, and has no tokens to limit"
        )
    options = parse_config(config.method.options, "method", _Candidates).model_dump()
    row = find("sample_searches", config.method.name)
    refuse_row(f"method.name={row.name!r}", row.facts["scorer"], scorer_row(config.scorer))
    check_trained(config.scorer)
    job = _Job(config, row.facts["policy"], "best_of_n, greedy and others are for policies that write")
    job.alone("mmrl search")
    scorer = job.scorer(config.scorer)
    with job.files, WorkDir(config.output).owned():
        report = search_samples(
            job.prompts, job.policy, row.target, scorer, job.verifier, folder=config.output, method=row.name,
            **options, judges=job.task.judges if isinstance(job.task, SampleJudge) else None,
            seed=config.seed, prompts_per_batch=config.batch,
            about={"policy": job.fingerprint, "scorer": _stamp(config.scorer)},
            rollouts=job.rollouts({"scorer": config.scorer}),
        )  # fmt: skip
        report["unusable_prompts"] = job.lost
        report["parameters"] = {"policy": parameters(job.policy), "scorer": parameters(scorer)}
        write_json(config.output / "report.json", report)
    return report


def run_benchmark(
    name: str, data: Path, scorer: str | Mapping[str, Any], out: Path | None, **options: Any
) -> dict[str, Any]:
    """A scorer, by name, folder or section, on a public benchmark's file; prints the table."""
    from mmrl.reasoning.bench.run import find_bench, run_bench

    lenient = find_bench(name).lenient  # what has no score counts against the scorer
    model = on_device(load_scorer(scorer))

    def score(records: Sequence[SolutionRecord]) -> list[list[float]]:
        scores = score_records(model, records)
        lost = [r.id for r, s in zip(records, scores, strict=True) if s is None]
        if lost and not lenient:
            raise ValueError(f"{len(lost)} questions cannot be scored (reasons above), the first: {lost[:3]}")
        return [s or [] for s in scores]

    return run_bench(name, data, score, out=out, **options)


# ---- what they share ------------------------------------------------------------------------------------------------


class _Job:
    """The components of a recipe, on their device."""

    def __init__(self, config: JobConfig, protocol: type, others: str = "") -> None:
        """
        Args:
            protocol: what the policy has to follow. others: told where it does not: methods for other policies.
        """
        asker = f"method.name={config.method.name!r}{f' ({others})' if others else ''}"
        policy_row = find("policies", config.policy.name)
        refuse_row(asker, protocol, policy_row)
        policy_row.check(config.policy.options, "policy")
        if config.verifier is not None:
            find("rewards", config.verifier.name).check(config.verifier.options, "verifier")
        import torch
        from accelerate import PartialState

        if config.cpu or not torch.cuda.is_available():
            torch.set_num_threads(config.threads)
        state = PartialState(cpu=config.cpu)
        self.config, self._cpu = config, config.cpu
        self.rank, self.world = state.process_index, state.num_processes
        self.task: Task = build("tasks", "task", config.task.name, config.task.options)
        policy = build_with({asker: protocol}, "policies", "policy", config.policy.name, config.policy.options)
        self.policy: Any = on_device(policy, config.cpu)
        self.reward = verifier = config.verifier or RewardConfig(name=_first_reward(self.task, config.task.name))
        self.verifier: OutcomeReward = build_reward(verifier, "verifier")
        self.seed, self.batch = config.seed, config.batch
        self.lost = 0  # prompts that the policy cannot take; the log says why
        self.files = ExitStack()
        model = _stamp(str(config.policy.options.get("model", "")))
        told = json.dumps([config.policy.model_dump(), verifier.model_dump(), model], sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The task's, as many as the recipe asks for and the policy can take."""
        every = self.task.prompts if self.config.split == "train" else self.task.eval_prompts
        wanted = list(every)[: self.config.prompts]
        taken: list[Prompt] = self.policy.admit(wanted)
        self.lost += len(wanted) - len(taken)
        return taken

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

    def rollouts(self, about: Mapping[str, Any] | None = None) -> RolloutFolder | None:
        """Where the recipe wants its trees, None when it does not. about: what else decides their contents."""
        config = self.config
        if config.rollouts is None:
            return None
        record = {
            "task": config.task.model_dump(mode="json"), "policy": config.policy.model_dump(mode="json"),
            "rewards": [{"name": self.reward.name, "weight": 1.0, **self.reward.options}], "step_rewards": [],
            "seed": config.seed, "processes": 1, "grown_by": config.method.model_dump(mode="json"),
            "made_by": self.fingerprint, **(about or {}),
        }  # fmt: skip
        self.files.enter_context(WorkDir(config.rollouts).owned())
        return RolloutFolder(config.rollouts, record)

    def alone(self, what: str) -> None:
        """ConfigError when several processes were started for what one does."""
        if self.world > 1:
            raise ConfigError(f"{what} runs in one process, but {self.world} were started; leave the launcher out")

    def scorer(self, scorer: str | Mapping[str, Any]) -> StepReward:
        """A scorer, by name, folder or section, on this job's device."""
        return on_device(load_scorer(scorer), self._cpu)


def _first_reward(task: Task, name: str) -> str:
    if not isinstance(task, RewardNamer) or not task.rewards:
        raise ConfigError(f"task.name={name!r} brings no reward to verify answers with; name one in `verifier:`")
    return task.rewards[0]


def parameters(component: Any) -> int:
    """Weights of a component's model, 0 without one."""
    model = model_of(component)
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def on_device(component: Any, cpu: bool = False) -> Any:
    """The component with its model on the GPU, where there is one."""
    import torch

    model = model_of(component)
    if model is not None and torch.cuda.is_available() and not cpu:
        model.to(torch.accelerator.current_accelerator())
    return component


def _stamp(component: str | Mapping[str, Any]) -> str:
    """A folder or a section, with the weights in the folders it names by name, size and time, so that another
    checkpoint under the same path is told apart."""
    files: list[Path] = []
    for folder in _texts(component):
        files += sorted(Path(folder).glob("*.safetensors")) if folder and Path(folder).is_dir() else []
    return json.dumps([component, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)])


def _texts(value: Any) -> list[str]:
    """Every text in a section, inner sections included."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    return [value] if isinstance(value, str) else []

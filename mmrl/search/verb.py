"""`mmrl search`: a recipe in, results.jsonl and report.json out.

There are two kinds of searches: over steps that a policy writes (`searches`: best-of-n, beams, MCTS ...), and over the
noisy samples of a diffusion model (`sample_searches`). Both score candidates by the recipe's `scorer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import PositiveInt

from mmrl.capabilities import Extender, PromptEncoder, SampleJudge, admitted, refuse_row
from mmrl.config import ConfigError, Section, parse_config
from mmrl.job import Job, parameters, stamp
from mmrl.registry import find, names
from mmrl.report.search_panel import disagreements
from mmrl.rollout import Prompt, State, StepReward
from mmrl.scorers.scoring import check_scorer, check_trained, score_states, scorer_row
from mmrl.search.budget import Budget
from mmrl.search.recipe import SearchConfig
from mmrl.search.run import search
from mmrl.search.samples import search_samples
from mmrl.workdir import WorkDir, write_json


def run_search(config: SearchConfig) -> dict[str, Any]:
    """Search every prompt as the recipe says; writes results.jsonl and report.json below its output.

    Raises:
        ConfigError: another process writes into the output.
    """
    if config.method.name in names("sample_searches"):
        return _search_samples(config)
    return _search_texts(config)


def _search_texts(config: SearchConfig) -> dict[str, Any]:
    """Search with a policy that writes its steps."""
    if config.scorer is not None:
        check_trained(check_scorer(config.scorer))
    find("searches", config.method.name).check(config.method.options, "method")
    job = Job(config, Extender, f"{', '.join(names('sample_searches'))}: for policies without text")
    job.alone("mmrl search")
    scorer, scores, prompts = None, None, job.prompts
    if config.scorer:
        scorer = job.scorer(config.scorer)
        scores = _StateScores(scorer)
        prompts = admitted(scorer, job.prompts)
    with job.files, WorkDir(config.output).owned():
        report = search(
            prompts,
            job.policy,
            scores,
            job.verifier,
            folder=config.output,
            method=config.method.name,
            settings=config.method.options,
            aggregations=config.aggregates,
            seed=config.seed,
            prompts_per_batch=config.batch,
            budget=Budget(config.max_tokens, parameters(job.policy), parameters(scorer)),
            prompt_tokens=_prompt_tokens(job.policy),
            about={"policy": job.fingerprint, "scorer": stamp(config.scorer or "")},
            canonical=find("answer_forms", config.answers).target,
            rollouts=job.rollouts({"scorer": config.scorer}),
        )
        report["unusable_prompts"] = job.lost + len(job.prompts) - len(prompts)
        rows = [json.loads(line) for line in (config.output / "results.jsonl").read_text().splitlines()]
        report["unreadable_steps"] = 0 if scores is None else scores.unreadable
        report["examples"] = disagreements(rows, prompts)
        write_json(config.output / "report.json", report)
    return report


def _prompt_tokens(policy: Any) -> Callable[[Prompt], int] | None:
    """The number of tokens of a prompt, for the budget; None where the policy does not give its ids."""
    if not isinstance(policy, PromptEncoder):
        return None
    return lambda prompt: len(policy.encode(prompt).ids)


class _StateScores:
    """Step scores along states; an unreadable step (too long, or with a marker inside) has 0 and ranks last.

    unreadable: number of such steps in this run.
    """

    def __init__(self, scorer: StepReward) -> None:
        self._scorer, self.unreadable = scorer, 0

    def __call__(self, states: Sequence[State]) -> list[list[float]]:
        rows = []
        for row in score_states(self._scorer, states):
            self.unreadable += sum(map(math.isnan, row))
            rows.append([0.0 if math.isnan(score) else score for score in row])
        return rows


class SampleOptions(Section):
    """Options of a search of samples: samples per prompt, and numbers of candidates at every noisy step to compare."""

    n: PositiveInt = 8
    k: tuple[PositiveInt, ...] = (4,)


def _search_samples(config: SearchConfig) -> dict[str, Any]:
    """Search with a policy whose steps are no texts."""
    if config.scorer is None or config.max_tokens is not None:
        raise ConfigError(
            f"method.name={config.method.name!r} needs a `scorer` that ranks candidates, and has no tokens to limit"
        )
    options = parse_config(config.method.options, "method", SampleOptions)
    row = find("sample_searches", config.method.name)
    refuse_row(f"method.name={row.name!r}", row.facts["scorer"], scorer_row(config.scorer))
    check_trained(config.scorer)
    job = Job(config, row.facts["policy"], "best_of_n, greedy and others are for policies that write")
    job.alone("mmrl search")
    scorer = job.scorer(config.scorer)
    with job.files, WorkDir(config.output).owned():
        report = search_samples(
            job.prompts,
            job.policy,
            row.target,
            scorer,
            job.verifier,
            folder=config.output,
            method=row.name,
            n=options.n,
            k=options.k,
            judges=job.task.judges if isinstance(job.task, SampleJudge) else None,
            seed=config.seed,
            prompts_per_batch=config.batch,
            about={"policy": job.fingerprint, "scorer": stamp(config.scorer)},
            rollouts=job.rollouts({"scorer": config.scorer}),
        )
        report["unusable_prompts"] = job.lost
        report["parameters"] = {"policy": parameters(job.policy), "scorer": parameters(scorer)}
        write_json(config.output / "report.json", report)
    return report

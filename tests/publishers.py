"""Everything that replaces a file or a folder, by the name of what it writes. `python publishers.py ROOT` has each one
write version 1 below ROOT/NAME, in a process that is killed when it is to be renamed."""

import contextlib
import io
import math
import os
import sys
from pathlib import Path

import torch

import mmrl.workdir
from mmrl.cache import made_once
from mmrl.config import parse_config
from mmrl.reasoning.answers import ExactAnswer
from mmrl.reasoning.bench.run import run_bench
from mmrl.reasoning.canonical import canonical_answer
from mmrl.reasoning.formats import convert
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.records_io import write_records
from mmrl.reasoning.verbs import run_score
from mmrl.report.artifacts import save_samples, save_tree
from mmrl.rollout import Actions, Prompt, Rollout, Sample
from mmrl.rollout_folder import RolloutFolder
from mmrl.search.run import search
from mmrl.trainers.checkpoint import Checkpoints
from mmrl.trainers.run_folder import RunFolder
from mmrl.tree import StepTree

TESTS = Path(__file__).parent
sys.path += [str(TESTS / "search"), str(TESTS / "reasoning" / "bench")]

from bench_tiny import constant, write  # noqa: E402
from known_tree import KnownTree, complete_tree  # noqa: E402
from tiny import recipe  # noqa: E402

RECORDS = [SolutionRecord(str(i), "1+1?", (Step("2"),), labels=(i % 2,)) for i in range(3)]


def rollout(version: int) -> Rollout:
    tree = StepTree([-1, 0], [0, 0], [0, 1], [math.nan, float(version)])
    return Rollout([Prompt("a", {})], tree, Actions(torch.zeros(2), torch.ones(2, dtype=torch.bool)), texts=["s", "t"])


def open_run(folder: Path, version: int) -> None:
    tree = recipe(folder / "model", folder, run={"resume": True, "iterations": version + 1})
    RunFolder(folder).open(parse_config(tree))


def truncate_metrics(folder: Path, version: int) -> None:
    run = RunFolder(folder)
    for iteration in (1, 2) if version == 0 else ():
        run.log(iteration, {"reward/mean": 0.5})
    run.truncate_metrics(2 - version)


def checkpoint(folder: Path, version: int) -> None:
    def write_state(part: Path) -> None:
        (part / "state.json").write_text(str(version))

    Checkpoints(folder).write(3, keep=1, is_main=True, write=write_state, wait=int)


def search_of(folder: Path, version: int) -> None:
    trees = {"0": complete_tree(2, 2, 0)}
    policy = KnownTree(trees, random=True)
    prompts = [Prompt("0", {"question": "?"}, {"answer": "1"})]
    search(prompts, policy, policy.score, ExactAnswer(), folder=folder, settings={"n": 2}, progress=False, canonical=canonical_answer,
           aggregations=("min", "last")[: version + 1])  # fmt: skip


def half(rollout: Rollout) -> torch.Tensor:
    return torch.full((len(rollout.tree),), 0.5)


def scores(folder: Path, version: int) -> None:
    write_records(folder / "data", RECORDS[: version + 2])
    run_score("publishers:half", folder / "data", folder / "scores.jsonl")


def converted(folder: Path, version: int) -> None:
    write_records(folder / "data", RECORDS[: version + 2])
    convert(folder / "data", folder / "converted.jsonl", "records", "records")


def benchmark(folder: Path, version: int) -> None:
    row = {"id": "a", "problem": "a", "steps": ["a", "b"], "final_answer_correct": False, "label": 0}
    write(folder / "data" / "math.jsonl", [row])
    with contextlib.redirect_stdout(io.StringIO()):
        run_bench("processbench", folder / "data", constant(float(version)), resamples=0, out=folder / "bench.json")


def cached(folder: Path, version: int) -> None:
    """Made anew where it is damaged: a kill leaves what was there."""

    def make(work: Path) -> None:
        (work / "weights").write_text(str(version) * 5)

    made_once(folder / "cached", make)
    if version == 0:
        (folder / "cached" / "more").write_text("of somebody")
        (folder / "cached" / "weights").write_text("dama")


# name of what is replaced -> what writes version 0 and version 1 of it into a folder
PUBLISHERS = {
    "config.yaml": open_run,
    "environment.json": open_run,
    "metrics.jsonl": truncate_metrics,
    "000003": checkpoint,
    "000001-00": lambda folder, version: RolloutFolder(folder, {}).save(rollout(version), 1),
    "recipe.json": lambda folder, version: RolloutFolder(folder, {"seed": 0}),
    "search.json": search_of,
    "report.json": search_of,
    "records.jsonl": lambda folder, version: write_records(folder / "records.jsonl", RECORDS[: version + 1]),
    "scores.jsonl": scores,
    "converted.jsonl": converted,
    "bench.json": benchmark,
    "cached": cached,
    "samples": lambda folder, version: save_samples([Sample(Prompt("a", {}), "x", 0)], [version], folder / "samples"),
    "first": lambda folder, version: save_tree(
        rollout(version), torch.zeros(2), lambda r, steps: [str(version) for _ in steps], folder / "first"
    ),
}


def die_at(name: str) -> None:
    """Let this process end as if killed when `name` has been written and is to be renamed."""
    flush = mmrl.workdir._flush

    def die(path: Path) -> None:
        flush(path)
        if path.name == f".{name}.part":
            os._exit(9)

    mmrl.workdir._flush = die


def main(root: Path) -> None:
    for name, write_version in PUBLISHERS.items():
        if os.fork() == 0:
            die_at(name)
            write_version(root / name, 1)
            os._exit(0)
        _, status = os.wait()
        (root / name / "exit_status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

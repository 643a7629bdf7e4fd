"""What labels, pictures and reward shaping do to a process reward model of the shapes task, from one command.

    python tools/prm_study.py --policy runs/shapes_steps/model --out study.json   # 2 seeds, about 20 minutes, one core
    python tools/prm_study.py --quick

The policy (by default the one of `mmrl demo vision`, trained first) annotates its own solutions by Monte Carlo, once
per seed. Everything else shares that: (a) raw labels, consensus with a judge, SCAN; (b) training without labels of
perception steps; (c) a twin that sees blank pictures; (d) the model as step reward of GRPO, with and without clip +
delta. Truth is the task's program, up to a solution's first wrong step: after that, right on its own and right so far
differ. Intervals are 95 % bootstraps over questions of the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrl.config import load_config, load_section
from mmrl.demo import recipe_path
from mmrl.reasoning.annotate.direct import by_scorer
from mmrl.reasoning.annotate.labels import labels_up_to, local_first_error, mc_first_error
from mmrl.reasoning.annotate.recipe import AnnotateConfig
from mmrl.reasoning.annotate.refine import consensus, scan
from mmrl.reasoning.annotate.targets import mc_values
from mmrl.reasoning.records import SolutionRecord
from mmrl.reasoning.records_io import read_records, write_records
from mmrl.reasoning.solutions import score_records
from mmrl.scorers.metrics import bootstrap, first_error, first_error_of_labels, first_error_score, rank_auc
from mmrl.scorers.scoring import load_scorer
from mmrl.search.recipe import SearchConfig

NEVER = 10**9
ETA = 0.5  # of the clip
SHAPING: dict[str, list[Any]] = {"sum": [], "clip + delta": [{"name": "clip", "eta": ETA}, "delta"]}
HOT = 1.4  # sampling temperature of the RL runs: at 1 the base model hardly ever tries another form
BASE = "soft"  # the labels that parts b, c and d train on

Records = list[SolutionRecord]
Index = NDArray[np.intp]
Number = dict[str, Any]  # value, low, high; seeds: the value of each


class Scored(NamedTuple):
    """A reward model's scores of solutions, and the threshold that suits the judge's questions."""

    scores: list[list[float]]
    tau: float


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="folder of the annotating policy; default: trained as in `mmrl demo vision`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--questions", type=int, default=600, help="annotated by Monte Carlo, 4 solutions each")
    parser.add_argument("--judged", type=int, default=100, help="questions with exact labels that the judge learns on")
    parser.add_argument("--tests", type=int, default=256, help="held-out questions")
    parser.add_argument("--iterations", type=int, default=150, help="of every reward model's training")
    parser.add_argument("--batch", type=int, default=16, help="questions of an iteration")
    parser.add_argument("--rl-iterations", type=int, default=60)
    parser.add_argument("--resamples", type=int, default=1000, help="of every bootstrap")
    parser.add_argument(
        "--folder", type=Path, help="keep everything here, to go on after a cut; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, help="write all numbers to this file as JSON")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, with the built-in base model")
    args = parser.parse_args()
    if args.quick:
        args.policy, args.seeds = args.policy or "shapes", args.seeds[:1]
        args.questions, args.judged, args.tests, args.iterations, args.rl_iterations = 16, 8, 12, 2, 2
        args.batch, args.resamples = 2, 20
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        args.policy = args.policy or trained_policy(folder)
        check_folder(args, folder)
        result = study(args, folder)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))


def study(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All seeds, then the numbers over them."""
    test = solved(args, folder / "test", "eval", args.tests, seed=1)
    args.test_file = str(folder / "test" / "records.jsonl")  # the trainer wants one, though it is not evaluated
    say(f"test: {len(test)} solutions of {args.tests} held-out questions")
    seeds = [one_seed(args, folder / f"seed{seed}", seed, test) for seed in args.seeds]
    models = {arm: [s["models"][arm] for s in seeds] for arm in seeds[0]["models"]}
    pairs = [("consensus", "hard"), ("scan", "hard"), (BASE, "no perception labels"), (BASE, "blind")]
    n = args.resamples
    return {
        "settings": {k: v for k, v in vars(args).items() if k not in ("folder", "out", "policy", "test_file")},
        "labels": {k: means([s["labels"][k] for s in seeds], n) for k in seeds[0]["labels"]},
        "models": {arm: model_numbers(test, found, n) for arm, found in models.items()},
        "differences": {f"{a} less {b}": gaps(test, models[a], models[b], n) for a, b in pairs},
        "best_of_8": search_numbers([s["search"] for s in seeds], n),
        "padding": {k: means([s["padding"][k] for s in seeds], n) for k in SHAPING},
        "rl": {k: rl_numbers([s["rl"][k] for s in seeds], n) for k in SHAPING},
    }


def one_seed(args: argparse.Namespace, folder: Path, seed: int, test: Records) -> dict[str, Any]:
    """Everything of one seed: labels against the truth, every model's scores, best-of-8 and the RL runs."""
    raw = annotated(args, folder / "raw", seed)
    known = solved(args, folder / "judged", "train", args.judged, seed=seed, scenes=seed + 1)
    say(f"seed {seed}: {len(raw)} annotated solutions, {len(known)} exactly labelled for the judge")
    judge = trained(args, folder / "judge", seed, known)
    sets = label_sets(raw, judge)
    truth = {r.id: y for r, y in zip(raw, exact_labels(raw), strict=True)}
    labels = {k: label_rows(raw, own, truth) for k, own in sets.items()}
    arms = {k: trained(args, folder / k, seed, own) for k, own in sets.items()}
    arms["no perception labels"] = trained(args, folder / "unseen", seed, sets[BASE], ignore=("perception",))
    others = {"untrained": untrained(args, folder / "untrained"), "judge": judge}
    models = {k: scored(m, test, known) for k, m in (others | arms).items()}
    twin = trained(args, folder / "blind", seed, blank(sets[BASE], folder / "blank"))
    models["blind"] = scored(twin, blank(test, folder / "blank"), blank(known, folder / "blank"))
    say(f"seed {seed}: models scored")
    search = {k: best_of_8(args, folder / f"search {k}", arms[k], seed) for k in (BASE, "no perception labels")}
    rl = {k: reinforced(args, folder / f"rl {k}", arms[BASE], seed, t) for k, t in SHAPING.items()}
    right = [r for r in test if r.first_error == -1]
    padded = {k: padding_gains(arms[BASE], right, t) for k, t in SHAPING.items()}
    return {"labels": labels, "models": models, "search": search, "rl": rl, "padding": padded}


def check_folder(args: argparse.Namespace, folder: Path) -> None:
    """Raises SystemExit when the folder holds a study of other settings: its models would be taken for this one's."""
    free = ("folder", "out", "seeds", "resamples", "quick")
    told, file = {k: v for k, v in vars(args).items() if k not in free}, folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != told:
        raise SystemExit(f"{folder} holds another study ({file.read_text()}); take another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told))


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# ---- solutions and labels ---------------------------------------------------------------------------------------


def trained_policy(folder: Path) -> str:
    """The policy of the demo, trained below the folder unless it is there."""
    run = folder / "shapes_steps"
    if not (run / "model").is_dir():
        say("training the annotating policy (--policy FOLDER takes one that exists)")
        train("shapes_steps", {"run.output": run})
    return str(run / "model")


def train(recipe: str, changes: Mapping[str, Any], trainer: Any = None) -> Any:
    """Run a shapes recipe quietly; returns its trainer."""
    from mmrl.trainers import trainer_of

    quiet = {"run.report": False, "run.trackers": [], "run.cpu": True, "run.checkpoint_every": NEVER}
    made = (trainer or trainer_of)(load_config(recipe_path(f"vision/{recipe}.yaml"), overrides({**quiet, **changes})))
    made.train()
    return made


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """`key=value` as recipes take them; JSON is YAML."""
    return [f"{k}={json.dumps(v, default=str)}" for k, v in changes.items()]


def job(args: argparse.Namespace, recipe: str, kind: Any, folder: Path, changes: Mapping[str, Any]) -> Any:
    """The recipe of a job with this study's policy."""
    common = {"policy.model": args.policy, "output": folder, "cpu": True}
    return load_section(recipe_path(f"vision/{recipe}.yaml"), kind, overrides({**common, **changes}))


def annotated(args: argparse.Namespace, folder: Path, seed: int) -> Records:
    """Solutions of the policy with Monte-Carlo counts and soft labels; no planted errors, to compare labels alone."""
    from mmrl.reasoning.annotate.verb import run_annotate

    changes = {"prompts": args.questions, "seed": seed, "inject": None}
    run_annotate(job(args, "shapes_annotate", AnnotateConfig, folder, changes))
    return read_records(folder / "records.jsonl", unlabelled=True)[0]


def solved(
    args: argparse.Namespace, folder: Path, split: str, questions: int, *, seed: int, scenes: int = 0
) -> Records:
    """Solutions of the policy with exact labels up to the first wrong step. scenes: the task's own seed."""
    from mmrl.reasoning.annotate.verb import run_annotate

    changes = {"split": split, "prompts": questions, "seed": seed, "task.seed": scenes}
    run_annotate(job(args, "shapes_exact", AnnotateConfig, folder, changes))
    records = read_records(folder / "records.jsonl")[0]
    return [relabelled(r, y) for r, y in zip(records, exact_labels(records), strict=True)]


def exact_labels(records: Records) -> list[tuple[float | None, ...]]:
    """The program's labels: 1 before the first wrong step, 0 at it, None after it."""
    found = by_scorer(load_scorer("shapes_steps"))(records)
    return [labels_up_to(local_first_error(y), len(y)) for y in found]  # type: ignore[arg-type]


def relabelled(record: SolutionRecord, labels: tuple[float | None, ...]) -> SolutionRecord:
    """The record with hard labels."""
    first = first_error_of_labels(labels)
    return replace(record, labels=labels, label_kind="hard", scope="prefix", first_error=first)


def label_sets(raw: Records, judge: Path) -> dict[str, Records]:
    """The same solutions under four labellings; the last two leave some out.

    soft: the share of right completions. hard: 1 where any completion is right, up to the first error. consensus: the
    hard ones where the judge finds the same first error. scan: SCAN's denoised labels.
    """
    hard = [relabelled(r, labels_up_to(mc_first_error(mc_values(r.mc)), len(r.steps))) for r in raw]  # type: ignore
    agreed, _ = consensus(raw, by_scorer(load_scorer(judge), threshold=0.5))
    return {"soft": raw, "hard": hard, "consensus": agreed, "scan": scan(raw)[0]}


def blank(records: Records, folder: Path) -> Records:
    """The records with every picture replaced by a black one of its size; one file each, so questions stay apart."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for r in records:
        files = [folder / f"{Path(i).parent.name}-{Path(i).name}" for i in r.images]
        for old, new in zip(r.images, files, strict=True):
            if not new.exists():
                with Image.open(old) as picture:
                    Image.new("RGB", picture.size).save(new)
        out.append(replace(r, images=tuple(map(str, files))))
    return out


# ---- reward models ----------------------------------------------------------------------------------------------


def trained(args: argparse.Namespace, folder: Path, seed: int, records: Records, ignore: Sequence[str] = ()) -> Path:
    """A reward model trained on these records from the policy's weights; the same budget for all. Kept if there."""
    from mmrl.trainers.step_reward import StepRewardTrainer

    class Unwatched(StepRewardTrainer):
        def evaluate(self, iteration: int) -> dict[str, float]:
            return {}  # the study measures afterwards

    if (folder / "run" / "model").is_dir():
        return folder / "run" / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was cut
    start, data = time.process_time(), folder / "train.jsonl"
    write_records(data, records)
    train("shapes_prm", {
        "task.train": data, "task.eval": args.test_file, "task.ignore_kinds": list(ignore),
        "scorer.model": args.policy, "scorer.head": "likelihood", "scorer.train_vision": False, "optim.lr": 3e-4,
        "run.output": folder / "run", "run.seed": seed, "run.iterations": args.iterations,
        "run.prompts_per_iteration": args.batch, "run.eval_every": NEVER,
    }, Unwatched)  # fmt: skip
    say(f"seed {seed}: trained {folder.name} on {len(records)} solutions, {time.process_time() - start:.0f} CPU-s")
    return folder / "run" / "model"


def untrained(args: argparse.Namespace, folder: Path) -> Path:
    """What every training starts from: the policy's own likelihood of a step."""
    from mmrl.registry import build

    model = overrides({"scorer.model": args.policy, "scorer.head": "likelihood"})
    config: Any = load_config(recipe_path("vision/shapes_prm.yaml"), model)
    build("scorers", "scorer", config.scorer.name, config.scorer.options).save(folder)
    return folder


def scored(model: Path, test: Records, known: Records) -> Scored:
    """Scores of the test solutions; the threshold is the one of 19 with the best first-error F1 on `known`."""
    scorer = load_scorer(model)
    tuning, truth = score_records(scorer, known), [r.first_error for r in known]

    def quality(tau: float) -> float:
        return first_error_score([first_error(s, tau=tau) for s in tuning], truth).f1  # type: ignore

    tau = max((t / 20 for t in range(1, 20)), key=quality)
    return Scored(score_records(scorer, test), tau)  # type: ignore[arg-type]


def best_of_8(args: argparse.Namespace, folder: Path, model: Path, seed: int) -> list[dict[str, Any]]:
    """Held-out questions searched with a model; the same seed draws the same candidates for every model."""
    from mmrl.search.verb import run_search
    from mmrl.search.votes import majority

    run_search(job(args, "shapes_search", SearchConfig, folder, {
        "scorer": model, "prompts": args.tests, "seed": seed + 2}))  # fmt: skip
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    out = []
    for row in rows:
        right = [bool(c["correct"]) for c in row["candidates"]]
        answers = [c["answer"] for c in row["candidates"]]
        voted = majority(answers)
        out.append({
            "id": row["id"], "picked": float(right[row["answer"]]), "random": statistics.mean(right),
            "majority": float(voted is not None and right[answers.index(voted)]), "any": float(any(right)),
        })  # fmt: skip
    return out


# ---- the model as a reward --------------------------------------------------------------------------------------


def reinforced(args: argparse.Namespace, folder: Path, model: Path, seed: int, transforms: list[Any]) -> Any:
    """GRPO of the base model on outcome + sum of the model's step scores, with room for longer completions.

    Returns rows (iteration, question, tokens, steps, right) of training, means over the question's group, and of the
    greedy evaluations.
    """
    from mmrl.trainers.branch_grpo import BranchGrpo
    from mmrl.trainers.evaluator import EVAL_SEED
    from vision.tasks.shapes import ShapesAnswer, split_steps

    if (rows := folder / "rows.json").exists():
        return json.loads(rows.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    drawn: list[dict[str, Any]] = []
    greedy: list[dict[str, Any]] = []

    class Measured(BranchGrpo):
        def sample(self, iteration: int) -> Any:
            rollout = super().sample(iteration)
            drawn.extend({"iteration": iteration, **row} for row in group_rows(rollout))
            return rollout

        def evaluate(self, iteration: int) -> dict[str, float]:
            samples = self.policy.generate(self.run.task.eval_prompts, seed=EVAL_SEED)
            for s, right in zip(samples, ShapesAnswer()(samples), strict=True):
                steps = float(len(split_steps(s.output)))
                greedy.append({"iteration": iteration, "id": s.prompt.id, "steps": steps, "right": right})
            return {}

    train("shapes_steps", {
        "policy.model": "shapes", "policy.max_steps": 12, "policy.temperature": HOT, "policy.max_new_tokens": 64,
        "task.held_out": args.tests, "step_rewards": [{"name": "vision_prm", "model": model}], "optim.lr": 1e-4,
        "credit.estimators": [{"name": "fold_grpo"}], "credit.transforms": transforms, "run.output": folder,
        "run.seed": seed, "run.iterations": args.rl_iterations, "run.prompts_per_iteration": args.batch,
        "run.eval_every": max(args.rl_iterations // 3, 1),
    }, Measured)  # fmt: skip
    say(f"seed {seed}: {folder.name}: {statistics.mean(r['steps'] for r in drawn[-32:]):.2f} steps at the end")
    rows.write_text(json.dumps({"drawn": drawn, "greedy": greedy}))
    return {"drawn": drawn, "greedy": greedy}


def group_rows(rollout: Any) -> list[dict[str, Any]]:
    """Per question: tokens and steps of a completion, share of right ones, and the mean step score."""
    tree, out = rollout.tree, []
    for g, prompt in enumerate(rollout.prompts):
        own = tree.group == g
        ends = own & tree.is_leaf
        count = float(ends.sum())
        out.append({
            "id": prompt.id, "tokens": float((tree.tok_end - tree.tok_start)[own].sum()) / count,
            "steps": float(own.sum()) / count, "right": float(tree.outcome[ends].nan_to_num().mean()),
            "score": float(tree.step_reward[own].nanmean()),
        })  # fmt: skip
    return out


def padding_gains(model: Path, right: Records, transforms: list[Any]) -> dict[str, list[tuple[str, float]]]:
    """What writing the first or the last line of right solutions four more times adds to the sum of step rewards."""
    scorer = load_scorer(model)
    plain = step_returns(scorer, right, transforms)
    out = {}
    for name, at in (("first line", 0), ("answer", -1)):
        longer = [replace(r, labels=None, steps=_repeated(r.steps, at % len(r.steps))) for r in right]
        found = step_returns(scorer, longer, transforms)
        out[name] = [(question(r), b - a) for r, a, b in zip(right, plain, found, strict=True)]
    return out


def _repeated(steps: tuple[Any, ...], at: int, times: int = 4) -> tuple[Any, ...]:
    return steps[:at] + (steps[at],) * (times + 1) + steps[at + 1 :]


def step_returns(scorer: Any, records: Records, transforms: list[Any]) -> list[float]:
    """Sum of the transformed step rewards of every solution, each a chain of its own."""
    from mmrl.credit.estimate import apply_transform
    from mmrl.tree import FINISHED, INTERNAL, StepTree
    from mmrl.tree_ops import path_sum

    parent: list[int] = []
    status: list[int] = []
    group: list[int] = []
    scores: list[float] = []
    for g, (r, s) in enumerate(zip(records, score_records(scorer, records), strict=True)):
        n = len(r.steps)
        parent += [-1, *range(len(parent), len(parent) + n - 1)]
        status += [INTERNAL] * (n - 1) + [FINISHED]
        group += [g] * n
        scores += s or []
    outcome = [1.0 if s == FINISHED else float("nan") for s in status]
    tree = StepTree(parent=parent, group=group, status=status, outcome=outcome, step_reward=scores)
    for t in transforms:
        tree = apply_transform(tree, {"name": t} if isinstance(t, str) else t)
    leaves = tree.is_leaf.nonzero().flatten()
    totals = dict(zip(tree.group[leaves].tolist(), path_sum(tree, tree.step_reward)[leaves].tolist(), strict=True))
    return [totals[g] for g in range(len(records))]


# ---- numbers ----------------------------------------------------------------------------------------------------


def over_seeds(statistic: Callable[[int, Index], float], problems: Sequence[Sequence[str]], resamples: int) -> Number:
    """Mean over seeds of statistic(seed, indices of that seed's items), bootstrapped over questions.

    A question that several seeds have is drawn for all of them at once.
    """
    owner = np.concatenate([np.full(len(p), s) for s, p in enumerate(problems)])
    place = np.concatenate([np.arange(len(p)) for p in problems])

    def mean(i: Index) -> float:
        return float(np.mean([statistic(s, place[i[owner[i] == s]]) for s in range(len(problems))]))

    found = bootstrap(mean, [k for p in problems for k in p], resamples=resamples)
    each = [statistic(s, np.arange(len(p))) for s, p in enumerate(problems)]
    return {"value": found.value, "low": found.low, "high": found.high, "seeds": each}


def mean_of(columns: Sequence[Sequence[float]], problems: Sequence[Sequence[str]], resamples: int) -> Number:
    """`over_seeds` of a mean; one column per seed."""
    values = [np.asarray(c, float) for c in columns]
    return over_seeds(lambda s, i: float(values[s][i].mean()) if len(i) else float("nan"), problems, resamples)


def question(record: SolutionRecord) -> str:
    """What solutions of one question share."""
    return f"{record.question} {Path(record.images[0]).name}"


def label_rows(raw: Records, own: Records, truth: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Per labelled step and per solution of a set, whether it agrees with the truth; per annotated one, if kept.

    Soft labels count as right from 1/2 on.
    """
    steps, firsts = [], []
    for r in own:
        exact, key = truth[r.id], question(r)
        steps += [(key, float((y >= 0.5) == (e >= 0.5)))
                  for y, e in zip(r.labels or (), exact, strict=True) if y is not None and e is not None]  # fmt: skip
        firsts.append((key, float(first_error_of_labels(r.labels or ()) == first_error_of_labels(exact))))
    ids = {r.id for r in own}
    return {"steps": steps, "first_error": firsts, "kept": [(question(r), float(r.id in ids)) for r in raw]}


def means(seeds: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, Number]:
    """The mean of every column of (question, value) pairs, over seeds."""
    return {
        k: mean_of([[v for _, v in s[k]] for s in seeds], [[q for q, _ in s[k]] for s in seeds], resamples)
        for k in seeds[0]
    }


def auc_of(test: Records, models: Sequence[Scored], kind: str | None = None) -> tuple[Any, list[str]]:
    """The statistic of `over_seeds` for the AUC over steps (of one kind), and the question of each step."""
    at = [(i, t) for i, r in enumerate(test) for t, s in enumerate(r.steps)
          if r.labels is not None and r.labels[t] is not None and kind in (None, s.kind)]  # fmt: skip
    y = np.array([test[i].labels[t] for i, t in at]) >= 0.5  # type: ignore[index]
    level = [np.unique([m.scores[i][t] for i, t in at], return_inverse=True)[1] for m in models]
    return lambda s, i: rank_auc(level[s][i], y[i]), [question(test[i]) for i, _ in at]


def f1_of(test: Records, models: Sequence[Scored], tuned: bool) -> tuple[Any, list[str]]:
    """The same for the first-error F1, at 1/2 or at the model's tuned threshold."""
    truth = np.array([r.first_error for r in test])
    found = [np.array([first_error(s, tau=m.tau if tuned else 0.5) for s in m.scores]) for m in models]
    return lambda s, i: first_error_score(found[s][i].tolist(), truth[i].tolist()).f1, [question(r) for r in test]


def measures(test: Records, models: Sequence[Scored]) -> dict[str, tuple[Any, list[str]]]:
    """Every measure of a reward model, one model per seed."""
    kinds = {f"auc/{k}": auc_of(test, models, k) for k in ("perception", "reasoning", "answer")}
    f1s = {"f1": f1_of(test, models, False), "f1_tuned": f1_of(test, models, True)}
    return {"auc": auc_of(test, models), **kinds, **f1s}


def model_numbers(test: Records, models: Sequence[Scored], resamples: int) -> dict[str, Number]:
    """AUC over all steps and by kind, first-error F1."""
    return {k: over_seeds(f, [q] * len(models), resamples) for k, (f, q) in measures(test, models).items()}


def gaps(test: Records, a: Sequence[Scored], b: Sequence[Scored], resamples: int) -> dict[str, Number]:
    """The measures of one model less those of another, on the same resamples."""
    out = {}
    for (key, (f, q)), (g, _) in zip(measures(test, a).items(), measures(test, b).values(), strict=True):

        def gap(s: int, i: Index, f: Any = f, g: Any = g) -> float:
            return float(f(s, i) - g(s, i))

        out[key] = over_seeds(gap, [q] * len(a), resamples)
    return out


def search_numbers(seeds: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, Number]:
    """Accuracy of every way to choose among the same 8 candidates, and the paired gap of the two models."""
    ids = [[r["id"] for r in s[BASE]] for s in seeds]

    def column(arm: str, key: str) -> list[list[float]]:
        return [[r[key] for r in s[arm]] for s in seeds]

    columns = {k: column(BASE, k) for k in ("random", "majority", "any")} | {k: column(k, "picked") for k in seeds[0]}
    a, b = (np.array(columns[k]) for k in seeds[0])
    columns |= {"gap": (a - b).tolist(), "over majority": (a - np.array(columns["majority"])).tolist()}
    return {k: mean_of(c, ids, resamples) for k, c in columns.items()}


def rl_numbers(seeds: Sequence[Mapping[str, Any]], resamples: int) -> dict[str, Any]:
    """The first and the last tenth of training, the change between them, and the greedy evaluations."""
    count = max(r["iteration"] for r in seeds[0]["drawn"]) + 1
    tenth = max(count // 10, 1)
    out: dict[str, Any] = {}
    ids = [[r["id"] for r in s["drawn"]] for s in seeds]
    when = [np.array([r["iteration"] for r in s["drawn"]]) for s in seeds]
    early, late = [w < tenth for w in when], [w >= count - tenth for w in when]
    for key in ("tokens", "steps", "right", "score"):
        x = [np.array([r[key] for r in s["drawn"]]) for s in seeds]
        out[key] = change(x, early, late, ids, resamples)
        out[key]["curve"] = [[float(v[w // tenth == j].mean()) for j in range(-(-count // tenth))]
                             for v, w in zip(x, when, strict=True)]  # fmt: skip
    at = sorted({r["iteration"] for r in seeds[0]["greedy"]})
    for key in ("steps", "right"):
        rows = {i: [[r for r in s["greedy"] if r["iteration"] == i] for s in seeds] for i in at}
        out[f"greedy {key}"] = {
            str(i): mean_of([[r[key] for r in c] for c in own], [[r["id"] for r in c] for c in own], resamples)
            for i, own in rows.items()
        }
    return out


def change(x: Any, early: Any, late: Any, problems: Sequence[Sequence[str]], resamples: int) -> dict[str, Any]:
    """Means of the items that are early, of those that are late, and the second less the first; one array per seed."""

    def part(s: int, i: Index, which: Any) -> float:
        taken = i[which[s][i]]
        return float(x[s][taken].mean()) if len(taken) else float("nan")

    def gap(s: int, i: Index) -> float:
        return part(s, i, late) - part(s, i, early)

    ways: dict[str, Any] = {"first": partial(part, which=early), "last": partial(part, which=late), "change": gap}
    return {name: over_seeds(way, problems, resamples) for name, way in ways.items()}


# ---- the tables -------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> str:
    """Markdown of the whole study."""
    label = {"steps": "labels right", "first_error": "first error right", "kept": "solutions kept"}
    model = {"auc": "AUC", "auc/perception": "perception", "auc/reasoning": "reasoning", "auc/answer": "answer",
             "f1": "first-error F1 at .5", "f1_tuned": "at tuned threshold"}  # fmt: skip
    rl = {f"{name}: {key}": row for name, found in result["rl"].items()
          for key, row in found.items() if not key.startswith("greedy")}  # fmt: skip
    greedy = {f"{name}: {key}": {f"iteration {i}": v for i, v in row.items()} for name, found in result["rl"].items()
              for key, row in found.items() if key.startswith("greedy")}  # fmt: skip
    picks = {k: {"accuracy": v} for k, v in result["best_of_8"].items()}
    parts = [
        ("labels", label, result["labels"]), ("reward model", model, result["models"]),
        ("difference", model, result["differences"]), ("best of 8", {"accuracy": "accuracy"}, picks),
        ("padding, four lines", {k: k for k in next(iter(result["padding"].values()))}, result["padding"]),
        ("GRPO, sampled", {k: k for k in ("first", "last", "change")}, rl),
        ("GRPO, greedy", {k: k for k in next(iter(greedy.values()))}, greedy),
    ]  # fmt: skip
    return "\n\n".join(table(*p) for p in parts)


def table(corner: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One Markdown table; `columns` maps keys of a row to headings."""
    lines = [f"| {corner} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row[k]) for k in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def cell(x: Number) -> str:
    """A value with its interval."""
    return f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"


if __name__ == "__main__":
    main()

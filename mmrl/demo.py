"""The demos: built-in jobs that need nothing but this package, side by side, and one report of them all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrl.registry import build, names, register
from mmrl.workdir import write_json

Overrides = Sequence[str]


@dataclass(frozen=True)
class Demo:
    """A built-in job and the runs that its section of the report compares.

    Args:
        title: of its section in the report.
        recipe: the one whose run the section is about.
        beside: recipes whose runs have the same budget and are compared with it.
        after: the demo whose model it starts from.
        judge: title and recipe of the step reward that is trained first and has a section of its own.
        seeds: each recipe runs once per seed from 0 on.
        run: does the work in place of training the recipes.
    """

    title: str
    recipe: str
    beside: tuple[str, ...] = ()
    after: str | None = None
    judge: tuple[str, str] | None = None
    seeds: int = 1
    run: Callable[[Demo, Path, Overrides], None] | None = None

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(recipe, seed) of every run; the first one is what the section is about."""
        return [(recipe, seed) for seed in range(self.seeds) for recipe in (self.recipe, *self.beside)]


class DemoError(RuntimeError):
    """A demo did not finish; its log says why."""


def recipe_path(name: str) -> Path:
    """The file of a recipe that ships with mmrl: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).parent
    for root in (here / "configs", here.parent / "configs"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"recipe {name} is missing from this installation")


def _demo(name: str) -> Demo:
    demo: Demo = build("demos", "demo", name, {})
    return demo


def run_demo(name: str, folder: Path, overrides: Overrides = ()) -> Path:
    """Run one demo below `folder`, and first the one it starts from unless its model is there; returns the report."""
    from mmrl.report.page import write_overview

    demo = _demo(name)
    if demo.after is not None and not (_run(folder, _demo(demo.after).recipe) / "model").is_dir():
        _train(_demo(demo.after).recipe, folder, overrides)
    (demo.run or _train_all)(demo, folder, overrides)
    return write_overview(_sections(demo, folder), _run(folder, demo.recipe) / "report.html")


def run_all(folder: Path, overrides: Overrides = ()) -> Path:
    """Every demo in a process of its own, at the same time where none waits for another; returns the one report.

    Raises:
        DemoError: one of them failed.
    """
    from mmrl.report.page import write_overview

    demos = {name: _demo(name) for name in names("demos")}
    processes = {name: _start(name, folder, overrides) for name, demo in demos.items() if demo.after is None}
    for name, demo in demos.items():
        if demo.after is not None and processes[demo.after].wait() == 0:
            processes[name] = _start(name, folder, overrides)
    # A demo without a process has waited for one that failed.
    failed = [name for name in demos if name not in processes or processes[name].wait() != 0]
    if failed:
        raise DemoError(f"demo {', '.join(failed)} failed; its messages are above. Alone: mmrl demo {failed[0]}")
    sections = []
    for demo in demos.values():
        sections += _sections(demo, folder)
    return write_overview(sections, folder / "report.html")


def _start(name: str, folder: Path, overrides: Overrides) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "mmrl", "demo", name, "--folder", str(folder), *overrides])


def _sections(demo: Demo, folder: Path) -> list[tuple[str, Path, list[Path]]]:
    """(title, run folder, folders of the runs to compare with) of each section of a demo."""
    first, *beside = (_run(folder, recipe, seed) for recipe, seed in demo.runs)
    sections: list[tuple[str, Path, list[Path]]] = []
    if demo.judge is not None:
        title, recipe = demo.judge
        sections.append((title, _run(folder, recipe), []))
    sections.append((demo.title, first, beside))
    return sections


def _run(folder: Path, recipe: str, seed: int = 0) -> Path:
    """The folder of a recipe's run."""
    return folder / (Path(recipe).stem + (f"_seed{seed}" if seed else ""))


def _train_all(demo: Demo, folder: Path, overrides: Overrides) -> None:
    if demo.judge is not None:
        _train(demo.judge[1], folder, overrides)
        overrides = [f"step_rewards.0.model={_run(folder, demo.judge[1]) / 'model'}", *overrides]
    for recipe, seed in demo.runs:
        _train(recipe, folder, [f"run.seed={seed}", *overrides] if seed else overrides, seed)


def _train(recipe: str, folder: Path, overrides: Overrides, seed: int = 0) -> None:
    from mmrl.config import load_config
    from mmrl.trainers import trainer_of

    output = _run(folder, recipe, seed)
    config = load_config(recipe_path(recipe), [*overrides, f"run.output={output}", "run.report=false"])
    trainer_of(config).train()


def _prm(demo: Demo, folder: Path, overrides: Overrides) -> None:
    """Annotate with the policy, train the scorer on that, search with both. Overrides are for the training."""
    from mmrl.config import load_section
    from mmrl.reasoning.annotate.recipe import AnnotateConfig
    from mmrl.reasoning.annotate.verb import run_annotate
    from mmrl.search.recipe import SearchConfig
    from mmrl.search.verb import run_search

    train, test = _run(folder, "shapes_annotate"), _run(folder, "shapes_exact")
    policy = f"policy.model={_run(folder, 'vision/shapes_steps.yaml') / 'model'}"
    for name, output in (("shapes_annotate", train), ("shapes_exact", test)):
        run_annotate(load_section(recipe_path(f"vision/{name}.yaml"), AnnotateConfig, [policy, f"output={output}"]))
    data = [f"task.train={train / 'records.jsonl'}", f"task.eval={test / 'records.jsonl'}"]
    _train(demo.recipe, folder, [*data, policy.replace("policy", "scorer"), *overrides])
    scorer = f"scorer={_run(folder, demo.recipe) / 'model'}"
    settings = [policy, scorer, f"output={_run(folder, 'shapes_search')}"]
    report = run_search(load_section(recipe_path("vision/shapes_search.yaml"), SearchConfig, settings))
    write_json(_run(folder, demo.recipe) / "search.json", report)


for _name, _built_in in {
    "vision": Demo(
        "A vision-language model learns from verified steps",
        "vision/shapes_steps.yaml",
        beside=("vision/shapes_outcome.yaml",),
    ),
    "prm": Demo("A process reward model judges its steps", "vision/shapes_prm.yaml", after="vision", run=_prm),
    "video": Demo(
        "A video agent learns from rewarded manipulations",
        "video/clips_steps.yaml",
        beside=("video/clips_answer.yaml",),
        seeds=2,
    ),
    "diffusion": Demo("A diffusion model is aligned by branch rollouts", "diffusion/digits_branch.yaml"),
    "latent": Demo(
        "It aligns the diffusion model at every step, without decoding",
        "diffusion/digits_lpo.yaml",
        judge=("A latent reward judges noisy latents", "diffusion/digits_latent_reward.yaml"),
    ),
}.items():
    register("demos", _name)(_built_in)

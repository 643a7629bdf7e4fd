"""The run folder: config, environment, metrics, checkpoints. Everything a report or a resume needs lies here."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mmrl.config import ConfigError
from mmrl.jsonl import read_metrics
from mmrl.recipe import TrainingConfig
from mmrl.trainers.checkpoint import Checkpoints
from mmrl.workdir import WorkDir

log = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes the numbers.
_FREE = {"output", "resume", "iterations", "eval_every", "checkpoint_every", "keep_checkpoints", "threads",
         "processes", "cpu", "trackers", "report", "max_unscored"}  # fmt: skip

# What decides numbers: pixels are pillow's, frames av's and decord's.
_PACKAGES = (
    "torch", "accelerate", "transformers", "diffusers", "peft", "tokenizers", "numpy", "pillow", "av", "decord",
)  # fmt: skip


class RunFolder(WorkDir):
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = Checkpoints(root / "checkpoints")

    def open(self, config: TrainingConfig) -> None:
        """Create the folder, or check that it holds the same run.

        Raises:
            ConfigError: it holds a run and `run.resume` is off, or that run had another recipe.
        """
        known = self.root / "config.yaml"
        if known.exists():
            if not config.run.resume:
                raise ConfigError(
                    f"{self.root} already holds a run; continue it with run.resume=true or choose another run.output"
                )
            changed = _differences(_read(known), yaml.safe_load(config.dump()))
            if changed:
                raise ConfigError(
                    f"{self.root} was made by another recipe: {'; '.join(changed)}. Use a new run.output"
                )
        self.root.mkdir(parents=True, exist_ok=True)
        now, record = environment(), self.root / "environment.json"
        if record.exists():
            self._compare(record, now["packages"])
        _replace(known, config.dump())
        _replace(record, json.dumps(now, indent=1) + "\n")

    def _compare(self, record: Path, packages: dict[str, str | None]) -> None:
        """Say which versions have changed since the run began or was last resumed."""
        try:
            before = dict(json.loads(record.read_text())["packages"])
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged, so nobody can tell whether versions have changed", record)
            return
        names = sorted(before.keys() & packages.keys())
        changed = [f"{n} {before[n]} -> {packages[n]}" for n in names if before[n] != packages[n]]
        if changed:
            log.warning(
                "%s goes on with other versions (%s): the rest may differ from an uninterrupted run, by its pixels "
                "where pillow, av or decord changed",
                self.root, ", ".join(changed),
            )  # fmt: skip

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a") as f:
            f.write(json.dumps({"iteration": iteration, **metrics}) + "\n")

    def truncate_metrics(self, iteration: int) -> None:
        """Keep the rows up to `iteration`; a resumed run writes the rest again."""
        if self.metrics.exists():
            rows = [row for row in read_metrics(self.metrics) if row["iteration"] <= iteration]
            _replace(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def _replace(file: Path, text: str) -> None:
    """Write beside the target and rename: whole or unchanged."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.rename(file)


def _read(config: Path) -> dict[str, Any]:
    """The recipe of the run that the folder holds.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        tree = yaml.safe_load(config.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{config} is damaged ({error}); use another run.output") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{config} is damaged (it holds no sections); use another run.output")
    return tree


def environment() -> dict[str, Any]:
    """Versions and revision, for whoever wants to repeat the run."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git.stdout.strip() or None,
        "argv": sys.argv,
    }


def _version(package: str) -> str | None:
    """Of an installed package, None without it: each modality brings its own."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = []
    for section in old.keys() | new.keys():
        a, b = old.get(section), new.get(section)
        if section == "run" and isinstance(a, dict) and isinstance(b, dict):
            a, b = ({k: v for k, v in x.items() if k not in _FREE} for x in (a, b))
        if a != b:
            changed.append(f"{section}: {a} -> {b}")
    return sorted(changed)

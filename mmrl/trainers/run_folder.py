"""The run folder: config, environment, metrics, checkpoints. Everything a report or a resume needs lies here."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmrl.config import ConfigError
from mmrl.jsonl import read_metrics
from mmrl.recipe import TrainingConfig
from mmrl.trainers.checkpoint import Checkpoints
from mmrl.workdir import WorkDir, append, recover, write_json, write_lines

log = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes the numbers.
_FREE = {
    f"run.{key}"
    for key in (
        "output", "resume", "iterations", "epochs", "eval_every", "checkpoint_every", "keep_checkpoints", "threads",
        "processes", "cpu", "trackers", "report", "max_unscored",
    )
}  # fmt: skip

_IDENTITY = "was made by another recipe", _FREE

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

    def check(self, config: TrainingConfig) -> None:
        """Refuse what `open` would refuse, before a model is loaded; nothing stays that was not there.

        Raises:
            ConfigError: as `open`, or the folder cannot be written, or another process has it.
        """
        if self.root.exists():
            with self.owned():
                self._check_run(config)
            return
        parent = next(folder for folder in self.root.absolute().parents if folder.exists())
        try:
            with tempfile.TemporaryDirectory(dir=parent):
                pass
        except OSError as error:
            raise self.unwritable(error) from error

    def open(self, config: TrainingConfig) -> None:
        """Create the folder, or check that it holds the same run.

        Raises:
            ConfigError: it holds a run and `run.resume` is off, or that run had another recipe.
        """
        self._check_run(config)
        recover(self.root / "model")
        self.identify("config.yaml", config.model_dump(mode="json"), *_IDENTITY)
        now, record = environment(), self.root / "environment.json"
        if record.exists():
            self._compare(record, now["packages"])
        write_json(record, now)

    def _check_run(self, config: TrainingConfig) -> None:
        if (self.root / "config.yaml").exists() and not config.run.resume:
            raise ConfigError(
                f"{self.root} already holds a run; continue it with run.resume=true or choose another run.output"
            )
        self.check_identity("config.yaml", config.model_dump(mode="json"), *_IDENTITY)

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
        append(self.metrics, [{"iteration": iteration, **metrics}])

    def truncate_metrics(self, iteration: int) -> None:
        """Keep the rows up to `iteration`; a resumed run writes the rest again."""
        if self.metrics.exists():
            rows = [row for row in read_metrics(self.metrics) if row["iteration"] <= iteration]
            write_lines(self.metrics, map(json.dumps, rows))


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

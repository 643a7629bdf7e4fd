"""The run folder: config, environment, metrics, checkpoints. Everything a report or a resume needs lies here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mmrl.config import ConfigError
from mmrl.recipe import TrainingConfig

# What may differ between a run and its continuation: nothing that changes the numbers.
_FREE = {"output", "resume", "iterations", "eval_every", "checkpoint_every", "keep_checkpoints", "threads",
         "processes", "cpu", "trackers", "report", "max_unscored"}  # fmt: skip


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"

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
            changed = _differences(yaml.safe_load(known.read_text()), yaml.safe_load(config.dump()))
            if changed:
                raise ConfigError(
                    f"{self.root} was made by another recipe: {'; '.join(changed)}. Use a new run.output"
                )
        self.root.mkdir(parents=True, exist_ok=True)
        known.write_text(config.dump())
        (self.root / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a") as f:
            f.write(json.dumps({"iteration": iteration, **metrics}) + "\n")

    def truncate_metrics(self, iteration: int) -> None:
        """Keep the lines up to `iteration`; a resumed run writes the rest again. Drops a last line cut by a kill."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
            except json.JSONDecodeError:
                break
        part = self.metrics.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        part.rename(self.metrics)

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; half-written ones carry another name."""
        found = sorted(p for p in self.checkpoints.glob("[0-9]*") if p.is_dir())
        return found[-1] if found else None

    def write_checkpoint(self, iteration: int, keep: int, is_main: bool, write: Callable[[str], object],
                         wait: Callable[[], object]) -> None:  # fmt: skip
        """`write` into a folder beside the target on all ranks, then rename it and drop the oldest."""
        final = self.checkpoints / f"{iteration:06d}"
        part = self.checkpoints / f".{iteration:06d}.part"
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        wait()
        write(str(part))
        wait()
        if is_main:
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in sorted(self.checkpoints.glob("[0-9]*"))[:-keep]:
                shutil.rmtree(old)
        wait()


def environment() -> dict[str, Any]:
    """Versions and revision, for whoever wants to repeat the run."""
    packages = ("torch", "accelerate", "transformers", "diffusers", "peft")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "python": sys.version.split()[0],
        "packages": {p: version(p) for p in packages},
        "git": git.stdout.strip() or None,
        "argv": sys.argv,
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = []
    for section in old.keys() | new.keys():
        a, b = old.get(section), new.get(section)
        if section == "run" and isinstance(a, dict) and isinstance(b, dict):
            a, b = ({k: v for k, v in x.items() if k not in _FREE} for x in (a, b))
        if a != b:
            changed.append(f"{section}: {a} -> {b}")
    return sorted(changed)

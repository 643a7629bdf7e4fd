"""A folder of stored rollouts as it is written: what made them, and a folder per batch, each complete or absent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmrl.config import ConfigError
from mmrl.rollout import Rollout
from mmrl.workdir import WorkDir, discard, publish, tidy

RECIPE = "recipe.json"  # beside the rollouts: what made them


class RolloutFolder:
    """Rollouts of one recipe, saved one by one; `mmrl.trainers.stored.StoredRollouts` reads them.

    Args:
        root: the folder. record: what decides its contents, JSON values.
        write: create the folder and its record, or check that it is of the same recipe; one process does it.
    Raises:
        ConfigError: it has rollouts of another recipe or of an unknown one.
    """

    def __init__(self, root: str | Path, record: Mapping[str, Any], *, write: bool = True) -> None:
        self.root = Path(root)
        if write:
            self._open(record)

    def _open(self, record: Mapping[str, Any]) -> None:
        if any(self.root.glob("*/rollout.json")) and not (self.root / RECIPE).exists():
            raise ConfigError(
                f"{self.root} holds rollouts without {RECIPE}, so what made them is unknown; use another folder"
            )
        WorkDir(self.root).identify(RECIPE, record, "holds rollouts of another recipe")
        tidy(self.root)

    def place(self, batch: int, rank: int = 0) -> Path:
        """The folder of a batch."""
        return self.root / f"{batch:06d}-{rank:02d}"

    def save(self, rollout: Rollout, batch: int, rank: int = 0) -> Path:
        """Write a batch: complete or absent, never half."""
        folder = self.place(batch, rank)
        with publish(folder) as part:
            rollout.save(part)
        return folder

    @property
    def batches(self) -> list[Path]:
        """The folders of all batches, in order."""
        return sorted(f.parent for f in self.root.glob("[!.]*/rollout.json"))

    def append(self, rollout: Rollout) -> Path:
        """Save as the batch after the last one."""
        taken = [int(f.name.partition("-")[0]) for f in self.batches]
        return self.save(rollout, max(taken, default=-1) + 1)

    def trim(self, batches: int, rank: int = 0) -> None:
        """Drop what a rank wrote behind its first so many batches."""
        for folder in self.batches:
            batch, _, own = folder.name.partition("-")
            if int(own) == rank and int(batch) >= batches:
                discard(folder)

    def keep(self, ids: Collection[str]) -> set[str]:
        """Drop the trees of all other prompts; returns the ids of those that are there."""
        found: set[str] = set()
        for folder in self.batches:
            rollout = Rollout.load(folder)
            kept = [i for i, p in enumerate(rollout.prompts) if p.id in ids]
            found |= {rollout.prompts[i].id for i in kept}
            if not kept:
                discard(folder)
            elif len(kept) < len(rollout.prompts):
                self.save(rollout.select(kept), int(folder.name.partition("-")[0]))
        return found

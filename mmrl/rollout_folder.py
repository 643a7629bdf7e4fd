"""A folder of stored rollouts as it is written: the recipe of them, and a folder per batch, complete or absent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmrl.config import ConfigError
from mmrl.rollout import Rollout
from mmrl.workdir import WorkDir, discard, publish, tidy

# The file beside the rollouts with the recipe that they were made by.
RECIPE = "recipe.json"


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
        return sorted(file.parent for file in self.root.glob("[!.]*/rollout.json"))

    def append(self, rollout: Rollout) -> Path:
        """Save as the batch after the last one."""
        batches = [_batch_of(folder) for folder in self.batches]
        return self.save(rollout, max(batches, default=-1) + 1)

    def trim(self, batches: int, rank: int = 0) -> None:
        """Keep the first `batches` batches of a rank and drop its later ones."""
        for folder in self.batches:
            rank_of_folder = int(folder.name.partition("-")[2])
            if rank_of_folder == rank and _batch_of(folder) >= batches:
                discard(folder)

    def keep(self, ids: Collection[str]) -> set[str]:
        """Drop the trees of all other prompts; returns the ids of those that are there."""
        kept_ids: set[str] = set()
        for folder in self.batches:
            rollout = Rollout.load(folder)
            kept = [i for i, prompt in enumerate(rollout.prompts) if prompt.id in ids]
            kept_ids |= {rollout.prompts[i].id for i in kept}
            if not kept:
                discard(folder)
            elif len(kept) < len(rollout.prompts):
                self.save(rollout.select(kept), _batch_of(folder))
        return kept_ids


def _batch_of(folder: Path) -> int:
    """The number of the batch in a folder that `RolloutFolder.place` has named."""
    return int(folder.name.partition("-")[0])

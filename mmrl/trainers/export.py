"""`mmrl export`: a run, one of its checkpoints or its model as a folder that other programs load."""

from __future__ import annotations

import tempfile
from pathlib import Path
from shutil import copytree
from typing import Any

from mmrl.capabilities import AdapterMerger, require
from mmrl.config import ConfigError, load_config
from mmrl.recipe import PolicyConfig, TrainingConfig
from mmrl.registry import find
from mmrl.trainers import trainer_of
from mmrl.trainers.checkpoint import Checkpoints, damage
from mmrl.workdir import publish


def export_model(source: Path, out: Path, *, merge: bool = False) -> Path:
    """Write the model of a run into a new folder, in the format that its ecosystem reads; returns what it came from.

    Args:
        source: a run folder (its model/, or its newest checkpoint where the run has not ended), RUN/best,
            RUN/checkpoints/000040, or a model folder of a run, such as RUN/model or RUN/best/000040/model.
        merge: with LoRA, add the adapter to the weights of its base, so that nothing else is needed to load it.
    Raises:
        ConfigError: `source` is no model or sound checkpoint of a run, or `out` exists already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    run = _run_of(source)
    source = _model_or_checkpoint(source, run)
    with tempfile.TemporaryDirectory() as scratch:
        # the run itself is not touched: no lock is taken, and nothing is written below it
        # and one process exports what any number of them trained
        here = [f"run.output={scratch}/run", "run.trackers=[]", "run.processes=null"]
        config = load_config(run / "config.yaml", here)
        model = source
        if _is_checkpoint(source):
            model = Path(scratch) / "model"
            trainer = trainer_of(config)
            trainer.loop.load(source)
            with trainer.loop.evaluating():
                trainer.save_model(model)
        with publish(out) as part:
            if merge:
                component = _component(config, model)
                require("mmrl export --merge", AdapterMerger, component).merge_adapter()
                component.save(part)
            else:
                copytree(model, part, dirs_exist_ok=True)
    return source


def _run_of(source: Path) -> Path:
    """The run folder that something belongs to."""
    for folder in (source, *source.absolute().parents[:3]):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"{source} belongs to no run (no config.yaml in it or above it); give the run.output of a run, one of its "
        "checkpoints, or its model folder"
    )


def _latest(run: Path) -> Path:
    """model/ of a run that has ended; of one that goes on, maybe after it had ended before, its newest checkpoint."""
    model, newest = run / "model", Checkpoints(run / "checkpoints").newest()
    if model.is_dir() and (newest is None or newest.stat().st_mtime <= model.stat().st_mtime):
        return model
    if newest is None:
        raise ConfigError(f"{run} has neither a model nor a checkpoint yet")
    return newest


def _model_or_checkpoint(source: Path, run: Path) -> Path:
    """The model folder or sound checkpoint that a path in a run means.

    Raises:
        ConfigError: the path holds neither.
    """
    place = source.absolute()
    inside = place.relative_to(run.absolute()).parts
    if not inside:
        return _latest(run)
    if len(inside) == 1 and inside[0] in ("checkpoints", "best") and (newest := Checkpoints(place).newest()):
        return newest / "model" if inside[0] == "best" else newest
    if inside[0] == "best" and (source / "model").is_dir():
        return source / "model"
    if _is_checkpoint(source):
        fault = damage(source)
        if fault:
            raise ConfigError(f"{source} is no sound checkpoint ({fault}); name another one")
        return source
    if place.name == "model" and place.is_dir():
        return source
    raise ConfigError(f"{source} is neither a model nor a checkpoint of {run}")


def _is_checkpoint(folder: Path) -> bool:
    return folder.absolute().parent.name == "checkpoints"


def _component(config: TrainingConfig, model: Path) -> Any:
    """The policy or scorer of a recipe with the weights in a folder."""
    if isinstance(config, PolicyConfig):
        kind, section = "policies", config.policy
    else:
        kind, section = "scorers", config.scorer  # type: ignore[attr-defined]
    row = find(kind, section.name)
    # where the folder of a trained model is more than another `model`, the row says which options read it
    trained = row.facts.get("trained", lambda options, folder: {**options, "model": str(folder)})
    return row.build(trained(section.options, model), section.name)

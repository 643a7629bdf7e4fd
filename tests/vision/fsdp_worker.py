"""Run on every rank by test_fsdp_resume.py: a recipe whose weights accelerate itself shards, on a CPU.

accelerate leaves FSDP out where its distributed type is MULTI_CPU, so the ranks say they are GPUs. Everything behind that
is what `accelerate launch` with configs/accelerate/fsdp2.yaml runs.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mmrl.config import load_config
from mmrl.registry import find
from mmrl.rollout import Rollout
from mmrl.trainers.sample_loss import Term

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "trainers"), str(TESTS / "vision")]
SHIPPED = TESTS.parent / "configs" / "accelerate" / "fsdp2.yaml"


class Twin:
    """An engine with a model of its own, which knows the trained weights by `sync` or `sync_lora` alone."""

    def __init__(self, folder: str) -> None:
        from vision.inputs.loading import load_model

        self.base = load_model(folder)
        self.hf: Any = self.base

    def open(self, request: Any) -> Any:
        from vision.growth.engine_hf import TransformersEngine

        return TransformersEngine(self.hf).open(request)

    def sync(self, weights: Any) -> None:
        self.hf.load_state_dict(dict(weights))

    def sync_lora(self, folder: Path) -> None:
        from peft import PeftModel

        self.hf = PeftModel.from_pretrained(copy.deepcopy(self.base), folder)

    def wake(self) -> None:
        pass

    sleep = wake


def likely(policy: Any, rollout: Rollout, rewards: Any, key: tuple[int, int]) -> list[Term]:
    """A sample loss: the mean negative log-prob of every step."""
    import torch

    steps = torch.arange(len(rollout.tree))
    return [
        Term(len(part), lambda part=part: -policy.log_probs(rollout, part).logp)  # type: ignore[misc]
        for part in policy.micro_batches(rollout, steps)
    ]


def pretend_gpus() -> None:
    """Have accelerate shard, as the shipped file says."""
    start = PartialState.__init__

    def as_gpus(self: PartialState, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpus  # type: ignore[method-assign]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for name, value in yaml.safe_load(SHIPPED.read_text())["fsdp_config"].items():
        variable = name.upper().replace("_LAYER_CLS_", "_CLS_")
        os.environ[variable] = str(value).lower() if isinstance(value, bool) else str(value)


def main(recipe: str, overrides: Sequence[str]) -> None:
    config = load_config(Path(recipe), list(overrides))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        pretend_gpus()
    options: dict[str, Any] = {}
    section = getattr(config, "policy", None)
    if section is not None:
        from vision.growth.engine_sync import SyncedEngine
        from vision.policy import VisionPolicy

        policy = VisionPolicy.build(**section.options)
        policy._engine = SyncedEngine(Twin(section.options["model"]), shared=False)  # type: ignore[arg-type]
        options["policy"] = policy
    trainer: Any = find("trainers", config.trainer).target
    trainer = trainer(config, **options)
    assert trainer.loop.sharded == trainer.loop.accelerator.is_fsdp2 == (trainer.loop.accelerator.num_processes > 1)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

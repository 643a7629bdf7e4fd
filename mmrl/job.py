"""The components of a recipe that is not training: annotation and search start from a `Job`.

A job builds task, policy and verifier, puts them on their device, and says what decides their results (`fingerprint`),
so that what was stored by another model or other settings is not taken for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from mmrl.capabilities import RewardNamer, build_with, model_of, refuse_row
from mmrl.config import ConfigError
from mmrl.recipe import JobConfig, RewardConfig
from mmrl.registry import build, find
from mmrl.rollout import OutcomeReward, Prompt, StepReward
from mmrl.rollout_folder import RolloutFolder
from mmrl.scorers.scoring import load_scorer
from mmrl.task import Task, build_reward
from mmrl.workdir import WorkDir


class Job:
    """Task, policy and verifier of a recipe, on their device.

    Args:
        protocol: what the policy has to follow.
        others: methods for policies that lack it, for the message.
    """

    def __init__(self, config: JobConfig, protocol: type, others: str = "") -> None:
        asker = f"method.name={config.method.name!r}"
        if others:
            asker += f" ({others})"
        policy_row = find("policies", config.policy.name)
        refuse_row(asker, protocol, policy_row)
        policy_row.check(config.policy.options, "policy")
        if config.verifier is not None:
            find("rewards", config.verifier.name).check(config.verifier.options, "verifier")
        # Imported here: a recipe that cannot run is refused without waiting for torch
        import torch
        from accelerate import PartialState

        if config.cpu or not torch.cuda.is_available():
            torch.set_num_threads(config.threads)
        state = PartialState(cpu=config.cpu)
        self.config, self._cpu = config, config.cpu
        self.rank, self.world = state.process_index, state.num_processes
        self.task: Task = build("tasks", "task", config.task.name, config.task.options)
        policy = build_with({asker: protocol}, "policies", "policy", config.policy.name, config.policy.options)
        self.policy: Any = on_device(policy, config.cpu)
        self.reward = config.verifier or RewardConfig(name=_first_reward(self.task, config.task.name))
        self.verifier: OutcomeReward = build_reward(self.reward, "verifier")
        self.seed, self.batch = config.seed, config.batch
        # Prompts that the policy cannot take; the log says why.
        self.lost = 0
        # Resources that stay open until the job has ended: locks of folders, stores.
        self.files = ExitStack()
        settings = [
            config.policy.model_dump(),
            self.reward.model_dump(),
            stamp(config.policy.options.get("model", "")),
        ]
        text = json.dumps(settings, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The task's, as many as the recipe asks for and the policy can take."""
        of_split = self.task.prompts if self.config.split == "train" else self.task.eval_prompts
        prompts = list(of_split)[: self.config.prompts]
        usable: list[Prompt] = self.policy.admit(prompts)
        self.lost += len(prompts) - len(usable)
        return usable

    def rollouts(self, about: Mapping[str, Any] | None = None) -> RolloutFolder | None:
        """The folder for the recipe's trees, None where it names none. about: what else decides their contents."""
        config = self.config
        if config.rollouts is None:
            return None
        record = {
            "task": config.task.model_dump(mode="json"),
            "policy": config.policy.model_dump(mode="json"),
            "rewards": [{"name": self.reward.name, "weight": 1.0, **self.reward.options}],
            "step_rewards": [],
            "seed": config.seed,
            "processes": 1,
            "grown_by": config.method.model_dump(mode="json"),
            "made_by": self.fingerprint,
            **(about or {}),
        }
        self.files.enter_context(WorkDir(config.rollouts).owned())
        return RolloutFolder(config.rollouts, record)

    def alone(self, verb: str) -> None:
        """Raise ConfigError when several processes were started for what one does."""
        if self.world > 1:
            raise ConfigError(f"{verb} runs in one process, but {self.world} were started; leave the launcher out")

    def scorer(self, scorer: str | Mapping[str, Any]) -> StepReward:
        """A scorer, by name, folder or section, on this job's device."""
        return on_device(load_scorer(scorer), self._cpu)


def _first_reward(task: Task, name: str) -> str:
    if not isinstance(task, RewardNamer) or not task.rewards:
        raise ConfigError(f"task.name={name!r} brings no reward to verify answers with; name one in `verifier:`")
    return task.rewards[0]


def parameters(component: Any) -> int:
    """Number of weights of a component's model, 0 without one."""
    model = model_of(component)
    return 0 if model is None else sum(weight.numel() for weight in model.parameters())


def on_device(component: Any, cpu: bool = False) -> Any:
    """The component with its model on the GPU, where there is one."""
    import torch

    model = model_of(component)
    if model is not None and torch.cuda.is_available() and not cpu:
        model.to(torch.accelerator.current_accelerator())
    return component


def stamp(component: str | Mapping[str, Any]) -> str:
    """A folder or a section, with the weights in its folders by name, size and time.

    Another checkpoint under the same path has another stamp.
    """
    files: list[Path] = []
    for text in _texts(component):
        if text and Path(text).is_dir():
            files += sorted(Path(text).glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([component, *weights])


def _texts(value: Any) -> list[str]:
    """Every text in a section, inner sections included."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    return [value] if isinstance(value, str) else []

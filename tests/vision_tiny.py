"""Tiny vision-language jobs for tests, named by dotted path in recipes so that subprocesses find them too."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl.rollout import Continuation, Prompt, Rollout, Sample

sys.path.insert(0, str(Path(__file__).parent / "vision"))


class Words:
    """Eight questions; `pictures` of them show an image. The reward is the share of digits among what is written."""

    rewards = ("vision_tiny:digits",)

    def __init__(self, folder: str, pictures: int = 8, broken: int = 0) -> None:
        from families import picture

        self.prompts = []
        for i in range(8):
            file = Path(folder) / f"{i}.png"
            picture(i).save(file)
            if i < broken:
                file.write_bytes(file.read_bytes()[:60])
            images = [str(file)] if i < pictures else []
            self.prompts.append(Prompt(f"q{i}", {"question": "count " + "it " * i, "images": images}))
        self.eval_prompts = self.prompts[broken : broken + 2]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {"length": float(sum(len(s.output) for s in samples) / len(samples))}


def digits(samples: Sequence[Sample]) -> list[float | None]:
    return [sum(c.isdigit() for c in s.output) / max(len(s.output), 1) for s in samples]


def digits_or_none(samples: Sequence[Sample]) -> list[float | None]:
    """`digits`, and equal rewards for every other question."""
    return [0.5 if int(s.prompt.id[1:]) % 2 else d for s, d in zip(samples, digits(samples), strict=True)]


def step_digits(rollout: Rollout) -> torch.Tensor:
    return torch.tensor([sum(c.isdigit() for c in t) / max(len(t), 1) for t in rollout.texts])


def vision_recipe(model: Path, folder: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A small run as a config tree; `sections` update whole sections."""
    tree: dict[str, Any] = {
        "task": {"name": "vision_tiny:Words", "folder": str(folder)},
        "policy": {"name": "vision", "model": str(model), "temperature": 0.7, "max_new_tokens": 12, "max_steps": 3},
        "plan": {0: 2, 1: 2},
        "rewards": [{"name": "vision_tiny:digits", "timeout_s": 0}],
        "credit": {"estimators": [{"name": "grpo"}]},
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "optim": {"lr": 1e-3},
        "run": {"output": str(output), "iterations": 2, "prompts_per_iteration": 4, "eval_every": 2,
                "trackers": [], "report": False, "cpu": True},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) and name != "plan" else values
    return tree


def odd(samples: Sequence[Sample]) -> list[float | None]:
    """Right where an odd number of characters is written."""
    return [float(len(s.output) % 2) for s in samples]


class StepJudge:
    """A policy that reads solutions and finds every step with a digit wrong, or a minor error, and worth its length."""

    def extend(self, states: Sequence[Any], n: int, *, seed: int, steps: Any = None, temperature: Any = None) -> Any:
        return [[Continuation((self._reply(s.prompt.inputs["question"]),), ((0.0,),), True)] * n for s in states]

    def _reply(self, question: str) -> str:
        steps = re.findall(r"<paragraph_\d+>\n(.*?)\n</paragraph_\d+>", question, re.DOTALL)
        flagged = [any(c.isdigit() for c in step) for step in steps]
        if "Judge one aspect" in question:
            return f"\\boxed{{{len(steps[-1]) % 11}}}"
        bad, good = ("minor", "none") if "How bad" in question else ("incorrect", "correct")
        parts = [f"<analysis_{i}>\\boxed{{{bad if f else good}}}</analysis_{i}>" for i, f in enumerate(flagged)]
        return "\n".join([*parts, f"\\boxed{{{'incorrect' if any(flagged) else 'correct'}}}"])

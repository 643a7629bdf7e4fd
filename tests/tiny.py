"""Tiny components for tests; named by dotted path in recipes, so that subprocesses find them too."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mmrl.rollout import Prompt, Sample
from mmrl.tree import StepTree


def save_tiny_dit(folder: Path) -> Path:
    """A random DiT with 4 x 4 pictures; seconds matter in tests."""
    # a process that only wants a task or a reward of this file need not wait for it
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=1, out_channels=1, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    return folder


class TinyTask:
    """Ten classes; the reward is the mean brightness, so any trainer must raise it."""

    rewards = ("tiny:brightness",)

    def __init__(self) -> None:
        self.prompts = [Prompt(f"class-{i}", {"label": i}) for i in range(10)]
        self.eval_prompts = [Prompt(f"class-{i}/eval", {"label": i}) for i in range(10)]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        x = torch.stack([s.output for s in samples])
        return {"judge": float(x.max()), "diversity": float(x.std(0).mean())}


class LoggingTask(TinyTask):
    """Writes a line into `log` for each time its judges are asked."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._log = Path(log)

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        with self._log.open("a") as file:
            file.write(f"judges {len(samples)} samples\n")
        return super().judges(samples)


class Logging:
    """`brightness` that writes the prompt of every sample it is asked about into `log`; no number for class 3."""

    def __init__(self, log: str) -> None:
        self._log = Path(log)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        with self._log.open("a") as file:
            file.write("".join(f"{s.prompt.id}\n" for s in samples))
        return [
            None if s.prompt.id == "class-3/eval" else v for s, v in zip(samples, brightness(samples), strict=True)
        ]


class InterruptedTask(TinyTask):
    """The process is asked to stop in its first evaluation, once."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = Path(flag)

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().judges(samples)


def raising_on_one_rank(samples: Sequence[Sample]) -> list[float | None]:
    """For reports of errors: the second process alone has one."""
    return raising(samples) if os.environ["RANK"] == "1" else brightness(samples)


def brightness(samples: Sequence[Sample]) -> list[float | None]:
    return [float(s.output.mean()) for s in samples]


def constant(samples: Sequence[Sample]) -> list[float | None]:
    return [0.5 for _ in samples]


def constant_for_even(samples: Sequence[Sample]) -> list[float | None]:
    """Equal rewards inside every even class: with two ranks, one of them has nothing to learn from."""
    return [0.5 if s.prompt.inputs["label"] % 2 == 0 else float(s.output.mean()) for s in samples]


def raising(samples: Sequence[Sample]) -> list[float | None]:
    raise KeyError("answer")


def wrong_length(samples: Sequence[Sample]) -> list[float | None]:
    return [0.0]


def nan_for_first(samples: Sequence[Sample]) -> list[float | None]:
    return [float("nan"), *(float(s.output.mean()) for s in samples[1:])]


def recipe(model: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A small run as a config tree; `sections` update whole sections."""
    tree: dict[str, Any] = {
        "task": {"name": "tiny:TinyTask"},
        "policy": {"name": "diffusion", "model": str(model), "steps": 6},
        "plan": {0: 2, 2: 2},
        "rewards": [{"name": "tiny:brightness", "timeout_s": 0}],  # a worker process would start anew for every run
        "loss": {"kl": 0.1},
        "optim": {"lr": 1e-2},
        "run": {"output": str(output), "iterations": 4, "prompts_per_iteration": 4, "eval_every": 2,
                "trackers": [], "report": False, "cpu": True},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) and name != "plan" else values
    return tree


def write_recipe(file: Path, tree: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(tree))
    return file


def random_forest(seed: int, groups: int = 3, steps: int = 40, unfinished: float = 0.2) -> StepTree:
    """Ragged trees with unfinished leaves, ties among outcomes and random extras. The last step starts a second chain,
    so that every estimator has something to compare."""
    g = torch.Generator().manual_seed(seed)
    group = torch.cat([torch.arange(groups), torch.randint(groups, (max(steps - groups, 0),), generator=g)])
    parent, last = [], [[] for _ in range(groups)]
    for i, k in enumerate(group.tolist()):
        above = last[k]
        pick = int(torch.randint(-1, len(above), (1,), generator=g)) if above else -1
        parent.append(above[pick] if pick >= 0 else -1)
        above.append(i)
    parent[-1] = -1 if steps > groups else parent[-1]
    parent_t = torch.tensor(parent)
    n = len(parent)
    has_child = torch.zeros(n, dtype=torch.bool)
    has_child[parent_t[parent_t >= 0]] = True
    status = torch.where(has_child, 0, torch.where(torch.rand(n, generator=g) < unfinished, 2, 1))
    outcome = torch.where(status == 1, torch.randint(0, 5, (n,), generator=g) / 4.0, torch.nan)
    return StepTree(
        parent_t, group, status, outcome,
        step_reward=torch.rand(n, generator=g), value=torch.rand(n, generator=g), logp=-torch.rand(n, generator=g),
        root_value=torch.rand(groups, generator=g), ok=torch.rand(n, generator=g) < 0.7,
        state_key=torch.randint(-1, 4, (n,), generator=g), edge_key=torch.randint(-1, 6, (n,), generator=g),
        tags={
            "wrong": torch.rand(n, generator=g) < 0.4, "implicit": torch.randn(n, generator=g),
            "similarity": torch.rand((n, 3), generator=g), "documents": torch.rand((n, 4), generator=g) < 0.5,
            "contribution": torch.rand(n, generator=g), "grounded": torch.rand(n, generator=g) < 0.5,
            "severity": torch.randint(4, (n,), generator=g), "events": torch.rand((n, 3), generator=g) < 0.4,
            "auxiliary": torch.rand(n, generator=g), "aspect": torch.randn(n, generator=g),
            "baseline": torch.rand((n, 5), generator=g), "set_id": torch.randint(4, (n,), generator=g),
        },
    )  # fmt: skip


def lone_chain(step_reward: list[float], outcome: float = 1.0, **more: Any) -> StepTree:
    """One rollout of one prompt."""
    k = len(step_reward)
    return StepTree(
        [i - 1 for i in range(k)], [0] * k, [0] * (k - 1) + [1], [torch.nan] * (k - 1) + [outcome],
        step_reward=step_reward, **more,
    )  # fmt: skip


def random_chains(seed: int, groups: int = 3, chains: int = 4) -> StepTree:
    """The paths of a random forest as independent rollouts, at least `chains` per prompt where it has them."""
    tree = random_forest(seed, groups=groups, steps=groups * chains * 3, unfinished=0.1)
    return flatten(tree)[0]


def flatten(tree: StepTree) -> tuple[StepTree, torch.Tensor]:
    """Every finished leaf's path as a chain of its own; returns it with the original step of each copy."""
    parent, group, status, outcome, source = [], [], [], [], []
    for leaf in tree.is_finished.nonzero().flatten().tolist():
        path = [leaf]
        while int(tree.parent[path[-1]]) >= 0:
            path.append(int(tree.parent[path[-1]]))
        for k, node in enumerate(reversed(path)):
            parent.append(len(parent) - 1 if k else -1)
            group.append(int(tree.group[node]))
            status.append(1 if node == leaf else 0)
            outcome.append(float(tree.outcome[node]))
            source.append(node)
    index = torch.tensor(source)
    groups, dense = torch.unique(torch.tensor(group), return_inverse=True)
    span = tree.span[index]
    chains = StepTree(
        parent, dense, status, outcome, step_reward=tree.step_reward[index], value=tree.value[index],
        logp=tree.logp[index], root_value=tree.root_value[groups], state_key=tree.state_key[index],
        edge_key=tree.edge_key[index], tok_start=span.cumsum(0) - span, tok_end=span.cumsum(0),
        ok=None if tree.ok is None else tree.ok[index], tags={k: v[index] for k, v in tree.tags.items()},
    )  # fmt: skip
    return chains, index

"""Task `digits_pairs`: samples of the digits base, ranked by the digits reward, as data for a latent reward.

Made once from the base's own samples (no decoding later, no reward calls) and kept in the user's cache folder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.adapters.base import Level
from diffusion.adapters.dit import DiTAdapter
from diffusion.digits_base import DigitsBase, digits_base
from diffusion.latent.data import labelled_pairs, noised, pair_accuracy, ranked_pairs
from diffusion.latent.reward import Space
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig
from diffusion.tasks.digits import LegibleSymmetric
from mmrl.cache import cache_root, made_once
from mmrl.rollout import Prompt, Rollout, Sample
from mmrl.scorers.labelled import Labelled
from mmrl.seeding import named_generator

log = logging.getLogger(__name__)

VERSION = 1  # raise when the code below changes what it makes


class DigitsPairs:
    """Sets of samples of one class, all pairs of a set ranked by the reward.

    A training set is noised anew, at a random level, every time it is seen; levels and noise come from torch's default
    generator, which checkpoints keep. An evaluation set is seen at one level, always with the same noise.

    Args:
        sets_per_class, set_size: of training; a set of n samples is scored once and gives n (n - 1) / 2 pairs.
        eval_pairs_per_class: of evaluation, of samples that no training pair holds. eval_sigmas: noise levels at which
            every one of them is seen.
        margin: least difference of rewards of a training pair.
        noise: the samples of a set share one noise (only their contents differ), or have each its own, as in LRM.
    """

    def __init__(
        self,
        sets_per_class: int = 50,
        set_size: int = 8,
        eval_pairs_per_class: int = 100,
        eval_sigmas: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9),
        margin: float = 0.0,
        noise: Literal["shared", "own"] = "shared",
        base: DigitsBase | None = None,
    ) -> None:
        if set_size < 2:
            raise ValueError(f"task.set_size={set_size}: a pair needs two samples")
        base = base or _base()
        self.margin, self.noise, self._reward = margin, noise, LegibleSymmetric(base)
        adapter = DiTAdapter.from_pretrained(base.folder)
        self._levels = Space(adapter.shape, dict(adapter.scheduler.config)).grid(20)
        self._sets = digits_samples(base, "train", sets_per_class, set_size)
        self._eval_sets = digits_samples(base, "eval", eval_pairs_per_class, 2)
        self._sigmas = tuple(eval_sigmas)
        self.prompts = [
            Prompt(f"digit-{d}/{k}", {"label": d, "set": k}) for d in range(10) for k in range(sets_per_class)
        ]
        self.eval_prompts = [
            Prompt(f"digit-{d}/{k}/s{s}", {"label": d, "set": k, "sigma": s})
            for s in self._sigmas for d in range(10) for k in range(eval_pairs_per_class)
        ]  # fmt: skip

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """All ranked pairs of these sets, noised alike."""
        fixed = "sigma" in prompts[0].inputs
        x, reward = self._eval_sets if fixed else self._sets
        at = [(p.inputs["label"], p.inputs["set"]) for p in prompts]
        own = torch.arange(len(prompts)).repeat_interleave(x.shape[2])
        levels = [self._level(p) for p in prompts]
        values = torch.cat([reward[a] for a in at])
        cond = {"label": torch.tensor([d for d, _ in at])}
        noise = torch.cat([self._noise(p, x.shape[2:]) for p in prompts])
        rollout = noised(prompts, torch.cat([x[a] for a in at]), own, levels, noise, cond)
        return labelled_pairs(rollout, ranked_pairs(values, own, margin=0.0 if fixed else self.margin))

    def _level(self, prompt: Prompt) -> Level:
        if "sigma" in prompt.inputs:
            s = prompt.inputs["sigma"]
            return Level(1 - s, s, s * 1000)
        return self._levels[int(torch.randint(len(self._levels), ()))]

    def _noise(self, prompt: Prompt, shape: torch.Size) -> Tensor:
        """(n, *D) for the n samples of a set, drawn once or n times."""
        generator = named_generator("pairs", prompt.id) if "sigma" in prompt.inputs else None
        if self.noise == "own":
            return torch.randn(shape, generator=generator)
        return torch.randn(shape[1:], generator=generator).expand(shape)

    def measures(self, data: Labelled, score: Tensor) -> dict[str, float]:
        """Pair accuracy by noise level, and that of the digits reward applied to the noisy picture."""
        pixel = pair_accuracy(data, self.pixel_scores(data.rollout)[data.node])
        return pair_accuracy(data, score) | {f"pixel_{k}": v for k, v in pixel.items()}

    def pixel_scores(self, rollout: Rollout) -> Tensor:
        """(N,) float64 digits reward of the latents taken as pictures, noise and all."""
        pictures = rollout.actions.payload["latent"] / 2 + 0.5
        owner = rollout.tree.group.tolist()
        return _rewards(self._reward, [Sample(rollout.prompts[g], p, 0) for g, p in zip(owner, pictures, strict=True)])


def digits_samples(base: DigitsBase, split: str, sets_per_class: int, size: int) -> tuple[Tensor, Tensor]:
    """Samples (10, sets, size, 1, 8, 8) in [-1, 1] of the base by class, and their rewards (10, sets, size).

    Made once per base, split and number: 4 to 7 ms of one core each.
    """
    count = sets_per_class * size
    folder = made_once(
        cache_root() / f"{base.folder.name}-{split}-{count}-v{VERSION}", partial(_make, base, split, count)
    )
    data = load_file(folder / "samples.safetensors")
    shape = (10, sets_per_class, size)
    return data["x"].reshape(*shape, *data["x"].shape[1:]), data["reward"].reshape(shape)


def _make(base: DigitsBase, split: str, per_class: int, work: Path) -> None:
    log.info("drawing %d samples of the digits base (once)", 10 * per_class)
    policy = DiffusionPolicy(DiTAdapter.from_pretrained(base.folder), SamplingConfig())
    prompts = [Prompt(f"{split}/digit-{d}/{k}", {"label": d}) for d in range(10) for k in range(per_class)]
    samples = policy.generate(prompts, seed=0)
    x = torch.stack([s.output for s in samples]) * 2 - 1
    save_file({"x": x, "reward": _rewards(LegibleSymmetric(base), samples)}, work / "samples.safetensors")


def _rewards(reward: LegibleSymmetric, samples: Sequence[Sample]) -> Tensor:
    return torch.tensor(reward(samples), dtype=torch.float64)


_base = lru_cache(maxsize=1)(digits_base)

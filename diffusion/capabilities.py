"""Capabilities of denoising policies and of what scores latents, as protocols with names (see `mmrl.capabilities`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from diffusion.adapters.base import Adapter, Cond, Level
from diffusion.schedule import SamplingConfig
from mmrl.rollout import Prompt, Rollout, Sample

# (latents (N, *D), their noise level, conditions, prompt of each (N,)) -> (N,) scores, such as LatentScorer.score
ScoreLatents = Callable[[Tensor, Level, Cond, Tensor], Tensor]


@runtime_checkable
class NoisePredictor(Protocol):
    """A policy whose network can be asked about latents at any noise level; losses on whole samples need it."""

    adapter: Adapter
    max_batch: int  # latents per call

    def levels(self) -> list[Level]:
        """The noise levels at which the sampler calls the network, the noisiest first."""

    def predict_at(
        self, rollout: Rollout, x: Tensor, level: Level, own: Tensor, *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps), each (N, *D) float32, of latents `x` at one level; own: (N,) prompt of each.

        Differentiable where gradients are on; with `reference`, by the initial model, without gradient.
        """


@runtime_checkable
class CandidateSampler(Protocol):
    """A policy that lets a function choose between the candidates of its noisy steps; a search needs it."""

    sampling: SamplingConfig

    def sample_best(self, prompts: Sequence[Prompt], *, k: int, score: ScoreLatents, seed: int) -> Rollout:
        """One sample per prompt; at every noisy step the best of k candidates goes on. k = 1 asks for no score."""

    def samples(self, rollout: Rollout) -> list[Sample]:
        """The decoded leaves, in node order."""


@runtime_checkable
class LatentScorer(Protocol):
    """A scorer of latents at any noise level; it chooses between candidates of a denoising step."""

    def score(self, x: Tensor, level: Level, cond: Cond, own: Tensor) -> Tensor:
        """(N,) higher is better, of latents x (N, *D); cond: conditions by prompt, own: (N,) prompt of each."""

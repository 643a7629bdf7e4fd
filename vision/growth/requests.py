"""Requests to a generation engine: encoded prompts go in, trees of sampled steps come out.

    request = GrowthRequest([prompt], BranchPlan({0: 2}), SamplingOptions(1.0, 64, 8, eos=(2,)), rule, seeds=[0])
    nodes = grow(TransformersEngine(hf), request)  # two answers, a node for each of their steps

`GrowthRequest` is for a whole tree; the driver cuts it into `SampleRequest`s, each for samples from one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mmrl.rollout import BranchPlan
from vision.inputs.step_rule import StepRule
from vision.inputs.tokens import PromptTokens


@dataclass(frozen=True)
class SamplingOptions:
    """The distribution of sampled tokens and where a completion ends. temperature 0 is greedy; above 0 it divides the
    logits, in the update as well.

    banned: ids that may never be sampled (image placeholders). eos: ids that end a completion.
    max_steps: depth from which a completion is no longer cut into steps. stop_after: steps after which a path is
        left open, None = every path goes on to its end.
    """

    temperature: float
    max_new_tokens: int
    max_steps: int
    banned: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    stop_after: int | None = None


@dataclass
class Node:
    """One sampled step.

    prompt: index into the prompts. parent: index into the list of nodes, -1 = the prompt.
    logp: of each token under the sampling distribution, banned ids removed.
    end: why it stopped; only a node that ended as a step has children.
    observed: tokens of the observation that follows it.
    """

    prompt: int
    parent: int
    depth: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    end: Literal["open", "step", "eos", "length"] = "open"
    observed: int = 0


# From the turns of a conversation, each its ids, to the observation after the last one; None ends the conversation.
Responder = Callable[[Sequence[Sequence[int]]], PromptTokens | None]


@dataclass(frozen=True)
class Start:
    """Where a tree begins: before the first step of a prompt, or behind steps that were written earlier.

    depth: of the first nodes. slot: number of its first leaf. sampled: tokens written before. state: the engine's
    state behind them; None = only the prompt comes before.
    """

    prompt: int
    depth: int = 0
    slot: int = 0
    sampled: int = 0
    state: Any = None


@dataclass(frozen=True)
class GrowthRequest:
    """Trees of steps to sample.

    plan: a step at depth d that ends as a step gets plan.factor(d + 1) children. rule: where a step ends.
    seeds: one per prompt; a prompt's samples depend on its own alone.
    responders: one per prompt where an environment answers. A step then is a turn of at most `max_new_tokens` that
        ends with an end mark, `rule` is not asked, and a conversation has at most `max_steps` turns.
    starts: by default one before the first step of every prompt.
    """

    prompts: Sequence[PromptTokens]
    plan: BranchPlan
    sampling: SamplingOptions
    rule: StepRule
    seeds: Sequence[int]
    responders: Sequence[Responder] = ()
    starts: Sequence[Start] | None = None

    def part(self, start: int, end: int) -> GrowthRequest:
        """The request of prompts `start` to `end`, whose trees begin before their first steps."""
        part = slice(start, end)
        return replace(self, prompts=self.prompts[part], seeds=self.seeds[part], responders=self.responders[part])


# ---- engines ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SampleRequest:
    """Samples that begin, or go on, at one place of a tree: as many as `slots`.

    slots: the number of each sample's first leaf; a sample depends on its prompt's seed, its slot and `sampled`.
    sampled: tokens of the path so far. room: most tokens. state: of an earlier sample, a start, or None = the prompt.
    observation: tokens between the state and the next sampled one. step_by_step: a sample may not go on behind the
    end of its step.
    """

    prompt: int
    slots: Sequence[int]
    sampled: int
    room: int
    state: Any
    observation: PromptTokens | None = None
    step_by_step: bool = True


@dataclass(slots=True)
class TokenSample:
    """Sampled tokens, float32 log-probs under the sampling distribution (temperature, banned ids), and the state of
    the engine behind them. entropy: of the distribution of a single token, for rules that ask for it."""

    ids: list[int]
    logp: list[float]
    state: Any
    entropy: float = float("nan")


class Session(Protocol):
    """An engine at work on one request. whole_steps: a sample has a step or more, else it is a single token."""

    whole_steps: bool

    def generate(self, requests: Sequence[SampleRequest], *, again: bool = False) -> list[list[TokenSample]]:
        """The samples of every request, at least one token each; they may end before their step does, and go on in
        another request.

        States hold until the next call. again: draw from the states before the last tokens, which are given up.
        """

    def keep(self, state: Any) -> Any:
        """The state of a sample, made to hold longer."""


class Engine(Protocol):
    """Samples tokens."""

    def open(self, request: GrowthRequest) -> Session:
        """Begin work on a request that has prompts.

        Raises:
            ValueError: a request that the engine cannot sample.
        """

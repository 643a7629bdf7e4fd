"""A rollout and its parts, and the protocols of the components that make it, reward it and learn from it.

    plan = BranchPlan({0: 8})                    # a group of eight samples per prompt
    rollout = policy.rollout(prompts, plan, seed=0)
    rewards = outcome_reward(policy.samples(rollout))

Shapes: N steps, G prompts, T actions (tokens or noise draws) of the rollout; S steps and A actions chosen from it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl.sample import Prompt, Sample
from mmrl.tree import StepTree


@dataclass(frozen=True)
class Forecast:
    """The cost of a plan, per prompt, computed before anything runs.

    leaves: finished samples.
    steps: nodes of the tree, that is unique transitions.
    calls: network calls, one per unique state that is expanded; siblings share their parent's.
    trained_states: unique states whose step has a density and enters the update.
    independent_calls: network calls for as many leaves from independent rollouts.
    """

    leaves: int
    steps: int
    calls: int
    trained_states: int
    independent_calls: int

    def __str__(self) -> str:
        saved = 1 - self.calls / self.independent_calls
        return (
            f"{self.leaves} leaves, {self.steps} steps, {self.calls} network calls ({saved:.1%} fewer than "
            f"independent), {self.trained_states} trained states per prompt"
        )


@dataclass(frozen=True)
class BranchPlan:
    """How many children a live step gets at each depth; depths that are not named get one.

    `{0: 8}` is GRPO with a group of 8; `{0: 2, 3: 2, 6: 2, 9: 2}` is BranchGRPO with 16 leaves. The same object
    serves every modality: depth is a denoising step, a reasoning step or a turn.

    Raises:
        ValueError: a negative depth, a factor below 1, more leaves than `max_leaves`.
    """

    factors: Mapping[int, int]
    max_leaves: int = 1024

    def __post_init__(self) -> None:
        for depth, factor in self.factors.items():
            if depth < 0:
                raise ValueError(f"plan: depth {depth} is negative; depths count from 0, the first step")
            if factor < 1:
                raise ValueError(f"plan: depth {depth} has factor {factor}; a live step needs at least 1 child")
        if self.leaves > self.max_leaves:
            raise ValueError(
                f"plan {dict(self.factors)} makes {self.leaves} leaves per prompt, more than {self.max_leaves}; "
                "drop a split or lower a factor"
            )

    @property
    def leaves(self) -> int:
        """Leaves per prompt."""
        return math.prod(self.factors.values())

    @property
    def splits(self) -> list[int]:
        """Depths at which a step gets more than one child, ascending."""
        return sorted(depth for depth, factor in self.factors.items() if factor > 1)

    def factor(self, depth: int) -> int:
        """Children of a live step at `depth`."""
        return self.factors.get(depth, 1)

    def width(self, depth: int) -> int:
        """Live states before the step at `depth`."""
        return math.prod(factor for at, factor in self.factors.items() if at < depth)

    def check(self, num_steps: int) -> None:
        """Raises ValueError when a depth lies beyond the last of `num_steps` steps."""
        beyond = [depth for depth in self.factors if depth >= num_steps]
        if beyond:
            raise ValueError(
                f"plan: depth {beyond[0]} lies beyond the last step; {num_steps} steps have depths 0..{num_steps - 1}"
            )

    def forecast(
        self, num_steps: int, *, trained_depths: Sequence[int] | None = None, full_steps: int | None = None
    ) -> Forecast:
        """Exact cost of one prompt over `num_steps` steps.

        calls = sum over steps i of width(i), steps = sum of width(i + 1), trained states = sum of width(i) over
        `trained_depths` (default all). `full_steps` is what an independent rollout would take.
        """
        self.check(num_steps)
        # width(i) states are expanded at depth i, and width(i + 1) steps come out.
        widths = [self.width(depth) for depth in range(num_steps + 1)]
        trained = range(num_steps) if trained_depths is None else trained_depths
        return Forecast(
            self.leaves,
            steps=sum(widths[1:]),
            calls=sum(widths[:-1]),
            trained_states=sum(widths[depth] for depth in trained),
            independent_calls=self.leaves * (full_steps or num_steps),
        )


@dataclass(frozen=True)
class Actions:
    """T actions: sampled tokens, or the noise of denoising transitions. A step owns the run `tok_start:tok_end`.

    logp: (T,) float32, log-probability under the behaviour policy, NaN where there is no density (an ODE step).
    trainable: (T,) bool, enters the loss. Implies a finite `logp`.
    payload: name -> (T, ...), tensors from which the policy recomputes `logp` (token ids, latents).
    """

    logp: Tensor
    trainable: Tensor
    payload: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = self.trainable & ~self.logp.isfinite()
        if bool(bad.any()):
            raise ValueError(f"action {int(bad.nonzero()[0])} is trainable but its logp is not finite")


# Ends the name of the lengths of a payload whose prompts differ in length; see `Rollout.prompt_payload`.
LENGTH = ".length"


@dataclass(frozen=True)
class Rollout:
    """One forest with everything needed to reward, replay and train on it.

    prompts: G prompts with distinct ids. tree: N steps. actions: T actions.
    texts: (N,) the text of each step, for policies that write; empty for others.
    prompt_payload: name -> (G, ...), tensors that the policy needs once per prompt (initial latent, prompt tokens).
        Where an entry's prompts differ in length, its rows end in zeros and NAME.length (G,) holds the real lengths.
    counts: cost of the rollout, summed over prompts: `calls` (network rows), `leaves`.
    about: JSON values that identify how it was made (seed, iteration, schedule, log-prob reduction).
    """

    prompts: Sequence[Prompt]
    tree: StepTree
    actions: Actions
    prompt_payload: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if len(self.texts) not in (0, len(self.tree)):
            raise ValueError(f"{len(self.texts)} texts for {len(self.tree)} steps; give one per step, or none")
        if self.tree.num_groups != len(self.prompts):
            raise ValueError(f"the tree has {self.tree.num_groups} groups for {len(self.prompts)} prompts")
        # Raises when a step owns actions that do not exist.
        self.tree.step_of_action(self.actions.logp.numel())

    def fields(self) -> list[str]:
        """Names of the fields that are filled somewhere, as `mmrl.registry` spells them."""
        tree = self.tree
        floats = ("outcome", "step_reward", "value", "root_value", "logp")
        names = [name for name in floats if not bool(getattr(tree, name).isnan().all())]
        names += [name for name in ("state_key", "edge_key") if bool((getattr(tree, name) >= 0).any())]
        if tree.ok is not None:
            names.append("ok")
        if self.texts:
            names.append("texts")
        names += [f"tags.{name}" for name in tree.tags]
        names += [f"actions.{name}" for name in self.actions.payload]
        return names

    def with_tree(self, tree: StepTree) -> Rollout:
        """The same rollout with rewards or values written into its tree."""
        return replace(self, tree=tree)

    def select(self, prompts: Sequence[int]) -> Rollout:
        """The rollout of some prompts, by their ascending positions; counts are dropped, they belong to the whole."""
        keep = torch.isin(self.tree.group, torch.tensor(list(prompts)))
        kept_steps = keep.nonzero().flatten()
        actions = self.tree.actions_of(kept_steps)
        payload = {name: tensor[actions] for name, tensor in self.actions.payload.items()}
        return Rollout(
            [self.prompts[i] for i in prompts],
            self.tree.select(keep),
            Actions(self.actions.logp[actions], self.actions.trainable[actions], payload),
            {name: tensor[list(prompts)] for name, tensor in self.prompt_payload.items()},
            about=self.about,
            texts=[self.texts[step] for step in kept_steps.tolist()] if self.texts else [],
        )

    @staticmethod
    def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
        """One rollout of all prompts; `about` is the first one's, counts are summed.

        Raises:
            ValueError: a prompt id occurs twice, or the payloads differ in kind.
        """
        first = rollouts[0]
        if any(set(r.actions.payload) != set(first.actions.payload) for r in rollouts):
            raise ValueError("rollouts to concatenate must carry the same payload")
        prompts: list[Prompt] = []
        texts: list[str] = []
        counts: Counter[str] = Counter()
        for rollout in rollouts:
            prompts.extend(rollout.prompts)
            texts.extend(rollout.texts)
            counts.update(rollout.counts)
        payload = {name: torch.cat([r.actions.payload[name] for r in rollouts]) for name in first.actions.payload}
        prompt_payloads = [r.prompt_payload for r in rollouts]
        prompt_payload = {name: _of_all_prompts(name, prompt_payloads) for name in first.prompt_payload}
        return Rollout(
            prompts,
            StepTree.concatenate([r.tree for r in rollouts]),
            Actions(
                torch.cat([r.actions.logp for r in rollouts]),
                torch.cat([r.actions.trainable for r in rollouts]),
                payload,
            ),
            prompt_payload,
            dict(counts),
            first.about,
            texts,
        )

    def save(self, folder: str | Path) -> Path:
        """Write tree, actions and prompts as safetensors and JSON; returns the folder."""
        folder = Path(folder)
        self.tree.save(folder)
        tensors = {"logp": self.actions.logp, "trainable": self.actions.trainable}
        tensors |= {f"action.{name}": tensor for name, tensor in self.actions.payload.items()}
        tensors |= {f"prompt.{name}": tensor for name, tensor in self.prompt_payload.items()}
        # safetensors refuses two tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "actions.safetensors")
        prompts = [{"id": p.id, "inputs": dict(p.inputs), "reference": p.reference} for p in self.prompts]
        record = {
            "format": 1,
            "prompts": prompts,
            "counts": dict(self.counts),
            "about": dict(self.about),
            "texts": list(self.texts),
        }
        (folder / "rollout.json").write_text(json.dumps(record, indent=1) + "\n")
        return folder

    @staticmethod
    def load(folder: str | Path) -> Rollout:
        """Read what `save` wrote.

        Raises:
            ValueError: no rollout there, or a cut file.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "rollout.json").read_text())
            tensors = load_file(folder / "actions.safetensors")
        except Exception as error:
            raise ValueError(f"{folder} holds no readable rollout ({error}); write it with rollout.save()") from error
        # Names of payload tensors are `action.NAME` and `prompt.NAME`; `logp` and `trainable` have no dot.
        payloads: dict[str, dict[str, Tensor]] = {"action": {}, "prompt": {}}
        for full_name, tensor in tensors.items():
            owner, _, name = full_name.partition(".")
            if name:
                payloads[owner][name] = tensor
        return Rollout(
            [Prompt(**fields) for fields in record["prompts"]],
            StepTree.load(folder),
            Actions(tensors["logp"], tensors["trainable"], payloads["action"]),
            payloads["prompt"],
            record["counts"],
            record["about"],
            record.get("texts", []),
        )


@dataclass(frozen=True)
class ActionLogProbs:
    """Recomputed densities of some actions of a rollout, all (A,) float32, differentiable where marked.

    index: (A,) int, positions in the rollout's actions.
    logp: log-probability under the current policy (differentiable).
    kl: exact divergence from the reference per action (differentiable), when the policy knows a closed form.
    ref_logp: log-probability under the reference.
    entropy: entropy of the action distribution, to look at; without gradient where the policy gives it of tokens.
    extra: name -> (A,) float32, further numbers that this policy gives of an action; a row of `loss_rules` names
        those that it needs.
    """

    index: Tensor
    logp: Tensor
    kl: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A prompt and the steps written so far.

    steps: texts with their separators, so that `"".join(steps)` is the whole text.
    done: the answer has ended.
    ids: per step its token ids as sampled, () = unknown. A policy continues from them rather than from the text, since
        other ids may spell the same text.
    path: per step its node in a `mmrl.growth.GrowingTree`, () = the state is in no tree.
    """

    prompt: Prompt
    steps: tuple[str, ...] = ()
    done: bool = False
    ids: tuple[tuple[int, ...], ...] = ()
    path: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """All that has been written."""
        return "".join(self.steps)

    def then(self, new: Continuation) -> State:
        """The state after a continuation, in no tree."""
        all_ids_known = len(self.ids) == len(self.steps) and len(new.ids) == len(new.steps)
        ids = self.ids + new.ids if all_ids_known else ()
        return State(self.prompt, self.steps + new.steps, new.done, ids)

    def upto(self, steps: int) -> State:
        """The state after the first `steps` steps."""
        return State(self.prompt, self.steps[:steps], False, self.ids[:steps], self.path[:steps])


@dataclass(frozen=True)
class Continuation:
    """The steps that a policy wrote after a state.

    steps: texts of the new steps, separators included.
    logps: per step, the log-prob of each of its tokens as sampled.
    done: the answer has ended, by itself or (truncated) at its longest length.
    ids: per step, its token ids; () = unknown.
    """

    steps: tuple[str, ...]
    logps: tuple[tuple[float, ...], ...]
    done: bool
    truncated: bool = False
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens sampled."""
        return sum(map(len, self.logps))


class Place(NamedTuple):
    """A state of a rollout: after step `step` of prompt `prompt`, or before the first step where it is -1."""

    prompt: int
    step: int = -1


class Answer(NamedTuple):
    """A right answer as a policy would write it: the words before it, such as "answer ", and the answer itself."""

    lead: str
    text: str


# The media of a prompt when a rollout is evaluated again: as they are, blanked out, or in a shuffled order.
Sight = Literal["given", "blank", "shuffled"]


@runtime_checkable
class Policy(Protocol):
    """A policy as every trainer needs it.

    It owns batching, since only it knows what a prefix costs.
    """

    # The module that is optimised; the loop replaces it by its wrapped form (DDP, FSDP).
    model: torch.nn.Module

    def forecast(self, plan: BranchPlan) -> Forecast:
        """Cost of one prompt under `plan`; raises ValueError when the plan does not fit this policy."""

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts it can take; the others (broken image, too long) are logged with their reason and left out."""

    def rollout(self, prompts: Sequence[Prompt], plan: BranchPlan, *, seed: int, iteration: int = 0) -> Rollout:
        """Sample a forest, every prefix computed once. Depends on (seed, iteration, prompt id) alone."""

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Split `steps` (S,) into parts that fit in memory; steps that share a forward stay together."""

    def log_probs(self, rollout: Rollout, steps: Tensor, *, reference: bool = False) -> ActionLogProbs:
        """Differentiable densities of the trainable actions of `steps`; with `reference`, also kl or ref_logp."""

    def samples(self, rollout: Rollout) -> list[Sample]:
        """The decoded leaves, in node order."""

    def generate(self, prompts: Sequence[Prompt], *, seed: int) -> list[Sample]:
        """One sample per prompt for evaluation, without exploration noise; depends on (seed, prompt id) alone."""

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """A picture or a text of each step, for people to look at."""

    def freeze_reference(self) -> None:
        """Remember the current weights as the reference of the KL; called once, before training."""

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model in its ecosystem's own format; with the weights of `state_dict` where they are sharded."""


class OutcomeReward(Protocol):
    """Samples -> one number per sample, None where it cannot be scored."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float | None]: ...


class StepReward(Protocol):
    """Rollout -> (N,) one number per step, NaN where it has no opinion."""

    def __call__(self, rollout: Rollout) -> Tensor: ...


@runtime_checkable
class StepScorer(StepReward, Protocol):
    """A trainable step reward. Called, it gives (N,) probabilities that a step is good, without gradient."""

    # The module that is optimised; the loop replaces it by its wrapped form (DDP, FSDP).
    model: torch.nn.Module

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts it can take; the others are logged with their reason and left out."""

    def readable(self, rollout: Rollout) -> Tensor:
        """(N,) bool, the steps that can have a score."""

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Split `steps` (S,) into parts that fit in memory; steps that share a forward stay together."""

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, C) float32, differentiable, one row per step in the order of `steps`. C = 1: the logit of "good"."""

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model and the record of how it reads steps; `mmrl.scorers.scoring.load_scorer` reads it."""


def padded_rows(rows: Sequence[Tensor]) -> Tensor:
    """(B, L, ...) of rows (L_i, ...), zeros behind the shorter ones."""
    longest = max(len(row) for row in rows)
    padded = rows[0].new_zeros((len(rows), longest, *rows[0].shape[1:]))
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _of_all_prompts(name: str, payloads: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The entry `name` of all prompts of several rollouts; padded to one length where an entry has lengths."""
    parts = [payload[name] for payload in payloads]
    if name + LENGTH not in payloads[0]:
        return torch.cat(parts)
    return padded_rows([row for part in parts for row in part])


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError when two prompts share an id: their samples would be normalised as one group."""
    ids: set[str] = set()
    for i, prompt in enumerate(prompts):
        if prompt.id in ids:
            raise ValueError(f"prompt {i}: id {prompt.id!r} occurs twice; ids name groups, make them unique")
        ids.add(prompt.id)


def reference_solution(prompt: Prompt) -> str | None:
    """The written solution that a prompt brings: `reference["solution"]`, or the lines of `reference["steps"]`."""
    reference = prompt.reference if isinstance(prompt.reference, Mapping) else {}
    if isinstance(reference.get("solution"), str):
        return str(reference["solution"])
    steps = reference.get("steps")
    if isinstance(steps, list) and steps:
        return "\n".join(map(str, steps))
    return None

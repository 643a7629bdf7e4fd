"""Completions of rollouts from their states: their trees are run once, and every completion forks the caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mmrl.rollout import BranchPlan, Place, Rollout, Sample
from vision.forward.attention import FLEX
from vision.forward.backbone import Backbone
from vision.forward.kv import check_cache, cut
from vision.forward.network import run_trees
from vision.forward.packing import ancestors, leaf_rows
from vision.forward.passes import build_reading
from vision.growth.dialogue import Dialogue, path_ids
from vision.growth.driver import grow
from vision.growth.engine_hf import State, TransformersEngine
from vision.growth.engine_sync import SyncedEngine
from vision.growth.engine_vllm import History
from vision.growth.requests import GrowthRequest, Node, SamplingOptions, Start
from vision.growth.rollout_trees import RolloutTrees, open_places, place_batches
from vision.inputs.step_rule import StepRule
from vision.inputs.tokens import PromptTokens


class Completions:
    """Completes rollouts, by a transformers model or an engine that has its weights.

    Args:
        body: the model and its encoder. trees: lays rollouts out. dialogue: gives the answers between steps, if any.
        rule: where a step ends.
    """

    def __init__(self, body: Backbone, trees: RolloutTrees, dialogue: Dialogue, rule: StepRule) -> None:
        self._body, self._trees, self._dialogue, self._rule = body, trees, dialogue, rule

    def run(
        self,
        hf: Any,
        rollout: Rollout,
        places: Sequence[Place],
        n: int,
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """n completions of each place by a transformers model; none of an end."""
        options = self._body.options
        completions: list[list[Sample]] = [[] for _ in places]
        open_positions = open_places(rollout, places)
        chosen = [places[position] for position in open_positions]
        for part in place_batches(rollout, chosen, options.max_tokens, most=max(1, options.max_batch // n)):
            positions = [open_positions[index] for index in part]
            own = [places[position] for position in positions]
            request = self._request(rollout, own, n, sampling, [seeds[position] for position in positions])
            request = self._behind_states(hf, rollout, own, request)
            nodes = grow(TransformersEngine(hf, self._body.features), request)
            for index, sample in self._samples(rollout, own, nodes):
                completions[positions[index]].append(sample)
        return completions

    def by_engine(
        self,
        engine: SyncedEngine,
        hf: Any,
        rollout: Rollout,
        places: Sequence[Place],
        n: int,
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """As `run`, by an engine with the weights of `hf`; what leads to a place lies in its prefix cache."""
        completions: list[list[Sample]] = [[] for _ in places]
        positions = open_places(rollout, places)
        chosen = [places[position] for position in positions]
        request = self._request(rollout, chosen, n, sampling, [seeds[position] for position in positions])
        in_turns = bool(request.responders)
        histories = []
        for place, prompt in zip(chosen, request.prompts, strict=True):
            histories.append(self._history(rollout, place, prompt, in_turns))
        starts = []
        for start in request.starts or ():
            sampled = start.sampled if in_turns else 0
            starts.append(replace(start, state=histories[start.prompt], sampled=sampled))
        nodes = engine.grow(hf, replace(request, starts=starts))
        if not in_turns:
            # As if sampling had stopped where the room of the whole completion ends.
            for node in nodes:
                written = len(path_ids(rollout, chosen[node.prompt].step))
                node.ids = node.ids[: max(1, sampling.max_new_tokens - written)]
        for index, sample in self._samples(rollout, chosen, nodes):
            completions[positions[index]].append(sample)
        return completions

    # Below, a node's `prompt` is the position of its place, and paths begin behind the place.

    def _request(
        self, rollout: Rollout, places: Sequence[Place], n: int, sampling: SamplingOptions, seeds: Sequence[int]
    ) -> GrowthRequest:
        """n completions of each place, whose starts have no states yet."""
        prompts = [rollout.prompts[p.prompt] for p in places]
        tokens = [self._body.encode(p) for p in prompts]
        before = [self._dialogue.turns(rollout, p.step) for p in places]
        responders = self._dialogue.responders(prompts, tokens, before)
        starts: list[Start] = []
        for index, (place, turns) in enumerate(zip(places, before, strict=True)):
            sampled = len(path_ids(rollout, place.step))
            if not responders:
                # One text has one room, of which at least a token is left.
                sampled = min(sampled, sampling.max_new_tokens - 1)
            # The plan branches before the first turn; behind turns there are n starts, one for each completion.
            for slot in range(n if turns else 1):
                starts.append(Start(index, len(turns), slot, sampled))
        plan, whole = BranchPlan({0: n}, n), self._dialogue.whole(sampling)
        return GrowthRequest(tokens, plan, whole, self._rule, seeds, responders, starts)

    def _behind_states(
        self, hf: Any, rollout: Rollout, places: Sequence[Place], request: GrowthRequest
    ) -> GrowthRequest:
        """The request with states that packed trees leave, or prompts that are followed by what was written."""
        style = self._body.style
        if style.plain and "flash" not in style.implementation:
            states = self._states(hf, rollout, places)
            starts = [replace(start, state=states[start.prompt]) for start in request.starts or ()]
            return replace(request, starts=starts)
        if request.responders:
            raise ValueError("conversations are completed from packed trees; load the model with attn: sdpa")
        paths = [torch.tensor(path_ids(rollout, p.step), dtype=torch.int64) for p in places]
        followed = [t.followed_by(ids) for t, ids in zip(request.prompts, paths, strict=True)]
        return replace(request, prompts=followed)

    def _history(self, rollout: Rollout, place: Place, prompt: PromptTokens, turns: bool) -> History:
        """The prompt and the steps up to a place, as vLLM takes them."""
        history = History.of(prompt) if turns else History(prompt.ids.tolist())
        if place.step < 0:
            return history
        for step in reversed(ancestors(rollout.tree.parents, place.step)):
            history = history.wrote(self._trees.ids(rollout, step).tolist())
            observation = self._dialogue.observation(rollout, step)
            if observation is not None:
                history = history.shown(observation)
        return history

    def _samples(self, rollout: Rollout, places: Sequence[Place], nodes: Sequence[Node]) -> list[tuple[int, Sample]]:
        """(position of its place, sample) of every completion, what came before its place included."""
        parents = [node.parent for node in nodes]
        inner = set(parents)
        samples = []
        for leaf, node in enumerate(nodes):
            if leaf in inner:
                continue
            new_steps = [nodes[index].ids for index in reversed(ancestors(parents, leaf))]
            place = places[node.prompt]
            text = self._dialogue.text(rollout, place.step, new_steps)
            samples.append((node.prompt, Sample(rollout.prompts[place.prompt], text, place.step)))
        return samples

    def _states(self, hf: Any, rollout: Rollout, places: Sequence[Place]) -> list[State]:
        """Every place's state: all trees in one call, each token of theirs once."""
        style = self._body.style
        if style.implementation == FLEX:
            style = replace(style, implementation="sdpa")
        by_prompt: dict[int, list[int]] = {}
        for index, place in enumerate(places):
            by_prompt.setdefault(place.prompt, []).append(index)
        trees = []
        ends = []
        for group, own in by_prompt.items():
            steps = [places[index].step for index in own if places[index].step >= 0]
            prompt = self._body.encode(rollout.prompts[group])
            laid_out = self._trees.lay_out(rollout, prompt, steps, open_ended=True)
            trees.append(laid_out)
            ends.append(torch.tensor([laid_out.end(places[index].step) for index in own]))
        job = build_reading([laid_out.tree for laid_out in trees], ends, "packed", style)
        # (places, V) logits behind the places, tree by tree, and a cache with a row per tree
        logits, past = run_trees(hf, job, self._body.features)
        check_cache(past)
        states: dict[int, State] = {}
        rows_of_logits = iter(logits)
        for row, own in enumerate(by_prompt.values()):
            tree = trees[row].tree
            for index in own:
                (columns,) = leaf_rows(tree.packed, [trees[row].after[places[index].step]])
                next_position = int(tree.positions[..., columns].max()) + 1
                memory = cut(past, row, columns.to(logits.device))
                states[index] = State(memory, next_position, next(rows_of_logits))
        return [states[index] for index in range(len(places))]

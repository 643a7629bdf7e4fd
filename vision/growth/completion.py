"""Finishing rollouts of tokens from their states: their trees are run once, and every completion forks the caches."""

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
        dialogue: answers between steps, or does not.
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
        going, options = open_places(rollout, places), self._body.options
        out: list[list[Sample]] = [[] for _ in places]
        chosen = [places[i] for i in going]
        for part in place_batches(rollout, chosen, options.max_tokens, most=max(1, options.max_batch // n)):
            own = [chosen[j] for j in part]
            request = self._request(rollout, own, n, sampling, [seeds[going[j]] for j in part])
            request = self._behind_states(hf, rollout, own, request)
            nodes = grow(TransformersEngine(hf, self._body.features), request)
            for j, sample in self._samples(rollout, own, nodes):
                out[going[part[j]]].append(sample)
        return out

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
        going = open_places(rollout, places)
        out: list[list[Sample]] = [[] for _ in places]
        chosen = [places[i] for i in going]
        request = self._request(rollout, chosen, n, sampling, [seeds[i] for i in going])
        turns = bool(request.answers)
        histories = [self._history(rollout, p, t, turns) for p, t in zip(chosen, request.prompts, strict=True)]
        starts = [
            replace(s, state=histories[s.prompt], sampled=s.sampled if turns else 0) for s in request.starts or ()
        ]
        nodes = engine.grow(hf, replace(request, starts=starts))
        if not turns:
            for node in nodes:  # as if sampling had stopped where the room ends
                written = len(path_ids(rollout, chosen[node.prompt].step))
                node.ids = node.ids[: max(1, sampling.max_new_tokens - written)]
        for j, sample in self._samples(rollout, chosen, nodes):
            out[going[j]].append(sample)
        return out

    # Below, a node's `prompt` is the position of its place, and paths begin behind the place.

    def _request(
        self, rollout: Rollout, places: Sequence[Place], n: int, sampling: SamplingOptions, seeds: Sequence[int]
    ) -> GrowthRequest:
        """n completions of each place, whose starts have no states yet."""
        prompts = [rollout.prompts[p.prompt] for p in places]
        tokens = [self._body.encode(p) for p in prompts]
        before = [self._dialogue.turns(rollout, p.step) for p in places]
        answers = self._dialogue.answers(prompts, tokens, before)
        starts: list[Start] = []
        for i, (place, turns) in enumerate(zip(places, before, strict=True)):
            sampled = len(path_ids(rollout, place.step))
            if not answers:  # one text has one room, with a token left at least
                sampled = min(sampled, sampling.max_new_tokens - 1)
            # before the first turn the plan itself branches
            starts += [Start(i, len(turns), slot, sampled) for slot in range(n if turns else 1)]
        plan, whole = BranchPlan({0: n}, n), self._dialogue.whole(sampling)
        return GrowthRequest(tokens, plan, whole, self._rule, seeds, answers, starts)

    def _behind_states(
        self, hf: Any, rollout: Rollout, places: Sequence[Place], request: GrowthRequest
    ) -> GrowthRequest:
        """The request with states that packed trees leave, or prompts that are followed by what was written."""
        style = self._body.style
        if style.plain and "flash" not in style.implementation:
            states = self._states(hf, rollout, places)
            return replace(request, starts=[replace(s, state=states[s.prompt]) for s in request.starts or ()])
        if request.answers:
            raise ValueError("conversations are completed from packed trees; load the model with attn: sdpa")
        paths = [torch.tensor(path_ids(rollout, p.step), dtype=torch.int64) for p in places]
        followed = [t.followed_by(ids) for t, ids in zip(request.prompts, paths, strict=True)]
        return replace(request, prompts=followed)

    def _history(self, rollout: Rollout, place: Place, prompt: PromptTokens, turns: bool) -> History:
        """What vLLM is given of a place."""
        history = History.of(prompt) if turns else History(prompt.ids.tolist())
        for v in reversed(ancestors(rollout.tree.parents, place.step)) if place.step >= 0 else ():
            history = history.wrote(self._trees.ids(rollout, v).tolist())
            observation = self._dialogue.observation(rollout, v)
            history = history if observation is None else history.shown(observation)
        return history

    def _samples(self, rollout: Rollout, places: Sequence[Place], nodes: Sequence[Node]) -> list[tuple[int, Sample]]:
        """(position of its place, sample) of every completion, what came before its place included."""
        parent = [n.parent for n in nodes]
        inner = set(parent)
        out = []
        for leaf in range(len(nodes)):
            if leaf not in inner:
                new = [nodes[v].ids for v in reversed(ancestors(parent, leaf))]
                place = places[nodes[leaf].prompt]
                text = self._dialogue.text(rollout, place.step, new)
                out.append((nodes[leaf].prompt, Sample(rollout.prompts[place.prompt], text, place.step)))
        return out

    def _states(self, hf: Any, rollout: Rollout, places: Sequence[Place]) -> list[State]:
        """Every place's state: all trees in one call, each token of theirs once."""
        style = self._body.style
        if style.implementation == FLEX:
            style = replace(style, implementation="sdpa")
        owners: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            owners.setdefault(place.prompt, []).append(i)
        prompts = {g: self._body.encode(rollout.prompts[g]) for g in owners}
        laid = {
            g: self._trees.lay_out(
                rollout, prompts[g], [places[i].step for i in own if places[i].step >= 0], open_ended=True
            )
            for g, own in owners.items()
        }
        ends = [torch.tensor([laid[g].end(places[i].step) for i in own]) for g, own in owners.items()]
        job = build_reading([x.tree for x in laid.values()], ends, "packed", style)
        logits, past = run_trees(hf, job, self._body.features)
        check_cache(past)
        states: dict[int, State] = {}
        rows = iter(logits)
        for row, (g, own) in enumerate(owners.items()):
            tree = laid[g].tree
            for i in own:
                (columns,) = leaf_rows(tree.packed, [laid[g].after[places[i].step]])
                after = int(tree.positions[..., columns].max()) + 1
                memory = cut(past, row, columns.to(logits.device))
                states[i] = State(memory, after, next(rows))
        return [states[i] for i in range(len(places))]

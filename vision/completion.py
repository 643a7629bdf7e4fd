"""Finishing rollouts of tokens from their states: their trees are run once, and every completion forks the caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrl.rollout import BranchPlan, Place, Rollout, Sample
from vision.attention import FLEX
from vision.backbone import Backbone
from vision.conversations import Conversations
from vision.driver import grow
from vision.engine_hf import State, TransformersEngine
from vision.engine_sync import SyncedEngine
from vision.engine_vllm import History
from vision.growth import Decoding, GrowthRequest, Node, PromptTokens, Start
from vision.kv import check_cache, cut
from vision.network import run_trees
from vision.packing import ancestors, leaf_rows
from vision.passes import build_reading
from vision.rollout_trees import RolloutTrees, open_places, place_batches
from vision.step_rule import StepRule


class Completions:
    """Completes rollouts, by a transformers model or an engine that has its weights.

    Args:
        talks: where an environment answers between steps.
    """

    def __init__(self, body: Backbone, trees: RolloutTrees, talks: Conversations | None, rule: StepRule) -> None:
        self._body, self._trees, self._talks, self._rule = body, trees, talks, rule

    def run(
        self, hf: Any, rollout: Rollout, places: Sequence[Place], n: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """n completions of each place by a transformers model; none of an end."""
        going, settings = open_places(rollout, places), self._body.settings
        out: list[list[Sample]] = [[] for _ in places]
        chosen = [places[i] for i in going]
        for part in place_batches(rollout, chosen, settings.max_tokens, most=max(1, settings.max_batch // n)):
            own, own_seeds = [chosen[j] for j in part], [seeds[going[j]] for j in part]
            nodes = self._nodes(hf, rollout, own, n, decoding, own_seeds)
            for j, sample in self._samples(rollout, own, nodes):
                out[going[part[j]]].append(sample)
        return out

    def by_engine(
        self, engine: SyncedEngine, hf: Any, rollout: Rollout, places: Sequence[Place], n: int, decoding: Decoding,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:  # fmt: skip
        """As `run`, by an engine with the weights of `hf`; what leads to a place lies in its prefix cache."""
        going = open_places(rollout, places)
        out: list[list[Sample]] = [[] for _ in places]
        chosen, own_seeds = [places[i] for i in going], [seeds[i] for i in going]
        nodes = self._engine_nodes(engine, hf, rollout, chosen, n, decoding, own_seeds)
        for j, sample in self._samples(rollout, chosen, nodes):
            out[going[j]].append(sample)
        return out

    # Below, a node's `prompt` is the position of its place, and paths begin behind the place.

    def _nodes(
        self, hf: Any, rollout: Rollout, places: Sequence[Place], n: int, decoding: Decoding, seeds: Sequence[int]
    ) -> list[Node]:
        style = self._body.style
        packed = style.plain and "flash" not in style.implementation
        if packed:
            states = self._states(hf, rollout, places)
        if self._talks is None:
            paths = [self._written(rollout, p) for p in places]
            written = [min(len(ids), decoding.max_new_tokens - 1) for ids in paths]
            tokens = self._encoded(rollout, places)
            if not packed:
                tokens = [t.followed_by(ids, "") for t, ids in zip(tokens, paths, strict=True)]
            starts = [Start(i, sampled=k, state=states[i] if packed else None) for i, k in enumerate(written)]
            decoding = replace(decoding, max_steps=1)  # nobody asks where a completion's steps end
            request = GrowthRequest(tokens, BranchPlan({0: n}, n), decoding, self._rule, seeds, (), starts)
        elif packed:
            request = self._conversations(rollout, places, states, n, decoding, seeds)
        else:
            raise ValueError("conversations are completed from packed trees; load the model with attn: sdpa")
        return grow(TransformersEngine(hf, self._body.features), request)

    def _engine_nodes(
        self, engine: SyncedEngine, hf: Any, rollout: Rollout, places: Sequence[Place], n: int, decoding: Decoding,
        seeds: Sequence[int],
    ) -> list[Node]:  # fmt: skip
        tokens = self._encoded(rollout, places)
        if self._talks is not None:
            histories = [
                History.of(
                    t,
                    [
                        (self._trees.ids(rollout, v).tolist(), self._talks.observation(rollout, v))
                        for v in self._path(rollout, p)
                    ],
                )
                for t, p in zip(tokens, places, strict=True)
            ]
            return engine.grow(hf, self._conversations(rollout, places, histories, n, decoding, seeds))
        paths = [self._written(rollout, p) for p in places]
        spelt = [self._body.tokenizer.decode(ids) for ids in paths]
        begun = [t.followed_by(ids, text) for t, ids, text in zip(tokens, paths, spelt, strict=True)]
        whole = replace(decoding, max_steps=1)
        nodes = engine.grow(hf, GrowthRequest(begun, BranchPlan({0: n}, n), whole, self._rule, seeds))
        for node in nodes:  # as if sampling had stopped where the room ends
            node.ids = node.ids[: max(1, decoding.max_new_tokens - len(paths[node.prompt]))]
        return nodes

    def _conversations(
        self, rollout: Rollout, places: Sequence[Place], states: Sequence[Any], n: int, decoding: Decoding,
        seeds: Sequence[int],
    ) -> GrowthRequest:  # fmt: skip
        """n conversations go on from each place."""
        assert self._talks is not None
        before = [self._talks.turns(rollout, p.step) for p in places]
        starts = []
        for i, (turns, state) in enumerate(zip(before, states, strict=True)):
            sampled = sum(size for _, size in turns)
            # before the first turn the plan itself branches
            starts += [Start(i, len(turns), slot, sampled, state) for slot in range(n if turns else 1)]
        prompts, tokens = [rollout.prompts[p.prompt] for p in places], self._encoded(rollout, places)
        answers = self._talks.answers(prompts, tokens, before)
        return GrowthRequest(tokens, BranchPlan({0: n}, n), decoding, self._rule, seeds, answers, starts)

    def _encoded(self, rollout: Rollout, places: Sequence[Place]) -> list[PromptTokens]:
        return [self._body.encode(rollout.prompts[p.prompt]) for p in places]

    def _samples(self, rollout: Rollout, places: Sequence[Place], nodes: Sequence[Node]) -> list[tuple[int, Sample]]:
        """(position of its place, sample) of every completion, what came before its place included."""
        parent = [n.parent for n in nodes]
        inner = set(parent)
        decode = partial(self._body.tokenizer.decode, skip_special_tokens=True)
        out = []
        for leaf in range(len(nodes)):
            if leaf in inner:
                continue
            new = [nodes[v].ids for v in ancestors(parent, leaf)[::-1]]
            place = places[nodes[leaf].prompt]
            if self._talks is None:
                text = decode(self._written(rollout, place).tolist() + new[0])
            else:
                turns = [rollout.texts[v] for v in self._path(rollout, place)]
                text = "\n".join([*turns, *map(decode, new)])
            out.append((nodes[leaf].prompt, Sample(rollout.prompts[place.prompt], text, place.step)))
        return out

    @staticmethod
    def _path(rollout: Rollout, place: Place) -> list[int]:
        """The steps up to a place, the first one first."""
        return ancestors(rollout.tree.parents, place.step)[::-1] if place.step >= 0 else []

    def _written(self, rollout: Rollout, place: Place) -> Tensor:
        """Ids of all steps up to a place."""
        ids = [self._trees.ids(rollout, v) for v in self._path(rollout, place)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *ids])

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

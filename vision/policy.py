"""A vision-language (or plain language) model as a Policy: steps are runs of sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mmrl.finite import check_finite
from mmrl.model_names import model_name
from mmrl.reference import Reference, bare, unwrap
from mmrl.registry import check_section, declares, of_kind
from mmrl.rollout import (
    ActionLogProbs,
    Actions,
    Answer,
    BranchPlan,
    Continuation,
    Forecast,
    Place,
    Prompt,
    Rollout,
    Sample,
    Sight,
    State,
)
from mmrl.seeding import named_generator
from mmrl.sharding import is_sharded
from mmrl.tree import INTERNAL, UNFINISHED, StepTree
from vision.forward.backbone import Backbone, trainable_model
from vision.forward.network import Network, kl_job, run_job
from vision.forward.packing import ancestors
from vision.forward.passes import Job, TokenTree, build_job
from vision.growth.answers import AnswerTrees
from vision.growth.completion import Completions
from vision.growth.dialogue import Dialogue, MultiTurn, Spelling
from vision.growth.engine_hf import grow_in_parts, sampling_mode
from vision.growth.engine_sync import SyncedEngine, vllm_engine
from vision.growth.environment import Environment
from vision.growth.requests import GrowthRequest, Node, SamplingOptions
from vision.growth.rollout_trees import RolloutTrees, step_batches
from vision.inputs.loading import banned_ids, eos_ids, load_processor, save_model, tokenizer_of
from vision.inputs.options import TOKEN_DEFAULTS, PolicyOptions
from vision.inputs.prompts import PromptEncoder
from vision.inputs.step_rule import StepRule, step_rule
from vision.inputs.tokens import PromptTokens


class VisionPolicy:
    """Steps are cut by `rule` while they are sampled; actions are tokens.

    Args:
        hf: a transformers image-text or causal language model, or a PEFT model around one.
        processor: from `vision.inputs.loading.load_processor`.
        rule: where a step ends.
        options: everything else; see `PolicyOptions`.
        engine: samples in place of the transformers model, which then only trains.
        environment: answers between steps, which then are turns: each ends with an end mark, `rule` only cuts given
            texts; `max_new_tokens` is the longest turn, and a conversation ends where the environment ends it or
            after `max_steps` turns.
        encode: makes tokens of prompts; by default pictures and text.

    Raises:
        ValueError: a mode the model cannot take.
    """

    def __init__(
        self, hf: Any, processor: Any, rule: StepRule, options: PolicyOptions, engine: SyncedEngine | None = None,
        environment: Environment | None = None, encode: PromptEncoder | None = None,
    ) -> None:  # fmt: skip
        self.rule, self.options = rule, options
        network = Network(hf)
        self.model: nn.Module = network
        self._engine = engine
        self._body = Backbone(network, processor, options, keep_images=engine is not None, encode=encode)
        self.encode, self.tokenizer, self.processor = self._body.encode, self._body.tokenizer, processor
        eos = eos_ids(bare(hf), self.tokenizer)
        banned = banned_ids(hf.config, self.tokenizer, keep=eos)
        self.sampling = SamplingOptions(
            options.temperature, options.max_new_tokens, options.max_steps, tuple(banned), tuple(sorted(eos))
        )
        self._reference = Reference()
        self._dialogue = Dialogue(self.tokenizer) if environment is None else MultiTurn(environment, self.tokenizer)
        self._trees = RolloutTrees(self.encode, self._dialogue)

    @classmethod
    @declares(
        writes=("logp", "texts", "state_key", "edge_key", "tags.truncated", "actions.token"),
        modality="text",
        recipe=TOKEN_DEFAULTS,
        options_of=PolicyOptions,
    )
    def build(
        cls,
        model: Annotated[str, model_name("shapes")] = "shapes",
        steps: Annotated[str | dict[str, Any], of_kind("step_rules")] = "line",
        dtype: str = "float32",
        attn: str = "sdpa",
        lora_rank: int = 0,
        train_vision: bool = False,
        engine: Literal["transformers", "vllm"] = "transformers",
        engine_url: str = "",
        engine_exchange: str = "",
        engine_memory: float = 0.4,
        **options: Any,
    ) -> VisionPolicy:
        """From a recipe's `policy:` section.

        Args:
            model: "shapes" (the built-in tiny model, made on first use), a folder, or a hub name.
            steps: where a step ends, or begins: a row of `step_rules`, with its options where it has any.
            attn: sdpa, eager, flash_attention_2 (no packing), or mmrl_flex: FlexAttention in the update, on a GPU.
            lora_rank: 0 trains all weights; above 0 trains LoRA on the language model's projections, and the
                reference for the KL is the model with the adapter off.
            train_vision: train the image encoder and projector too; off, they are frozen and pictures are encoded
                once an iteration.
            engine: what samples; vllm needs the extra of that name (docs/guides/vllm.md).
            engine_url: a running vLLM server; empty starts vLLM in this process with `engine_memory` of the device.
            engine_exchange: a folder that server and trainer both see, through which weights travel.
            options: fields of `PolicyOptions`.
        """
        chosen = PolicyOptions(**options)
        if engine == "vllm" and check_section("step_rules", "policy.steps", steps).facts.get("unsure"):
            raise ValueError(
                f"policy.steps={steps}: vLLM does not tell entropies while it samples; take engine: transformers"
            )
        if model == "shapes":
            from vision.tasks.shapes_base import shapes_base

            model = str(shapes_base())
        processor = load_processor(model)
        hf = trainable_model(model, dtype, attn, lora_rank, train_vision, chosen.gradient_checkpointing)
        rule = step_rule(tokenizer_of(processor), steps, bare(hf).config.get_text_config().vocab_size)
        other = None
        if engine == "vllm":
            other = vllm_engine(
                model, engine_url, engine_exchange, max_model_len=chosen.max_prompt_tokens + chosen.max_new_tokens,
                memory=engine_memory, lora_rank=lora_rank, dtype=dtype,
            )  # fmt: skip
        return cls(hf, processor, rule, chosen, other)

    @property
    def _network(self) -> Network:
        inner = unwrap(self.model)
        assert isinstance(inner, Network)
        return inner

    # ---- rollout ----------------------------------------------------------------------------------------------

    def forecast(self, plan: BranchPlan) -> Forecast:
        """Upper bounds per prompt: a completion may end before `max_steps`. A call is one sampled step."""
        bound = plan.forecast(self.sampling.max_steps)
        return Forecast(bound.leaves, bound.steps, bound.steps, bound.steps, bound.leaves * self.sampling.max_steps)

    def begin_iteration(self) -> None:
        """Let go of what the last iteration encoded; see `mmrl.capabilities.EncodingCache`."""
        self._body.begin_iteration()
        self._dialogue.begin_iteration()

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that can be encoded; each other one is logged with its reason, once."""
        return self._body.admit(prompts)

    def rollout(self, prompts: Sequence[Prompt], plan: BranchPlan, *, seed: int, iteration: int = 0) -> Rollout:
        """Sample a tree of steps per prompt; depends on (seed, iteration, prompt id) alone."""
        tokens = [self.encode(p) for p in prompts]
        seeds = [named_generator(seed, iteration, p.id).initial_seed() for p in prompts]
        nodes = self._grow(self._request(prompts, tokens, plan, self.sampling, seeds))
        about = {"seed": seed, "iteration": iteration, "temperature": self.sampling.temperature}
        return self._as_rollout(prompts, tokens, nodes, about)

    def _request(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], plan: BranchPlan, sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> GrowthRequest:  # fmt: skip
        return GrowthRequest(tokens, plan, sampling, self.rule, seeds, self._dialogue.answers(prompts, tokens))

    def _grow(self, request: GrowthRequest) -> list[Node]:
        if self._engine is not None:
            return self._engine.grow(self._network.hf, request)
        return self._grow_by(self._network, request)

    def _grow_by(self, network: nn.Module, request: GrowthRequest) -> list[Node]:
        with self._sampling(network):
            nodes: list[Node] = network(grow_in_parts, request, self._body.features, self.options.max_batch)
        return nodes

    def _sampling(self, network: nn.Module) -> AbstractContextManager[None]:
        """The network, set to sample inside the block."""
        if is_sharded(network):
            raise RuntimeError(
                "policy.engine: transformers cannot sample with sharded weights: every forward is a collective, and "
                "ranks make unequal numbers of them; set policy.engine: vllm"
            )
        assert isinstance(network, Network)
        return sampling_mode(network.hf, self._body.style.implementation)

    def _as_rollout(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], nodes: Sequence[Node], about: dict[str, Any]
    ) -> Rollout:
        order = sorted(range(len(nodes)), key=lambda i: nodes[i].prompt)  # stable: parents stay before children
        place = {old: new for new, old in enumerate(order)}
        nodes = [nodes[i] for i in order]
        parent = torch.tensor([place[n.parent] if n.parent >= 0 else -1 for n in nodes])
        inner = torch.zeros(len(nodes), dtype=torch.bool)
        inner[parent[parent >= 0]] = True
        end = torch.tensor([len(n.ids) for n in nodes]).cumsum(0)
        truncated = torch.tensor([n.end == "length" for n in nodes])
        texts = [self.tokenizer.decode(n.ids, skip_special_tokens=True) for n in nodes]
        observed = torch.tensor([n.observed for n in nodes])
        tree = StepTree(
            parent, torch.tensor([n.prompt for n in nodes]), torch.where(inner, INTERNAL, UNFINISHED),
            torch.full((len(nodes),), torch.nan), logp=torch.tensor([sum(n.logp) for n in nodes]),
            tok_start=end - torch.tensor([len(n.ids) for n in nodes]), tok_end=end, tags={"truncated": truncated},
            **text_states(parent.tolist(), [n.prompt for n in nodes], texts),
        )  # fmt: skip
        logp = torch.tensor([x for n in nodes for x in n.logp], dtype=torch.float32)
        ids = torch.tensor([x for n in nodes for x in n.ids])
        counts = {
            "calls": len(nodes), "leaves": int((~inner).sum()), "tokens": len(ids), "truncated": int(truncated.sum()),
            "prompt_tokens": sum(len(t.ids) for t in tokens), "observed_tokens": int(observed.sum()),
        }  # fmt: skip
        size = torch.tensor([len(t.ids) for t in tokens])
        actions = Actions(logp, torch.ones(len(ids), dtype=torch.bool), {"token": ids})
        rollout = Rollout(list(prompts), tree, actions, {"prompt_tokens": size}, counts, about, texts)
        return self._dialogue.annotated(rollout, observed)

    def write(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Rollout:
        """A rollout of given completions, one per prompt and ended, as if sampled with log-prob 0; for imitation."""
        tokens = [self.encode(p) for p in prompts]
        nodes: list[Node] = []
        spelling = Spelling(self._written, self.rule, self._end, self.sampling.max_steps)
        for g, text in enumerate(texts):
            nodes += self._dialogue.written(prompts[g], tokens[g], g, text, len(nodes), spelling)
        return self._as_rollout(prompts, tokens, nodes, {"written": True, "temperature": self.sampling.temperature})

    def beyond_limits(self, texts: Sequence[str]) -> list[str]:
        """See `mmrl.trainers.references.Writer`: the longest completion, or the longest turn and their number."""
        return [self._dialogue.beyond_limits(text, self.sampling) for text in texts]

    @property
    def _end(self) -> int:
        named = self.tokenizer.eos_token_id
        return int(named) if named in self.sampling.eos else self.sampling.eos[0]

    def samples(self, rollout: Rollout) -> list[Sample]:
        """The completions, special tokens left out; of conversations the turns, a line break between them."""
        leaves = rollout.tree.is_leaf.nonzero().flatten().tolist()
        group = rollout.tree.group.tolist()
        return [Sample(rollout.prompts[group[s]], self._dialogue.text(rollout, s), s) for s in leaves]

    def generate(self, prompts: Sequence[Prompt], *, seed: int) -> list[Sample]:
        """One completion per prompt at the evaluation temperature."""
        sampling = self._dialogue.whole(replace(self.sampling, temperature=self.options.eval_temperature))
        seeds = [named_generator(seed, "evaluation", p.id).initial_seed() for p in prompts]
        tokens = [self.encode(p) for p in prompts]
        nodes = self._grow(self._request(prompts, tokens, BranchPlan({0: 1}), sampling, seeds))
        return self.samples(self._as_rollout(prompts, tokens, nodes, {}))

    def extend(
        self,
        states: Sequence[State],
        n: int,
        *,
        seed: int,
        steps: int | None = None,
        temperature: float | None = None,
    ) -> list[list[Continuation]]:
        """n continuations of each state; see `mmrl.capabilities.Extender`.

        Raises:
            PromptError: a state whose prompt cannot be encoded; `admit` sorts those out.
        """
        self._dialogue.need_single_turn(
            "search and annotation with a policy that acts in an environment are not supported yet"
        )
        heat = self.sampling.temperature if temperature is None else temperature
        sampling = replace(self.sampling, temperature=heat, stop_after=steps)
        tokens = [self.encode(s.prompt).followed_by(self._ids_of(s)) for s in states]
        seeds = [named_generator(seed, s.prompt.id, s.text).initial_seed() for s in states]
        nodes = self._grow(self._request([s.prompt for s in states], tokens, BranchPlan({0: n}), sampling, seeds))
        texts = self.tokenizer.batch_decode([x.ids for x in nodes], skip_special_tokens=True)
        inner = {x.parent for x in nodes}
        parent = [x.parent for x in nodes]
        out: list[list[Continuation]] = [[] for _ in states]
        for leaf, node in enumerate(nodes):
            if leaf not in inner:
                path = ancestors(parent, leaf)[::-1]
                logps = tuple(tuple(nodes[v].logp) for v in path)
                ids = tuple(tuple(nodes[v].ids) for v in path)
                done, cut = node.end in ("eos", "length"), node.end == "length"
                out[node.prompt].append(Continuation(tuple(texts[v] for v in path), logps, done, cut, ids))
        return out

    def _ids_of(self, state: State) -> Tensor:
        """Ids of what a state has written: as sampled where that is known."""
        if not state.ids:
            return self._written(state.text)
        return torch.tensor([i for step in state.ids for i in step], dtype=torch.int64)

    def choice_logps(self, states: Sequence[State], choices: Sequence[str]) -> Tensor:
        """(S, C) float32 log-prob of the first token of each choice directly after each state, temperature 1.

        Raises:
            ValueError: two choices begin with the same token.
        """
        first = [self.tokenizer.encode(c, add_special_tokens=False)[:1] for c in choices]
        if len({tuple(f) for f in first}) < len(first):
            raise ValueError(f"choices {list(choices)} begin with the same token; name others")
        ids = [torch.tensor(f) for f in first]
        out, size = [], self.options.max_batch
        for a in range(0, len(states), size):
            tokens = [self.encode(s.prompt).followed_by(self._written(s.text)) for s in states[a : a + size]]
            trees = [TokenTree(t, [-1, *[0] * len(ids)], [t.ids, *ids]) for t in tokens]
            wanted = [t.packed.start[1:] for t in trees]
            with torch.no_grad():
                out.append(self._log_probs(trees, wanted, 1.0)["logp"].reshape(len(trees), len(ids)).cpu())
        logps = torch.cat(out)
        check_finite(logps, "the language model", "states")
        return logps

    def write_steps(self, written: Rollout) -> Rollout:
        """See `mmrl.capabilities.StepWriter`.

        Of steps with a text alone, every one but a leaf ends with the line break that separates steps, and a leaf
        that is not tagged `open` with the end of the answer.
        """
        self._dialogue.need_single_turn(
            "steps of a policy that acts in an environment cannot be written; give whole outputs"
        )
        tree, sampled = written.tree, written.actions
        still_open = tree.tags.get("open", torch.zeros(len(tree), dtype=torch.bool)).tolist()
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        for v, (a, b) in enumerate(zip(tree.tok_start.tolist(), tree.tok_end.tolist(), strict=True)):
            if "token" in sampled.payload and a < b:
                ids.append(sampled.payload["token"][a:b].tolist())
                logps.append(sampled.logp[a:b].tolist())
                continue
            leaf = bool(tree.is_leaf[v])
            text = written.texts[v] if leaf else written.texts[v].removesuffix("\n") + "\n"
            ids.append([*self._written(text).tolist(), *([self._end] if leaf and not still_open[v] else [])])
            logps.append([0.0] * len(ids[-1]))
        size = torch.tensor([len(x) for x in ids])
        end = size.cumsum(0)
        texts = [self.tokenizer.decode(x, skip_special_tokens=True) for x in ids]
        tags = {"truncated": torch.zeros(len(tree), dtype=torch.bool)} | tree.tags
        return replace(
            written,
            tree=tree.replace(
                logp=torch.tensor([sum(x) for x in logps]), tok_start=end - size, tok_end=end, tags=tags,
                **text_states(tree.parent.tolist(), tree.group.tolist(), texts),
            ),
            actions=Actions(
                torch.tensor([x for own in logps for x in own], dtype=torch.float32),
                torch.ones(int(size.sum()), dtype=torch.bool),
                {"token": torch.tensor([x for own in ids for x in own], dtype=torch.int64)},
            ),
            prompt_payload={"prompt_tokens": torch.tensor([len(self.encode(p).ids) for p in written.prompts])},
            about={"temperature": self.sampling.temperature, "written": True} | dict(written.about),
            texts=texts,
        )  # fmt: skip

    def _written(self, text: str) -> Tensor:
        """Ids of a text; placeholders in it are spelt out, as no picture belongs to them."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not set(self.sampling.banned).isdisjoint(ids):
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """What the steps say; of a conversation, with what that made the environment show, (text, picture or None)."""
        return self._dialogue.describe(rollout, steps)

    # ---- update -----------------------------------------------------------------------------------------------

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Steps of whole prompts while their trees fit in `max_tokens`; a larger tree is cut along its branches."""
        return step_batches(rollout, steps, self.options.max_tokens, whole_prompts=whole_prompts)

    def log_probs(self, rollout: Rollout, steps: Tensor, *, reference: bool = False) -> ActionLogProbs:
        """Log-probs of the tokens of `steps`, every prompt and shared step run once per call.

        With `reference`, `ref_logp` of the initial model.
        """
        trees, wanted, index = self._trees.of_steps(rollout, steps)
        out = self._log_probs(trees, wanted, self.sampling.temperature)
        ref = None
        if reference:
            with self._reference.applied(self.model, self._network.hf) as model:
                ref = self._log_probs(trees, wanted, self.sampling.temperature, model)["logp"]
        return ActionLogProbs(index, out["logp"], ref_logp=ref, entropy=out["entropy"])

    def _log_probs(
        self, trees: Sequence[TokenTree], wanted: Sequence[Tensor], temperature: float, model: Any = None
    ) -> dict[str, Tensor]:
        """Log-probs and entropies of packed tokens; by `model` instead of the trained one, without gradient."""
        body = self._body
        arguments = (run_job, self._job(trees, wanted), temperature, self.sampling.banned, body.features)
        if model is not None:
            return model(*arguments, None)
        grad = torch.is_grad_enabled()
        self._network.hf.train(grad and self.options.gradient_checkpointing)
        return (self.model if grad else self._network)(*arguments, body.blank if grad else None)

    def _job(self, trees: Sequence[TokenTree], wanted: Sequence[Tensor]) -> Job:
        """The cheapest layout that gives the packed tokens `wanted` their log-probs."""
        style = self._body.style
        sharded = is_sharded(self._network)
        return self._body.job(trees, lambda mode: build_job(trees, wanted, mode, style), sharded=sharded)

    # ---- a second look ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(
        self, rollout: Rollout, places: Sequence[Place], n: int, *, seeds: Sequence[int], temperature: float | None
    ) -> list[list[Sample]]:
        """Texts (of conversations the turns, a line break between them) from states of a rollout, each state run once;
        see `mmrl.capabilities.Completer`. A completion has as much room as a rollout has left there.

        Steps of a policy with another tokenizer are read as text.
        """
        heat = self.sampling.temperature if temperature is None else temperature
        sampling, n = replace(self.sampling, temperature=heat), n if heat > 0 else 1
        rollout = self._respelt(rollout)
        finish = Completions(self._body, self._trees, self._dialogue, self.rule)
        if self._engine is not None:
            return finish.by_engine(self._engine, self._network.hf, rollout, places, n, sampling, seeds)
        with self._sampling(self._network):
            done: list[list[Sample]] = self._network(finish.run, rollout, places, n, sampling, seeds)
        return done

    def _respelt(self, rollout: Rollout) -> Rollout:
        """The rollout in this policy's own tokens.

        Raises:
            ValueError: a conversation in other tokens, whose observations would be others too.
        """
        steps = range(len(rollout.tree))
        ids = [self._trees.ids(rollout, v) for v in steps]
        if self.tokenizer.batch_decode([i.tolist() for i in ids], skip_special_tokens=True) == list(rollout.texts):
            return rollout
        self._dialogue.need_single_turn(
            "these conversations were sampled with another tokenizer; take a model that shares it"
        )
        tree = rollout.tree
        nodes = [
            Node(int(tree.group[v]), int(tree.parent[v]), int(tree.depth[v]), own, [0.0] * len(own), "step")
            for v, own in ((v, self._written(rollout.texts[v]).tolist()) for v in steps)
        ]
        tokens = [self.encode(p) for p in rollout.prompts]
        return self._as_rollout(rollout.prompts, tokens, nodes, dict(rollout.about))

    @torch.no_grad()
    def answer_logps(
        self, rollout: Rollout, places: Sequence[Place], answers: Sequence[Answer], *, sight: Sight = "given"
    ) -> Tensor:
        """Mean log-probs of answers behind states, at temperature 1; see `mmrl.capabilities.AnswerReader`."""
        self._need_whole_weights("answer_probability")
        rollout = self._seen(rollout, sight)
        asked = AnswerTrees(self._trees, self._written, answers, self.options.max_tokens)
        total = torch.zeros(len(places), dtype=torch.float64)
        count = torch.zeros_like(total)
        for trees, wanted, owner in asked.parts(rollout, places, blank=sight == "blank"):
            logp = self._log_probs(trees, wanted, 1.0)["logp"].double().cpu()
            total.index_add_(0, owner, logp)
            count.index_add_(0, owner, torch.ones_like(logp))
        check_finite(total, "the language model", "answers")
        return total / count

    @torch.no_grad()
    def divergence(self, rollout: Rollout, steps: Tensor, sight: Sight) -> Tensor:
        """Mean KL(p || q) over a step's tokens, q under `sight`, at temperature 1.

        See `mmrl.capabilities.SightReader`.
        """
        self._need_whole_weights("divergence")
        other = self._seen(rollout, sight)
        total = torch.zeros(len(rollout.tree), dtype=torch.float64)
        owner = rollout.tree.step_of_action(rollout.actions.logp.numel())
        self._network.hf.eval()
        for part in self.micro_batches(rollout, steps):
            given, wanted, index = self._trees.of_steps(rollout, part)
            blind, _, _ = self._trees.of_steps(other, part, blank=sight == "blank")
            jobs = [self._job(trees, wanted) for trees in (given, blind)]
            kl = self._network(kl_job, *jobs, self._body.features)
            total.index_add_(0, owner[index], kl.double().cpu())
        check_finite(total, "the language model", "steps")
        return (total / rollout.tree.span)[steps]

    def instructed_logps(self, rollout: Rollout, steps: Tensor, instruction: str) -> tuple[Tensor, Tensor]:
        """Actions and log-probs at temperature 1 with the instruction behind the question; see
        `mmrl.capabilities.Instructable`."""
        told = [replace(p, inputs={**p.inputs, "question": _told(p, instruction)}) for p in rollout.prompts]
        rollout = replace(rollout, prompts=told)
        index, logps = [], []
        with self._reference.applied(self.model, self._network.hf) as model:
            for part in self.micro_batches(rollout, steps):
                trees, wanted, own = self._trees.of_steps(rollout, part, reworded=True)
                index.append(own)
                logps.append(self._log_probs(trees, wanted, 1.0, model)["logp"].cpu())
        return torch.cat(index), torch.cat(logps)

    def initial_samples(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[list[Sample]]:
        """Texts by the initial weights, at the temperature of rollouts; see `mmrl.capabilities.InitialSampler`.

        They are always sampled by the transformers model: an engine has the weights in training.
        """
        tokens = [self.encode(p) for p in prompts]
        seeds = [named_generator(seed, "initial", p.id).initial_seed() for p in prompts]
        plan = BranchPlan({0: n}, n)
        with self._reference.applied(self.model, self._network.hf) as model:
            nodes = self._grow_by(model, self._request(prompts, tokens, plan, self.sampling, seeds))
        rollout = self._as_rollout(prompts, tokens, nodes, {})
        out: list[list[Sample]] = [[] for _ in prompts]
        for sample in self.samples(rollout):
            out[int(rollout.tree.group[sample.step])].append(sample)
        return out

    def _need_whole_weights(self, reading: str) -> None:
        if is_sharded(self._network):
            raise RuntimeError(
                f"reading {reading!r} cannot run with sharded weights: every forward is a collective, and ranks make "
                "unequal numbers of them; unset ACCELERATE_CONFIG"
            )

    def _seen(self, rollout: Rollout, sight: Sight) -> Rollout:
        """The rollout with the prompts that are seen; blank ones have the same tokens, blanked where they are run."""
        if sight != "shuffled":
            return rollout
        return replace(rollout, prompts=[self.encode.shuffled(p) for p in rollout.prompts])

    def freeze_reference(self) -> None:
        """Keep a frozen copy of the current weights for the KL (not needed with LoRA)."""
        self._reference.freeze(self.model, self._network.hf)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights (with LoRA, the adapter) and processor in transformers' format.

        state_dict: weights of `self.model` by name, in place of its own, which may be sharded.
        """
        weights = state_dict and {name.removeprefix("hf."): w for name, w in state_dict.items()}
        save_model(self._network.hf, self.processor, folder, weights)


def _told(prompt: Prompt, instruction: str) -> str:
    return f"{prompt.inputs.get('question', '')}\n{instruction}"


def text_states(parent: Sequence[int], group: Sequence[int], texts: Sequence[str]) -> dict[str, list[int]]:
    """state_key and edge_key of written steps: what was written before a step is its state (white space apart).

    Chains of one prompt that wrote the same lines are in the same state, which is what GiGPO and SALT compare.
    """
    ids: dict[tuple[int, str], int] = {}
    state: list[int] = []
    edge: list[int] = []
    for p, g, text in zip(parent, group, texts, strict=True):
        state.append(edge[p] if p >= 0 else ids.setdefault((-1 - g, ""), len(ids)))
        edge.append(ids.setdefault((state[-1], " ".join(text.split())), len(ids)))
    return {"state_key": state, "edge_key": edge}

"""A vision-language (or plain language) model as a `Policy`: steps are runs of sampled tokens.

    policy = VisionPolicy.build("folder of a Qwen2.5-VL", steps="line", max_new_tokens=256)
    rollout = policy.rollout(prompts, BranchPlan({0: 4, 1: 2}), seed=0)  # trees of 4 x 2 answers
    new = policy.log_probs(rollout, torch.arange(len(rollout.tree)))  # new.logp: (A,), with gradient

`vision.growth` samples, and the packed forward in `vision.forward` recomputes log-probs; here they are put together.
"""

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
from vision.forward.backbone import Backbone, trainable_model
from vision.forward.lora import LoraOptions, merged, trained_options
from vision.forward.network import Network, kl_job, run_job
from vision.forward.passes import Job, TokenTree, build_job
from vision.growth.answers import AnswerTrees
from vision.growth.completion import Completions
from vision.growth.dialogue import Dialogue, MultiTurn, Spelling
from vision.growth.engine_hf import grow_in_parts, sampling_mode
from vision.growth.engine_sync import SyncedEngine, vllm_engine
from vision.growth.environment import Environment
from vision.growth.requests import GrowthRequest, Node, SamplingOptions
from vision.growth.rollout_trees import RolloutTrees, step_batches
from vision.growth.rollouts import RolloutBuilder
from vision.inputs.loading import banned_ids, eos_ids, load_processor, save_model, tokenizer_of
from vision.inputs.options import TOKEN_DEFAULTS, PolicyOptions
from vision.inputs.prompts import PromptEncoder
from vision.inputs.step_rule import StepRule, step_rule
from vision.inputs.tokens import PromptTokens


class VisionPolicy:
    """A policy whose actions are tokens, and whose steps are cut by `rule` while they are sampled.

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
        self,
        hf: Any,
        processor: Any,
        rule: StepRule,
        options: PolicyOptions,
        engine: SyncedEngine | None = None,
        environment: Environment | None = None,
        encode: PromptEncoder | None = None,
    ) -> None:
        self.rule, self.options = rule, options
        network = Network(hf)
        # Replaced by whatever wraps it for training (DDP, FSDP); `_network` is the module inside.
        self.model: nn.Module = network
        self._engine = engine
        self._body = Backbone(network, processor, options, keep_images=engine is not None, encode=encode)
        self.encode, self.tokenizer, self.processor = self._body.encode, self._body.tokenizer, processor
        eos = eos_ids(bare(hf), self.tokenizer)
        # A sampled image placeholder has no picture behind it, and the update would fail.
        banned = banned_ids(hf.config, self.tokenizer, keep=eos)
        self.sampling = SamplingOptions(
            options.temperature, options.max_new_tokens, options.max_steps, tuple(banned), tuple(sorted(eos))
        )
        self._reference = Reference()
        self.environment = environment
        self._dialogue = Dialogue(self.tokenizer) if environment is None else MultiTurn(environment, self.tokenizer)
        self._trees = RolloutTrees(self.encode, self._dialogue)
        self._rollouts = RolloutBuilder(self.tokenizer, self._dialogue, banned, self.sampling.eos)

    @classmethod
    @declares(
        writes=("logp", "texts", "state_key", "edge_key", "tags.truncated", "actions.token"),
        modality="text",
        recipe=TOKEN_DEFAULTS,
        steps="max_steps",
        trained=trained_options,
        options_of=PolicyOptions,
    )
    def build(
        cls,
        model: Annotated[str, model_name("shapes")] = "shapes",
        steps: Annotated[str | dict[str, Any], of_kind("step_rules")] = "line",
        dtype: str = "float32",
        attn: str = "sdpa",
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | str | None = None,
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
            lora_rank: 0 trains all weights, or goes on with the adapter that `model` holds, such as the result of an
                earlier run; above 0 trains a new LoRA on the language model.
            lora_alpha, lora_targets: see `vision.forward.lora.LoraOptions`.
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
        lora = LoraOptions(lora_rank, lora_alpha, lora_targets)
        hf = trainable_model(model, dtype, attn, lora, train_vision, chosen.gradient_checkpointing)
        rule = step_rule(tokenizer_of(processor), steps, bare(hf).config.get_text_config().vocab_size)
        sampler = None
        if engine == "vllm":
            sampler = vllm_engine(
                model,
                engine_url,
                engine_exchange,
                max_model_len=chosen.max_prompt_tokens + chosen.max_new_tokens,
                memory=engine_memory,
                lora_rank=lora_rank,
                dtype=dtype,
            )
        return cls(hf, processor, rule, chosen, sampler)

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
        """Give up what the last iteration encoded; see `mmrl.capabilities.EncodingCache`."""
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
        return self._rollouts.of_nodes(prompts, tokens, nodes, about)

    def _request(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[PromptTokens],
        plan: BranchPlan,
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> GrowthRequest:
        """A request for trees below `prompts`, encoded as `tokens`."""
        return GrowthRequest(tokens, plan, sampling, self.rule, seeds, self._dialogue.responders(prompts, tokens))

    def _grow(self, request: GrowthRequest) -> list[Node]:
        """Sample with the current weights, by the engine where there is one."""
        if self._engine is not None:
            return self._engine.grow(self._network.hf, request)
        return self._grow_by(self._network, request)

    def _grow_by(self, network: nn.Module, request: GrowthRequest) -> list[Node]:
        """Sample by a transformers model, the trained one or the reference."""
        with self._sampling(network):
            nodes: list[Node] = network(grow_in_parts, request, self._body.features, self.options.max_batch)
        return nodes

    def _sampling(self, network: nn.Module) -> AbstractContextManager[None]:
        """A block in which the network samples.

        Raises:
            RuntimeError: its weights are sharded.
        """
        if is_sharded(network):
            raise RuntimeError(
                "policy.engine: transformers cannot sample with sharded weights: every forward is a collective, and "
                "ranks make unequal numbers of them; set policy.engine: vllm"
            )
        assert isinstance(network, Network)
        return sampling_mode(network.hf, self._body.style.implementation)

    def write(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Rollout:
        """A rollout of given completions, one per prompt and ended, as if sampled with log-prob 0; for imitation."""
        tokens = [self.encode(p) for p in prompts]
        spelling = Spelling(self._rollouts.ids_of, self.rule, self._rollouts.end, self.sampling.max_steps)
        nodes: list[Node] = []
        for index, text in enumerate(texts):
            nodes += self._dialogue.written(prompts[index], tokens[index], index, text, len(nodes), spelling)
        about = {"written": True, "temperature": self.sampling.temperature}
        return self._rollouts.of_nodes(prompts, tokens, nodes, about)

    def beyond_limits(self, texts: Sequence[str]) -> list[str]:
        """See `mmrl.trainers.references.Writer`: the longest completion, or the longest turn and their number."""
        return [self._dialogue.beyond_limits(text, self.sampling) for text in texts]

    def samples(self, rollout: Rollout) -> list[Sample]:
        """The completions, special tokens left out; of conversations the turns, a line break between them."""
        leaves = rollout.tree.is_leaf.nonzero().flatten().tolist()
        groups = rollout.tree.group.tolist()
        samples = []
        for leaf in leaves:
            samples.append(Sample(rollout.prompts[groups[leaf]], self._dialogue.text(rollout, leaf), leaf))
        return samples

    def generate(self, prompts: Sequence[Prompt], *, seed: int) -> list[Sample]:
        """One completion per prompt at the evaluation temperature."""
        # Nothing reads the steps of an evaluation, so they are not cut.
        sampling = self._dialogue.whole(replace(self.sampling, temperature=self.options.eval_temperature))
        seeds = [named_generator(seed, "evaluation", p.id).initial_seed() for p in prompts]
        tokens = [self.encode(p) for p in prompts]
        nodes = self._grow(self._request(prompts, tokens, BranchPlan({0: 1}), sampling, seeds))
        return self.samples(self._rollouts.of_nodes(prompts, tokens, nodes, {}))

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
        if temperature is None:
            temperature = self.sampling.temperature
        sampling = replace(self.sampling, temperature=temperature, stop_after=steps)
        # The text so far becomes part of the prompt: a state is a root, and nothing above it is trained.
        prompts = [state.prompt for state in states]
        tokens = [self.encode(state.prompt).followed_by(self._ids_of(state)) for state in states]
        seeds = [named_generator(seed, state.prompt.id, state.text).initial_seed() for state in states]
        nodes = self._grow(self._request(prompts, tokens, BranchPlan({0: n}), sampling, seeds))
        return self._rollouts.continuations(nodes, len(states))

    def _ids_of(self, state: State) -> Tensor:
        """(L,) int64 ids of what was written in a state: as sampled, or where that is unknown, of its text."""
        if not state.ids:
            return self._rollouts.ids_of(state.text)
        return torch.tensor([token for step in state.ids for token in step], dtype=torch.int64)

    def choice_logps(self, states: Sequence[State], choices: Sequence[str]) -> Tensor:
        """(S, C) float32 log-prob of the first token of each choice directly after each state, temperature 1.

        Raises:
            ValueError: two choices begin with the same token.
        """
        first = [self.tokenizer.encode(choice, add_special_tokens=False)[:1] for choice in choices]
        if len({tuple(ids) for ids in first}) < len(first):
            raise ValueError(f"choices {list(choices)} begin with the same token; name others")
        branches = [torch.tensor(ids) for ids in first]
        parts = []
        for start in range(0, len(states), self.options.max_batch):
            # A tree per state: what was written so far is its prompt, and every choice is a child of one token.
            trees = []
            for state in states[start : start + self.options.max_batch]:
                tokens = self.encode(state.prompt).followed_by(self._rollouts.ids_of(state.text))
                trees.append(TokenTree(tokens, [-1, *[0] * len(branches)], [tokens.ids, *branches]))
            wanted = [tree.packed.start[1:] for tree in trees]
            with torch.no_grad():
                logp = self._log_probs(trees, wanted, 1.0)["logp"]
            parts.append(logp.reshape(len(trees), len(branches)).cpu())
        logps = torch.cat(parts)
        check_finite(logps, "the language model", "states")
        return logps

    def write_steps(self, written: Rollout) -> Rollout:
        """The rollout with tokens for the steps that are texts; see `mmrl.capabilities.StepWriter`."""
        self._dialogue.need_single_turn(
            "steps of a policy that acts in an environment cannot be written; give whole outputs"
        )
        tokens = [self.encode(p) for p in written.prompts]
        return self._rollouts.of_steps(written, tokens, self.sampling.temperature)

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """The steps as texts; those of a conversation as (text, picture of what the environment showed or None)."""
        return self._dialogue.describe(rollout, steps)

    # ---- update -----------------------------------------------------------------------------------------------

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Steps of whole prompts while their trees fit in `max_tokens`; a larger tree is cut along its branches."""
        return step_batches(rollout, steps, self.options.max_tokens, whole_prompts=whole_prompts)

    def log_probs(self, rollout: Rollout, steps: Tensor, *, reference: bool = False) -> ActionLogProbs:
        """Log-probs of the tokens of `steps`, every prompt and shared step run once per call.

        With `reference`, `ref_logp` of the initial model.
        """
        trees, wanted, actions = self._trees.of_steps(rollout, steps)
        scores = self._log_probs(trees, wanted, self.sampling.temperature)
        ref_logp = None
        if reference:
            with self._reference.applied(self.model, self._network.hf) as model:
                ref_logp = self._log_probs(trees, wanted, self.sampling.temperature, model)["logp"]
        return ActionLogProbs(actions, scores["logp"], ref_logp=ref_logp, entropy=scores["entropy"])

    def _log_probs(
        self, trees: Sequence[TokenTree], wanted: Sequence[Tensor], temperature: float, model: Any = None
    ) -> dict[str, Tensor]:
        """Log-probs and entropies of packed tokens; by `model` instead of the trained one, without gradient."""
        body = self._body
        arguments = (run_job, self._job(trees, wanted), temperature, self.sampling.banned, body.features)
        if model is not None:
            return model(*arguments, None)
        if not torch.is_grad_enabled():
            self._network.hf.train(False)
            return self._network(*arguments, None)
        # transformers checkpoints layers in train mode alone.
        self._network.hf.train(self.options.gradient_checkpointing)
        return self.model(*arguments, body.blank)

    def _job(self, trees: Sequence[TokenTree], wanted: Sequence[Tensor]) -> Job:
        """The cheapest layout that gives the packed tokens `wanted` their log-probs."""
        style = self._body.style
        sharded = is_sharded(self._network)
        return self._body.job(trees, lambda mode: build_job(trees, wanted, mode, style), sharded=sharded)

    # ---- readings of a rollout --------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(
        self, rollout: Rollout, places: Sequence[Place], n: int, *, seeds: Sequence[int], temperature: float | None
    ) -> list[list[Sample]]:
        """Texts (of conversations the turns, a line break between them) from states of a rollout, each state run once;
        see `mmrl.capabilities.Completer`. A completion has as much room as a rollout has left there.

        Steps of a policy with another tokenizer are read as text.
        """
        if temperature is None:
            temperature = self.sampling.temperature
        if temperature == 0:
            n = 1  # greedy completions are all the same
        sampling = replace(self.sampling, temperature=temperature)
        rollout = self._respelt(rollout)
        completions = Completions(self._body, self._trees, self._dialogue, self.rule)
        if self._engine is not None:
            return completions.by_engine(self._engine, self._network.hf, rollout, places, n, sampling, seeds)
        with self._sampling(self._network):
            samples: list[list[Sample]] = self._network(completions.run, rollout, places, n, sampling, seeds)
        return samples

    def _respelt(self, rollout: Rollout) -> Rollout:
        """The rollout in this policy's own tokens."""
        step_ids = [self._trees.ids(rollout, step) for step in range(len(rollout.tree))]
        return self._rollouts.respelt(rollout, step_ids, self.encode)

    @torch.no_grad()
    def answer_logps(
        self, rollout: Rollout, places: Sequence[Place], answers: Sequence[Answer], *, sight: Sight = "given"
    ) -> Tensor:
        """Mean log-probs of answers behind states, at temperature 1; see `mmrl.capabilities.AnswerReader`."""
        self._need_whole_weights("answer_probability")
        rollout = self._with_sight(rollout, sight)
        answer_trees = AnswerTrees(self._trees, self._rollouts.ids_of, answers, self.options.max_tokens)
        # (places,) sums over the tokens of each answer, and their numbers
        total = torch.zeros(len(places), dtype=torch.float64)
        count = torch.zeros_like(total)
        for trees, wanted, owner in answer_trees.parts(rollout, places, blank=sight == "blank"):
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
        other = self._with_sight(rollout, sight)
        # (N,) sums over the tokens of each step, and (A,) the step of each token
        total = torch.zeros(len(rollout.tree), dtype=torch.float64)
        owner = rollout.tree.step_of_action(rollout.actions.logp.numel())
        self._network.hf.eval()
        for part in self.micro_batches(rollout, steps):
            given, wanted, index = self._trees.of_steps(rollout, part)
            changed, _, _ = self._trees.of_steps(other, part, blank=sight == "blank")
            jobs = [self._job(trees, wanted) for trees in (given, changed)]
            kl = self._network(kl_job, *jobs, self._body.features)
            total.index_add_(0, owner[index], kl.double().cpu())
        check_finite(total, "the language model", "steps")
        return (total / rollout.tree.span)[steps]

    def instructed_logps(self, rollout: Rollout, steps: Tensor, instruction: str) -> tuple[Tensor, Tensor]:
        """Actions and log-probs at temperature 1 with the instruction behind the question; see
        `mmrl.capabilities.Instructable`."""
        prompts = [_with_instruction(p, instruction) for p in rollout.prompts]
        rollout = replace(rollout, prompts=prompts)
        actions, logps = [], []
        with self._reference.applied(self.model, self._network.hf) as model:
            for part in self.micro_batches(rollout, steps):
                trees, wanted, own = self._trees.of_steps(rollout, part, reworded=True)
                actions.append(own)
                logps.append(self._log_probs(trees, wanted, 1.0, model)["logp"].cpu())
        return torch.cat(actions), torch.cat(logps)

    def initial_samples(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[list[Sample]]:
        """Texts by the initial weights, at the temperature of rollouts; see `mmrl.capabilities.InitialSampler`.

        They are always sampled by the transformers model: an engine has the weights in training.
        """
        tokens = [self.encode(p) for p in prompts]
        seeds = [named_generator(seed, "initial", p.id).initial_seed() for p in prompts]
        plan = BranchPlan({0: n}, n)
        with self._reference.applied(self.model, self._network.hf) as model:
            nodes = self._grow_by(model, self._request(prompts, tokens, plan, self.sampling, seeds))
        rollout = self._rollouts.of_nodes(prompts, tokens, nodes, {})
        by_prompt: list[list[Sample]] = [[] for _ in prompts]
        for sample in self.samples(rollout):
            by_prompt[int(rollout.tree.group[sample.step])].append(sample)
        return by_prompt

    def _need_whole_weights(self, reading: str) -> None:
        """Raise RuntimeError where the weights are sharded."""
        if is_sharded(self._network):
            raise RuntimeError(
                f"reading {reading!r} cannot run with sharded weights: every forward is a collective, and ranks make "
                "unequal numbers of them; unset ACCELERATE_CONFIG"
            )

    def _with_sight(self, rollout: Rollout, sight: Sight) -> Rollout:
        """The rollout with its prompts as the model sees them: frames in another order where `sight` is "shuffled".

        "blank" changes no token, so there the trees are built with blank pictures instead.
        """
        if sight != "shuffled":
            return rollout
        return replace(rollout, prompts=[self.encode.shuffled(p) for p in rollout.prompts])

    def freeze_reference(self) -> None:
        """Keep a frozen copy of the current weights for the KL (not needed with LoRA)."""
        self._reference.freeze(self.model, self._network.hf)

    def merge_adapter(self) -> None:
        """See `mmrl.capabilities.AdapterMerger`."""
        self._network.hf = merged(self._network.hf)

    def move_reference(self, share: float) -> None:
        """See `mmrl.capabilities.ReferenceMover`."""
        self._reference.move(self.model, share)

    def reference_tensors(self) -> dict[str, Tensor]:
        """See `mmrl.capabilities.ReferenceMover`."""
        return self._reference.tensors()

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights (with LoRA, the adapter) and processor in transformers' format.

        state_dict: weights of `self.model` by name, in place of its own, which may be sharded.
        """
        # `Network` has the model under this name.
        weights = state_dict and {name.removeprefix("hf."): weight for name, weight in state_dict.items()}
        save_model(self._network.hf, self.processor, folder, weights)


def _with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with a line behind its question."""
    question = f"{prompt.inputs.get('question', '')}\n{instruction}"
    return replace(prompt, inputs={**prompt.inputs, "question": question})

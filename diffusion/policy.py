"""A diffusion model as a Policy: rollouts by the branch sampler, log-probs by replaying the recorded schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion.adapters.base import Adapter, Cond, Level
from diffusion.adapters.conditions import split_rows, stack_rows
from diffusion.adapters.pipeline import Dtype, LoraFormats
from diffusion.capabilities import ScoreLatents
from diffusion.kernels import gaussian_kl, log_prob
from diffusion.loading import load_adapter
from diffusion.lora import add_lora, checkpoint_gradients, load_lora, load_peft_lora, merged
from diffusion.sampler import Forest, Start, complete, kernel_stds, sample_forest, sample_ode, transition
from diffusion.schedule import NoiseSchedule, SamplingConfig, candidates, placed_plan, plan_schedule, record
from mmrl.byte_cache import ByteCache
from mmrl.capabilities import require
from mmrl.finite import check_finite
from mmrl.model_names import model_name
from mmrl.reference import Reference, unwrap
from mmrl.registry import declares, of_kind
from mmrl.rollout import ActionLogProbs, Actions, BranchPlan, Forecast, Place, Prompt, Rollout, Sample, Sight
from mmrl.seeding import named_generator
from mmrl.tree import INTERNAL, UNFINISHED, StepTree

# Defaults of a recipe whose policy denoises. Log-probs are means over a latent's elements, hence the narrow clip
# range (BranchGRPO's script); Gaussian steps have a closed divergence; depths are aligned, hence its estimator; every
# public trainer clamps advantages at 5.
DENOISING_DEFAULTS = {
    "loss.clip_low": 1e-3, "loss.clip_high": 1e-3, "loss.kl_form": "exact", "optim.lr": 2e-4,
    "credit.estimators": [{"name": "branch_depth"}], "credit.clip": 5.0,
}  # fmt: skip


def _fields_written(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of its rollouts; candidates at a step are forks without a plan that splits."""
    fields = ["logp", "tags.std", "actions.latent"]
    fields += ["forks"] if options["candidates"] > 1 else []
    fields += ["actions.mean"] if options["keep_mean"] else []
    return tuple(fields)


# of prompts embedded in an iteration: 200 of SDXL
EMBEDDED_BYTES = 2**28


def _trained(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options that read what a run with these options saved: its LoRA goes on, anything else is whole."""
    if (folder / "lora").is_dir():
        return {**options, "lora_start": str(folder / "lora")}
    return {**options, "model": str(folder)}


class DiffusionPolicy:
    """Steps are denoising transitions, one action each.

    Args:
        adapter: the model family.
        sampling: how to sample; see `SamplingConfig`.
        max_batch: most latents per network call, in rollout and update. The update visits the states of a depth in
            the rollout's order and chunks, so both passes see the same batches and the first ratio is exactly 1.
    """

    def __init__(self, adapter: Adapter, sampling: SamplingConfig, max_batch: int = 256) -> None:
        if max_batch < 1:
            raise ValueError(f"policy.max_batch={max_batch}: at least 1")
        self.adapter, self.sampling, self.max_batch = adapter, sampling, max_batch
        self.model: nn.Module = adapter.model
        self._reference = Reference()
        # Nothing stays for the next iteration: last bits can depend on which prompts were embedded together, and a
        # resumed run embeds those of its own iterations alone.
        self._embedded = ByteCache(0, EMBEDDED_BYTES, name="embedded prompts")

    @classmethod
    @declares(
        writes=_fields_written,
        may_write={"actions.mean": "keep_mean: true"},
        modality="latent",
        shardable=False,
        steps="steps",
        trained=_trained,
        recipe=DENOISING_DEFAULTS,
        options_of=SamplingConfig,
    )
    def build(
        cls,
        model: Annotated[str, model_name("digits")] = "digits",
        max_batch: int = 256,
        adapter: Annotated[str, of_kind("adapters", options=False)] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: PositiveInt | None = None,
        width: PositiveInt | None = None,
        num_frames: PositiveInt | None = None,
        call: dict[str, Any] | None = None,
        dtype: Dtype | None = None,
        frozen_dtype: Dtype | None = None,
        offload_encoders: bool | None = None,
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_alpha: PositiveFloat | None = None,
        lora_targets: list[str] | str | None = None,
        lora_start: str | None = None,
        **sampling: Any,
    ) -> DiffusionPolicy:
        """From a recipe's `policy:` section.

        Args:
            model: "digits" (the built-in base, made on first use), the folder of a saved diffusers pipeline, or its
                hub name.
            adapter: a row of `adapters`, or the dotted path of one's own (`diffusion.adapters.base`); null goes by
                the folder's index: its denoiser's own row, else diffusers' modular blocks.
            guidance_scale: null is the adapter's own: none for a DiT and Stable Diffusion's UNets (1), for families
                with blocks that of their pipeline, embedded or classifier-free.
            negative_prompt: of classifier-free guidance, in rollout and update.
            height, width, num_frames: of the outputs; null is the family's own.
            call: further inputs of the family's pipeline, such as {max_sequence_length: 256}.
            dtype: of what denoises. frozen_dtype: of encoders and decoder, by default the same.
            offload_encoders: keep the text encoders on the CPU but while they read prompts.
            gradient_checkpointing: less memory, one more forward pass in the update.
            lora_rank: 0 trains all weights; above 0 trains LoRA, and the reference for the KL is the model with the
                LoRA off, or as it came with `lora_start`, so that no second copy of the model is kept.
                lora_alpha: by default twice the rank.
            lora_targets: ends of module names or "all-linear"; null is the attention projections.
            lora_start: a LoRA to go on from, in diffusers' or PEFT's format: a folder, file or hub name, such as
                RUN/model/lora; rank, alpha and targets as it has them.
            sampling: fields of `SamplingConfig`.

        Raises:
            ValueError: the folder holds no such model, or its adapter does not take a key that is set.
        """
        options = {
            "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "height": height, "width": width,
            "num_frames": num_frames, "call": call, "dtype": dtype, "frozen_dtype": frozen_dtype,
            "offload_encoders": offload_encoders,
        }  # fmt: skip
        lora = {"lora_alpha": lora_alpha, "lora_targets": lora_targets, "lora_start": lora_start}
        needless = [name for name, value in lora.items() if value is not None]
        if needless and not lora_rank:
            raise ValueError(f"policy.{needless[0]} is for LoRA; set policy.lora_rank")
        policy = cls(load_adapter(model, adapter, options), SamplingConfig(**sampling), max_batch)
        if gradient_checkpointing:
            checkpoint_gradients(policy.model)
        if lora_rank:
            policy.add_lora(lora_rank, lora_alpha, lora_targets)
        if lora_start is not None:
            if (Path(lora_start) / "adapter_config.json").is_file():
                load_peft_lora(policy.model, lora_start)
            else:
                pipeline = require("policy.lora_start", LoraFormats, policy.adapter)
                load_lora(policy.model, lora_start, pipeline.lora_formats, pipeline.denoisers)
        return policy

    def add_lora(self, rank: int, alpha: float | None = None, targets: Sequence[str] | str | None = None) -> None:
        """Freeze the model and train LoRA of this rank; see `diffusion.lora.add_lora`."""
        self.model = add_lora(self.model, rank, alpha, targets)

    # ---- forward ----------------------------------------------------------------------------------------------

    @property
    def _bare(self) -> nn.Module:
        return unwrap(self.model)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _predict(
        self, model: nn.Module, schedule: NoiseSchedule, cond: Cond, x: Tensor, i: int, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._predict_level(model, schedule.levels[i], cond, x, own)

    def _predict_level(
        self, model: nn.Module, level: Level, cond: Cond, x: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self.adapter.predict(model, a.to(self._device), level, cond, b.to(self._device))
            for a, b in zip(x.split(self.max_batch), own.split(self.max_batch), strict=True)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def levels(self) -> list[Level]:
        """The noise levels at which the sampler calls the network, the noisiest first."""
        return self.adapter.schedule(self.sampling.steps)[:-1]

    def predict_at(
        self, rollout: Rollout, x: Tensor, level: Level, own: Tensor, *, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps), each (N, *D) float32, of latents `x` at one level; `own` (N,) is the prompt of each.

        Differentiable where gradients are on; with `reference`, by the initial model, without gradient.
        """
        if reference:
            with self._reference.applied(self.model, self._bare) as model:
                return self._predict_level(model, level, _cond(rollout), x, own)
        model = self.model if torch.is_grad_enabled() else self._bare
        return self._predict_level(model, level, _cond(rollout), x, own)

    def begin_iteration(self) -> None:
        """Forget the last iteration's embedded prompts; see `mmrl.capabilities.EncodingCache`."""
        self._embedded.begin_iteration()

    def _embed(self, prompts: Sequence[Prompt]) -> Cond:
        """Conditions of prompts, a row each; every distinct prompt is embedded once an iteration."""
        keys = [(p.id, str(dict(p.inputs))) for p in prompts]
        rows: dict[Any, Cond] = {}
        missing: dict[Any, Prompt] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            cached = self._embedded.get(key)
            if cached is None:
                missing[key] = prompt
            else:
                rows[key] = cached
        if missing:
            fresh = split_rows(self.adapter.encode(list(missing.values())))
            for key, row in zip(missing, fresh, strict=True):
                rows[key] = row
                self._embedded.put(key, row, sum(x.numel() * x.element_size() for x in row.values()))
        return stack_rows([rows[key] for key in keys])

    def freeze_reference(self) -> None:
        """Keep a frozen copy of the current weights for the KL (not needed with LoRA)."""
        self._reference.freeze(self.model, self._bare)

    def move_reference(self, share: float) -> None:
        """See `mmrl.capabilities.ReferenceMover`."""
        self._reference.move(self.model, share)

    def reference_tensors(self) -> dict[str, Tensor]:
        """See `mmrl.capabilities.ReferenceMover`."""
        return self._reference.tensors()

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All of them: labels cannot be malformed here."""
        return list(prompts)

    # ---- Policy -----------------------------------------------------------------------------------------------

    def noise_schedule(self, plan: BranchPlan, iteration: int = 0) -> NoiseSchedule:
        """The steps a rollout will take; ValueError when the plan does not fit."""
        placed = placed_plan(self.sampling, plan, iteration)
        return plan_schedule(self.sampling, placed, self.adapter.schedule(self.sampling.steps), iteration)

    def forecast(self, plan: BranchPlan) -> Forecast:
        """Cost of one prompt; trained states are the states before noisy steps."""
        schedule, plan = self.noise_schedule(plan), placed_plan(self.sampling, plan, 0)
        noisy = [i for i, n in enumerate(schedule.noisy) if n]
        cost = plan.forecast(len(schedule), trained_depths=noisy, full_steps=self.sampling.steps)
        side = sum(plan.width(i) * (candidates(self.sampling, plan, schedule, i) - 1) for i in noisy)
        return replace(cost, steps=cost.steps + side)

    def rollout(self, prompts: Sequence[Prompt], plan: BranchPlan, *, seed: int, iteration: int = 0) -> Rollout:
        """Sample a tree per prompt; all leaves of a prompt start from one initial latent."""
        return self._sample(prompts, plan, self.sampling, seed, iteration)

    def sample_best(self, prompts: Sequence[Prompt], *, k: int, score: ScoreLatents, seed: int) -> Rollout:
        """One sample per prompt; at every noisy step the best of k candidates goes on. k = 1 asks for no score."""
        sampling = replace(self.sampling, candidates=k)
        return self._sample(prompts, BranchPlan({}), sampling, seed, 0, score if k > 1 else None)

    @torch.no_grad()
    def _sample(
        self,
        prompts: Sequence[Prompt],
        plan: BranchPlan,
        sampling: SamplingConfig,
        seed: int,
        iteration: int,
        score: ScoreLatents | None = None,
    ) -> Rollout:
        """score: of `sampling.candidates` the one with its highest score goes on; None = a random one."""
        plan = placed_plan(sampling, plan, iteration)
        schedule = plan_schedule(sampling, plan, self.adapter.schedule(sampling.steps), iteration)
        cond = self._embed(prompts)
        generators = [named_generator(seed, iteration, p.id) for p in prompts]
        init = torch.stack([self.adapter.init(g) for g in generators]).to(self._device)

        def predict(x: Tensor, i: int, own: Tensor) -> tuple[Tensor, Tensor]:
            return self._predict(self._bare, schedule, cond, x, i, own)

        def choose(x: Tensor, level: Level, own: Tensor) -> Tensor:
            assert score is not None
            return score(x, level, cond, own)

        forest = sample_forest(predict, init, plan, sampling, schedule, generators, None if score is None else choose)
        about = record(sampling, schedule) | {"prediction": self.adapter.prediction}
        about |= {"seed": seed, "iteration": iteration}
        latents = {"latent": forest.latent} | ({"mean": forest.mean} if sampling.keep_mean else {})
        payload = {"init": init.to(getattr(torch, sampling.storage)).cpu()}
        return Rollout(
            list(prompts),
            _as_tree(forest, len(schedule)),
            Actions(forest.logp, ~forest.std.isnan(), latents),
            payload | {f"cond_{k}": v.cpu() for k, v in cond.items()},
            {"calls": forest.calls, "leaves": plan.leaves * len(prompts)},
            about,
        )

    @torch.no_grad()
    def complete(
        self, rollout: Rollout, places: Sequence[Place], n: int, *, seeds: Sequence[int], temperature: float | None
    ) -> list[list[Sample]]:
        """Pictures from latents of a rollout, along the rest of its own schedule; see `mmrl.capabilities.Completer`.

        A rollout of another policy is completed where both denoise the same latents by the same schedule.

        Raises:
            ValueError: a temperature other than None and 0, or a rollout of another kind of model.
        """
        if temperature not in (None, 0):
            raise ValueError(f"temperature={temperature}: denoising draws its own noise (null), or none (0: the ODE)")
        sampling, schedule = self._replay(rollout)
        self._check_kind(rollout)
        if temperature == 0:
            schedule = replace(schedule, noisy=[False] * len(schedule))
        starts, at = [], []
        for i, place in enumerate(places):
            ahead = 0 if place.step < 0 else int(rollout.tree.depth[place.step]) + 1
            if ahead < len(schedule):
                stored = rollout.prompt_payload["init"] if place.step < 0 else rollout.actions.payload["latent"]
                latent = stored[place.prompt if place.step < 0 else place.step]
                starts.append(Start(place.prompt, ahead, latent.float().to(self._device)))
                at.append(i)
        out: list[list[Sample]] = [[] for _ in places]
        if not starts:
            return out
        cond = self._embed(rollout.prompts)

        def predict(x: Tensor, i: int, own: Tensor) -> tuple[Tensor, Tensor]:
            return self._predict(self._bare, schedule, cond, x, i, own)

        generators = [torch.Generator().manual_seed(seeds[i]) for i in at]
        latents = complete(predict, starts, n, sampling, schedule, generators)
        pictures = iter(self._finished(torch.cat(latents)))
        for i, own in zip(at, latents, strict=True):
            prompt = rollout.prompts[places[i].prompt]
            out[i] = [Sample(prompt, next(pictures), places[i].step) for _ in own]
        return out

    @torch.no_grad()
    def divergence(self, rollout: Rollout, steps: Tensor, sight: Sight) -> Tensor:
        """Mean squared difference, over a latent's elements, of where the ODE would lead in each step with its prompt
        and with the empty one; see `mmrl.capabilities.SightReader`.

        Raises:
            ValueError: a sight without meaning for denoising.
        """
        if sight == "shuffled":
            raise ValueError("sight: shuffled is for clips; denoising knows its prompt or, blank, the empty one")
        sampling, schedule = self._replay(rollout)
        schedule, cond = replace(schedule, noisy=[False] * len(schedule)), _cond(rollout)
        other = self.adapter.unconditional(cond) if sight == "blank" else cond
        out = torch.empty(len(steps), dtype=torch.float64)
        for depth in rollout.tree.depth[steps].unique().tolist():
            at = rollout.tree.depth[steps] == depth
            x, own, inverse = _parent_states(rollout, steps[at])
            x = x.float().to(self._device)
            seen, blind = (
                transition(sampling, schedule, depth, x, *self._predict(self._bare, schedule, c, x, depth, own)).mean
                for c in (cond, other)
            )
            out[at] = ((seen - blind) ** 2).flatten(1).mean(1).double().cpu()[inverse]
        check_finite(out, "the denoising network", "steps")
        return out

    def initial_samples(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[list[Sample]]:
        """Pictures by the initial weights and the ODE, each from a latent of its own; see
        `mmrl.capabilities.InitialSampler`."""
        repeated = [p for p in prompts for _ in range(n)]
        names = [(seed, "initial", p.id, k) for p in prompts for k in range(n)]
        with self._reference.applied(self.model, self._bare) as model:
            pictures = self._pictures(model, repeated, [named_generator(*name) for name in names])
        samples = [Sample(p, picture, i) for i, (p, picture) in enumerate(zip(repeated, pictures, strict=True))]
        return [samples[a : a + n] for a in range(0, len(samples), n)]

    def _check_kind(self, rollout: Rollout) -> None:
        """Refuse a rollout whose latents this model does not denoise."""
        shape, own = (
            tuple(rollout.prompt_payload["init"].shape[1:]),
            tuple(self.adapter.init(named_generator(0)).shape),
        )
        made = rollout.about.get("prediction", self.adapter.prediction)
        if shape != own or made != self.adapter.prediction:
            raise ValueError(
                f"this model denoises latents of shape {tuple(own)} and predicts {self.adapter.prediction}; the "
                f"rollout has {tuple(shape)} of a model that predicts {made}. Give one of the same kind"
            )

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """Steps of one depth at a time, siblings together, at most `max_batch` parent states each.

        With `whole_prompts`, prompts that share a part while it has at most `max_batch` steps.
        """
        tree = rollout.tree
        if whole_prompts:
            group, size = torch.unique(tree.group[steps], return_inverse=True, return_counts=True)[1:]
            return [steps[torch.isin(group, torch.tensor(part))] for part in _packed(size.tolist(), self.max_batch)]
        parts = []
        for depth in tree.depth[steps].unique():
            of_depth = steps[tree.depth[steps] == depth]
            # siblings share their parent's state, for which the network is called once
            state = torch.unique(tree.sibling_set[of_depth], return_inverse=True)[1]
            batch = state // self.max_batch
            for number in range(int(batch.max()) + 1):
                parts.append(of_depth[batch == number])
        return parts

    def log_probs(self, rollout: Rollout, steps: Tensor, *, reference: bool = False) -> ActionLogProbs:
        """Log-densities of the noisy transitions among `steps`, one network row per distinct parent state.

        With `reference`, `kl` is the closed Gaussian form against the initial model, `ref_logp` its log-density.
        """
        trained = steps[rollout.actions.trainable[steps]]
        if not len(trained):
            none = torch.zeros(0, device=self._device)
            return ActionLogProbs(trained, none, ref_logp=none if reference else None)
        depth = rollout.tree.depth[trained]
        # a depth has one noise level, so its transitions share the network call, the interval and the kernel
        outs = [self._log_probs_at(rollout, trained[depth == d], int(d), reference) for d in depth.unique()]
        joined = {}
        for name in ("index", "logp", "kl", "ref_logp"):
            parts = [x for o in outs if (x := getattr(o, name)) is not None]
            if parts:
                joined[name] = torch.cat(parts)
        extra = {name: torch.cat([o.extra[name] for o in outs]) for name in outs[0].extra}
        return ActionLogProbs(**joined, extra=extra)

    def _log_probs_at(self, rollout: Rollout, steps: Tensor, depth: int, reference: bool) -> ActionLogProbs:
        sampling, schedule = self._replay(rollout)
        x, own, inverse = _parent_states(rollout, steps)
        x, cond = x.float().to(self._device), _cond(rollout)
        model = self.model if torch.is_grad_enabled() else self._bare
        step = transition(sampling, schedule, depth, x, *self._predict(model, schedule, cond, x, depth, own))
        chosen = rollout.actions.payload["latent"][steps].float().to(self._device)
        inverse = inverse.to(self._device)
        logp = log_prob(chosen, step.mean[inverse], step.std, sampling.reduce)
        extra = self._extra(rollout, steps, step.mean[inverse], step.std, depth)
        if not reference:
            return ActionLogProbs(steps, logp, extra=extra)
        with self._reference.applied(self.model, self._bare) as model:
            ref = transition(sampling, schedule, depth, x, *self._predict(model, schedule, cond, x, depth, own))
        kl = gaussian_kl(step.mean, ref.mean, step.std, sampling.reduce)[inverse]
        ref_logp = log_prob(chosen, ref.mean[inverse], step.std, sampling.reduce)
        return ActionLogProbs(steps, logp, kl, ref_logp, extra=extra)

    def _extra(self, rollout: Rollout, steps: Tensor, mean: Tensor, std: float, depth: int) -> dict[str, Tensor]:
        """Numbers of each transition that rules of the loss can ask for; see `diffusion.loss_rules`."""
        sampling, schedule = self._replay(rollout)
        interval = schedule.interval(depth)
        noisy_stds = [s for s in kernel_stds(sampling, schedule) if s > 0]
        numbers = {
            "std": std,
            "relative_std": std * len(noisy_stds) / sum(noisy_stds),
            "interval": interval.s - interval.s2,
        }
        extra = {name: torch.full((len(steps),), x, device=mean.device) for name, x in numbers.items()}
        old = rollout.actions.payload.get("mean")
        if old is not None:
            extra["mean_shift"] = gaussian_kl(mean, old[steps].to(mean.device), std)
        return extra

    def samples(self, rollout: Rollout) -> list[Sample]:
        """Decoded leaves, without the candidates that nothing follows."""
        tree = rollout.tree
        leaves = (tree.is_leaf & ~tree.tags["side"] if "side" in tree.tags else tree.is_leaf).nonzero().flatten()
        pictures = self._finished(rollout.actions.payload["latent"][leaves].float())
        owner = rollout.tree.group[leaves].tolist()
        return [Sample(rollout.prompts[g], p, s) for g, p, s in zip(owner, pictures, leaves.tolist(), strict=True)]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seed: int) -> list[Sample]:
        """One ODE sample per prompt, from initial noise that depends on (seed, prompt id) alone."""
        if not prompts:  # of a process that has none of the evaluation's
            return []
        pictures = self._pictures(self._bare, prompts, [named_generator(seed, "evaluation", p.id) for p in prompts])
        return [Sample(p, picture, i) for i, (p, picture) in enumerate(zip(prompts, pictures, strict=True))]

    def _pictures(self, model: nn.Module, prompts: Sequence[Prompt], generators: Sequence[torch.Generator]) -> Tensor:
        """One ODE sample per prompt by `model`, each from a latent by its own generator."""
        levels = self.adapter.schedule(self.sampling.eval_steps or self.sampling.steps)
        schedule = NoiseSchedule(levels, [False] * (len(levels) - 1), [1.0] * (len(levels) - 1))
        cond = self._embed(prompts)
        init = torch.stack([self.adapter.init(g) for g in generators])

        def predict(x: Tensor, i: int, own: Tensor) -> tuple[Tensor, Tensor]:
            return self._predict(model, schedule, cond, x, i, own)

        return self._finished(sample_ode(predict, init.to(self._device), self.sampling, schedule))

    @torch.no_grad()
    def describe(self, rollout: Rollout, steps: Tensor) -> list[Tensor]:
        """(C, H, W) pictures in [0, 1]: a leaf's latent decoded, an inner step's clean estimate decoded."""
        _, schedule = self._replay(rollout)
        x = rollout.actions.payload["latent"][steps].float()
        depth, own = rollout.tree.depth[steps], rollout.tree.group[steps]
        for d in depth.unique():
            if int(d) + 1 < len(schedule):
                at = depth == d
                x[at] = self._predict(self._bare, schedule, _cond(rollout), x[at], int(d) + 1, own[at])[0].cpu()
        return list(self._decode(x))

    def merge_adapter(self) -> None:
        """See `mmrl.capabilities.AdapterMerger`."""
        self.model = merged(self._bare)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The model in diffusers' format, with LoRA the LoRA alone. Its weights are never sharded: see `build`."""
        self.adapter.save(self._bare, Path(folder))

    @torch.no_grad()
    def _finished(self, x: Tensor) -> Tensor:
        """Decoded latents (N, *D) at the end of their schedule.

        Raises:
            NotFiniteError: naming the denoising network, or the decoder where the latents are finite.
        """
        check_finite(x, "the denoising network", "finished latents")
        pictures = self._decode(x)
        check_finite(pictures, "the decoder of latents (VAE)", "pictures")
        return pictures

    def _decode(self, x: Tensor) -> Tensor:
        return torch.cat([self.adapter.decode(part.to(self._device)).cpu() for part in x.split(self.max_batch)])

    def _replay(self, rollout: Rollout) -> tuple[SamplingConfig, NoiseSchedule]:
        return SamplingConfig(**rollout.about["sampling"]), NoiseSchedule.from_record(rollout.about["course"])


def _as_tree(forest: Forest, num_steps: int) -> StepTree:
    """Every transition a step; a leaf counts as unfinished until a reward is written into it, a side candidate always.

    Tags: `std` of the step's kernel, and `side` where there are such candidates.
    """
    status = torch.where((forest.depth == num_steps - 1) | forest.side, UNFINISHED, INTERNAL)
    outcome = torch.full((len(status),), torch.nan)
    tags = {"std": forest.std} | ({"side": forest.side} if bool(forest.side.any()) else {})
    return StepTree(forest.parent, forest.group, status, outcome, logp=forest.logp, tags=tags)


def _packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive indices in parts whose sizes add up to at most `limit`; a larger one is a part of its own."""
    parts: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(i)
        room -= size
    return parts


def _cond(rollout: Rollout) -> Cond:
    return {k.removeprefix("cond_"): v for k, v in rollout.prompt_payload.items() if k.startswith("cond_")}


def _parent_states(rollout: Rollout, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct states before `steps`: latents (U, *D), prompt of each (U,), and the state of each step (S,)."""
    tree = rollout.tree
    _, inverse = torch.unique(tree.sibling_set[steps], return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(steps)).scatter_reduce_(
        0, inverse, torch.arange(len(steps)), "amin"
    )
    parent, own = tree.parent[steps[first]], tree.group[steps[first]]
    latent, init = rollout.actions.payload["latent"], rollout.prompt_payload["init"]
    if bool((parent < 0).any()):  # all steps of a call share their depth
        return init[own], own, inverse
    return latent[parent], own, inverse

"""A latent reward model: the denoiser itself, read at its inner features, judges noisy latents at any noise level.

LRM (Diffusion Model as a Noise-Aware Latent Reward Model): no decoding, one score per state of a trajectory,
exp(logit_scale) cos(image feature, condition feature). `trainer: step_reward` trains it on pairs noised alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.adapters.base import Cond, Level
from diffusion.adapters.pipeline import modular_class, pipeline_index
from diffusion.latent.features import Family
from diffusion.latent.transformers import family_of, load_denoiser
from diffusion.schedule import NoiseSchedule
from mmrl.finite import check_finite
from mmrl.model_names import model_name
from mmrl.reference import unwrap
from mmrl.registry import declares, find, names, of_kind
from mmrl.rollout import Prompt, Rollout
from mmrl.scorers.scoring import RECORD, probabilities

LOG_SCALE = 2.6592  # ln(1 / 0.07), as CLIP and LRM start


@dataclass(frozen=True)
class Space:
    """The latents a denoiser knows: their shape, what it predicts, and the noise schedule that gives t its meaning.

    shape: (*D) of one latent. scheduler: the configuration of the model's diffusers scheduler.
    """

    shape: tuple[int, ...]
    scheduler: dict[str, Any]

    @property
    def prediction(self) -> str:
        """flow, epsilon, v or sample, as `diffusion.kernels.Prediction`."""
        if str(self.scheduler["_class_name"]).startswith("FlowMatch") or self.scheduler.get("use_flow_sigmas"):
            return "flow"
        told = str(self.scheduler.get("prediction_type", "epsilon"))
        return {"v_prediction": "v"}.get(told, told)

    @cached_property
    def _abar(self) -> Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler).alphas_cumprod.double()

    def level(self, t: float) -> Level:
        """The level that the network knows as time t: flow (1 - t/N, t/N), otherwise (sqrt(abar), sqrt(1 - abar))."""
        if self.prediction == "flow":
            s = t / float(self.scheduler["num_train_timesteps"])
            return Level(1 - s, s, t)
        abar = float(self._abar[min(max(round(t), 0), len(self._abar) - 1)])
        return Level(abar**0.5, (1 - abar) ** 0.5, t)

    def grid(self, n: int) -> list[Level]:
        """n levels at even times from the clean end on, pure noise left out; LRM's 1, 51, .. 951 for n = 20."""
        count = int(self.scheduler["num_train_timesteps"])
        first = 0 if self.prediction == "flow" else 1
        return [self.level(first + count * k / n) for k in range(n)]

    def check(self, shape: Sequence[int], levels: Sequence[Level] = (), prediction: str | None = None) -> None:
        """Raises ValueError when latents of this shape, at these levels, of a model with this prediction are others
        than those the latent reward was trained on."""
        if tuple(shape) != self.shape:
            raise ValueError(
                f"this latent reward was trained on latents of shape {self.shape} and got {tuple(shape)}; train one "
                "on the denoiser (and resolution) whose samples it is to judge"
            )
        if prediction is not None and prediction != self.prediction:
            raise ValueError(
                f"this latent reward was trained on a denoiser that predicts {self.prediction!r}; the policy predicts "
                f"{prediction!r}. Train one on the policy's own denoiser"
            )
        for level in levels:
            own, scale = self.level(level.t), self._scale(level)
            worst = max(abs(own.a - scale * level.a), abs(own.s - scale * level.s))
            if worst > 2e-3 + 0.05 * (level.s == 0):  # clean latents are told as t = 0 or 1 alike
                raise ValueError(
                    f"another schedule: at t = {level.t:g} this latent reward ({self.prediction}) knows "
                    f"x = {own.a:.4f} x0 + {own.s:.4f} eps, the rollout has {level.a:.4f} x0 + {level.s:.4f} eps. "
                    "Train one with the policy's scheduler"
                )

    def _scale(self, level: Level) -> float:
        """Factor to this space: 1, or for variance-exploding latents x0 + s eps (Euler) 1 / sqrt(1 + s^2)."""
        exploding = self.prediction != "flow" and level.a == 1.0
        return float((1 + level.s**2) ** -0.5) if exploding else 1.0

    def known(self, x: Tensor, levels: Tensor) -> Tensor:
        """Latents (N, *D) at `levels` (N, 3) in this space, float32."""
        self.check(x.shape[1:], [Level(*row) for row in torch.unique(levels.double(), dim=0).tolist()])
        scale = torch.tensor([self._scale(Level(*row)) for row in levels.tolist()], device=x.device)
        return x.float() * scale.view(-1, *[1] * (x.ndim - 1))


class LatentNetwork(nn.Module):
    """Denoiser and head as one module, so that whatever wraps it sees both.

    The visual projection starts normal (std 0.02, LRM), the projection of the condition as the identity (SDXL's LRM
    has none; that of SD 1.5 loads CLIP's).

    Args:
        enhance: the weight w of VFE, 1 = off; by default the family's.
        family: a row of `latent_families` or a dotted path; by default the one named as the denoiser's class.
        pipeline: what a saved model needs to read its denoiser through the pipeline's blocks again: `model` and the
            options of `load_denoiser`; None for denoisers that are read alone.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        enhance: float | None = None,
        family: str | Family | None = None,
        pipeline: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pipeline = pipeline
        if isinstance(family, Family):
            self.family_name, self.family = "blocks", family
        else:
            self.family_name = family or type(denoiser).__name__
            self.family = find("latent_families", self.family_name).target
        self.enhance = self.family.enhance if enhance is None else enhance
        scales, width = self.family.widths(denoiser)
        self.family.prepare(denoiser)
        self.denoiser = denoiser
        self.visual_projection = nn.Linear(sum(scales), width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=0.02)
        nn.init.eye_(self.text_projection.weight)
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(N,) float32 scores of latents x (N, *D) at times t (N,) under conditions of one row per latent."""
        found = self.family.features(self.denoiser, x, t, cond)
        *scales, mid = found.scales
        if self.enhance != 1.0:  # visual feature enhancement: away from what the empty prompt sees
            null = self.family.features(self.denoiser, x, t, self.family.null(self.denoiser, cond)).scales[-1]
            mid = null + self.enhance * (mid - null)
        image = self.visual_projection(torch.cat([*scales, mid], 1))
        return self.logit_scale.exp() * F.cosine_similarity(image, self.text_projection(found.condition), dim=1)


def _untrained(options: Mapping[str, Any]) -> str:
    """Why a latent reward of these options gives random numbers; "" = it does not."""
    if (Path(str(options["model"])) / RECORD).is_file():
        return ""
    return f"a new head on the denoiser of {options['model']!r}, which has no {RECORD}"


class LatentReward:
    """A StepScorer on states of a denoising trajectory.

    A score is the log-odds of being preferred. Only differences between states of one prompt and level are trained;
    with the loss's `center` the mean of a prompt's samples is 0 at every level, so that sigmoid(score) is the
    probability of beating an average sample.

    Args:
        network: the denoiser with its head. space: the latents it was trained on.
        max_batch: most latents per network call. leaves_only: as a step reward, no opinion on inner steps: a leaf
            value without decoding.
    """

    def __init__(self, network: LatentNetwork, space: Space, max_batch: int = 256, leaves_only: bool = False) -> None:
        if max_batch < 1:
            raise ValueError(f"scorer.max_batch={max_batch}: at least 1")
        self.model: nn.Module = network.eval()  # a DiT in train() would drop labels at random
        self.space, self.max_batch, self.leaves_only = space, max_batch, leaves_only

    @classmethod
    @declares(reads=("actions.latent",), fits="latents", shardable=False, untrained=_untrained)
    def build(
        cls,
        model: Annotated[str, model_name("digits")] = "digits",
        enhance: float | None = None,
        max_batch: int = 256,
        train_denoiser: bool = True,
        leaves_only: bool = False,
        family: Annotated[str, of_kind("latent_families")] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        call: dict[str, Any] | None = None,
    ) -> LatentReward:
        """From a recipe's `scorer:` section.

        Args:
            model: "digits" (a new head on the built-in base), a folder with transformer/ or unet/ and scheduler/ (a
                new head on that), or a folder that `save` wrote. A pipeline whose denoiser has no row in
                `latent_families` is read through diffusers' blocks; what is saved then names this folder.
            enhance: the weight of VFE, by default LRM's 7.5 for a UNet and 1 (off) for a DiT, whose null class is
                untrained unless it learned without labels at times; a saved model brings its own.
            train_denoiser: off, only the head trains.
            family: how the denoiser is read, a row of `latent_families` or a dotted path; null goes by its class.
            height, width, num_frames, call: as the policy's, of a pipeline that is read through its blocks.
        Raises:
            ValueError: the folder holds neither, or `enhance` contradicts a saved model.
        """
        if model == "digits":
            from diffusion.digits_base import digits_base

            model = str(digits_base().folder)
        folder = Path(model)
        options = {"height": height, "width": width, "num_frames": num_frames, "call": call}
        options = {name: value for name, value in options.items() if value is not None}
        if (folder / RECORD).exists():
            network, space = _load_saved(folder, enhance, family)
        else:
            network, space = _load_new(folder, enhance, family, options)
        if not train_denoiser:
            network.denoiser.requires_grad_(False)
        return cls(network, space, max_batch, leaves_only)

    # ---- judge ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, x: Tensor, level: Level, cond: Cond, own: Tensor) -> Tensor:
        """(N,) float32 on the CPU: scores of latents x (N, *D) at one noise level, without gradient.

        Args:
            cond: conditions, one row per prompt, as the policy's adapter encodes them. own: (N,) prompt of each.
        Raises:
            ValueError: latents of another shape or schedule, or conditions that lack an entry.
        """
        levels = torch.tensor([level], dtype=torch.float64).expand(len(x), 3)
        parts = torch.arange(len(x)).split(self.max_batch)
        scores = torch.cat([self._scores(x[p], levels[p], cond, own[p]).cpu() for p in parts])
        check_finite(scores, "the latent reward", "latents")
        return scores

    @torch.no_grad()
    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) float64 sigmoid of the score of each prompt's initial noise.

        Raises:
            ValueError: the rollout has no initial latents or no recorded schedule.
        """
        if "init" not in rollout.prompt_payload or "course" not in rollout.about:
            raise ValueError("the rollout has no initial noise with its level: only a diffusion policy's own has")
        level = NoiseSchedule.from_record(rollout.about["course"]).levels[0]
        own = torch.arange(len(rollout.prompts))
        return self.score(rollout.prompt_payload["init"], level, _conditions(rollout), own).sigmoid().double()

    # ---- StepScorer -------------------------------------------------------------------------------------------

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 sigmoid of the score of the state after each step; NaN on inner steps with `leaves_only`."""
        if not self.leaves_only:
            return probabilities(self, rollout)
        leaves = rollout.tree.is_leaf.nonzero().flatten()
        out = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
        with torch.no_grad():
            for part in leaves.split(self.max_batch):
                out[part] = self.logits(rollout, part)[:, 0].double().sigmoid().cpu()
        check_finite(out, "the latent reward", "latents", leaves)
        return out

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All of them: a rollout brings the encoded conditions along."""
        return list(prompts)

    def readable(self, rollout: Rollout) -> Tensor:
        """(N,) bool, all."""
        return torch.ones(len(rollout.tree), dtype=torch.bool)

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """At most `max_batch` steps each; with `whole_prompts`, prompts that share a part while they fit into it."""
        if not whole_prompts:
            return list(steps.split(self.max_batch))
        group = rollout.tree.group[steps]
        parts: list[Tensor] = []
        for g in group.unique():
            own = steps[group == g]
            if parts and len(parts[-1]) + len(own) <= self.max_batch:
                parts[-1] = torch.cat([parts[-1], own])
            else:
                parts.append(own)
        return parts

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, 1) float32 scores of the states after `steps`, differentiable.

        Raises:
            ValueError: a rollout without latents, of another shape or schedule, or whose conditions lack an entry.
        """
        latent = rollout.actions.payload.get("latent")
        if latent is None:
            raise ValueError("the rollout has no latents: a latent reward scores rollouts of a diffusion policy")
        if told := rollout.about.get("prediction"):
            self.space.check(self.space.shape, prediction=str(told))
        own = rollout.tree.group[steps]
        return self._scores(latent[steps], levels_of(rollout)[steps], _conditions(rollout), own)[:, None]

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights as `latent_reward.safetensors`, the configurations of denoiser and scheduler, and the record."""
        folder, network = Path(folder), self._network
        config: Any = network.denoiser.config
        folder.mkdir(parents=True, exist_ok=True)
        weights = network.state_dict() if state_dict is None else state_dict
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / "latent_reward.safetensors")
        record = {
            "scorer": "latent_reward", "format": {"aggregate": "last"}, "enhance": network.enhance,
            "shape": list(self.space.shape), "prediction": self.space.prediction, "scheduler": self.space.scheduler,
            "class": type(network.denoiser).__name__, "family": network.family_name,
            "denoiser": {k: v for k, v in dict(config).items() if not k.startswith("_")},
            "pipeline": network.pipeline,
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    # ---- forward ----------------------------------------------------------------------------------------------

    @property
    def _network(self) -> LatentNetwork:
        inner = unwrap(self.model)
        assert isinstance(inner, LatentNetwork)
        return inner

    def _scores(self, x: Tensor, levels: Tensor, cond: Cond, own: Tensor) -> Tensor:
        """(N,) scores, on the model's device."""
        network, device = self._network, self._network.logit_scale.device
        needs = network.family.needs + (network.family.null_needs if network.enhance != 1.0 else ())
        missing = [k for k in needs if k not in cond]
        if missing:
            raise ValueError(
                f"the conditions have no {', '.join(missing)} (they have {', '.join(cond) or 'nothing'}): this latent "
                f"reward needs {', '.join(needs)}, one row per prompt; `pooled` is the pooled text feature and null_* "
                "those of the empty prompt (scorer.enhance=1 needs no null_*)"
            )
        x = self.space.known(x.to(device), levels)
        rows = {k: v.to(device)[own.to(device)] for k, v in cond.items()}
        model = self.model if torch.is_grad_enabled() else network
        return model(x, levels[:, 2].to(device, torch.float32), rows)


def _conditions(rollout: Rollout) -> dict[str, Tensor]:
    """The conditions that the policy's adapter encoded, one row per prompt."""
    return {k.removeprefix("cond_"): v for k, v in rollout.prompt_payload.items() if k.startswith("cond_")}


def levels_of(rollout: Rollout) -> Tensor:
    """(N, 3) float64 (a, s, t) of the state after each step: its own, or by its depth in the recorded schedule."""
    if "level" in rollout.actions.payload:
        return rollout.actions.payload["level"].double()
    if "course" not in rollout.about:
        raise ValueError("the rollout has no noise levels: neither a recorded schedule nor `level` per step")
    table = torch.tensor(NoiseSchedule.from_record(rollout.about["course"]).levels, dtype=torch.float64)
    return table[rollout.tree.depth + 1]


def _load_new(
    folder: Path, enhance: float | None, family: str | None, options: Mapping[str, Any]
) -> tuple[LatentNetwork, Space]:
    """A new head on the denoiser of a diffusers folder."""
    import diffusers

    part = next((p for p in ("unet", "transformer") if (folder / p / "config.json").exists()), None)
    file = folder / "scheduler" / "scheduler_config.json"
    if part is None or not file.exists():
        raise ValueError(
            f"scorer.model={str(folder)!r}: neither a saved latent reward ({RECORD}) nor a denoiser (transformer/ or "
            "unet/, and scheduler/, as a diffusers pipeline is saved)"
        )
    name = json.loads((folder / part / "config.json").read_text())["_class_name"]
    if family is None and name not in names("latent_families") and modular_class(pipeline_index(folder)) is not None:
        return _through_blocks({"model": str(folder), "options": dict(options)}, enhance)
    if options:
        raise ValueError(f"scorer.{next(iter(options))} is for pipelines with blocks; a {name} is read without one")
    denoiser = getattr(diffusers, name).from_pretrained(folder, subfolder=part, local_files_only=True)
    return LatentNetwork(denoiser, enhance, family), space_of(denoiser, json.loads(file.read_text()))


def _through_blocks(pipeline: Mapping[str, Any], enhance: float | None) -> tuple[LatentNetwork, Space]:
    """A new head on a denoiser that is called by its pipeline's blocks."""
    adapter = load_denoiser(pipeline["model"], pipeline["options"])
    network = LatentNetwork(adapter.model, enhance, family_of(adapter), pipeline)
    shape = tuple(adapter.init(torch.Generator().manual_seed(0)).shape)
    config = adapter.blocks.scheduler.config
    scheduler = {k: v for k, v in dict(config).items() if k != "_use_default_values"}
    return network, Space(shape, scheduler)


def space_of(denoiser: Any, scheduler: dict[str, Any]) -> Space:
    """The latents of a denoiser with square samples of its configured size."""
    c = denoiser.config
    return Space((c.in_channels, c.sample_size, c.sample_size), dict(scheduler))


def _load_saved(folder: Path, enhance: float | None, family: str | None) -> tuple[LatentNetwork, Space]:
    """What `save` wrote.

    Raises:
        ValueError: damaged, of another kind of scorer, or with another VFE weight than asked for.
    """
    import diffusers

    record = json.loads((folder / RECORD).read_text())
    if record.get("scorer") != "latent_reward":
        raise ValueError(f"{folder} holds a {record.get('scorer')!r}, no latent reward")
    if enhance is not None and enhance != record["enhance"]:
        raise ValueError(f"scorer.enhance={enhance}: {folder} was trained with {record['enhance']}; leave it out")
    if record.get("pipeline"):
        network, _ = _through_blocks(record["pipeline"], record["enhance"])
    else:
        denoiser = getattr(diffusers, record["class"])(**record["denoiser"])
        network = LatentNetwork(denoiser, record["enhance"], family or record.get("family"))
    try:
        network.load_state_dict(load_file(folder / "latent_reward.safetensors"))
    except Exception as error:
        raise ValueError(f"the latent reward in {folder} cannot be read ({error}); save it again") from error
    return network, Space(tuple(record["shape"]), record["scheduler"])

"""What is measured of a family: its adapter against the plain pipeline of the same folder."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import recipe
from torch import Tensor

from diffusion.adapters.base import Adapter
from diffusion.lora import lora_weights
from diffusion.policy import DiffusionPolicy
from diffusion.sampler import sample_ode
from diffusion.schedule import NoiseSchedule, SamplingConfig
from family_pipelines.builders import FAMILIES, Family
from mmrl.config import parse_config
from mmrl.rollout import BranchPlan, Prompt
from mmrl.trainers import trainer_of

TEXTS = ["a red cat", "two dogs on a hill"]
NEGATIVE = "blurred"
PROMPTS = [Prompt(f"p{i}", {"prompt": text}) for i, text in enumerate(TEXTS)]
STEPS = 4


class Run(NamedTuple):
    """latents: after the loop, in its layout. pictures: (N, C, H, W), or (N, F, C, H, W) of films."""

    latents: Tensor
    pictures: Tensor


def policy(name: str, folder: Path, **options: Any) -> DiffusionPolicy:
    family = FAMILIES[name]
    negative = {"negative_prompt": NEGATIVE} if family.negative else {}
    return DiffusionPolicy.build(str(folder), **{"steps": STEPS} | family.options | negative | options)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(len(TEXTS))]


def plain_pipeline(folder: Path) -> Any:
    """The pipeline as its users load it, with a first-order solver."""
    from diffusers import DiffusionPipeline, UniPCMultistepScheduler

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline.scheduler, UniPCMultistepScheduler):
        # without its corrector, UniPC of order 1 is Euler's method
        config = pipeline.scheduler.config
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            config, solver_order=1, disable_corrector=list(range(STEPS))
        )
    return pipeline


def run_plain(pipeline: Any, family: Family) -> Run:
    """The pipeline's own call. Its latents are seen where its scheduler gives them."""
    sizes = {k: v for k, v in family.options.items() if k in ("height", "width", "num_frames")}
    negative = {"negative_prompt": [NEGATIVE] * len(TEXTS)} if family.negative else {}
    stepped, own = [], pipeline.scheduler.step

    def step(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        stepped.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipeline.scheduler.step = step
    texts = list(TEXTS)  # Z-Image's pipeline writes its chat template into the list
    out = pipeline(
        texts, num_inference_steps=STEPS, generator=generators(), output_type="pt", **sizes, **negative, **family.plain
    )
    pipeline.scheduler.step = own
    return Run(stepped[-1].float(), (out.frames if family.film else out.images).float())


@torch.no_grad()
def run_adapter(adapter: Adapter, model: torch.nn.Module | None = None) -> Run:
    """The same by the adapter and the ODE."""
    levels, cond = adapter.schedule(STEPS), adapter.encode(PROMPTS)
    init = torch.stack([adapter.init(g) for g in generators()])

    def predict(x: Tensor, i: int, own: Tensor) -> tuple[Tensor, Tensor]:
        return adapter.predict(model or adapter.model, x, levels[i], cond, own)

    course = NoiseSchedule(levels, [False] * STEPS, [1.0] * STEPS)
    latents = sample_ode(predict, init, SamplingConfig(steps=STEPS), course)
    return Run(latents, adapter.decode(latents))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the larger of 1 and the largest value."""
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


@torch.no_grad()
def gather_error(adapter: Adapter) -> float:
    """Rows permuted, doubled and branched, in one batch, against each row alone with its prompt alone."""
    levels, cond = adapter.schedule(STEPS), adapter.encode(PROMPTS)
    x = torch.stack([adapter.init(g) for g in generators()])
    rows, own = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 0, 1])
    together = adapter.predict(adapter.model, x[rows], levels[1], cond, own)
    worst = 0.0
    for k in range(len(rows)):
        prompt = int(own[k])
        one = adapter.encode([PROMPTS[prompt]])
        alone = adapter.predict(adapter.model, x[rows[k : k + 1]], levels[1], one, torch.tensor([0]))
        worst = max(worst, *(gap(together[j][k], alone[j][0]) for j in range(2)))
    return worst


def ratio_deviation(policy: DiffusionPolicy) -> float:
    """Of the first update, whose guided predictions must be those of the rollout."""
    rollout = policy.rollout(PROMPTS, BranchPlan({0: 2, 2: 2}), seed=0)
    worst = 0.0
    for part in policy.micro_batches(rollout, rollout.actions.trainable.nonzero().flatten()):
        new = policy.log_probs(rollout, part)
        ratio = (new.logp.detach().cpu() - rollout.actions.logp[new.index]).exp()
        worst = max(worst, float((ratio - 1).abs().max()))
    return worst


class Reloaded(NamedTuple):
    """Of a LoRA that mmrl saved: how far the plain pipeline that loads it is from mmrl's own forward, and how far the
    LoRA takes its latents."""

    error: float
    effect: float


def reloaded_lora(name: str, folder: Path, saved: Path) -> Reloaded:
    trained = policy(name, folder, lora_rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in trained.model.named_parameters():
            if "lora_B" in key:
                value.copy_(torch.randn(value.shape, generator=generator))
    trained.save(saved)
    plain = plain_pipeline(folder)
    before = run_plain(plain, FAMILIES[name]).latents
    if (saved / "lora" / "pytorch_lora_weights.safetensors").exists():
        plain.load_lora_weights(saved / "lora")
    else:  # two experts
        plain.load_lora_weights(saved / "lora" / "transformer")
        plain.load_lora_weights(saved / "lora" / "transformer_2", load_into_transformer_2=True)
    mine, theirs = run_adapter(trained.adapter, trained.model), run_plain(plain, FAMILIES[name])
    return Reloaded(gap(mine.latents, theirs.latents), gap(before, theirs.latents))


def two_iterations(name: str, folder: Path, output: Path, iterations: int = 2, **run: Any) -> dict[str, Tensor]:
    """Branch GRPO by the usual trainer; the trained weights."""
    texts = output.parent / "prompts.txt"
    texts.write_text("\n".join(TEXTS))
    family = FAMILIES[name]
    options = (
        {"steps": STEPS, "lora_rank": 2} | family.options | ({"negative_prompt": NEGATIVE} if family.negative else {})
    )
    tree = recipe(
        folder, output, policy=options, plan={0: 2, 2: 2}, loss={"kl": 0.1}, optim={"lr": 1e-2},
        task={"name": "text_prompts", "train": str(texts), "eval": str(texts)},
        run={"iterations": iterations, "eval_every": 2, "prompts_per_iteration": 2, "checkpoint_every": 1} | run,
    )  # fmt: skip
    trainer = trainer_of(parse_config(tree))
    trainer.train()
    return lora_weights(trainer.policy.model)


def trained_names(policy: DiffusionPolicy) -> set[str]:
    """Parameters that a loss on all of a rollout's steps reaches."""
    rollout = policy.rollout(PROMPTS, BranchPlan({0: 2, 2: 2}), seed=0)
    for part in policy.micro_batches(rollout, rollout.actions.trainable.nonzero().flatten()):
        policy.log_probs(rollout, part).logp.sum().backward()
    return {name for name, p in policy.model.named_parameters() if p.grad is not None and bool(p.grad.any())}

"""What is measured of a family: its adapter against the plain pipeline of the same folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import PeftModel
from tiny import recipe
from torch import Tensor

from diffusion.adapters.base import Adapter
from diffusion.lora import lora_weights
from diffusion.policy import DiffusionPolicy
from diffusion.sampler import sample_ode
from diffusion.schedule import NoiseSchedule, SamplingConfig
from family_pipelines.builders import FAMILIES, HUNYUAN_LENGTHS, Family
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
    from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
    from diffusers.modular_pipelines.flux2.encoders import Flux2TextEncoderStep

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    if isinstance(pipeline.scheduler, UniPCMultistepScheduler):
        # without its corrector, UniPC of order 1 is Euler's method
        first_order = {"solver_order": 1, "disable_corrector": list(range(STEPS))}
        pipeline.scheduler = UniPCMultistepScheduler.from_config(config, **first_order)
    elif not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    if type(pipeline).__name__ == "Flux2Pipeline":  # its system prompt breaks a line where that of its blocks does not
        pipeline.system_message = Flux2TextEncoderStep.DEFAULT_SYSTEM_MESSAGE
    if type(pipeline).__name__ == "HunyuanVideo15Pipeline":
        for name, length in HUNYUAN_LENGTHS.items():
            setattr(pipeline, name, length)
    return pipeline


def run_plain(pipeline: Any, family: Family) -> Run:
    """The pipeline's own call, prompt by prompt. Its latents are seen where its scheduler gives them."""
    sizes = {k: v for k, v in family.options.items() if k in ("height", "width", "num_frames")}
    options = family.plain | sizes | ({"negative_prompt": NEGATIVE} if family.negative else {})
    stepped, own = [], pipeline.scheduler.step

    def step(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        stepped.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipeline.scheduler.step = step
    latents, pictures = [], []
    for text, generator in zip(TEXTS, generators(), strict=True):
        out = pipeline(prompt=text, num_inference_steps=STEPS, generator=generator, output_type="pt", **options)
        latents.append(stepped[-1].float())
        pictures.append((out.frames if family.film else out.images).float())
    pipeline.scheduler.step = own
    return Run(torch.cat(latents), torch.cat(pictures))


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
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    trained.save(saved)
    mine = run_adapter(trained.adapter, trained.model)
    plain = plain_pipeline(folder)
    before = run_plain(plain, FAMILIES[name]).latents
    if (saved / "lora" / "adapter_config.json").exists():  # no pipeline of the family loads LoRA
        plain.transformer = PeftModel.from_pretrained(plain.transformer, saved / "lora")
    elif not isinstance(plain, LoraBaseMixin):  # the pipeline loads no LoRA, its modular one does
        trained.adapter.lora_formats.update_components(transformer=plain.transformer)
        trained.adapter.lora_formats.load_lora_weights(saved / "lora")
    elif (saved / "lora" / "pytorch_lora_weights.safetensors").exists():
        plain.load_lora_weights(saved / "lora")
    else:  # two experts
        plain.load_lora_weights(saved / "lora" / "transformer")
        plain.load_lora_weights(saved / "lora" / "transformer_2", load_into_transformer_2=True)
    theirs = run_plain(plain, FAMILIES[name])
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


class Measured(NamedTuple):
    """A row of the table of families; errors as shares of the largest value."""

    replay: float
    pictures: float
    gather: float
    ratio: float
    half_ratio: float
    lora: Reloaded
    grad_norm: float
    resumed: bool


def measure(name: str, folder: Path, work: Path) -> Measured:
    """Everything that the tests of a family assert."""
    one = policy(name, folder)
    mine, plain = run_adapter(one.adapter), run_plain(plain_pipeline(folder), FAMILIES[name])
    whole = two_iterations(name, folder, work / "whole")
    two_iterations(name, folder, work / "parts", 1)
    resumed = two_iterations(name, folder, work / "parts", resume=True)
    rows = [json.loads(line) for line in (work / "whole" / "metrics.jsonl").read_text().splitlines()]
    return Measured(
        gap(mine.latents, plain.latents),
        gap(mine.pictures, plain.pictures),
        gather_error(one.adapter),
        ratio_deviation(one),
        ratio_deviation(policy(name, folder, dtype="bfloat16", storage="bfloat16", lora_rank=2)),
        reloaded_lora(name, folder, work / "lora"),
        next(row["policy/grad_norm"] for row in rows if "policy/grad_norm" in row),
        all(torch.equal(whole[k], resumed[k]) for k in whole),
    )

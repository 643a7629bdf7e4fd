"""Stable Diffusion's UNets as a policy, on tiny random pipelines that diffusers itself builds, saves and samples."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import recipe

from diffusion.adapters.unet import UNetAdapter
from diffusion.latent.lpo import LatentJudge
from diffusion.latent.reward import LatentReward
from diffusion.policy import DiffusionPolicy
from diffusion.sampler import sample_ode
from diffusion.schedule import NoiseSchedule, SamplingConfig
from diffusion.tasks.text_prompts import TextPrompts
from mmrl.config import ConfigError, load_config, parse_config
from mmrl.rollout import BranchPlan, Prompt, Rollout
from mmrl.scorers.scoring import good_logits
from mmrl.trainers import trainer_of

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
TEXTS = ["a red cat", "two dogs on a hill"]
PROMPTS = [Prompt(f"p{i}", {"prompt": t}) for i, t in enumerate(TEXTS)]
SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "steps_offset": 1, "timestep_spacing": "leading"}  # fmt: skip
NUMBERS = {"sd": 16, "xl": 16 + 24}  # width of the text that the UNet reads


def save_tokenizer(folder):
    """Letters alone, 24 tokens at most."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def text_encoder(kind, width):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=12, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return kind(config)


def unet(kind, size):
    options = {}
    if kind == "xl":
        options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                   "projection_class_embeddings_input_dim": 12 + 6 * 4}  # fmt: skip
    return UNet2DConditionModel(
        sample_size=size, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=NUMBERS[kind], attention_head_dim=4, norm_num_groups=4, **options,
    )  # fmt: skip


def save_pipeline(folder, kind="sd", prediction="epsilon", size=8):
    """A random pipeline of real classes."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.18215,
    )  # fmt: skip
    parts = {"vae": vae, "unet": unet(kind, size), "tokenizer": save_tokenizer(folder.parent / f"{folder.name}-words")}
    parts["text_encoder"] = text_encoder(CLIPTextModel, 16)
    if kind == "xl":
        parts["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, 24)
        parts |= {"tokenizer_2": parts["tokenizer"]}
        # as SDXL's own file, which says where DDIM ends though Euler's scheduler has no such option
        scheduler = EulerDiscreteScheduler.from_config(SD | {"prediction_type": prediction, "set_alpha_to_one": False})
        StableDiffusionXLPipeline(**parts, scheduler=scheduler).save_pretrained(folder)
    else:
        scheduler = PNDMScheduler(**SD, skip_prk_steps=True, prediction_type=prediction)
        quiet = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, scheduler=scheduler, **quiet).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    cases = {"sd": ("sd", "epsilon"), "sd-v": ("sd", "v_prediction"), "xl": ("xl", "epsilon")}
    return {name: save_pipeline(root / name, *case) for name, case in cases.items()}


@pytest.fixture(params=["sd", "xl"])
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(params=["sd", "sd-v", "xl"])
def every_folder(request, folders):
    return folders[request.param]


def pipeline(folder):
    kind = StableDiffusionXLPipeline if "xl" in folder.name else StableDiffusionPipeline
    found = kind.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config, clip_sample=False)
    return found


LPO = {"steps": 4, "noise": "all", "split_noise": "independent", "candidates": 3, "kernel": "ddim",
       "final_step": "sample"}  # fmt: skip


def policy(folder, **options):
    return DiffusionPolicy.build(str(folder), **LPO | options)


# ---- against diffusers ------------------------------------------------------------------------------------------


def test_without_a_prompt_is_the_empty_prompt(every_folder):
    adapter = policy(every_folder).adapter
    cond = adapter.encode(PROMPTS)
    got, empty = (
        adapter.unconditional(cond),
        adapter.encode([Prompt("a", {"prompt": ""}), Prompt("b", {"prompt": ""})]),
    )
    if adapter.xl:  # whose folder says force_zeros_for_empty_prompt
        empty |= {k: torch.zeros_like(empty[k]) for k in ("text", "pooled")}
    for name in ("text", "pooled"):
        torch.testing.assert_close(got[name], empty[name], atol=1e-5, rtol=0)
        assert not torch.allclose(got[name], cond[name], atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_our_ddim_is_that_of_diffusers(every_folder, guidance):
    adapter = UNetAdapter.from_pretrained(every_folder, guidance)
    levels = adapter.schedule(6)
    init = torch.randn(2, *adapter.shape, generator=torch.Generator().manual_seed(0))
    want = pipeline(every_folder)(
        TEXTS, num_inference_steps=6, guidance_scale=guidance, latents=init, eta=0.0, output_type="latent"
    )
    cond = adapter.encode(PROMPTS)

    def predict(x, i, own):
        return adapter.predict(adapter.model, x, levels[i], cond, own)

    with torch.no_grad():
        got = sample_ode(predict, init, SamplingConfig(steps=6), NoiseSchedule(levels, [False] * 6, [1.0] * 6))
    torch.testing.assert_close(got, want.images, atol=1e-4, rtol=1e-4)
    assert float((got - init).abs().mean()) > 0.1


def test_pictures_are_those_of_diffusers(folder):
    adapter, own = UNetAdapter.from_pretrained(folder), pipeline(folder)
    x = torch.randn(10, *adapter.shape)  # two parts
    with torch.no_grad():
        want = own.image_processor.postprocess(own.vae.decode(x / 0.18215).sample, output_type="pt")
    got = adapter.decode(x)
    torch.testing.assert_close(got, want)
    assert got.shape == (10, 3, 16, 16) and 0 <= float(got.min()) < float(got.max()) <= 1


def test_times_are_the_published_ones(folder):
    levels = UNetAdapter.from_pretrained(folder).schedule(20)
    assert [v.t for v in levels] == [*range(951, 0, -50), 0]
    assert all(v.a**2 + v.s**2 == pytest.approx(1) for v in levels)
    assert levels[-1].s == pytest.approx(0.00085**0.5, abs=1e-6)  # DDIM ends at t = 0, which is not quite clean


def test_std_of_the_steps_is_that_of_the_published_table(folders):
    p = policy(folders["sd"], steps=20, candidates=1)
    std = p.rollout(PROMPTS[:1], BranchPlan({}), seed=0).tree.tags["std"]
    for step, want in {0: 0.6444, 1: 0.6241, 10: 0.4016, 18: 0.0406, 19: 0.0206}.items():  # t = 951 - 50 step
        assert float(std[step]) == pytest.approx(want, abs=6e-5)


def test_conditions_are_those_of_the_pipelines(folder):
    adapter, own = UNetAdapter.from_pretrained(folder), pipeline(folder)
    cond = adapter.encode(PROMPTS)
    text, null, *pooled = own.encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(cond["text"], text)
    torch.testing.assert_close(cond["null_text"], null.expand_as(text))
    assert all(len(v) == 2 and v.is_contiguous() and not v.requires_grad for v in cond.values())
    if "xl" in folder.name:
        torch.testing.assert_close(cond["pooled"], pooled[0])
        assert not bool(cond["null_text"].any()) and not bool(cond["null_pooled"].any())  # zeros, by its configuration
        assert cond["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    else:
        assert bool(cond["null_text"].any()) and cond["pooled"].shape == (2, 16) and "time_ids" not in cond


def test_many_prompts_are_encoded_in_parts(folder):
    adapter = UNetAdapter.from_pretrained(folder)
    many, two = adapter.encode([*PROMPTS] * 20), adapter.encode(PROMPTS)
    for k, v in two.items():
        torch.testing.assert_close(many[k], v.repeat(20, *[1] * (v.ndim - 1)))


# ---- guidance, densities ----------------------------------------------------------------------------------------


def test_guidance_is_one_batched_call_and_1_is_none(every_folder):
    plain, guided = UNetAdapter.from_pretrained(every_folder, 1.0), UNetAdapter.from_pretrained(every_folder, 4.0)
    level, cond = plain.schedule(5)[2], plain.encode(PROMPTS)
    x, own, rows = torch.randn(3, *plain.shape), torch.tensor([0, 1, 1]), []

    def eps(adapter, cond):
        hook = adapter.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        with torch.no_grad():
            x0, eps = adapter.predict(adapter.model, x, level, cond, own)
        hook.remove()
        return level.a * eps - level.s * x0 if "sd-v" in str(every_folder) else eps  # guidance acts on v there

    null = cond | {"text": cond["null_text"], "pooled": cond["null_pooled"]}
    full, empty = eps(plain, cond), eps(plain, null)
    torch.testing.assert_close(eps(guided, cond), empty + 4.0 * (full - empty), atol=1e-4, rtol=1e-4)
    assert rows == [3, 3, 6] and not torch.allclose(full, empty, atol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_first_ratio_is_exactly_1(every_folder, lora_rank):
    p = policy(every_folder, guidance_scale=3.0, lora_rank=lora_rank, storage="bfloat16")
    rollout = p.rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    p.freeze_reference()
    for part in p.micro_batches(rollout, rollout.actions.trainable.nonzero().flatten()):
        new = p.log_probs(rollout, part, reference=True)
        assert torch.equal(new.logp.detach(), rollout.actions.logp[new.index])
        assert torch.equal(new.ref_logp, new.logp.detach()) and not bool(new.kl.detach().any())
    new.logp.sum().backward()
    trained = {n for n, v in p.model.named_parameters() if v.grad is not None}
    assert all(("lora_" in n) == bool(lora_rank) for n in trained) and trained


def test_rows_do_not_depend_on_company(folder):
    p = policy(folder, max_batch=2)
    many, one = p.rollout(PROMPTS, BranchPlan({}), seed=3), p.rollout(PROMPTS[1:], BranchPlan({}), seed=3)
    own = many.tree.group == 1
    torch.testing.assert_close(
        many.actions.payload["latent"][own], one.actions.payload["latent"], atol=1e-4, rtol=1e-4
    )


# ---- latent rewards ---------------------------------------------------------------------------------------------


def test_a_latent_reward_on_the_same_folder_reads_its_rollouts(folder, tmp_path):
    p, reward = policy(folder, guidance_scale=2.0), LatentReward.build(str(folder))
    assert reward.model.enhance == 7.5  # reads the empty prompt too
    rollout = Rollout.load(p.rollout(PROMPTS, BranchPlan({}), seed=0).save(tmp_path / "r"))
    values = good_logits(reward, rollout)
    assert values.shape == (len(rollout.tree),) and bool(values.isfinite().all()) and float(values.std()) > 0
    reward.save(tmp_path / "judge")
    found = LatentJudge(str(tmp_path / "judge"), told="before")(rollout)
    assert bool(found.isfinite().all())
    judged = p.sample_best(PROMPTS, k=p.sampling.candidates, score=reward.score, seed=0)
    assert len(judged.tree) == len(rollout.tree)


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_saved_policy_is_a_pipeline_again(folder, tmp_path):
    p = policy(folder)
    with torch.no_grad():
        for v in p.model.parameters():
            v.add_(0.02 * torch.randn_like(v))
    p.save(tmp_path / folder.name)
    back = policy(tmp_path / folder.name)
    same = [torch.equal(a, b) for a, b in zip(p.model.parameters(), back.model.parameters(), strict=True)]
    assert all(same) and back.adapter.schedule(4) == p.adapter.schedule(4)
    pictures = [torch.stack([s.output for s in q.generate(PROMPTS, seed=0)]) for q in (p, back)]
    assert torch.equal(*pictures) and pictures[0].shape == (2, 3, 16, 16)
    assert pipeline(tmp_path / folder.name).unet.config.sample_size == 8


def test_a_saved_lora_is_read_by_diffusers(folder, tmp_path):
    """With its alpha, which is twice the rank here."""
    p = policy(folder, lora_rank=2)
    with torch.no_grad():
        for n, v in p.model.named_parameters():
            if "lora_" in n:
                v.normal_(std=0.3)
    p.save(tmp_path)
    own = pipeline(folder)
    plain = [v.clone() for v in _unet_out(p, own.unet)]
    own.load_lora_weights(tmp_path / "lora")
    want = _unet_out(p, p.model)
    torch.testing.assert_close(_unet_out(p, own.unet), want, atol=1e-5, rtol=1e-5)
    assert float((want[0] - plain[0]).abs().max()) > 1e-3
    assert [f.name for f in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    p.merge_adapter()
    p.save(tmp_path / "whole")
    whole = _unet_out(p, pipeline(tmp_path / "whole").unet)
    torch.testing.assert_close(whole, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def _unet_out(p, model):
    x = torch.randn(2, *p.adapter.shape, generator=torch.Generator().manual_seed(1))
    level = p.adapter.schedule(4)[1]
    return p.adapter.predict(model, x, level, p.adapter.encode(PROMPTS), torch.arange(2))


def test_text_encoders_and_vae_are_frozen(folder):
    p = policy(folder)
    rest = [v for k, v in p.adapter.pipeline.components.items() if isinstance(v, torch.nn.Module) and k != "unet"]
    assert len(rest) == (3 if "xl" in folder.name else 2)
    assert not any(v.requires_grad or m.training for m in rest for v in m.parameters())
    p.adapter.decode(x := torch.randn(1, *p.adapter.shape, requires_grad=True)).mean().backward()
    assert float(x.grad.abs().sum()) > 0  # as ReFL needs it


def test_folders_that_are_something_else(folders, tiny_model, tmp_path):
    assert type(policy(tiny_model, kernel="posterior").adapter).__name__ == "DiTAdapter"
    unet("sd", 8).save_pretrained(tmp_path / "a" / "unet")
    with pytest.raises(
        ValueError, match="there is no model_index.json; it must be a saved StableDiffusionPipeline or"
    ):
        policy(tmp_path / "a")
    (tmp_path / "a" / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    with pytest.raises(ValueError, match="model_index.json says StableDiffusionInpaintPipeline"):
        policy(tmp_path / "a")
    (tmp_path / "b" / "transformer").mkdir(parents=True)
    (tmp_path / "b" / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(
        ValueError,
        match="is a FluxTransformer2DModel without model_index.json, for which there is no adapter: rows .*"
        r"\(DiTTransformer2DModel, UNet2DConditionModel\), nor blocks",
    ):
        policy(tmp_path / "b")
    with pytest.raises(ValueError, match="no model_index.json there and no transformer/config.json or unet/config"):
        policy(tmp_path)


def test_a_folder_with_a_safety_checker_in_its_index(folders, tmp_path):
    """As Stable Diffusion 1.5 is published; the parts that are not used need not be there."""
    shutil.copytree(folders["sd"], tmp_path / "sd")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    del index["image_encoder"], index["requires_safety_checker"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index))
    UNetAdapter.from_pretrained(tmp_path / "sd").pipeline.save_pretrained(tmp_path / "again")
    assert pipeline(tmp_path / "again").safety_checker is None


def test_schedules_and_latents_it_cannot_place(folders):
    from diffusers import EDMEulerScheduler

    found = pipeline(folders["sd"])
    found.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler with prediction_type 'epsilon' is no schedule"):
        UNetAdapter(found)
    found = pipeline(folders["sd"])
    found.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="a VAE with latents_mean"):
        UNetAdapter(found)


def test_prompts_without_text_and_too_long_ones(folders, caplog):
    adapter = UNetAdapter.from_pretrained(folders["sd"])
    with pytest.raises(ValueError, match="prompt 'x': inputs.prompt is None; a text is needed"):
        adapter.encode([Prompt("x", {"label": 1})])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            adapter.encode([Prompt("long", {"prompt": "a " * 30})])
    assert caplog.messages == ["prompt 'long' has 32 tokens; the text encoder reads the first 24"]


# ---- the task ---------------------------------------------------------------------------------------------------


def test_prompts_from_lines_and_from_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a red cat\n\n  two dogs \n")
    rows = ['{"prompt": "a", "tag": "x"}', "{}", '{"prompt": " ", "id": 3}', '{"prompt": "b", "id": 7}', "no"]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows, '{"prompt": "c", "id": "7"}']))
    task = TextPrompts(str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), max_bad=0.9)
    assert [(p.id, p.inputs["prompt"]) for p in task.prompts] == [("a.txt:1", "a red cat"), ("a.txt:3", "two dogs")]
    assert [(p.id, p.inputs, p.reference) for p in task.eval_prompts] == [
        ("b.jsonl:1", {"prompt": "a"}, {"tag": "x"}), ("7", {"prompt": "b"}, {}),
    ]  # fmt: skip
    assert [b.row for b in task.quarantined] == [2, 3, 5, 6] and task.quarantined[0].file.endswith("b.jsonl")
    assert len(TextPrompts(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), limit=1).prompts) == 1


def test_prompt_files_that_cannot_be_used(tmp_path):
    (tmp_path / "good.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"a\n\xff\xfe\n")
    good = str(tmp_path / "good.txt")
    for name, message in (
        ("none.txt", "no file .*none.txt"), ("empty.txt", "no usable row"),
        ("bytes.txt", "1 of 2 rows are bad, more than max_bad=0.05; line 2: no UTF-8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TextPrompts(good, str(tmp_path / name))
    tree = recipe(tmp_path, tmp_path / "run", rewards=[])
    tree["task"] = {"name": "text_prompts", "train": good, "eval": good}
    with pytest.raises(ConfigError, match=r"task.name='text_prompts' names no reward that fits it; list some in"):
        trainer_of(parse_config(tree))


def test_a_saved_lora_goes_on(folder, tmp_path):
    first = DiffusionPolicy.build(str(folder), lora_rank=2)
    with torch.no_grad():
        for weight in lora_parameters(first):
            weight.normal_(0.0, 0.1)
    first.save(tmp_path)
    again = DiffusionPolicy.build(str(folder), lora_rank=2, lora_start=str(tmp_path / "lora"))
    assert all(map(torch.equal, lora_parameters(first), lora_parameters(again)))


def lora_parameters(policy):
    return [weight for name, weight in policy.model.named_parameters() if "lora_" in name]


# ---- training ------------------------------------------------------------------------------------------------


def test_branch_grpo_raises_the_brightness(folders, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    options = {"steps": 4, "guidance_scale": 2.0}
    run = {"iterations": 6, "eval_every": 6, "prompts_per_iteration": 2}
    tree = recipe(folders["sd-v"], tmp_path / "run", policy=options, run=run, loss={"kl": 0.0}, optim={"lr": 4e-3})
    files = {"train": str(tmp_path / "p.txt"), "eval": str(tmp_path / "p.txt")}
    tree |= {"task": {"name": "diffusion.tasks.text_prompts:TextPrompts", **files}, "plan": {0: 4, 2: 2}}
    trainer = trainer_of(parse_config(tree))
    before = trainer.evaluate(0)["eval/reward"]
    assert trainer.train()["eval/reward"] > before + 0.005


def test_an_iteration_embeds_each_text_once(folders, tmp_path, monkeypatch):
    """Rollout, completions of its states, samples of the initial weights, two updates against the initial model."""
    embedded = []
    encode = UNetAdapter._encode_texts
    monkeypatch.setattr(
        UNetAdapter, "_encode_texts", lambda self, texts: embedded.append(texts) or encode(self, texts)
    )
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    files = {"train": str(tmp_path / "p.txt"), "eval": str(tmp_path / "p.txt")}
    tree = recipe(
        folders["sd"], tmp_path / "run", policy={"steps": 4}, plan={0: 2}, loss={"kl": 0.1},
        optim={"updates_per_rollout": 2}, run={"iterations": 2, "eval_every": 1, "prompts_per_iteration": 2},
        readings=[{"name": "monte_carlo", "n": 1}, {"name": "baseline", "n": 2}],
    )  # fmt: skip
    tree["task"] = {"name": "diffusion.tasks.text_prompts:TextPrompts", **files}
    trainer_of(parse_config(tree)).train()
    # three evaluations and two iterations
    assert [sorted(texts) for texts in embedded] == [["", *TEXTS]] * 5


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_two_iterations_of_the_recipe(name, folders, tmp_path):
    judge = LatentReward.build(str(folders[name]))
    torch.nn.init.normal_(judge.model.visual_projection.weight, std=1.0)
    judge.save(tmp_path / "judge")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in TEXTS))
    file = CONFIGS / ("lpo_sdxl.yaml" if name == "xl" else "lpo_sd15.yaml")
    changes = {
        "task.train": tmp_path / "p.jsonl", "task.eval": tmp_path / "p.jsonl", "policy.model": folders[name],
        "policy.steps": 4, "policy.lora_rank": 2, "step_rewards.0.model": tmp_path / "judge", "pairs.threshold": 0.0,
        "rewards": "[{name: 'tiny:brightness', timeout_s: 0}]", "run.output": tmp_path / "run", "run.iterations": 2,
        "run.prompts_per_iteration": 2, "run.eval_every": 2, "run.trackers": "[]", "run.report": "false",
        "run.mixed_precision": "'no'", "run.cpu": "true",
    }  # fmt: skip
    last = trainer_of(load_config(file, [f"{k}={v}" for k, v in changes.items()])).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if "preference/pairs" in r]
    assert [r["preference/pairs"] for r in trained] == [8, 8]  # two prompts, four noisy steps
    assert trained[0]["preference/margin"] == 0 and trained[1]["preference/margin"] != 0
    assert trained[0]["policy/grad_norm"] > 0 and 0 <= last["eval/reward"] <= 1
    own = pipeline(folders[name])
    own.load_lora_weights(tmp_path / "run" / "model" / "lora")
    assert any("lora" in n for n, _ in own.unet.named_parameters())

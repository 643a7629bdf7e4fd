"""Families of diffusion models through one adapter, on tiny random pipelines of the real classes.

The quick suite has three that differ most; `-m slow` has all.
"""

import json

import pytest
import torch
from family_pipelines.builders import FAMILIES, save_family
from family_pipelines.oracle import (
    PROMPTS,
    gap,
    gather_error,
    plain_pipeline,
    policy,
    ratio_deviation,
    reloaded_lora,
    run_adapter,
    run_plain,
    trained_names,
    two_iterations,
)
from PIL import Image

from diffusion.lora import lora_weights
from diffusion.policy import DiffusionPolicy
from mmrl.report.artifacts import save_output

QUICK = ("sd3", "flux", "wan")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """Folder of a family's pipeline, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = save_family(name, root / name)
        return made[name]

    return folder


@pytest.mark.parametrize("name", EVERY)
def test_replays_the_pipelines_own_loop(name, family_folder):
    mine, plain = (
        run_adapter(policy(name, family_folder(name)).adapter),
        run_plain(plain_pipeline(family_folder(name)), FAMILIES[name]),
    )
    assert gap(mine.latents, plain.latents) < 1e-5
    assert mine.pictures.shape == plain.pictures.shape and gap(mine.pictures, plain.pictures) < 1e-4
    assert float(plain.pictures.std()) > 0.01  # not all clipped


@pytest.mark.parametrize("name", EVERY)
def test_rows_of_a_batch_are_those_alone(name, family_folder):
    assert gather_error(policy(name, family_folder(name)).adapter) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_first_ratio_is_1_and_every_lora_weight_trains(name, family_folder):
    p = policy(name, family_folder(name), lora_rank=2)
    assert ratio_deviation(p) == 0.0
    half = policy(name, family_folder(name), lora_rank=2, dtype="bfloat16", storage="bfloat16")
    assert ratio_deviation(half) == 0.0
    names = trained_names(p)
    assert names and all("lora_" in n for n in names)


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_lora_does_the_same_in_the_plain_pipeline(name, family_folder, tmp_path):
    lora = reloaded_lora(name, family_folder(name), tmp_path)
    assert lora.error < 1e-5 and lora.effect > 5e-3


@pytest.mark.parametrize("name", EVERY)
def test_two_iterations_resumed_are_those_of_one_run(name, family_folder, tmp_path):
    folder = family_folder(name)
    whole = two_iterations(name, folder, tmp_path / "whole")
    half = two_iterations(name, folder, tmp_path / "parts", 1)
    resumed = two_iterations(name, folder, tmp_path / "parts", resume=True)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any(not torch.equal(whole[k], half[k]) for k in whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "policy/ratio_dev_max" in row]
    assert len(trained) == 2 and trained[0]["policy/ratio_dev_max"] == 0 and trained[0]["policy/grad_norm"] > 0


def test_a_film_is_kept_as_a_picture_that_moves(tmp_path):
    film = torch.rand(5, 3, 8, 8)
    with Image.open(tmp_path / save_output(film, tmp_path, "film")["picture"]) as kept:
        assert kept.n_frames == 5 and kept.size == (8, 8)


def test_keys_that_an_adapter_does_not_take(family_folder, tiny_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options, message in (
        ({"num_frames": 5}, "StableDiffusion3ModularPipeline takes no num_frames"),
        ({"call": {"max_length": 5}}, "takes no max_length; it knows.*max_sequence_length"),
        ({"lora_alpha": 2}, "policy.lora_alpha is for LoRA; set policy.lora_rank"),
        ({"lora_rank": 2, "lora_targets": ["query"]}, "lora_targets.*end in .*to_q"),
    ):
        with pytest.raises(ValueError, match=message):
            policy("sd3", family_folder("sd3"), **options)
    with pytest.raises(
        ValueError, match="policy.height=8: adapter 'DiTTransformer2DModel' does not take it; it takes g"
    ):
        DiffusionPolicy.build(str(tiny_model), height=8)
    with pytest.raises(ValueError, match="neither a folder nor a pipeline that the hub has"):
        DiffusionPolicy.build("no-such/model")


def test_lora_by_names_everywhere_and_from_a_start(family_folder, tmp_path):
    folder = family_folder("sd3")
    named = policy("sd3", folder, lora_rank=2, lora_alpha=3, lora_targets=["add_q_proj", "to_k"])
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in lora_weights(named.model)}
    assert layers == {"add_q_proj", "to_k"}
    everywhere = policy("sd3", folder, lora_rank=2, lora_targets="all-linear")
    assert len(lora_weights(everywhere.model)) > 3 * len(lora_weights(named.model))
    with torch.no_grad():
        for parameter in named.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    named.save(tmp_path)
    options = {"lora_rank": 2, "lora_alpha": 3, "lora_start": str(tmp_path / "lora")}
    again = policy("sd3", folder, lora_targets=["add_q_proj", "to_k"], **options)
    assert gap(run_adapter(again.adapter, again.model).latents, run_adapter(named.adapter, named.model).latents) == 0
    with pytest.raises(
        ValueError, match="layers do not fit, such as .*; set policy.lora_rank and policy.lora_targets"
    ):
        policy("sd3", folder, **options)


def test_a_lora_of_two_experts_goes_on_and_is_merged(family_folder, tmp_path):
    folder = family_folder("wan22")
    first = policy("wan22", folder, lora_rank=2)
    with torch.no_grad():
        for parameter in first.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    first.save(tmp_path / "first")
    again = policy("wan22", folder, lora_rank=2, lora_start=str(tmp_path / "first" / "lora"))
    want = run_adapter(first.adapter, first.model).latents
    assert gap(run_adapter(again.adapter, again.model).latents, want) == 0
    again.merge_adapter()
    again.save(tmp_path / "whole")
    whole = policy("wan22", tmp_path / "whole")
    assert gap(run_adapter(whole.adapter).latents, want) < 1e-5
    assert gap(run_adapter(policy("wan22", folder).adapter).latents, want) > 1e-3


def test_half_precision_and_checkpoints_of_gradients(family_folder):
    folder = family_folder("sd3")
    exact = policy("sd3", folder, lora_rank=2)
    cheap = policy("sd3", folder, lora_rank=2, gradient_checkpointing=True)
    assert trained_names(cheap) == trained_names(exact) and ratio_deviation(cheap) == 0
    for a, b in zip(exact.model.parameters(), cheap.model.parameters(), strict=True):
        assert a.grad is None or gap(a.grad, b.grad) < 1e-5
    half = policy("sd3", folder, dtype="bfloat16", frozen_dtype="bfloat16", lora_rank=2, offload_encoders=True)
    components = half.adapter.pipeline.components
    assert {components[name].dtype for name in ("transformer", "vae", "text_encoder_3")} == {torch.bfloat16}
    assert ratio_deviation(half) == 0 and trained_names(half) == trained_names(exact)
    mixed = policy("sd3", folder, frozen_dtype="bfloat16")
    for other in (half, mixed):
        far = gap(run_adapter(other.adapter).latents, run_adapter(exact.adapter).latents)
        assert 0 < far < 0.1


def test_without_guidance_the_network_is_called_once(family_folder):
    for name in ("sd3", "wan"):
        plain = policy(name, family_folder(name), guidance_scale=1.0).adapter
        guided = policy(name, family_folder(name)).adapter
        cond = plain.encode(PROMPTS)
        calls = []
        hook = plain.model.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        x, level = plain.init(torch.Generator().manual_seed(0))[None], plain.schedule(4)[1]
        alone = plain.predict(plain.model, x, level, cond, torch.tensor([0]))[1]
        hook.remove()
        both = guided.predict(guided.model, x, level, cond, torch.tensor([0]))[1]
        guided.without_guidance()
        again = guided.predict(guided.model, x, level, cond, torch.tensor([0]))[1]
        assert calls == [1] and torch.equal(alone, again) and not torch.allclose(alone, both, atol=1e-4)


def test_a_trained_pipeline_is_saved_whole(family_folder, tmp_path):
    trained = policy("flux", family_folder("flux"))
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.mul_(1.1)
    trained.save(tmp_path)
    plain = run_plain(plain_pipeline(tmp_path), FAMILIES["flux"])
    assert gap(run_adapter(trained.adapter).latents, plain.latents) < 1e-5
    assert gap(run_adapter(policy("flux", tmp_path).adapter).latents, plain.latents) < 1e-5

"""A LoRA result goes on: imitation with LoRA, branch GRPO on its adapter, annotation and search with that, export."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from families import family_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs import run_verb
from vision_tiny import vision_recipe

from mmrl.config import parse_config
from mmrl.trainers import trainer_of
from vision.forward.lora import LoraOptions, add_lora, load_adapter
from vision.inputs.loading import load_model
from vision.policy import VisionPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from test_imitation import text_recipe


def logits(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)("how many?", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def trained(tree):
    trainer = trainer_of(parse_config(tree))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Imitation with LoRA, then branch GRPO with a KL on its result."""
    folder = tmp_path_factory.mktemp("lora")
    first = text_recipe(folder, "sft", run={"iterations": 4}, optim={"lr": 1e-2}, policy={"lora_rank": 4})
    trained(first)
    second = vision_recipe(
        folder / "sft" / "model", folder, folder / "grpo", run={"iterations": 2}, loss={"kl": 0.1, "kl_form": "k3"},
    )  # fmt: skip
    second["task"] = first["task"]
    return folder, trained(second)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_trains_on_and_is_its_own_reference(runs):
    folder, trainer = runs
    first = next(row for row in rows(folder / "grpo") if "policy/kl" in row)
    assert first["policy/kl"] == pytest.approx(0, abs=1e-6)
    trains = [name for name, p in trainer.policy.model.named_parameters() if p.requires_grad]
    assert trains and all("lora_" in name for name in trains)
    config = json.loads((folder / "grpo" / "model" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(family_folder("text"))
    # the reference is the policy as it came from imitation, not the base without its adapter
    start = VisionPolicy.build(model=str(folder / "sft" / "model"))
    start.freeze_reference()
    with torch.no_grad():
        for name, p in start.model.named_parameters():
            if "lora_" in name:
                p.add_(0.05)
    task = trainer.run.task
    rollout = start.rollout(task.prompts[:1], trainer.run.plan, seed=0)
    same = VisionPolicy.build(model=str(folder / "sft" / "model"))
    every = torch.arange(len(rollout.tree))
    lent = start.log_probs(rollout, every, reference=True)
    assert torch.allclose(lent.ref_logp, same.log_probs(rollout, every).logp.detach(), atol=1e-5)
    assert not torch.allclose(lent.ref_logp, lent.logp.detach(), atol=1e-3)
    # and the weights in training are back in their place
    assert torch.equal(start.log_probs(rollout, every).logp, lent.logp)


def test_export_merges_what_peft_would(runs, tmp_path):
    from peft import PeftModel

    folder, _ = runs
    run_verb("export", folder / "grpo", tmp_path / "whole", "--merge")
    run_verb("export", folder / "grpo", tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    base = AutoModelForCausalLM.from_pretrained(family_folder("text")).eval()
    plain = logits(base, tmp_path / "whole")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(logits(whole, tmp_path / "whole"), logits(adapted, tmp_path / "adapter"), atol=1e-5)
    assert (logits(whole, tmp_path / "whole") - plain).abs().max() > 1e-3


def test_a_checkpoint_is_exported_at_any_time(runs, tmp_path):
    folder, _ = runs
    newest = sorted((folder / "grpo" / "checkpoints").iterdir())[-1]
    before = sorted(p.name for p in (folder / "grpo").iterdir())
    run_verb("export", newest, tmp_path / "m", "--merge")
    run_verb("export", folder / "grpo", tmp_path / "n", "--merge")
    assert torch.equal(
        logits(load_model(tmp_path / "m"), tmp_path / "m"), logits(load_model(tmp_path / "n"), tmp_path / "n")
    )
    assert sorted(p.name for p in (folder / "grpo").iterdir()) == before
    with pytest.raises(ValueError, match="exists already"):
        run_verb("export", folder / "grpo", tmp_path / "m")
    with pytest.raises(ValueError, match="belongs to no run"):
        run_verb("export", tmp_path, tmp_path / "o")


def test_what_a_path_in_a_run_means(runs, tmp_path, monkeypatch):
    folder, _ = runs
    checkpoints = folder / "grpo" / "checkpoints"
    newest = sorted(checkpoints.iterdir())[-1]
    monkeypatch.chdir(checkpoints)
    for place in (newest.name, checkpoints):
        out = tmp_path / f"of-{Path(place).name}"
        run_verb("export", place, out)
        saved, exported = (load_file(at / "adapter_model.safetensors") for at in (folder / "grpo" / "model", out))
        assert all(torch.equal(saved[name], exported[name]) for name in saved)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    best = tmp_path / "run" / "best" / "000004"
    shutil.copytree(folder / "grpo" / "model", best / "model")
    shutil.copy(folder / "grpo" / "config.yaml", tmp_path / "run")
    run_verb("export", best, tmp_path / "best")
    assert (tmp_path / "best" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="samples is neither a model nor a checkpoint"):
        run_verb("export", folder / "grpo" / "samples", tmp_path / "no")
    shutil.copytree(newest, tmp_path / "run" / "checkpoints" / newest.name)
    (tmp_path / "run" / "checkpoints" / newest.name / "state.json").unlink()
    with pytest.raises(ValueError, match="no sound checkpoint .state.json is missing"):
        run_verb("export", tmp_path / "run" / "checkpoints" / newest.name, tmp_path / "no")


def test_an_adapter_names_its_base_for_every_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(family_folder("text").parent)
    VisionPolicy.build(model="text", lora_rank=2).save(tmp_path / "first")
    # an adapter of another program may name it by a relative path
    file = tmp_path / "first" / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written["base_model_name_or_path"] == str(family_folder("text"))
    file.write_text(json.dumps(written | {"base_model_name_or_path": "text"}))
    VisionPolicy.build(model=str(tmp_path / "first")).save(tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    load_model(tmp_path / "second")


def test_one_process_exports_what_several_trained(runs, tmp_path):
    folder, _ = runs
    run = shutil.copytree(folder / "grpo", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["processes"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    run_verb("export", run / "checkpoints", tmp_path / "m")
    assert (tmp_path / "m" / "adapter_config.json").is_file()


def test_a_model_without_an_adapter_is_not_merged(tmp_path):
    trained(text_recipe(tmp_path, "full", run={"iterations": 1}))
    with pytest.raises(ValueError, match="no adapter to merge"):
        run_verb("export", tmp_path / "full", tmp_path / "m", "--merge")
    run_verb("export", tmp_path / "full", tmp_path / "m")
    load_model(tmp_path / "m")


@pytest.mark.parametrize("targets, ends", [
    (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}), (["q_proj"], {"q_proj"}),
    ("v_proj", {"v_proj"}), ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
])  # fmt: skip
def test_targets_of_a_new_lora(targets, ends):
    hf = add_lora(load_model(family_folder("qwen2_5_vl")), LoraOptions(2, alpha=3.0, targets=targets))
    reached = {name.split(".lora_")[0] for name, p in hf.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in reached} == ends and not any("visual" in name for name in reached)
    assert hf.peft_config["default"].lora_alpha == 3.0


def test_targets_and_ranks_that_do_not_fit_are_refused(runs):
    folder, _ = runs
    with pytest.raises(ValueError, match="no linear layer qkv; its linear layers end in down_proj"):
        add_lora(load_model(family_folder("text")), LoraOptions(2, targets=["qkv"]))
    with pytest.raises(ValueError, match="set lora_rank"):
        LoraOptions(alpha=2.0)
    for named in (LoraOptions(8), LoraOptions(4, alpha=2.0), LoraOptions(4, targets="all-linear")):
        with pytest.raises(ValueError, match="has rank 4 and trains on with its own alpha and layers"):
            load_adapter(load_model(family_folder("text")), folder / "sft" / "model", named)
    with pytest.raises(ValueError, match="lora_rank=4 trains the language model alone"):
        VisionPolicy.build(model=str(folder / "sft" / "model"), train_vision=True)


def test_annotation_and_search_take_an_adapter(runs, tmp_path):
    folder, _ = runs
    tree = vision_recipe(family_folder("text"), tmp_path, tmp_path / "x")
    job = {
        "policy": {**tree["policy"], "model": str(folder / "grpo" / "model")}, "split": "train",
        "task": {"name": "vision_tiny:Words", "folder": str(tmp_path), "pictures": 0},
        "prompts": 2, "method": {"name": "best_of_n", "n": 2}, "output": str(tmp_path / "found"),
        "verifier": tree["rewards"][0] if tree.get("rewards") else None,
    }  # fmt: skip
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(job))
    run_verb("search", file)
    assert len((tmp_path / "found" / "results.jsonl").read_text().splitlines()) == 2


def test_a_base_that_is_gone_is_said_to_be(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "sft" / "model", tmp_path / "m")
    file = tmp_path / "m" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(FileNotFoundError, match="adapter of the model '/no/such/model', which does not exist"):
        VisionPolicy.build(model=str(tmp_path / "m"))

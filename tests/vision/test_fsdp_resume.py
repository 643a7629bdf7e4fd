"""Runs whose weights accelerate shards (FSDP2) stop and go on: on as many ranks bit for bit, on one as well."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from families import family_folder
from processes import run_command, run_ranks
from safetensors.torch import load_file
from vision_tiny import vision_recipe

WORKER = Path(__file__).with_name("fsdp_worker.py")

# rounding of tiny gradients is not blown up to whole steps
RUN = {"iterations": 6, "prompts_per_iteration": 4, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 3}
RUN |= {"trackers": [], "report": False, "cpu": True}
OPTIM = {"lr": 1e-2, "eps": 1e-3, "ema": 0.9}


def policy_recipe(folder, **sections):
    (folder / "pictures").mkdir(exist_ok=True)
    model = family_folder("qwen2_5_vl")
    return vision_recipe(model, folder / "pictures", folder / "run", **{"optim": OPTIM, "run": RUN} | sections)


def grpo(folder):
    return policy_recipe(folder, loss={"kl": 0.1, "kl_form": "k3"})


def lora(folder):
    return policy_recipe(folder, policy={"lora_rank": 4})


def old_policy(folder):
    tree = policy_recipe(folder, optim=OPTIM | {"ema": None}, trainer="sample_loss", old_decay=0.5)
    tree["loss"] = {"name": "fsdp_worker:likely"}
    del tree["credit"]
    return tree


def step_reward(folder):
    return {
        "trainer": "step_reward", "task": {"name": "test_step_reward:Signs"}, "optim": OPTIM,
        "scorer": {"name": "vision_prm", "model": str(family_folder("qwen2_5_vl")), "format": {"marker": "\n\n"}},
        "run": RUN | {"output": str(folder / "run")},
    }  # fmt: skip


def kept(run):
    """Every tensor of the last checkpoint, whole, and the model that was written."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    folder = str(run / "checkpoints" / "000006" / "tensors")
    about = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(a.size, dtype=a.properties.dtype) for name, a in about.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
    for file in (run / "model").rglob("*.safetensors"):
        tensors |= {f"{file.name}/{name}": w for name, w in load_file(file).items()}
    return tensors


def halted(whole, copy):
    """The run as it stood after four iterations."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "000006")
    shutil.rmtree(copy / "model")
    return f"run.output={copy}"


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("recipe", [grpo, lora, old_policy, step_reward])
def test_a_sharded_run_goes_on_as_if_it_had_not_stopped(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path)))
    run_ranks(2, WORKER, file)
    want = kept(tmp_path / "run")
    averages = [name for name in want if name.startswith(("ema/", "old_policy/"))]
    assert averages and len(want) > 3 * len(averages)

    run_ranks(2, WORKER, file, "run.resume=true", halted(tmp_path / "run", tmp_path / "two"))
    for name, x in kept(tmp_path / "two").items():
        assert torch.equal(x, want[name]), name

    alone = run_command(WORKER, file, "run.resume=true", halted(tmp_path / "run", tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    whole = run_command(WORKER, file, f"run.output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for run in ("one", "whole"):
        got = kept(tmp_path / run)
        assert got.keys() == want.keys()
        for name, x in got.items():
            torch.testing.assert_close(x, want[name], atol=1e-4, rtol=0, msg=lambda m, r=run, n=name: f"{r} {n}: {m}")

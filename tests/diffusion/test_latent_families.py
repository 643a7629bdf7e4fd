"""Latent rewards on transformers that go through diffusers' blocks, and LPO by them."""

import json

import pytest
import torch
from family_pipelines.builders import FAMILIES, save_family
from family_pipelines.oracle import PROMPTS, TEXTS, policy
from tiny import brightness, recipe

from diffusion.latent.reward import LatentReward
from mmrl.config import parse_config, trainer_config
from mmrl.rewards.scoring import write_outcomes
from mmrl.rollout import BranchPlan
from mmrl.trainers import trainer_of

NAMES = ["sd3", "flux", "qwen_image", "wan"]
EVERY = [pytest.param(name, marks=() if name == "sd3" else pytest.mark.slow) for name in NAMES]
LPO = {"steps": 4, "noise": "all", "split_noise": "independent", "candidates": 3}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("latent_families"), {}
    return lambda name: made.setdefault(name, save_family(name, root / name))


def judge(name, folder):
    keys = ("height", "width", "num_frames", "call")
    reward = LatentReward.build(str(folder), **{k: v for k, v in FAMILIES[name].options.items() if k in keys})
    torch.nn.init.normal_(reward.model.visual_projection.weight, std=1.0)
    return reward


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_those_of_each_row_alone_and_survive_saving(name, family_folder, tmp_path):
    reward = judge(name, family_folder(name))
    rollout = policy(name, family_folder(name)).rollout(PROMPTS, BranchPlan({0: 2, 2: 2}), seed=0)
    every = torch.arange(len(rollout.tree))
    together = reward.logits(rollout, every)  # of several times and prompts
    alone = torch.cat([reward.logits(rollout, every[i : i + 1]) for i in every])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert float(together.std()) > 1e-3
    together.sum().backward()
    trained = [n for n, p in reward.model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert any("denoiser" in n for n in trained) and "visual_projection.weight" in trained
    reward.save(tmp_path / "saved")
    again = LatentReward.build(str(tmp_path / "saved"))
    assert torch.equal(again.logits(rollout, every), together)


def learned(name, folder, work):
    """Folder of a latent reward that was trained for two iterations on trees with rewards."""
    policy_of_trees = policy(name, folder, noise="all")
    for part in ("train", "eval"):
        rollout = policy_of_trees.rollout(PROMPTS, BranchPlan({0: 2, 2: 2}), seed=len(part))
        samples = policy_of_trees.samples(rollout)
        write_outcomes(rollout, samples, torch.tensor(brightness(samples))).save(work / part / "0")
    keys = ("height", "width", "num_frames", "call")
    options = {k: v for k, v in FAMILIES[name].options.items() if k in keys}
    tree = {
        "trainer": "step_reward", "scorer": {"name": "latent_reward", "model": str(folder), **options},
        "task": {"name": "tree_pairs", "train": str(work / "train"), "eval": str(work / "eval")},
        "loss": {"name": "preference", "center": 0.01}, "optim": {"lr": 3e-3},
        "run": recipe(folder, work / "reward")["run"] | {"iterations": 2, "prompts_per_iteration": 2},
    }  # fmt: skip
    trainer_of(parse_config(tree, model=trainer_config(tree))).train()
    rows = [json.loads(line) for line in (work / "reward" / "metrics.jsonl").read_text().splitlines()]
    assert any(value > 0 for row in rows for key, value in row.items() if key.endswith("grad_norm"))
    return work / "reward" / "model"


@pytest.mark.parametrize("name", EVERY)
def test_lpo_trains_by_a_latent_reward_that_was_trained(name, family_folder, tmp_path):
    reward = learned(name, family_folder(name), tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    files = {"train": str(tmp_path / "prompts.txt"), "eval": str(tmp_path / "prompts.txt")}
    tree = recipe(
        family_folder(name), tmp_path / "run", plan={}, optim={"lr": 1e-3}, task={"name": "text_prompts", **files},
        policy={"lora_rank": 2} | LPO | FAMILIES[name].options, run={"iterations": 2, "prompts_per_iteration": 2},
        step_rewards=[{"name": "latent_judge", "model": str(reward)}], loss={"name": "lpo", "beta": 500},
        pairs={"name": "extremes", "by": "step_reward", "squash": True, "threshold": 0.0},
    )  # fmt: skip
    tree |= {"trainer": "step_preference"}
    tree["loss"].pop("kl")
    trainer_of(parse_config(tree)).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "preference/pairs" in row]
    assert [row["preference/pairs"] for row in trained] == [6, 6]  # two prompts, three noisy steps
    assert trained[0]["preference/margin"] == 0 and trained[1]["preference/margin"] != 0
    assert trained[0]["policy/grad_norm"] > 0


def test_a_judge_of_other_latents_is_refused(family_folder):
    rollout = policy("sd3", family_folder("sd3"), height=24).rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    with pytest.raises(ValueError, match=r"trained on latents of shape \(4, 8, 8\) and got \(4, 12, 8\)"):
        judge("sd3", family_folder("sd3")).logits(rollout, torch.arange(2))

"""Readings of a video agent: turns completed in the clip, divergence from shuffled frames, and runs from recipes."""

import functools

import pytest
import torch
from agent_tiny import agent
from families import family_folder
from make_clips import write_clip

from mmrl.config import parse_config
from mmrl.readings import ReadingContext, fill
from mmrl.readings.contrast import divergence
from mmrl.rewards import score
from mmrl.rollout import BranchPlan, Place, Prompt
from mmrl.trainers.branch_grpo import BranchGrpo


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip") / "c.mp4", frames=250, size=(64, 96), gop=25))


def outcome(samples):
    return score(samples, {"length": (lambda s: [float(len(x.output)) for x in s], 1.0)}).total


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_turns_go_on_from_where_they_are_in_the_clip(family, clip):
    policy = agent(str(family_folder(family)), max_steps=5)
    prompts = [Prompt("a", {"question": "what is it", "videos": [clip]}), Prompt("b", {"question": "count it"})]
    rollout = policy.rollout(prompts, BranchPlan({0: 3, 1: 2}), seed=0)
    inner = (~rollout.tree.is_leaf).nonzero().flatten().tolist()
    places = [Place(int(rollout.tree.group[v]), v) for v in inner]
    assert places
    seeds = list(range(len(places)))
    found = policy.complete(rollout, places, 2, seeds=seeds, temperature=None)
    for place, own in zip(places, found, strict=True):
        (alone,) = policy.complete(rollout, [place], 2, seeds=[seeds[places.index(place)]], temperature=None)
        assert [s.output for s in own] == [s.output for s in alone] and len(own) == 2


def test_divergence_from_shuffled_frames_is_that_of_the_shuffled_prompt(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), max_steps=4)
    rollout = policy.rollout([Prompt("a", {"question": "what", "videos": [clip]})], BranchPlan({0: 3, 1: 2}), seed=0)
    reading = functools.partial(divergence, sight="shuffled")
    context = ReadingContext(policy, outcome)
    tree = fill(rollout, {"it": (reading, ("tags.divergence",))}, context, limit=0.0)[0].tree
    assert float(tree.tags["divergence"].min()) > 1e-8
    still = policy.divergence(rollout, torch.arange(len(tree)), "given")
    assert float(still.abs().max()) < 1e-7


RUNS = {
    "gae": {"credit": {"estimators": [{"name": "gae"}]}, "readings": [{"name": "monte_carlo", "n": 2}]},
    "igpo": {
        "credit": {"estimators": [{"name": "igpo"}], "transforms": ["progress"]},
        "readings": [{"name": "answer_probability", "lead": "FINAL_ANSWER: "}],
    },
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_methods_run_from_recipes(method, tmp_path):
    (tmp_path / "clips").mkdir()
    tree = {
        "task": {"name": "test_agent_readings:Asked", "folder": str(tmp_path / "clips")},
        "policy": {"name": "agent_tiny:agent", "model": str(family_folder("qwen2_5_vl"))},
        "plan": {0: 3}, "rewards": [{"name": "agent_tiny:digits", "timeout_s": 0}],
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "run": {"output": str(tmp_path / "run"), "iterations": 1, "prompts_per_iteration": 2, "eval_every": 9,
                "trackers": [], "report": False, "cpu": True},
        **RUNS[method],
    }  # fmt: skip
    metrics = BranchGrpo(parse_config(tree)).train()
    name = RUNS[method]["readings"][0]["name"]
    assert metrics[f"reading/{name}/failed_prompts"] == 0 and metrics["policy/grad_norm"] > 0


class Asked:
    """Questions about clips with an answer each."""

    rewards = ("agent_tiny:digits",)

    def __init__(self, folder):
        from dataclasses import replace

        from agent_tiny import Questions

        self.prompts = [replace(p, reference={"answer": "7"}) for p in Questions(folder, films=2).prompts[:4]]
        self.eval_prompts = self.prompts[:1]

    def judges(self, samples):
        return {}

"""Conversations with stills and films through a real vLLM engine. Runs where vLLM is installed (.ci/vllm)."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from families import picture
from film_album import FilmAlbum, prompts
from test_engine_vllm import EXACT, make

from mmrl.losses.mismatch import mismatch
from mmrl.rollout import BranchPlan
from vision.growth.engine_sync import SyncedEngine
from vision.growth.engine_vllm import VllmEngine
from vision.inputs.loading import load_model, load_processor, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.step_rule import step_rule
from vision.policy import VisionPolicy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm runs this"),
]
PLAN = BranchPlan({0: 3, 1: 2})


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """(policy, prompts): a tiny Qwen2.5-VL that vLLM samples for, one question with a picture."""
    root = tmp_path_factory.mktemp("talk")
    folder = make("qwen2_5_vl", root / "model")
    picture(0).save(root / "0.png")
    hf, processor = load_model(folder), load_processor(folder)
    options = PolicyOptions(temperature=0.9, max_new_tokens=12, max_steps=4, max_prompt_tokens=200)
    engine = VllmEngine.in_process(folder, max_model_len=512, gpu_memory_utilization=0.01, dtype="float32", films=True)
    album = FilmAlbum()
    rule = step_rule(tokenizer_of(processor), "line", hf.config.get_text_config().vocab_size)
    policy = VisionPolicy(hf, processor, rule, options, SyncedEngine(engine, shared=False), album)
    album.encode = policy.encode
    # untrained models hardly ever close a turn, so every fifth token does
    ends = [i for i in range(0, len(policy.tokenizer), 5) if i not in policy.sampling.banned]
    policy.sampling = replace(policy.sampling, eos=tuple(sorted({*policy.sampling.eos, *ends})))
    yield policy, prompts([str(root / "0.png")])
    engine.close()


def stale(policy, rollout):
    """How far the policy's log-probs are from those that were sampled."""
    again = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    return mismatch(again.logp.detach(), rollout.actions.logp[again.index])


def test_turns_after_films_and_stills_equal_the_update_before_and_after_a_change_of_weights(talk, capsys):
    policy, rows = talk
    rollout = policy.rollout(rows, PLAN, seed=0)
    seen, media = rollout.tree.tags["observed"], policy._engine.engine.counts
    assert int(rollout.tree.depth.max()) == 2 and int((seen > 0).sum()) >= 4
    assert rollout.counts["tokens"] > 50 and media["cached_tokens"] > 0
    before = stale(policy, rollout)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.model.hf.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=generator))
    old, new = stale(policy, rollout), stale(policy, policy.rollout(rows, PLAN, seed=1))
    with capsys.disabled():
        print(f"\nconversations: {before}\nstale {old}\nsynced {new}")  # noqa: T201
    assert before["max"] < EXACT and new["max"] < EXACT
    assert old["mean"] > 1e-2, "the change of weights must be visible"


def test_equal_seeds_give_equal_conversations_in_any_batch(talk):
    policy, rows = talk
    both, again = (policy.rollout(rows, PLAN, seed=3) for _ in range(2))
    assert torch.equal(both.actions.payload["token"], again.actions.payload["token"])
    alone = policy.rollout(rows[1:], PLAN, seed=3)
    assert torch.equal(both.select([1]).actions.payload["token"], alone.actions.payload["token"])


def test_greedy_conversations_are_those_of_transformers(talk):
    policy, rows = talk
    got = [s.output for s in policy.generate(rows, seed=0)]
    engine, policy._engine = policy._engine, None
    want = [s.output for s in policy.generate(rows, seed=0)]
    policy._engine = engine
    assert got == want

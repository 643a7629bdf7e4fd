"""Readings of conversations: the environment goes on from any turn, and shows what it showed."""

import functools
from dataclasses import replace

import pytest
import torch
from test_turns import policy_of, prompts

from mmrl.readings import ReadingContext, fill
from mmrl.readings.contrast import divergence
from mmrl.readings.monte_carlo import MonteCarlo
from mmrl.reasoning.readings.answers import AnswerProbability
from mmrl.rewards import score
from mmrl.rollout import Answer, BranchPlan, Place
from vision.forward.packing import ancestors
from vision.growth.answers import spell


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from families import picture

    folder = tmp_path_factory.mktemp("album")
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


def letters(samples):
    return [sum(c.isalpha() for c in s.output) / max(len(s.output), 1) for s in samples]


def outcome(samples):
    return score(samples, {"letters": (letters, 1.0)}).total


def rewarded(policy, family, files):
    rollout = policy.rollout(prompts(family, files), BranchPlan({0: 3, 1: 2}), seed=0)
    samples = policy.samples(rollout)
    leaves = torch.tensor([s.step for s in samples])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, outcome(samples)))


def filled(rollout, policy, reading, writes, **context):
    context = ReadingContext(policy, outcome, answer=lambda p: Answer("it is ", "3"), **context)
    return fill(rollout, {"it": (reading, writes)}, context, limit=0.0)[0].tree


def inner_places(rollout):
    inner = (~rollout.tree.is_leaf).nonzero().flatten().tolist()
    assert len(inner) > 2
    return [Place(0), Place(1), *(Place(int(rollout.tree.group[v]), v) for v in inner)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_greedy_completions_go_on_as_a_greedy_conversation_does(family, files):
    """Completed turn by turn: from every state of a greedy conversation the rest is the same conversation."""
    policy, _ = policy_of(family, files, turns=4)
    sampled, policy.sampling = policy.sampling, replace(policy.sampling, temperature=0.0)
    rollout = policy.rollout(prompts(family, files), BranchPlan({0: 1}), seed=0)
    policy.sampling = sampled
    whole = {int(rollout.tree.group[s.step]): s.output for s in policy.samples(rollout)}
    places = inner_places(rollout)
    found = policy.complete(rollout, places, 2, seeds=range(len(places)), temperature=0.0)
    assert [[s.output for s in own] for own in found] == [[whole[p.prompt]] for p in places]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_completions_of_a_forest_are_those_of_single_states(family, files):
    policy, _ = policy_of(family, files)
    rollout = rewarded(policy, family, files)
    places = inner_places(rollout)
    seeds = list(range(100, 100 + len(places)))
    together = policy.complete(rollout, places, 3, seeds=seeds, temperature=None)
    for place, seed, own in zip(places, seeds, together, strict=True):
        assert len(own) == 3
        (alone,) = policy.complete(rollout, [place], 3, seeds=[seed], temperature=None)
        assert [s.output for s in alone] == [s.output for s in own]
        turns = [rollout.texts[v] for v in ancestors(rollout.tree.parent.tolist(), place.step)[::-1]]
        assert place.step < 0 or all(
            s.output.split("\n")[: len(turns)] == turns for s in own if "\n" not in "".join(turns)
        )
    tree = filled(rollout, policy, MonteCarlo(n=2), ("value", "root_value", "tags.visits", "tags.q_sum"))
    assert bool(tree.value.isfinite().all()) and bool((tree.tags["visits"][~tree.is_leaf] == 2).all())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_answers_stand_behind_what_was_shown(family, files):
    """The probability after a turn is that of the same words written as the next turn of the conversation."""
    policy, _ = policy_of(family, files)
    rollout = rewarded(policy, family, files)
    tree = filled(rollout, policy, AnswerProbability(), ("value", "root_value"))
    ids, first = spell(Answer("it is ", "3"), policy._rollouts.ids_of)
    parent = rollout.tree.parent.tolist()
    for place in inner_places(rollout):
        path = ancestors(parent, place.step)[::-1] if place.step >= 0 else []
        turns = [policy._trees.ids(rollout, v).tolist() for v in path]
        prompt = rollout.prompts[place.prompt]
        nodes = policy._dialogue._nodes_of_turns(prompt, policy.encode(prompt), 0, [*turns, ids.tolist()], 0)
        assert len(nodes) == len(turns) + 1
        told = policy._rollouts.of_nodes([prompt], [policy.encode(prompt)], nodes, {})
        policy.sampling, sampled = replace(policy.sampling, temperature=1.0), policy.sampling
        with torch.no_grad():
            logp = policy.log_probs(told, torch.tensor([len(turns)])).logp
        policy.sampling = sampled
        got = tree.root_value[place.prompt] if place.step < 0 else tree.value[place.step]
        assert float(got.log()) == pytest.approx(float(logp[first:].mean()), abs=1e-4)


def test_what_was_shown_is_blanked_too(files):
    policy, _ = policy_of("qwen2_5_vl", files)
    rollout = rewarded(policy, "qwen2_5_vl", files)
    got = filled(rollout, policy, divergence, ("tags.divergence",)).tags["divergence"]
    blind = rollout.tree.group == 1  # a prompt without a picture: it diverges only once one was shown
    first = blind & (rollout.tree.parent < 0)
    assert float(got[first].abs().max()) < 1e-6 < float(got[~blind].min())
    with pytest.raises(RuntimeError, match="has no frames to shuffle"):
        filled(rollout, policy, functools.partial(divergence, sight="shuffled"), ("tags.divergence",))

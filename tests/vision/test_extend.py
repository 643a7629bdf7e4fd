"""Going on from any state: what a policy that writes offers to annotation and search (`mmrl.capabilities.Extender`)."""

import functools

import pytest
import torch
from families import FAMILIES, family_folder

from mmrl.growth import ROOT, GrowingTree, rollout_of
from mmrl.rollout import Prompt, State
from mmrl.scorers.labelled import solution_forest
from vision.inputs.loading import vision_tower
from vision.inputs.prompts import PromptError
from vision.policy import VisionPolicy


def build(family="qwen2_5_vl", newline=1.5, **options):
    """A policy that ends lines often and says nothing but ordinary characters, so that texts and ids agree."""
    policy = VisionPolicy.build(
        model=str(family_folder(family)), **({"temperature": 0.7, "max_new_tokens": 30, "max_steps": 8} | options)
    )
    special = sorted(set(policy.tokenizer.get_added_vocab().values()) - {policy.tokenizer.eos_token_id})
    line = policy.tokenizer.encode("\n", add_special_tokens=False)

    def shift(module, args, out):
        more = torch.zeros(out.shape[-1])
        more[special], more[line] = -50.0, newline
        return out + more

    policy.model.hf.get_output_embeddings().register_forward_hook(shift)
    return policy


policy_of = functools.cache(build)


def prompt(pictures, family="qwen2_5_vl", i=0):
    images = [] if family == "text" else [str(pictures / "0.png")]
    return Prompt(f"p{i}", {"question": "how many " * (i + 1), "images": images})


def states(pictures, family="qwen2_5_vl"):
    return [
        State(prompt(pictures, family)), State(prompt(pictures, family), ("1 + 1\n",)),
        State(prompt(pictures, family, 1), ("a\n", "b")),
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_a_prefix_equals_the_whole(family, pictures):
    """The sampled log-probs are those of the written whole, teacher forced, behind a prefix of any length."""
    policy = policy_of(family)
    for state, own in zip(states(pictures, family), policy.extend(states(pictures, family), 2, seed=3), strict=True):
        for c in own:
            whole = policy.write([state.prompt], [state.text + "".join(c.steps)])
            with torch.no_grad():
                lp = policy.log_probs(whole, torch.arange(len(whole.tree))).logp
            sampled = torch.tensor([x for step in c.logps for x in step])
            before = len(policy.tokenizer.encode(state.text, add_special_tokens=False))
            torch.testing.assert_close(lp[before : before + len(sampled)], sampled, atol=1e-5, rtol=0)
            assert c.tokens == len(sampled) and len(c.steps) == len(c.logps)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_one_step_at_a_time(family, pictures):
    policy = policy_of(family)
    own = policy.extend(states(pictures, family), 8, seed=1, steps=1)
    assert [len(o) for o in own] == [8, 8, 8]
    flat = [c for o in own for c in o]
    assert all(len(c.steps) == 1 for c in flat) and {c.done for c in flat} == {True, False}
    for c in flat:
        assert c.done or (c.steps[0].endswith("\n") and c.steps[0].strip())
        assert not c.truncated or c.done
    two = policy.extend(states(pictures, family), 8, seed=1, steps=2)
    for short, long in zip(own, two, strict=True):  # the same draws go further
        assert sorted(c.steps[0] for c in short) == sorted(c.steps[0] for c in long)
        going = {c.steps[0] for c in short if not c.done}
        assert all(len(c.steps) == (2 if c.steps[0] in going else 1) for c in long)
    whole = policy.extend(states(pictures, family), 8, seed=1)
    assert all(c.done for o in whole for c in o)


def test_steps_joined_are_the_text_and_states_grow(pictures):
    policy = policy_of()
    state = State(prompt(pictures))
    for seed in range(12):
        (found,) = policy.extend([state], 1, seed=seed, steps=1)
        if not found[0].done:
            break
    after = state.then(found[0])
    assert after.steps == found[0].steps and not after.done and after.text == "".join(after.steps)
    (again,) = policy.extend([after], 3, seed=0)
    assert all(after.then(c).done for c in again)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "text"])
def test_a_draw_depends_on_seed_prompt_id_and_text_alone(family, pictures):
    policy = policy_of(family)
    three = states(pictures, family)
    whole = policy.extend(three, 2, seed=5)
    texts = [[c.steps for c in o] for o in whole]
    for i, state in enumerate(three):
        (alone,) = policy.extend([state], 2, seed=5)
        assert [c.steps for c in alone] == texts[i]
        for a, b in zip(alone, whole[i], strict=True):
            assert sum(a.logps, ()) == pytest.approx(sum(b.logps, ()), abs=1e-5)
    assert [[c.steps for c in o] for o in policy.extend(three[::-1], 2, seed=5)] == texts[::-1]
    cut = (State(three[2].prompt, ("a", "\nb")),)  # the same text in other steps is the same state
    assert [c.steps for c in policy.extend(cut, 2, seed=5)[0]] == texts[2]
    small = build(family, max_batch=2)
    assert [[c.steps for c in o] for o in small.extend(three, 2, seed=5)] == texts
    other = State(Prompt("else", three[1].prompt.inputs), three[1].steps)
    assert [c.steps for c in policy.extend([other], 2, seed=5)[0]] != texts[1]
    assert [[c.steps for c in o] for o in policy.extend(three, 2, seed=6)] != texts


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_temperature_zero_is_greedy(family, pictures):
    policy = policy_of(family)
    own = policy.extend(states(pictures, family), 3, seed=1, temperature=0.0)
    assert all(len({c.steps for c in o}) == 1 for o in own)
    assert [o[0].steps for o in own] == [
        o[0].steps for o in policy.extend(states(pictures, family), 1, seed=2, temperature=0.0)
    ]
    state, c = states(pictures, family)[1], own[1][0]
    whole = policy.write([state.prompt], [state.text + "".join(c.steps)])
    at = len(policy.tokenizer.encode(state.text, add_special_tokens=False))
    ids = whole.actions.payload["token"]
    for t in range(min(5, c.tokens)):  # every token is the most likely one behind those before it
        text = policy.tokenizer.decode(ids[: at + t])
        letters = [x for x in "abcdefghijklmnopqrstuvwxyz0123456789\n +-=<>" if x]
        logps = policy.choice_logps(
            [State(state.prompt, (text,))], [*letters, policy.tokenizer.decode(ids[at + t])][-1:]
        )
        assert float(logps.max()) >= float(policy.choice_logps([State(state.prompt, (text,))], letters).max()) - 1e-5


def test_another_temperature_is_one_draw_from_another_distribution(pictures):
    policy = policy_of()
    hot, cold = (policy.extend(states(pictures), 8, seed=1, temperature=t) for t in (2.0, 0.2))
    mean = [
        sum(sum(map(sum, c.logps)) for o in own for c in o) / sum(c.tokens for o in own for c in o)
        for own in (hot, cold)
    ]
    assert mean[1] > mean[0] + 0.5 and policy.sampling.temperature == 0.7


def test_siblings_differ(pictures):
    (own,) = policy_of().extend(states(pictures)[:1], 8, seed=1)
    assert len({c.steps for c in own}) > 5


def test_the_longest_length_ends_it_and_is_told(pictures):
    policy = build(max_new_tokens=4, newline=-50.0)
    own = [c for o in policy.extend(states(pictures), 4, seed=1, steps=1) for c in o]
    assert any(c.truncated for c in own)
    assert all(c.done and c.truncated == (c.tokens == 4 and len(c.steps[0]) == 4) for c in own)


def test_the_picture_is_encoded_once(pictures):
    policy = build()
    calls = []
    vision_tower(policy.model.hf).register_forward_hook(lambda *_: calls.append(1))
    policy.extend(states(pictures), 4, seed=1)
    policy.extend(states(pictures), 4, seed=2, steps=1)
    assert len(calls) == 1


def test_a_bad_prompt_is_an_error_that_admit_foresees(pictures):
    policy, bad = policy_of(), Prompt("bad", {"question": "?", "images": [str(pictures / "none.png")]})
    assert policy.admit([bad]) == []
    with pytest.raises(PromptError, match="none.png"):
        policy.extend([State(bad)], 1, seed=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_placeholder_that_was_written_is_text(family, pictures):
    """A policy can spell it out of ordinary characters; read back as one token it would ask for features."""
    policy = policy_of(family)
    token = policy.tokenizer.convert_ids_to_tokens(policy.sampling.banned[-1])
    state = State(prompt(pictures, family), (f"see {token}\n",))
    ids = policy._rollouts.ids_of(state.text)
    assert len(ids) == len(state.text) and not torch.isin(ids, torch.tensor(policy.sampling.banned)).any()
    ((one,),) = policy.extend([state], 1, seed=0)
    assert all(x == x and x > -50 for step in one.logps for x in step)
    assert torch.isfinite(policy.choice_logps([state], ["a", "b"])).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "text"])
def test_choices_are_the_next_tokens_log_probs(family, pictures):
    """(S, C), each against one written continuation; a batch of states equals each alone."""
    policy = build(family, temperature=1.0)
    asked = states(pictures, family)
    got = policy.choice_logps(asked, ["Yes", "No", "\n"])
    assert got.shape == (3, 3) and got.dtype == torch.float32 and not got.requires_grad
    for i, state in enumerate(asked):
        torch.testing.assert_close(policy.choice_logps([state], ["Yes", "No", "\n"])[0], got[i], atol=1e-5, rtol=0)
        for k, first in enumerate("YN\n"):
            whole = policy.write([state.prompt], [state.text + first])
            with torch.no_grad():
                lp = policy.log_probs(whole, torch.arange(len(whole.tree))).logp
            assert float(lp[len(state.text)]) == pytest.approx(float(got[i, k]), abs=1e-5)
    small = build(family, temperature=0.3, max_batch=1)  # neither batching nor the temperature enter
    torch.testing.assert_close(small.choice_logps(asked, ["Yes", "No", "\n"]), got, atol=1e-5, rtol=0)


def test_tokens_of_written_texts_come_back_in_their_order(pictures):
    policy = policy_of()
    prompts = [prompt(pictures, i=i) for i in range(2)]
    rollout, _ = solution_forest(prompts, [[["a", "b"], ["a", "c"]], [["d"]]])
    out = policy.write_steps(rollout)
    assert out.tree.parent.tolist() == rollout.tree.parent.tolist() == [-1, 0, 0, -1]
    assert [t.strip() for t in out.texts] == rollout.texts
    assert out.tree.is_leaf.tolist() == [False, True, True, True] and out.prompts == prompts
    with torch.no_grad():
        assert torch.isfinite(policy.log_probs(out, torch.arange(4)).logp).all()


def test_a_state_goes_on_from_the_ids_that_were_sampled(pictures):
    """Other ids may spell its text as well; here they plainly do not, so that it shows."""
    policy = policy_of()
    said = tuple(policy.tokenizer.encode("1 + 1\n", add_special_tokens=False))
    (want,) = policy.extend([State(prompt(pictures), ("1 + 1\n",))], 1, seed=0)
    for ids, same in ((said, True), (said[::-1], False)):
        (got,) = policy.extend([State(prompt(pictures), ("1 + 1\n",), ids=(ids,))], 1, seed=0)
        assert (got[0].logps[0] == pytest.approx(want[0].logps[0], abs=1e-5)) is same
        flat = [i for step in got[0].ids for i in step]
        assert policy.tokenizer.decode(flat, skip_special_tokens=True) == "".join(got[0].steps)


def test_steps_keep_their_sampled_tokens_and_log_probs(pictures):
    """A grown tree becomes a rollout whose ratio is 1: nothing is tokenised or scored again."""
    policy = policy_of()
    tree = GrowingTree(prompt(pictures))
    (first,) = policy.extend([tree.state(ROOT)], 3, seed=4, steps=1)
    for c in first:
        (end,) = tree.grow(ROOT, c)
        if not c.done:
            for more in policy.extend([tree.state(end)], 2, seed=4)[0]:
                tree.grow(end, more)
    rollout = policy.write_steps(rollout_of([tree]))
    assert len(rollout.tree) > 5 and not rollout.tree.is_chains
    assert rollout.texts == tree.texts[1:] and rollout.about["temperature"] == 0.7
    with torch.no_grad():
        lp = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    torch.testing.assert_close(lp.logp, rollout.actions.logp[lp.index], atol=1e-5, rtol=0)

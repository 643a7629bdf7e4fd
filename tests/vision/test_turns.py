"""Conversations with an environment: what is sampled, what is shown in between, and the same thing in the update."""

from dataclasses import replace

import pytest
import torch
from families import family_folder, picture

from mmrl.rollout import BranchPlan, Prompt, Rollout
from vision.growth.environment import TurnResult
from vision.inputs.loading import load_model, load_processor, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.step_rule import step_rule
from vision.policy import VisionPolicy

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "text")


class Album:
    """Shows a picture after turns with an even number of letters, words after the others, and ends after `turns`."""

    def __init__(self, encode, files, turns=3):
        self.encode, self.files, self.turns, self.asked = encode, files, turns, 0

    def start(self, prompt):
        return (prompt.id,)

    def step(self, state, text, used):
        self.asked += 1
        state = (*state, text)
        if len(state) > self.turns:
            return TurnResult(state, None)
        images = self.files[len(text) % len(self.files) :][:1] if self.files and len(text) % 2 == 0 else []
        seen = self.encode(Prompt("seen", {"question": "look " * (1 + len(text) % 3), "images": images}))
        return TurnResult(state, seen, ok=len(text) > 3)

    def picture(self, state, text):
        return picture(len(state)) if len(text) % 2 == 0 else None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    out = []
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
        out.append(str(folder / f"{i}.png"))
    return out


def policy_of(family, files, *, mode="auto", turns=3, train_vision=False, **more):
    folder = family_folder(family)
    hf, processor = load_model(folder), load_processor(folder)
    if not train_vision:
        for name, p in hf.named_parameters():
            if "visual" in name or "vision" in name:
                p.requires_grad_(False)
    told = {"temperature": 0.9, "max_new_tokens": 6, "max_steps": 4, "max_prompt_tokens": 500, "mode": mode} | more
    options = PolicyOptions(**told)
    rule = step_rule(tokenizer_of(processor), "line", hf.config.get_text_config().vocab_size)
    album = Album(None, [] if family == "text" else files, turns)
    policy = VisionPolicy(hf, processor, rule, options, None, album)
    album.encode = policy.encode
    # untrained models hardly ever close a turn, so every third token does
    ends = [i for i in range(0, len(policy.tokenizer), 3) if i not in policy.sampling.banned]
    policy.sampling = replace(policy.sampling, eos=tuple(sorted({*policy.sampling.eos, *ends})))
    return policy, album


def prompts(family, files):
    images = [] if family == "text" else files[:1]
    return [Prompt("a", {"question": "count it", "images": images}), Prompt("b", {"question": "how many are red"})]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_sees_what_was_sampled(family, files):
    policy, _ = policy_of(family, files)
    rollout = policy.rollout(prompts(family, files), BranchPlan({0: 3, 1: 2}), seed=0)
    tree = rollout.tree
    assert int(tree.tags["observed"].sum()) > 0 and int(tree.depth.max()) >= 1
    out = policy.log_probs(rollout, torch.arange(len(tree)))
    torch.testing.assert_close(out.logp, rollout.actions.logp[out.index], atol=2e-5, rtol=0)
    assert len(rollout.actions.logp) == int((tree.tok_end - tree.tok_start).sum()) == rollout.counts["tokens"]
    inner = ~tree.is_leaf
    assert tree.ok[inner].tolist() == [len(rollout.texts[v]) > 3 for v in inner.nonzero().flatten()]
    assert bool((tree.tags["observed"][tree.is_leaf] == 0).all())  # the last token is always an action's


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_every_layout_gives_the_same_and_a_part_equals_the_whole(family, files):
    found = {}
    for mode in ("rows", "packed", "prefix_packed"):
        policy, _ = policy_of(family, files, mode=mode)
        rollout = policy.rollout(prompts(family, files), BranchPlan({0: 2, 1: 2}), seed=1)
        steps = torch.arange(len(rollout.tree))
        whole = policy.log_probs(rollout, steps)
        found[mode] = whole.logp.detach()
        policy.options = replace(policy.options, max_tokens=60)
        parts = policy.micro_batches(rollout, steps)
        assert len(parts) > 1 and torch.equal(torch.cat(parts).sort().values, steps)
        got = torch.empty_like(whole.logp)
        place = {int(a): i for i, a in enumerate(whole.index)}
        for part in parts:
            one = policy.log_probs(rollout, part)
            got[[place[int(a)] for a in one.index]] = one.logp
        torch.testing.assert_close(got, whole.logp, atol=2e-5, rtol=0)
    torch.testing.assert_close(found["packed"], found["rows"], atol=2e-5, rtol=0)
    torch.testing.assert_close(found["prefix_packed"], found["rows"], atol=2e-5, rtol=0)


def test_a_tree_of_conversations_equals_its_chains(files):
    """Leaf by leaf, the tree's log-probs are those of a conversation that shares nothing."""
    policy, _ = policy_of("qwen2_5_vl", files)
    rollout = policy.rollout(prompts("qwen2_5_vl", files)[:1], BranchPlan({0: 2, 1: 2}), seed=3)
    tree = rollout.tree
    whole = policy.log_probs(rollout, torch.arange(len(tree)))
    for leaf in tree.is_leaf.nonzero().flatten().tolist():
        path = [leaf]
        while int(tree.parent[path[-1]]) >= 0:
            path.append(int(tree.parent[path[-1]]))
        chain = policy.log_probs(rollout, torch.tensor(sorted(path)))
        place = {int(a): i for i, a in enumerate(whole.index)}
        want = whole.logp[[place[int(a)] for a in chain.index]]
        torch.testing.assert_close(chain.logp, want, atol=2e-5, rtol=0)


def test_a_prompt_does_not_depend_on_its_company(files):
    policy, _ = policy_of("qwen2_5_vl", files)
    both = policy.rollout(prompts("qwen2_5_vl", files), BranchPlan({0: 4}), seed=5)
    alone = policy.rollout(prompts("qwen2_5_vl", files)[1:], BranchPlan({0: 4}), seed=5)
    own = both.select([1])
    assert torch.equal(own.actions.payload["token"], alone.actions.payload["token"])
    torch.testing.assert_close(own.actions.logp, alone.actions.logp, atol=2e-5, rtol=0)
    assert torch.equal(own.tree.tags["observed"], alone.tree.tags["observed"])


def test_observations_are_replayed_after_a_round_trip_through_a_folder(files, tmp_path):
    policy, _ = policy_of("qwen2_5_vl", files)
    rollout = policy.rollout(prompts("qwen2_5_vl", files), BranchPlan({0: 3}), seed=0)
    again = Rollout.load(rollout.save(tmp_path / "r"))
    fresh, album = policy_of("qwen2_5_vl", files)
    out = fresh.log_probs(again, torch.arange(len(again.tree)))
    torch.testing.assert_close(out.logp, rollout.actions.logp[out.index], atol=2e-5, rtol=0)
    asked = album.asked
    fresh.log_probs(again, torch.arange(len(again.tree)))
    assert album.asked == asked  # remembered
    album.turns = 1  # the environment is another one now
    late, album = policy_of("qwen2_5_vl", files, turns=1)
    with pytest.raises(ValueError, match="use the files and settings of that run"):
        late.log_probs(again, torch.arange(len(again.tree)))


def test_no_gradient_reaches_an_observation_but_through_context(files):
    """The loss is a sum over sampled tokens alone: their number is that of the actions, whatever was shown."""
    policy, _ = policy_of("text", [])
    rollout = policy.rollout(prompts("text", []), BranchPlan({0: 3}), seed=0)
    embeddings = policy.model.hf.get_input_embeddings()
    seen = []
    handle = embeddings.register_forward_hook(lambda m, i, o: (seen.append((i[0], o)), o.retain_grad())[1])
    out = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    out.logp.sum().backward()
    handle.remove()
    assert len(out.logp) == rollout.counts["tokens"]
    # the last token of a leaf predicts nothing: no gradient at all
    assert any(bool((o.grad.abs().sum(-1) == 0).any()) for _, o in seen)


def test_written_conversations_stop_where_the_environment_does(files):
    policy, _ = policy_of("text", [])
    written = policy.write(prompts("text", [])[:1], ["one\nthree\nfive\nnever read"])
    assert [t.strip() for t in written.texts] == ["one", "three", "five"]
    assert written.tree.parent.tolist() == [-1, 0, 1]
    ends = policy.sampling.eos
    token = written.actions.payload["token"]
    assert all(int(token[int(e) - 1]) in ends for e in written.tree.tok_end)
    assert bool((written.tree.tags["observed"][:-1] > 0).all())


def test_evaluation_takes_all_turns_and_is_greedy(files):
    policy, _ = policy_of("qwen2_5_vl", files)
    one, two = (policy.generate(prompts("qwen2_5_vl", files), seed=s) for s in (1, 2))
    assert [s.output for s in one] == [s.output for s in two]
    assert all(s.output.count("\n") <= 3 for s in one)


def test_a_person_sees_the_turns_and_what_they_showed(files, tmp_path):
    from mmrl.report.artifacts import save_tree
    from mmrl.report.tree_picture import draw_tree

    policy, _ = policy_of("qwen2_5_vl", files)
    rollout = policy.rollout(prompts("qwen2_5_vl", files), BranchPlan({0: 3}), seed=0)
    told = policy.describe(rollout, torch.arange(len(rollout.tree)))
    assert [t for t, _ in told] == [t.strip() for t in rollout.texts]
    shown = [s for s in (rollout.tree.group == 0).nonzero().flatten().tolist() if told[s][1] is not None]
    assert shown
    save_tree(rollout, torch.zeros(len(rollout.tree)), policy.describe, tmp_path)
    svg = draw_tree(tmp_path)
    assert svg.count("<image") == len(shown) + 1  # and the prompt's


def test_searching_with_an_agent_is_refused(files):
    from mmrl.rollout import State

    policy, _ = policy_of("text", [])
    with pytest.raises(ValueError, match="not supported yet"):
        policy.extend([State(prompts("text", [])[0])], 1, seed=0)


def test_sliding_windows_are_refused(files):
    policy, _ = policy_of("gemma3", files)
    with pytest.raises(ValueError, match="sliding window"):
        policy.rollout(prompts("gemma3", files), BranchPlan({0: 1}), seed=0)

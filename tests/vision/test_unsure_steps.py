"""Steps that begin where the policy is unsure: borders, forks before them, and that a tree is sampled as it is scored."""

import math

import pytest
import torch
from families import family_folder

from mmrl.rollout import BranchPlan, Prompt
from vision.policy import VisionPolicy

ENTROPY = {"name": "entropy", "limit": 1.0}
PROMPTS = [Prompt(f"p{i}", {"question": f"what is {i} + 2?"}) for i in range(3)]


def policy(steps, **settings):
    options = {"temperature": 0.2, "max_new_tokens": 16, "max_steps": 4} | settings
    return VisionPolicy.build(str(family_folder("text")), steps=steps, **options)


def scored(made, rollout):
    out = made.log_probs(rollout, torch.arange(len(rollout.tree)))
    return out.logp, out.entropy, rollout.tree.step_of_action(len(out.logp))


def first_of_step(owner):
    return torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])


@pytest.mark.parametrize("steps", [ENTROPY, {"name": "confidence", "limit": 0.4}], ids=lambda steps: steps["name"])
def test_steps_begin_where_and_only_where_the_policy_is_unsure(steps):
    """By the log-probs and entropies of the update, which know nothing of the sampler's."""
    made = policy(steps, max_steps=99)
    rollout = made.rollout(PROMPTS, BranchPlan({0: 1}), seed=3)
    logp, entropy, owner = scored(made, rollout)
    unsure = entropy > 1.0 if steps == ENTROPY else logp <= math.log(0.4)
    begins = first_of_step(owner)
    root = rollout.tree.parent[owner] < 0
    assert torch.equal((begins & ~root), (unsure & ~(begins & root)))
    assert int((begins & ~root).sum()) > 3 and int((~begins).sum()) > 3


@pytest.mark.parametrize("steps", [ENTROPY, {"name": "confidence", "limit": 0.4}], ids=lambda steps: steps["name"])
def test_children_draw_their_first_token_from_the_unsure_state(steps):
    made = policy(steps)
    rollout = made.rollout(PROMPTS, BranchPlan({0: 1, 1: 3, 2: 2}), seed=0)
    tree = rollout.tree
    logp, entropy, owner = scored(made, rollout)
    torch.testing.assert_close(rollout.actions.logp, logp.detach(), atol=1e-5, rtol=0)
    first = first_of_step(owner)
    start = torch.zeros(len(tree), dtype=torch.int64).index_put((owner[first],), first.nonzero().flatten())
    tokens = rollout.actions.payload["token"]
    forks = [tree.parent.eq(p).nonzero().flatten() for p in tree.parent.unique().tolist() if p >= 0]
    forks = [children for children in forks if len(children) == 3]
    assert forks and any(len(tokens[start[children]].unique()) > 1 for children in forks)
    for children in forks:
        torch.testing.assert_close(entropy[start[children]], entropy[start[children[:1]]].expand(3), atol=1e-4, rtol=0)


def test_the_first_path_is_what_an_uncut_policy_samples():
    """Forks keep the first child on its parent's noise: cutting changes where steps are, not what is said."""
    cut, whole = policy(ENTROPY, max_steps=99), policy("line", max_steps=1)
    plan = BranchPlan({0: 2})
    texts = [sorted(s.output for s in p.samples(p.rollout(PROMPTS, plan, seed=5))) for p in (cut, whole)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 6


def test_a_stop_after_one_step_and_most_steps():
    made = policy(ENTROPY, max_steps=2)
    assert int(made.rollout(PROMPTS, BranchPlan({0: 2}), seed=1).tree.depth.max()) == 1


@pytest.mark.parametrize(
    "steps, message",
    [
        ("entropy", r"steps.limit is missing; it has no default"),
        ({"name": "confidence", "limit": 1.5}, "steps.limit=1.5: input should be less than 1"),
        ({"name": "entropy", "limit": 0}, "steps.limit=0: input should be greater than 0"),
        ("entrpy", r"unknown step rule 'entrpy' \(did you mean entropy\?\)"),
    ],
)
def test_rules_that_cannot_be_read(steps, message):
    with pytest.raises(ValueError, match=message):
        policy(steps)


def test_vllm_is_refused_before_it_is_started():
    with pytest.raises(ValueError, match="vLLM does not tell entropies"):
        VisionPolicy.build(str(family_folder("text")), steps=ENTROPY, engine="vllm")

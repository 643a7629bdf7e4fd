"""The driver of token trees alone: engines that bring tokens, and engines that bring whole steps, grow the same tree."""

from collections import Counter

import pytest
import torch
from families import tokenizer_for

from mmrl.rollout import BranchPlan
from vision.forward.packing import ancestors
from vision.growth.driver import grow
from vision.growth.requests import GrowthRequest, SamplingOptions, Start, TokenSample
from vision.inputs.step_rule import step_rule
from vision.inputs.tokens import PromptTokens

TOKENIZER = tokenizer_for("text")
RULE = step_rule(TOKENIZER, "line")
(LINE,) = TOKENIZER.encode("\n", add_special_tokens=False)
END = TOKENIZER.eos_token_id
LETTERS = TOKENIZER.encode("abc", add_special_tokens=False)


class Scripted:
    """What follows is drawn from the seed, the slot and the place in the path; states say what came before."""

    def __init__(self, whole_steps):
        self.whole_steps, self.kept = whole_steps, []

    def open(self, request):
        self.request = request
        return self

    def generate(self, requests, *, again=False):
        return [[self.sample(r, slot) for slot in r.slots] for r in requests]

    def sample(self, request, slot):
        stops = {END} | ({LINE} if request.step_by_step else set())
        ids = [self.token(request, slot, request.sampled)]
        while self.whole_steps and ids[-1] not in stops and len(ids) < request.room:
            ids.append(self.token(request, slot, request.sampled + len(ids)))
        before = request.state or ()
        shown = () if request.observation is None else ("shown", len(request.observation.ids))
        return TokenSample(ids, [-float(i) for i in ids], (*before, *shown, *ids))

    def token(self, request, slot, at):
        seed = self.request.seeds[request.prompt]
        generator = torch.Generator().manual_seed(hash((seed, slot, at)) % 2**40)
        u = float(torch.rand((), generator=generator))
        return END if u < 0.12 else LINE if u < 0.4 else LETTERS[at % 3]

    def keep(self, state):
        self.kept.append(state)
        return state


def prompt():
    ids = torch.tensor(LETTERS)
    return PromptTokens(ids, torch.zeros_like(ids), torch.arange(len(ids)), len(ids), "abc")


def paths(nodes):
    """How often each path occurs, whatever the order of the nodes."""
    parent = [n.parent for n in nodes]
    assert all(p < v for v, p in enumerate(parent)), "parents come before children"
    return Counter(
        (n.prompt, tuple(tuple(nodes[u].ids) for u in ancestors(parent, v)), tuple(n.logp), n.end, n.observed, n.depth)
        for v, n in enumerate(nodes)
    )


def answer(turns):
    """Words after turns of an even length, nothing after four turns or "a"."""
    if len(turns) == 4 or turns[-1][0] == LETTERS[0]:
        return None
    ids = torch.tensor(LETTERS[: 1 + len(turns[-1]) % 3])
    return PromptTokens(ids, torch.zeros_like(ids), torch.arange(len(ids)), len(ids))


@pytest.mark.parametrize("plan", [{0: 2, 1: 2}, {1: 3}, {0: 2, 2: 2, 3: 2}, {0: 4}], ids=str)
@pytest.mark.parametrize("more", [{}, {"max_steps": 2}, {"max_new_tokens": 6}, {"stop_after": 2}], ids=str)
@pytest.mark.parametrize("turns", [False, True])
def test_whole_steps_and_single_tokens_make_the_same_tree(plan, more, turns):
    options = {"temperature": 1.0, "max_new_tokens": 12, "max_steps": 5, "eos": (END,)} | more
    seeds, prompts = range(6), [prompt()] * 6
    answers = [answer] * 6 if turns else ()
    request = GrowthRequest(prompts, BranchPlan(plan), SamplingOptions(**options), RULE, seeds, answers)
    tokens, steps = Scripted(whole_steps=False), Scripted(whole_steps=True)
    grown = grow(tokens, request)
    assert paths(grown) == paths(grow(steps, request))
    assert len(grown) > 6 and Counter(tokens.kept) == Counter(steps.kept)
    assert bool(tokens.kept) is turns, "states outlive their round for answers alone"
    parts = [node for i in range(6) for node in grow(Scripted(whole_steps=False), request.part(i, i + 1))]
    assert sorted(len(n.ids) for n in parts) == sorted(len(n.ids) for n in grown), "a prompt needs no company"


def test_trees_go_on_from_where_they_were_left():
    """Slots, tokens and the depth before a start count as if they had been sampled in the same tree."""
    sampling = SamplingOptions(1.0, 30, 6, (), (END,))
    whole = grow(Scripted(False), GrowthRequest([prompt()], BranchPlan({0: 2}), sampling, RULE, (7,)))
    first = next(v for v, n in enumerate(whole) if n.depth == 0 and n.end == "step")
    slot = [v for v, n in enumerate(whole) if n.depth == 0].index(first)
    start = Start(0, 1, slot, len(whole[first].ids), tuple(whole[first].ids))
    rest = grow(Scripted(False), GrowthRequest([prompt()], BranchPlan({0: 2}), sampling, RULE, (7,), (), [start]))
    parent = [n.parent for n in whole]
    behind = [n for v, n in enumerate(whole) if v != first and first in ancestors(parent, v)]
    assert [(n.ids, n.end, n.depth) for n in rest] == [(n.ids, n.end, n.depth) for n in behind]


def test_no_prompts_need_no_engine():
    assert grow(None, GrowthRequest([], BranchPlan({0: 2}), SamplingOptions(1.0, 9, 4), RULE, ())) == []

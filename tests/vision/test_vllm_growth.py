"""How trees grow from an engine's requests, with a scripted engine in vLLM's place. One token is one character."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from families import tokenizer_for
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mmrl.rollout import BranchPlan
from vision.growth.driver import grow as grow_with
from vision.growth.engine_vllm import VllmEngine
from vision.growth.requests import GrowthRequest, SamplingOptions
from vision.growth.vllm_backends import Reply
from vision.inputs.step_rule import step_rule
from vision.inputs.tokens import PromptTokens

TOKENIZER = tokenizer_for("text")
RULE = step_rule(TOKENIZER, "line")
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def prompt(text="q:"):
    ids = torch.tensor(encode(text))
    return PromptTokens(ids, torch.zeros_like(ids), torch.arange(len(ids)), len(ids), text)


class Script:
    """Answers like vLLM: n samples per call, each cut at its first stop id or at max_tokens.

    says: text of prompt and path -> what its samples go on to say. logp is minus the token's place in the sequence.
    """

    tokenizer, max_model_len = TOKENIZER, 64

    def __init__(self, says):
        self.says, self.calls, self.rounds = says, [], 0

    def generate(self, calls):
        self.calls += calls
        self.rounds += 1
        return [Reply(c.ids, 0, [self._sample(c, text) for text in self._continuations(c)]) for c in calls]

    def _continuations(self, call):
        said = self.says[TOKENIZER.decode(call.ids)]
        assert len(said) == call.sampling_params["n"]
        return said

    @staticmethod
    def _sample(call, text):
        out = []
        for token in encode(text)[: call.sampling_params["max_tokens"]]:
            out.append(token)
            if token in call.sampling_params["stop_token_ids"]:
                break
        return out, [-float(len(call.ids) + k) for k in range(len(out))]


def grow(says, plan, *, prompts=None, seeds=(5,), **more):
    script = Script(says)
    options = {"temperature": 1.0, "max_new_tokens": 40, "max_steps": 8, "banned": (PAD,), "eos": (END,)} | more
    request = GrowthRequest(prompts or [prompt()], BranchPlan(plan), SamplingOptions(**options), RULE, seeds)
    return grow_with(VllmEngine(script), request), script


def shown(nodes):
    return [(n.parent, n.depth, TOKENIZER.decode(n.ids), n.end) for n in nodes]


def test_below_the_last_fork_a_path_is_one_request_cut_into_steps():
    nodes, script = grow({"q:": ["a\nb\nc<|end|>", "d<|end|>"]}, {0: 2})
    assert shown(nodes) == [
        (-1, 0, "a\n", "step"), (0, 1, "b\n", "step"), (1, 2, "c<|end|>", "eos"), (-1, 0, "d<|end|>", "eos"),
    ]  # fmt: skip
    assert [n.logp for n in nodes] == [[-2.0, -3.0], [-4.0, -5.0], [-6.0, -7.0], [-2.0, -3.0]]
    assert script.rounds == 1 and script.calls[0].sampling_params["stop_token_ids"] == [END]


def test_above_a_fork_every_step_is_a_request_that_stops_at_its_end():
    says = {"q:": ["a\nz"], "q:a\n": ["b\nz"], "q:a\nb\n": ["c\nd<|end|>", "e<|end|>"]}
    nodes, script = grow(says, {2: 2})
    assert shown(nodes) == [
        (-1, 0, "a\n", "step"), (0, 1, "b\n", "step"), (1, 2, "c\n", "step"), (2, 3, "d<|end|>", "eos"),
        (1, 2, "e<|end|>", "eos"),
    ]  # fmt: skip
    assert [c.sampling_params["stop_token_ids"] for c in script.calls] == [[END, *encode("\n")]] * 2 + [[END]]
    assert nodes[2].logp == [-6.0, -7.0] and nodes[3].logp == [-8.0, -9.0]


def test_leading_separators_stop_a_request_but_no_step():
    says = {"q:": ["\n", "a\n"], "q:\n": ["b\n"], "q:\nb\n": ["c<|end|>"] * 2, "q:a\n": ["<|end|>", "d<|end|>"]}
    nodes, _ = grow(says, {0: 2, 1: 2})
    assert shown(nodes) == [
        (-1, 0, "\nb\n", "step"), (-1, 0, "a\n", "step"), (1, 1, "<|end|>", "eos"), (0, 1, "c<|end|>", "eos"),
        (1, 1, "d<|end|>", "eos"), (0, 1, "c<|end|>", "eos"),
    ]  # fmt: skip
    assert nodes[0].logp == [-2.0, -3.0, -4.0]


def test_limits_end_paths_as_the_transformers_decoder_does():
    nodes, script = grow({"q:": ["a\nb\ncc"], "q:a\n": ["b\ncc"] * 2}, {0: 1, 1: 2}, max_new_tokens=4)
    assert shown(nodes) == [(-1, 0, "a\n", "step"), (0, 1, "b\n", "length"), (0, 1, "b\n", "length")]
    assert [c.sampling_params["max_tokens"] for c in script.calls] == [4, 2]
    nodes, _ = grow({"q:": ["a\nb\nc\n<|end|>"]}, {0: 1}, max_steps=2)
    assert shown(nodes) == [(-1, 0, "a\n", "step"), (0, 1, "b\nc\n<|end|>", "eos")]


def test_paths_are_left_open_after_so_many_steps():
    """As with transformers: what `extend(steps=..)` asks for."""
    nodes, script = grow({"q:": ["a\nb\nc", "<|end|>"], "q:a\n": ["b\nc"]}, {0: 2}, stop_after=2)
    assert shown(nodes) == [(-1, 0, "a\n", "step"), (0, 1, "b\n", "step"), (-1, 0, "<|end|>", "eos")]
    assert all(set(encode("\n")) < set(c.sampling_params["stop_token_ids"]) for c in script.calls)


def test_what_was_written_behind_a_picture_keeps_its_ids_though_its_text_would_be_other_tokens():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "#": 3, "|": 4}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="|")
    assert tokenizer("#ab")["input_ids"] == [3, 2]
    calls = []

    class Sampler:
        max_model_len = 32

        def generate(self, given):
            calls.extend(given)
            return [Reply([3, 3, 3, *c.ids[1:]], 0, [([4], [-1.0])]) for c in given]

    Sampler.tokenizer = tokenizer
    shown = replace(prompt(), ids=torch.tensor([3, 3, 3, 2]), text="#ab", images=(Image.new("RGB", (8, 8)),))
    request = GrowthRequest(
        [shown.followed_by(torch.tensor([0, 1]))], BranchPlan({0: 1}), SamplingOptions(1.0, 9, 4, (), (4,)), RULE, (1,)
    )
    grow_with(VllmEngine(Sampler()), request)
    assert [c.ids for c in calls] == [[3, 2, 0, 1]]


def test_seeds_differ_between_branches_and_follow_the_prompt_alone():
    says = {"q:": ["a\n", "a\n"], "q:a\n": ["b<|end|>"] * 2, "p:": ["a\n", "a\n"], "p:a\n": ["b<|end|>"] * 2}
    _, alone = grow(says, {0: 2, 1: 2})
    _, both = grow(says, {0: 2, 1: 2}, prompts=[prompt("p:"), prompt()], seeds=(6, 5))

    def seeds(script, text):
        return [c.sampling_params["seed"] for c in script.calls if TOKENIZER.decode(c.ids).startswith(text)]

    assert seeds(alone, "q:") == seeds(both, "q:")
    assert len(set(seeds(both, "q:") + seeds(both, "p:"))) == 6, "equal texts of siblings must not draw alike"


def test_banned_ids_get_no_probability_and_greedy_needs_no_seed():
    _, script = grow({"q:": ["a<|end|>"]}, {0: 1}, temperature=0.0)
    sampling = script.calls[0].sampling_params
    assert sampling["logit_bias"] == {PAD: -1e9} and "seed" not in sampling
    assert torch.tensor([0.0, -1e9]).log_softmax(0)[0] == 0.0


@pytest.mark.parametrize(
    ("plan", "more", "message"),
    [
        ({0: 2}, {"temperature": 0.0}, "children of a fork equal"),
        ({0: 1}, {"temperature": 0.001}, "between 0.01 and 2"),
        ({0: 1}, {"max_new_tokens": 63}, "max_model_len=64"),
    ],
)
def test_what_vllm_would_change_silently_is_refused(plan, more, message):
    with pytest.raises(ValueError, match=message):
        grow({"q:": ["a<|end|>"]}, plan, **more)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: Reply(r.prompt[:-1], 0, r.samples), ValueError, "vLLM sees 1 tokens, our processor made 2"),
        (lambda r: Reply([9, *r.prompt[1:]], 0, r.samples), ValueError, "differ from position 0"),
        (lambda r: Reply(r.prompt, 0, [([5, END], [-1.0, float("nan")])]), RuntimeError, "not finite"),
        (lambda r: Reply(r.prompt, 0, [([5, END], [-1.0, -9999.0])]), RuntimeError, "not finite"),
        (lambda r: Reply(r.prompt, 0, [([], [])]), RuntimeError, "without tokens"),
    ],
)
def test_a_wrong_reply_is_an_error(change, error, message):
    script = Script({"q:": ["a<|end|>"]})
    script.generate = lambda calls: [change(Reply(c.ids, 0, [([5, END], [-1.0, -1.0])])) for c in calls]
    with pytest.raises(error, match=message):
        sampling = SamplingOptions(1.0, 9, 4, (), (END,))
        grow_with(VllmEngine(script), GrowthRequest([prompt()], BranchPlan({0: 1}), sampling, RULE, (1,)))


def test_a_step_that_vllm_breaks_off_is_an_error():
    with pytest.raises(RuntimeError, match="prompt 0: vLLM broke a step off after 2 tokens"):
        grow({"q:": ["ab"]}, {0: 1})


def test_steps_that_begin_at_unsure_tokens_are_refused():
    rule = step_rule(TOKENIZER, {"name": "entropy", "limit": 1.0})
    request = GrowthRequest([prompt()], BranchPlan({0: 1}), SamplingOptions(1.0, 9, 4, (), (END,)), rule, (1,))
    with pytest.raises(ValueError, match="does not tell entropies"):
        grow_with(VllmEngine(Script({})), request)


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mmrl\[vllm\]'"):
        VllmEngine.in_process("folder", max_model_len=64)

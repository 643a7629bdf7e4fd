"""Conversations through an engine's requests, with scripted engines and a transformers model in vLLM's place."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import family_folder, picture, tokenizer_for
from film_album import FilmAlbum, film, prompts, still

from mmrl.rollout import BranchPlan, Place
from vision.forward.network import masked_scores
from vision.forward.passes import TokenTree
from vision.growth.driver import grow
from vision.growth.engine_hf import TransformersEngine
from vision.growth.engine_sync import SyncedEngine
from vision.growth.engine_vllm import VllmEngine
from vision.growth.requests import GrowthRequest, SamplingOptions
from vision.growth.vllm_backends import Call, Reply, Server
from vision.growth.vllm_media import media_of, rotary, take_positions
from vision.inputs.loading import load_model, load_processor, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.step_rule import step_rule
from vision.inputs.tokens import PromptTokens
from vision.policy import VisionPolicy

TOKENIZER = tokenizer_for("text")
END = TOKENIZER.eos_token_id
RULE = step_rule(TOKENIZER, "line")  # not asked: a step is a turn
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "text")


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def piece(text):
    ids = torch.tensor(encode(text))
    return PromptTokens(ids, torch.zeros_like(ids), torch.arange(len(ids)), len(ids), text)


class Script:
    """Says what is written down for a history; logp is minus the token's place in it."""

    tokenizer, max_model_len = TOKENIZER, 64

    def __init__(self, says):
        self.says, self.rounds = says, []

    def generate(self, calls):
        self.rounds.append(calls)
        return [Reply(c.ids, 0, [self._sample(c, text) for text in self._said(c)]) for c in calls]

    def _said(self, call):
        said = self.says[TOKENIZER.decode(call.ids)]
        assert len(said) == call.sampling_params["n"]
        return said

    @staticmethod
    def _sample(call, text):
        ids = encode(text)[: call.sampling_params["max_tokens"]]
        assert not set(ids[:-1]) & set(call.sampling_params["stop_token_ids"])
        return ids, [-float(len(call.ids) + k) for k in range(len(ids))]


def run(says, plan, shows, *, given=("q:",), seeds=(5,), **more):
    """shows: text of a turn -> what follows; turns that are not named end the conversation."""
    script = Script(says)
    told = {"temperature": 1.0, "max_new_tokens": 9, "max_steps": 4, "eos": (END,)} | more

    def answer(turns):
        seen = shows.get(TOKENIZER.decode(turns[-1], skip_special_tokens=True))
        return None if seen is None else piece(seen)

    pieces = [piece(t) for t in given]
    answers = [answer] * len(pieces)
    request = GrowthRequest(pieces, BranchPlan(plan), SamplingOptions(**told), RULE, seeds, answers)
    return grow(VllmEngine(script), request), script


def shown(nodes):
    return [(n.parent, n.depth, TOKENIZER.decode(n.ids), n.end, n.observed) for n in nodes]


# ---- turns -------------------------------------------------------------------------------------------------------


def test_a_turn_is_a_request_whose_prompt_is_the_whole_history():
    says = {"q:": ["a<|end|>"], "q:a<|end|>[x]": ["bb<|end|>"], "q:a<|end|>[x]bb<|end|>[yy]": ["c<|end|>"]}
    nodes, script = run(says, {0: 1}, {"a": "[x]", "bb": "[yy]"})
    assert shown(nodes) == [
        (-1, 0, "a<|end|>", "step", 3), (0, 1, "bb<|end|>", "step", 4), (1, 2, "c<|end|>", "eos", 0),
    ]  # fmt: skip
    assert [n.logp for n in nodes] == [[-2.0, -3.0], [-7.0, -8.0, -9.0], [-14.0, -15.0]]
    assert len(script.rounds) == 3
    assert all(
        c.sampling_params["stop_token_ids"] == [END] and c.sampling_params["max_tokens"] == 9
        for r in script.rounds
        for c in r
    )


def test_turns_fork_where_the_plan_does_and_conversations_end_by_themselves():
    says = {
        "q:": ["a<|end|>", "b<|end|>"], "q:a<|end|>[x]": ["c<|end|>", "abcdefghij"],
        "q:a<|end|>[x]c<|end|>[x]": ["d<|end|>"],
    }  # fmt: skip
    nodes, script = run(says, {0: 2, 1: 2}, {"a": "[x]", "c": "[x]"})
    assert shown(nodes) == [
        (-1, 0, "a<|end|>", "step", 3), (-1, 0, "b<|end|>", "eos", 0), (0, 1, "c<|end|>", "step", 3),
        (0, 1, "abcdefghi", "length", 0), (2, 2, "d<|end|>", "eos", 0),
    ]  # fmt: skip
    assert [len(r) for r in script.rounds] == [1, 1, 1]


def test_the_last_turn_is_not_answered():
    nodes, _ = run({"q:": ["a<|end|>"], "q:a<|end|>[x]": ["a<|end|>"]}, {0: 1}, {"a": "[x]"}, max_steps=2)
    assert [(n.end, n.observed) for n in nodes] == [("step", 3), ("eos", 0)]


def test_a_turn_closed_by_its_last_token_is_closed():
    nodes, _ = run({"q:": ["abc<|end|>"], "q:abc<|end|>[x]": ["abcde"]}, {0: 1}, {"abc": "[x]"}, max_new_tokens=4)
    assert [(n.end, len(n.ids)) for n in nodes] == [("step", 4), ("length", 4)]


def test_seeds_differ_between_branches_and_follow_the_prompt_alone():
    says = {f"{p}:{t}": ["a<|end|>"] * 2 for p in "qp" for t in ("", "a<|end|>[x]")}
    _, alone = run(says, {0: 2, 1: 2}, {"a": "[x]"}, max_steps=2)
    _, both = run(says, {0: 2, 1: 2}, {"a": "[x]"}, max_steps=2, given=("p:", "q:"), seeds=(6, 5))

    def drawn(script, start):
        calls = [c for r in script.rounds for c in r]
        return [c.sampling_params["seed"] for c in calls if TOKENIZER.decode(c.ids).startswith(start)]

    assert drawn(alone, "q") == drawn(both, "q")
    assert len(set(drawn(both, "q") + drawn(both, "p"))) == 6, "equal histories of siblings must not draw alike"


def test_sampled_ids_stay_though_their_text_would_be_other_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "|": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="|")
    sampled, seen = [0, 1, 3], torch.tensor([1, 0])
    again = tokenizer(tokenizer.decode(sampled), add_special_tokens=False)["input_ids"]
    assert again == [2, 3], "the tokenizer merges what was sampled apart"
    calls = []

    class Sampler:
        max_model_len = 32

        def generate(self, given):
            calls.extend(given)
            return [Reply(c.ids, 0, [(list(sampled), [-1.0] * 3)]) for c in given]

    start = PromptTokens(torch.tensor([1]), torch.zeros(1, dtype=torch.int64), torch.arange(1), 1)
    follows = PromptTokens(seen, torch.zeros_like(seen), torch.arange(2), 2)
    request = GrowthRequest(
        [start], BranchPlan({0: 1}), SamplingOptions(1.0, 5, 3, (), (3,)), RULE, (1,), [lambda turns: follows]
    )
    nodes = grow(VllmEngine(Sampler()), request)
    assert [c.ids for c in calls] == [[1], [1, 0, 1, 3, 1, 0], [1, 0, 1, 3, 1, 0, 0, 1, 3, 1, 0]]
    assert [n.ids for n in nodes] == [sampled] * 3


def test_what_cannot_be_sampled_is_an_error():
    with pytest.raises(ValueError, match="the conversation has 61 tokens; with 9 new ones"):
        run({"q:": ["a<|end|>"]}, {0: 1}, {"a": "x" * 57})
    with pytest.raises(ValueError, match="children of a fork equal"):
        run({}, {0: 2}, {}, temperature=0.0)
    with pytest.raises(RuntimeError, match="broke a turn off after 2 tokens"):
        run({"q:": ["ab"]}, {0: 1}, {})


def test_what_vllm_saw_must_be_the_history():
    script = Script({})
    script.generate = lambda calls: [Reply(c.ids[:-1], 0, [([END], [-1.0])]) for c in calls]
    with pytest.raises(ValueError, match="vLLM sees 1 tokens, our processor made 2"):
        sampling = SamplingOptions(1.0, 9, 4, (), (END,))
        request = GrowthRequest([piece("q:")], BranchPlan({0: 1}), sampling, RULE, (1,), [lambda turns: None])
        grow(VllmEngine(script), request)


def test_a_server_takes_no_media():
    server = object.__new__(Server)
    with pytest.raises(ValueError, match="leave policy.engine_url empty"):
        server.generate([Call([1], (), {}, [None])])


# ---- pictures and films ------------------------------------------------------------------------------------------


class Transformers:
    """A transformers model in vLLM's place: it sees a request's ids, patches and positions and nothing else.

    Greedy at temperature 0; above, it draws from its own generator.
    """

    max_model_len = 2000

    def __init__(self, hf, banned):
        self.hf, self.banned, self.calls = hf, banned, []
        self.random = torch.Generator().manual_seed(0)

    def generate(self, calls):
        self.calls += calls
        return [Reply(c.ids, 0, [self._sample(c) for _ in range(c.sampling_params["n"])]) for c in calls]

    def wake(self):
        self.calls.append("wake")

    def sleep(self):
        self.calls.append("sleep")

    def load(self, weights):
        self.calls.append({name: w.clone() for name, w in weights})

    @torch.no_grad()
    def _sample(self, call):
        ids, out, logp = list(call.ids), [], []
        temperature = call.sampling_params["temperature"]
        while len(out) < call.sampling_params["max_tokens"] and not set(out[-1:]) & set(
            call.sampling_params["stop_token_ids"]
        ):
            logits = self.hf(input_ids=torch.tensor([ids]), **self._seen(ids, call.media)).logits[0, -1]
            scores = masked_scores(logits, temperature or 1.0, self.banned).log_softmax(-1)
            drawn = torch.multinomial(scores.exp(), 1, generator=self.random) if temperature else scores.argmax()[None]
            out.append(int(drawn))
            ids.append(int(drawn))
            logp.append(float(scores[drawn]))
        return out, logp

    def _seen(self, ids, media):
        if not hasattr(self.hf.model, "get_rope_index"):
            return {}
        positions, _ = rotary(len(ids), [(m.start, m.positions) for m in media])
        out = {"position_ids": positions[:, None]}
        for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [m for m in media if m.kind == kind]
            if own:
                out[values] = torch.cat([m.values for m in own])
                out[f"{kind}_grid_thw"] = torch.stack([m.grid for m in own])
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    picture(0).save(folder / "0.png")
    return [str(folder / "0.png")]


def policy_of(family, temperature=0.9):
    folder = family_folder(family)
    hf, processor = load_model(folder), load_processor(folder)
    options = PolicyOptions(
        temperature=temperature, eval_temperature=0.0, max_new_tokens=5, max_steps=4, max_prompt_tokens=500
    )
    rule = step_rule(tokenizer_of(processor), "line", hf.config.get_text_config().vocab_size)
    album = FilmAlbum()
    policy = VisionPolicy(hf, processor, rule, options, None, album)
    album.encode = policy.encode
    # untrained models hardly ever close a turn, so every second token does
    ends = [i for i in range(0, len(policy.tokenizer), 2) if i not in policy.sampling.banned]
    policy.sampling = replace(policy.sampling, eos=tuple(sorted({*policy.sampling.eos, *ends})))
    return policy, album


def with_engine(policy):
    backend = Transformers(policy.model.hf.eval(), policy.sampling.banned)
    policy._engine = SyncedEngine(VllmEngine(backend), shared=False)
    return backend


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_conversations_are_those_of_the_transformers_decoder(family, files):
    policy, _ = policy_of(family)
    rows = prompts() if family == "text" else prompts(files)
    tokens = [policy.encode(p) for p in rows]
    greedy = replace(policy.sampling, temperature=0.0)
    answers = policy._dialogue.responders(rows, tokens)
    request = GrowthRequest(tokens, BranchPlan({0: 1}), greedy, policy.rule, (1, 2), answers)
    want = grow(TransformersEngine(policy.model.hf.eval()), request)
    got = grow(VllmEngine(Transformers(policy.model.hf, greedy.banned)), request)
    assert [(n.prompt, n.parent, n.depth, n.ids, n.end, n.observed) for n in got] == [
        (n.prompt, n.parent, n.depth, n.ids, n.end, n.observed) for n in want
    ]
    assert sum(n.observed > 0 for n in got) >= 2, "nothing was shown"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_sees_what_the_engine_sampled(family, files):
    policy, _ = policy_of(family)
    backend = with_engine(policy)
    rollout = policy.rollout(prompts() if family == "text" else prompts(files), BranchPlan({0: 3, 1: 2}), seed=0)
    assert backend.calls[0] == "wake" and backend.calls[-1] == "sleep" and isinstance(backend.calls[1], dict)
    kinds = {m.kind for c in backend.calls[2:-1] for m in c.media}
    assert kinds == (set() if family == "text" else {"image", "video"})
    out = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    torch.testing.assert_close(out.logp, rollout.actions.logp[out.index], atol=2e-5, rtol=0)


def test_an_engine_sleeps_after_an_error_too():
    policy, _ = policy_of("text")
    backend = with_engine(policy)

    def fail(calls):
        raise OSError("the engine is gone")

    backend.generate = fail
    with pytest.raises(OSError, match="is gone"):
        policy.rollout(prompts(), BranchPlan({0: 1}), seed=0)
    assert backend.calls[0] == "wake" and backend.calls[-1] == "sleep"


def test_media_of_earlier_turns_are_the_same_objects(files):
    """That is what makes them one entry in vLLM's caches."""
    policy, _ = policy_of("qwen2_5_vl")
    backend = with_engine(policy)
    policy.rollout(prompts(files), BranchPlan({0: 2}), seed=0)
    calls = [c for c in backend.calls if isinstance(c, Call)]
    longer = [
        (a, b) for a in calls for b in calls if len(b.ids) > len(a.ids) and b.ids[: len(a.ids)] == a.ids and a.media
    ]
    assert longer
    for a, b in longer:
        assert all(x is y for x, y in zip(a.media, b.media, strict=False)), "a prefix of the media of a later turn"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_over_a_conversation_are_those_of_the_update(family, files):
    policy, album = policy_of(family)
    start = policy.encode(prompts(files)[0])
    turns = [torch.tensor(policy.tokenizer.encode(t)) for t in ("once", "more", "done")]
    shows = [album.show("film", 1), album.show("stills", 2)]
    ids = [start.ids, turns[0], shows[0].ids, turns[1], shows[1].ids, turns[2]]
    tree = TokenTree(start, [-1, 0, 1, 2, 3, 4], ids, {2: shows[0], 4: shows[1]})
    at = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
    media = [m.at(at[v]) for v, p in ((0, start), (2, shows[0]), (4, shows[1])) for m in media_of(p)]
    assert [m.kind for m in media] == ["image", "video", "image", "image"]
    for m in media:  # a run of pads per grid, as long as it
        assert int(m.pads.sum()) == int(m.grid.prod()) // 4
        assert len(m.values) == int(m.grid.prod()) and m.positions.shape == (3, len(m.pads) + 1)
    got, after = rotary(at[-1], [(m.start, m.positions) for m in media])
    assert torch.equal(got, tree.positions)
    assert after == int(tree.positions[0, -1]) + 1
    assert len({m.key for m in media}) == 4


def test_a_film_in_pieces_has_features_at_its_placeholders_alone():
    """Qwen3-VL writes times between the frames of a film."""
    policy, _ = policy_of("qwen3_vl")
    tokens = policy.encode.tokens(*film(policy.encode, 0, frames=4))
    (medium,) = media_of(tokens)
    assert not bool(medium.pads.all()) and bool(medium.pads[0]) and bool(medium.pads[-1])
    inside = tokens.ids[medium.start : medium.start + len(medium.pads)]
    assert torch.equal(medium.pads, inside == policy.encode.video_token)


def test_a_picture_alone_at_the_start_and_at_the_end():
    policy, _ = policy_of("qwen2_5_vl")
    text, pixels = still(policy.encode, 0)
    tokens = policy.encode.tokens(text, pixels)
    inner = replace(
        tokens, ids=tokens.ids[1:-1], types=tokens.types[1:-1], positions=tokens.positions[:, 1:-1] - 1,
        next_position=tokens.next_position - 2,
    )  # fmt: skip
    (medium,) = media_of(inner)
    assert (medium.start, medium.positions[:, -1].tolist()) == (0, [2, 2, 2])  # 2 x 2 tokens
    assert medium.positions[:, :-1].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    got, after = rotary(6, [(1, medium.positions)])
    assert got.tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]] and after == 4


def test_given_positions_replace_the_engines_own_rule():
    given = torch.tensor([[0, 0, 7], [0, 1, 7], [0, 0, 7]])
    model = SimpleNamespace(get_mrope_input_positions=lambda tokens, features: "its own rule")
    take_positions(model)

    def feature(offset, **data):
        return SimpleNamespace(mm_position=SimpleNamespace(offset=offset), data=data)

    assert model.get_mrope_input_positions([1] * 5, [feature(1)]) == "its own rule"
    two = [
        feature(4, given_positions=SimpleNamespace(data=given)),
        feature(1, given_positions=SimpleNamespace(data=given)),
    ]
    positions, delta = model.get_mrope_input_positions([1] * 7, two)
    assert positions.tolist() == [[0, 1, 1, 8, 9, 9, 16], [0, 1, 2, 8, 9, 10, 16], [0, 1, 1, 8, 9, 9, 16]]
    assert delta == 17 - 7
    take_positions(SimpleNamespace())  # a model without such positions stays as it is


@pytest.mark.parametrize("swap", [False, True])
def test_grids_in_another_order_than_their_placeholders_are_an_error(swap):
    policy, _ = policy_of("qwen2_5_vl")
    (one, small), (two, large) = still(policy.encode, 0, (32, 64)), still(policy.encode, 1, (64, 64))
    order = (large, small) if swap else (small, large)
    tensors = {k: torch.cat([p.tensors[k] for p in order]) for k in small.tensors}
    tokens = policy.encode.tokens(one + "x" + two, replace(small, tensors=tensors))
    with pytest.raises(ValueError, match="text stands between") if swap else nullcontext():
        assert [len(m.pads) for m in media_of(tokens)] == [2, 4]


def test_pictures_of_other_families_are_refused(files):
    policy, _ = policy_of("llava")
    with_engine(policy)
    with pytest.raises(ValueError, match="Qwen-VL models alone"):
        policy.rollout(prompts(files), BranchPlan({0: 1}), seed=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_conversations_are_completed_as_the_transformers_decoder_does(family, files):
    policy, _ = policy_of(family)
    rollout = policy.rollout(prompts() if family == "text" else prompts(files), BranchPlan({0: 3, 1: 2}), seed=0)
    inner = (~rollout.tree.is_leaf).nonzero().flatten().tolist()
    places = [Place(0), *(Place(int(rollout.tree.group[v]), v) for v in inner), Place(1)]
    assert len(places) > 3
    want = policy.complete(rollout, places, 3, seeds=range(len(places)), temperature=0.0)
    with_engine(policy)
    got = policy.complete(rollout, places, 3, seeds=range(len(places)), temperature=0.0)
    assert [[s.output for s in own] for own in got] == [[s.output for s in own] for own in want]
    drawn = policy.complete(rollout, places, 3, seeds=range(len(places)), temperature=None)
    assert [len(own) for own in drawn] == [3] * len(places)
    for place, own in zip(places, drawn, strict=True):
        before = [] if place.step < 0 else [text for text, _ in policy._dialogue.turns(rollout, place.step)]
        assert all(s.output.split("\n")[: len(before)] == before for s in own)

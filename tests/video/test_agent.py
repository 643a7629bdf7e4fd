"""Video agents: what is shown after a turn, on-policy ratios across turns, budgets, bad clips, several processes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from agent_tiny import Questions, agent
from families import family_folder
from make_clips import number, write_clip
from processes import run_ranks
from safetensors.torch import load_file
from unpatch import unpatchify

from mmrl.config import parse_config
from mmrl.rollout import BranchPlan, Prompt
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.run import Run
from video.acting.actions import MANIPULATIONS, manipulation
from video.encoding import Views
from video.reading.reader import VideoDecodeError
from video.rewards import TemporalContrast
from vision.inputs.prompts import PromptError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """25 s at 10 frames a second: two segments by the rule, each frame numbered."""
    return str(write_clip(tmp_path_factory.mktemp("clip") / "c.mp4", frames=250, size=(64, 96), gop=25))


def prompts(clip):
    return [Prompt("a", {"question": "what is it", "videos": [clip]}), Prompt("b", {"question": "count it"})]


def frames_of(policy, piece):
    """Pixels back from an observation's patches."""
    encoder, pixels = policy.encode, piece.pixels
    (grid,) = pixels.tensors["image_grid_thw"].tolist()
    return unpatchify(
        pixels.tensors["pixel_values"].numpy(), tuple(grid), patch=encoder._patch, merge=encoder._merge,
        norm=encoder._norm,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_is_one_across_turns_with_frames_between(family, clip):
    policy = agent(str(family_folder(family)), max_steps=5)
    rollout = policy.rollout(prompts(clip), BranchPlan({0: 4, 1: 2}), seed=0)
    tree = rollout.tree
    assert int(tree.depth.max()) >= 2
    shown = {policy._dialogue.observation(rollout, v).pixels is not None
             for v in (tree.tags["observed"] > 0).nonzero().flatten().tolist()}  # fmt: skip
    assert shown == {True, False}  # frames and errors
    out = policy.log_probs(rollout, torch.arange(len(tree)))
    ratio = (out.logp.detach() - rollout.actions.logp[out.index]).exp()
    assert float((ratio - 1).abs().max()) < 1e-4
    assert len(out.logp) == rollout.counts["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_rows_with_films_and_stills_in_branches(family, clip):
    found = {}
    for mode in ("rows", "packed"):
        policy = agent(str(family_folder(family)), mode=mode)
        rollout = policy.rollout(prompts(clip), BranchPlan({0: 3, 1: 2}), seed=1)
        found[mode] = policy.log_probs(rollout, torch.arange(len(rollout.tree))).logp
    torch.testing.assert_close(found["packed"], found["rows"], atol=2e-5, rtol=0)


def test_positions_are_those_of_the_models_own_rule_along_every_conversation(clip):
    policy = agent(str(family_folder("qwen2_5_vl")))
    rollout = policy.rollout(prompts(clip), BranchPlan({0: 4}), seed=0)
    trees, _, _ = policy._trees.of_steps(rollout, torch.arange(len(rollout.tree)))
    from vision.forward.packing import rows_of

    for tree in trees:
        for take in rows_of(tree.packed, tree.parent, "rows"):
            ids, types = tree.packed.ids[take], tree.packed.types[take]
            shown = tree.images_along(take)
            assert torch.equal(tree.positions[:, take], policy.encode.rope(ids, types, shown))
            runs = int((torch.diff(types, prepend=torch.zeros(1, dtype=torch.int64)) > 0).sum())
            assert runs == sum(len(p.tensors["image_grid_thw"]) for p in shown)


def test_manipulations_show_the_frames_they_name(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60)
    text = "FIND_SEGMENT(x) = 2\nFIND_FRAME(x) = 178\nSPATIAL_ZOOM(x) = [0, 0, 1000, 500]\nFINAL_ANSWER: B"
    written = policy.write(prompts(clip)[:1], [text])
    assert written.texts == text.split("\n")
    first, second, third = (policy._dialogue.observation(written, v) for v in range(3))
    # 250 frames at 10 a second: two segments of 125; four frames of the second one
    assert [number(f) for f in frames_of(policy, first)] == [(125 + 125 * k // 4) % 256 for k in range(4)]
    assert number(frames_of(policy, second)[0]) == 177  # 1-based
    bars = frames_of(policy, third)[0]  # the upper 32 of 64 rows, two thirds of them bars
    row = bars[bars.shape[0] // 3].astype(int).mean(-1)
    bits = [int(row[round((k + 0.5) * len(row) / 8)] > 128) for k in range(8)]
    assert sum(b << k for k, b in enumerate(bits)) == 177
    assert "segment" in first.text and "region" in third.text
    assert first.types.unique().tolist() == [0, 2] and second.types.unique().tolist() == [0, 1]


def quarter_turn(pixels):
    return np.rot90(pixels)


def nothing(pixels):
    return None


@pytest.fixture
def own_manipulations():
    """`turn` shows a frame, or a second of film, turned; `transcript` gives a text; `broken` changes nothing rightly."""
    frame = {"properties": {"frame": {"type": "integer"}}}

    @manipulation("turn", {"properties": {"frame": {"type": "integer"}, "start": {"type": "number"}}, "required": []})
    def turn(state, args):
        look = state.still(args["frame"] - 1) if "frame" in args else state.segment(args["start"], args["start"] + 1)
        return look.changed(quarter_turn)

    @manipulation("transcript", {"properties": {"text": {"type": "string"}}})
    def transcript(state, args):
        return args["text"]

    @manipulation("broken", frame)
    def broken(state, args):
        return state.still(args["frame"] - 1).changed(nothing)

    yield
    for name in ("turn", "transcript", "broken"):
        del MANIPULATIONS[name]


def test_own_manipulations_show_texts_and_changed_pixels(clip, own_manipulations):
    """A film turned frame by frame, a still of other sides, words, and three turns that are refused."""
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=80, max_steps=9)
    turns = [
        'TURN(x) = {"frame": 178}',
        "FIND_FRAME(x) = 178",
        'TURN(x) = {"start": 2}',
        'TRANSCRIPT(x) = {"text": "She says: it is red."}',
        'TRANSCRIPT(x) = {"text": "It says <|image_pad|> there."}',
        'BROKEN(x) = {"frame": 3}',
        "FINAL_ANSWER: B",
    ]
    written = policy.write(prompts(clip)[:1], ["\n".join(turns)])
    shown = [policy._dialogue.observation(written, v) for v in range(6)]
    turned, plain = frames_of(policy, shown[0])[0], frames_of(policy, shown[1])[0]
    assert turned.shape[:2] == plain.shape[1::-1]  # the frame is twice as wide as it is high
    assert np.abs(np.rot90(plain).astype(int) - turned).mean() < 3
    assert [f.shape[0] > f.shape[1] for f in frames_of(policy, shown[2])] == [True] * 4
    assert shown[3].text.count("She says: it is red.") == 1 and shown[3].pixels is None
    assert all("failed_action" in tokens.text and tokens.pixels is None for tokens in shown[4:])
    assert written.tree.ok.tolist() == [True] * 4 + [False] * 2 + [True]


def test_a_turn_with_a_segment_and_a_frame_is_refused_and_the_conversation_goes_on(clip):
    """Pixels of one observation are one film or stills; such a turn once ended the run."""
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=80)
    environment = policy._dialogue._replay.environment
    environment.syntax = "tool_call"
    calls = [
        '{"name": "find_segment", "arguments": {"segments": [2]}}',
        '{"name": "find_frame", "arguments": {"frame": 7}}',
    ]
    for ordered in (calls, calls[::-1]):
        text = "".join(f"<tool_call>{call}</tool_call>" for call in ordered)
        result = environment.step(environment.start(prompts(clip)[0]), text, 100)
        assert "failed_action" in result.observation.text and not result.ok
        after = environment.step(result.state, f"<tool_call>{calls[1]}</tool_call>", 200)
        assert after.ok and number(frames_of(policy, after.observation)[0]) == 6


def test_the_first_view_spans_the_clip_by_its_clock(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False)
    tokens = policy.encode(prompts(clip)[0])
    assert [number(f) for f in frames_of(policy, tokens)] == [0, 62, 125, 187]
    assert tokens.pixels.seconds == pytest.approx(2 * 18.7 / 3, abs=1e-3)  # two frames per row in time
    stamped = agent(str(family_folder("qwen3_vl")), scripted=False).encode(prompts(clip)[0])
    assert "<3.1 seconds>" in stamped.text and "<15.6 seconds>" in stamped.text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_shuffled_clip_has_its_frames_in_another_order_and_its_clock(family, clip):
    """T-GRPO: the first view's frames change places, their times do not; later looks are into the same clip."""
    policy = agent(str(family_folder(family)), scripted=False, max_new_tokens=60)
    policy.encode.views = replace(policy.encode.views, frames=10)
    ordered = prompts(clip)[0]
    (twin,) = TemporalContrast().controls([ordered])
    views = [policy.encode(p) for p in (ordered, twin)]
    frames = [[number(f) for f in frames_of(policy, v)] for v in views]
    assert frames[0] == list(range(0, 250, 25)) and sorted(frames[1]) == frames[0] and frames[1] != frames[0]
    assert views[0].text == views[1].text and torch.equal(views[0].positions, views[1].positions)
    assert views[0].pixels.key != views[1].pixels.key and views[0].pixels.seconds == views[1].pixels.seconds
    turns = ["FIND_FRAME(x) = 26", "FIND_SEGMENT(x) = 2", "FINAL_ANSWER: B"]
    written = policy.write([twin], ["\n".join(turns)])
    still, film = (frames_of(policy, policy._dialogue.observation(written, v)) for v in range(2))
    assert number(still[0]) == frames[1][1]  # frame 25 from 0 is the second one of the first view
    order = policy.encode.info(twin).order
    assert sorted(order) == list(range(250)) and order == policy.encode.info(twin).order
    assert [number(f) for f in film] == [order[125 + 125 * k // 4] for k in range(4)]
    other = policy.encode.info(replace(twin, id="other"))
    assert other.order != order


def test_training_with_shuffled_twins(clip, tmp_path):
    """Twins are sampled for the prompt with a clip alone, half as often, and are no part of what is trained on."""
    task = SimpleNamespace(prompts=prompts(clip), eval_prompts=prompts(clip), rewards=(), judges=lambda samples: {})
    config = parse_config({
        "task": {"name": "clips"}, "policy": {"name": "video"}, "plan": {0: 4},
        "run": {"output": str(tmp_path), "prompts_per_iteration": 2, "cpu": True, "trackers": []},
    })  # fmt: skip
    run = Run(config, agent(str(family_folder("qwen2_5_vl"))), task, {"t": (Parity(), 1.0)})
    rollout = run.rollout(0)
    assert sorted(p.id for p in rollout.prompts) == ["a", "b"]
    assert [s.prompt.id for s in Parity.seen] == ["a/shuffled"] * 2
    assert run.meter.cost["leaves"] == 8 and run.meter.cost["tokens"] > rollout.counts["tokens"]


class Parity(TemporalContrast):
    """With an answer that an untrained model can give."""

    seen = ()

    def __call__(self, samples, controls=()):
        Parity.seen = controls
        return [float(len(s.output) % 2) for s in samples]


def test_a_film_stands_before_the_first_turn(clip):
    encode = agent(str(family_folder("qwen2_5_vl")), scripted=False).encode
    (plain,) = prompts(clip)[:1]
    history = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a clip"}]
    told = encode(replace(plain, inputs={**plain.inputs, "history": history}))
    assert int((told.types == 2).sum()) == int((encode(plain).types == 2).sum()) > 0
    film, words = told.text.index("<|video_pad|>"), told.text.index("What is it?")
    assert film < words < told.text.index("a clip") < told.text.index(plain.inputs["question"])


def test_text_after_a_film_goes_on_behind_its_largest_position(clip):
    """As Qwen2.5-VL was released: the second row in time lies 12 s x tokens per second later, the text behind that."""
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False)
    tokens = policy.encode(prompts(clip)[0])
    film = tokens.types == 2
    last = int(film.nonzero()[-1])
    assert int(tokens.positions[0, last]) > int(tokens.positions[1:, last].max())  # time is what reached furthest
    after = tokens.positions[:, last + 1]
    assert after.tolist() == [int(tokens.positions[:, film].max()) + 1] * 3
    assert tokens.next_position == int(tokens.positions.max()) + 1


def test_equal_looks_are_one_picture_for_the_encoder(clip):
    """Group members that look at the same frame share its features."""
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60)
    texts = ["FIND_FRAME(x) = 9\nFINAL_ANSWER: A", "FIND_FRAME(other words) = 9\nFINAL_ANSWER: B"]
    keys = [policy._dialogue.observation(policy.write(prompts(clip)[:1], [t]), 0).pixels.key for t in texts]
    assert keys[0] == keys[1]


def test_wrong_calls_are_told_and_the_conversation_goes_on(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60)
    text = "SPATIAL_ZOOM(x) = [0, 0, 500, 500]\nFIND_FRAME(x) = 251\nwhat now\nFINAL_ANSWER: A"
    written = policy.write(prompts(clip)[:1], [text])
    told = [policy._dialogue.observation(written, v).text for v in range(3)]
    assert written.tree.ok.tolist() == [False, False, False, True]
    assert "no_frame_selected" in told[0]
    assert "out_of_range" in told[1] and "frame 1 to 250" in told[1]
    assert "parse_error" in told[2]


def test_frames_that_cannot_be_read_are_told_by_a_name_of_their_own(clip, monkeypatch):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60)
    environment = policy._dialogue._replay.environment
    state = environment.start(prompts(clip)[0])

    def broken(path, index, size=None):
        raise VideoDecodeError(path, "corrupt_frame", f"frame {index[0]}")

    monkeypatch.setattr(environment.encoder.reader, "read", broken)
    answered = environment.step(state, "FIND_FRAME(x) = 9", 0)
    assert answered.observation.pixels is None
    assert "Error unreadable_frames: the file is damaged here (corrupt_frame)" in answered.observation.text
    environment.hints = False
    assert "unreadable_frames" in environment.step(state, "FIND_FRAME(x) = 10", 0).observation.text


def test_a_full_context_asks_for_the_answer_and_then_ends(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60, max_steps=8)
    environment = policy._dialogue._replay.environment
    environment.hints = False
    policy.encode.views = replace(policy.encode.views, frame_pixels=256 * 256, min_pixels=250 * 250)  # some 80 tokens
    prompt, used = prompts(clip)[0], 100
    state = environment.start(prompt)
    environment.max_context = used + 60
    answered = environment.step(state, "FIND_FRAME(x) = 9", used)
    after, seen = answered.state, answered.observation
    assert not answered.ok
    assert "budget_exceeded" in seen.text and seen.pixels is None
    assert environment.step(after, "FIND_FRAME(x) = 10", used + 40).observation is None
    environment.max_context = used + 10
    assert environment.step(state, "FIND_FRAME(x) = 9", used).observation is None


def test_the_last_turn_can_only_answer(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60, max_steps=2)
    written = policy.write(prompts(clip)[:1], ["FIND_FRAME(x) = 9\nFIND_FRAME(x) = 10\nFINAL_ANSWER: A"])
    assert written.texts == ["FIND_FRAME(x) = 9", "FIND_FRAME(x) = 10"]  # two turns, nothing is shown after the second
    assert "answer now" in policy._dialogue.observation(written, 0).text


def test_bad_clips_are_quarantined_by_reason(tmp_path, clip, caplog):
    task = Questions(str(tmp_path), films=3, broken=2)
    policy = agent(str(family_folder("qwen2_5_vl")))
    two = Prompt("two", {"question": "x", "videos": [clip, clip]})
    missing = Prompt("gone", {"question": "x", "videos": [str(tmp_path / "none.mp4")]})
    good = policy.admit([*task.prompts[:3], two, missing])
    assert [p.id for p in good] == ["q2"]
    told = caplog.text
    assert "q0" in told and "truncated" in told and "one clip" in told and "missing" in told


def test_models_of_other_families_are_refused():
    with pytest.raises(ValueError, match="need a model of qwen2_vl"):
        agent(str(family_folder("llava")))
    with pytest.raises(ValueError, match=r"views\.frames=0"):
        Views(frames=0)


def test_a_prompt_longer_than_the_limit_says_what_takes_the_room(clip):
    policy = agent(str(family_folder("qwen2_5_vl")), max_prompt_tokens=20)
    with pytest.raises(PromptError, match="first view"):
        policy.encode(prompts(clip)[0])


def test_a_clip_without_frames_to_show_twice_still_works(tmp_path):
    one = str(write_clip(tmp_path / "one.mp4", frames=1, size=(64, 96)))
    policy = agent(str(family_folder("qwen2_5_vl")), scripted=False, max_new_tokens=60)
    written = policy.write(
        [Prompt("a", {"question": "x", "videos": [one]})], ["FIND_FRAME(x) = 1\nFIND_SEGMENT(x) = 1\nFINAL_ANSWER: A"]
    )
    assert len(written.texts) == 3
    assert np.isfinite(policy.log_probs(written, torch.arange(3)).logp.detach().numpy()).all()


def test_greedy_evaluation_and_pictures_for_people(clip):
    policy = agent(str(family_folder("qwen2_5_vl")))
    policy.options = replace(policy.options, eval_temperature=0.0)
    assert [s.output for s in policy.generate(prompts(clip), seed=0)] == [
        s.output for s in policy.generate(prompts(clip), seed=1)
    ]
    rollout = policy.rollout(prompts(clip), BranchPlan({0: 6}), seed=0)
    pictures = [p for _, p in policy.describe(rollout, torch.arange(len(rollout.tree))) if p is not None]
    assert pictures and all(p.height == 96 for p in pictures)


@pytest.mark.multiproc
def test_two_processes_one_of_them_with_text_alone(tmp_path):
    """Prompts go to ranks in turn: with one clip among eight questions a rank often trains on text alone."""
    (tmp_path / "clips").mkdir()
    trees = {
        processes: {
            "task": {"name": "agent_tiny:Questions", "folder": str(tmp_path / "clips"), "films": 1},
            "policy": {"name": "agent_tiny:agent", "model": str(family_folder("qwen2_5_vl")), "train_vision": True},
            "plan": {0: 4}, "rewards": [{"name": "agent_tiny:digits", "timeout_s": 0}],
            "credit": {"estimators": [{"name": "grpo"}]}, "loss": {"clip_low": 0.2, "clip_high": 0.2},
            "optim": {"lr": 1e-3, "eps": 1e-3},
            "run": {"output": str(tmp_path / f"r{processes}"), "iterations": 2, "prompts_per_iteration": 4,
                    "eval_every": 2, "checkpoint_every": 2, "trackers": [], "report": False, "cpu": True,
                    "processes": processes},
        }
        for processes in (1, 2)
    }  # fmt: skip
    BranchGrpo(parse_config(trees[1])).train()
    file = tmp_path / "r2.yaml"
    file.write_text(yaml.safe_dump(trees[2]))
    run_ranks(2, "train", file)
    one, two = (load_file(tmp_path / f"r{n}" / "model" / "model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)

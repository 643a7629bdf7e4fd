"""An iteration's prompts are encoded once, however many there are and however often it goes through them."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import family_folder, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from vision_tiny import vision_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
# ruff: isort: off
import bench_encoding
import agent_tiny  # noqa: F401  # makes the next module importable
from make_clips import write_clip
# ruff: isort: on

import mmrl.reasoning.solutions
import video.encoding
import vision.forward.backbone
import vision.forward.network
import vision.growth.environment
import vision.inputs.prompts
from mmrl.byte_cache import ByteCache
from mmrl.config import parse_config
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import score_records
from mmrl.rollout import Prompt
from mmrl.trainers import trainer_of
from mmrl.tree import StepTree
from video.encoding import VideoEncoder
from video.reading.reader import VideoReader
from vision.forward.backbone import by_prompt, closure, micro_batches
from vision.inputs.prompts import PromptEncoder
from vision.prm import VisionPrm

EVERYTHING = {
    "loss": {"kl": 0.1, "kl_form": "k3", "recompute_old_logp": True},
    "step_rewards": [
        {
            "name": "vision_prm",
            "model": str(family_folder("qwen2_5_vl")),
            "max_tokens": 400,
            "head": "tokens",
            "format": {"positive": "+", "negative": "-"},
        }
    ],
    "policy": {"max_tokens": 400, "max_batch": 16, "max_new_tokens": 4},
    "readings": [{"name": "divergence"}],
    "credit": {"estimators": [{"name": "step_grpo"}]},
}


class Pictures:
    """Training and evaluation questions, as many of each by default, all with a picture of their own."""

    rewards = ("vision_tiny:odd",)

    def __init__(self, folder: str, questions: int, size: int = 64, evaluated: int | None = None) -> None:
        prompts = []
        for i in range(questions + (questions if evaluated is None else evaluated)):
            file = Path(folder) / f"{i}.png"
            picture(i, size).save(file)
            prompts.append(Prompt(f"q{i}", {"question": "count", "images": [str(file)]}))
        self.prompts, self.eval_prompts = prompts[:questions], prompts[questions:]

    def judges(self, samples):
        return {}


class Films:
    """Questions about clips, two of each clip."""

    rewards = ("vision_tiny:odd",)

    def __init__(self, folder: str, questions: int) -> None:
        clips = [str(write_clip(Path(folder) / f"{i}.mp4", frames=40 + i, size=(64, 96), gop=20)) for i in range(3)]
        prompts = [Prompt(f"q{i}", {"question": "count " * i, "videos": [clips[i % 3]]}) for i in range(questions)]
        self.prompts, self.eval_prompts = prompts[1:], prompts[:1]

    def judges(self, samples):
        return {}


class Count:
    """Calls of a method since `clear`, by its object and what `name` makes of its arguments."""

    def __init__(self, monkeypatch, owner, method, name):
        self.calls, original = Counter(), getattr(owner, method)

        def counted(*arguments):
            self.calls.update(name(*arguments))
            return original(*arguments)

        monkeypatch.setattr(owner, method, counted)

    @property
    def most(self):
        """Of one key."""
        return max(self.calls.values(), default=0)


def count_encodings(monkeypatch, encoder=PromptEncoder):
    """Prompts that became tokens, and pictures that went through an image encoder."""
    prompts = Count(monkeypatch, encoder, "_encode", lambda self, prompt: [(id(self), prompt.id)])
    towers = Count(
        monkeypatch,
        vision.forward.network,
        "_encode",
        lambda model, part: [(id(model), pixels.key) for pixels in part],
    )
    return prompts, towers


def by_phase(trainer, *counts):
    """Train; the calls that each evaluation and each iteration made, in turn."""
    phases = []

    def counted(run):
        def phase(iteration):
            for count in counts:
                count.calls.clear()
            metrics = run(iteration)
            phases.append((run.__name__, *(Counter(count.calls) for count in counts)))
            return metrics

        return phase

    trainer.iterate, trainer.evaluate = counted(trainer.iterate), counted(trainer.evaluate)
    trainer.train()
    return phases


def small_caches(monkeypatch, prompts):
    """Room for so many of the test's prompts between iterations."""
    monkeypatch.setattr(vision.inputs.prompts, "ENCODED_BYTES", prompts * 100_000)
    monkeypatch.setattr(vision.forward.backbone, "FEATURE_BYTES", prompts * 2_000)
    monkeypatch.setattr(vision.growth.environment, "OBSERVED_BYTES", prompts * 100_000)
    monkeypatch.setattr(video.encoding, "OBSERVED_BYTES", prompts * 100_000)


def check_once(phases, prompts, tower_factor=1):
    """Every prompt once by each encoder of each phase; in evaluation by the policy alone."""
    assert [name for name, *_ in phases] == ["evaluate", "iterate", "evaluate"]
    for name, encoded, features in phases:
        encoders = 1 if name == "evaluate" else 2
        assert len(encoded) == encoders * prompts and set(encoded.values()) == {1}
        assert len(features) == encoders * prompts * (tower_factor if encoders == 2 else 1)
        assert set(features.values()) == {1}


def test_an_iteration_encodes_each_of_its_prompts_once(tmp_path, monkeypatch):
    """Admission, rollout, rewards of steps, a reading, log-probs of the old, the new and the initial policy, two
    updates and evaluation, with room for 5 of 20 prompts between iterations; as it was, each encoded 20 anew."""
    small_caches(monkeypatch, prompts=5)
    counts = count_encodings(monkeypatch)
    tree = vision_recipe(
        family_folder("qwen2_5_vl"), tmp_path, tmp_path / "run", **EVERYTHING, plan={0: 2},
        optim={"updates_per_rollout": 2}, rewards=[{"name": "vision_tiny:odd", "timeout_s": 0}],
        run={"iterations": 1, "prompts_per_iteration": 20},
    )  # fmt: skip
    tree["task"] = {"name": "test_encoded_once:Pictures", "folder": str(tmp_path), "questions": 20}
    phases = by_phase(trainer_of(parse_config(tree)), *counts)
    for _, _, features in phases:
        # the reading's blanked pictures, which are no prompt's
        for key in [k for k in features if k[1].endswith("/blank")]:
            del features[key]
    check_once(phases, prompts=20)


def test_an_iteration_decodes_each_film_and_each_look_once(tmp_path, monkeypatch):
    """Films as prompts and what their conversations show, with room for four of them between iterations."""
    small_caches(monkeypatch, prompts=4)
    counts = count_encodings(monkeypatch, VideoEncoder)
    texts = Count(monkeypatch, VideoEncoder, "tokens", lambda self, text, pixels: [(text, pixels and pixels.key)])
    reads = Count(monkeypatch, VideoReader, "read", lambda self, path, index, size: [(path, tuple(index), size)])
    tree = vision_recipe(
        family_folder("qwen2_5_vl"), tmp_path, tmp_path / "run", plan={0: 4}, loss={"kl": 0.1, "kl_form": "k3"},
        optim={"updates_per_rollout": 2}, rewards=[{"name": "vision_tiny:odd", "timeout_s": 0}],
        run={"iterations": 1, "prompts_per_iteration": 6},
    )  # fmt: skip
    tree["task"] = {"name": "test_encoded_once:Films", "folder": str(tmp_path), "questions": 7}
    tree["policy"] = {"name": "agent_tiny:agent", "model": str(family_folder("qwen2_5_vl")), "max_tokens": 400}
    phases = by_phase(trainer_of(parse_config(tree)), *counts, texts, reads)
    _, encoded, features, shown, read = phases[1]
    assert len(encoded) == 6 and set(encoded.values()) == {1}
    # the films of two questions about one clip are one picture to the encoder
    seen = [n for (_, key), n in shown.items() if key is not None]
    assert len(seen) > 6 and set(seen) == set(features.values()) == {1}
    # both questions about a clip ask the reader, which keeps its frames
    assert max(read.values()) == 2


def test_training_a_reward_model_encodes_each_question_once(tmp_path, monkeypatch):
    """Ten of twelve questions have a picture; room for two of them between iterations."""
    small_caches(monkeypatch, prompts=2)
    counts = count_encodings(monkeypatch)
    tree = {
        "trainer": "step_reward",
        "task": {"name": "test_step_reward:Signs", "questions": 12, "pictures": 14, "folder": str(tmp_path)},
        "scorer": {"name": "vision_prm", "model": str(family_folder("qwen2_5_vl")), "max_tokens": 300},
        "run": {"output": str(tmp_path / "r"), "iterations": 1, "prompts_per_iteration": 12, "trackers": [],
                "report": False, "cpu": True},
    }  # fmt: skip
    for name, encoded, features in by_phase(trainer_of(parse_config(tree)), *counts):
        assert len(encoded) == len(features) == (12 if name == "iterate" else 2)
        assert set(encoded.values()) == set(features.values()) == {1}


def test_scoring_encodes_each_question_once(tmp_path, monkeypatch):
    small_caches(monkeypatch, prompts=2)
    monkeypatch.setattr(mmrl.reasoning.solutions, "QUESTIONS_AT_ONCE", 5)
    prompts, towers = count_encodings(monkeypatch)
    records = []
    for i in range(12):
        file = tmp_path / f"{i}.png"
        picture(i).save(file)
        records.append(SolutionRecord(f"r{i}", "what?", (Step("a"), Step("b" * (1 + i))), images=(str(file),)))
    scorer = VisionPrm.build(model=str(family_folder("qwen2_5_vl")), max_tokens=200)
    in_parts = score_records(scorer, records)
    assert set(prompts.calls.values()) == set(towers.calls.values()) == {1} and len(prompts.calls) == 12
    monkeypatch.setattr(mmrl.reasoning.solutions, "QUESTIONS_AT_ONCE", 12)
    for some, all_at_once in zip(in_parts, score_records(scorer, records), strict=True):
        assert some == pytest.approx(all_at_once, abs=1e-6)


@pytest.mark.slow
def test_64_pictures_of_a_megapixel_are_encoded_64_times_an_iteration(tmp_path, monkeypatch):
    """With the limits of a real run: 45 such prompts fit into what is kept between iterations."""
    family = tmp_path / "model"
    shutil.copytree(family_folder("qwen2_5_vl"), family)
    for file in family.glob("*processor_config.json"):
        file.write_text(file.read_text().replace('"longest_edge": 4096', f'"longest_edge": {1280 * 784}'))
    prompts, towers = count_encodings(monkeypatch)
    tree = vision_recipe(
        family, tmp_path, tmp_path / "run", plan={0: 2}, policy={"max_new_tokens": 2, "max_batch": 8},
        loss={"kl": 0.1, "kl_form": "k3"}, rewards=[{"name": "vision_tiny:odd", "timeout_s": 0}],
        run={"iterations": 1, "prompts_per_iteration": 64},
    )  # fmt: skip
    tree["task"] = {
        "name": "test_encoded_once:Pictures", "folder": str(tmp_path), "questions": 64, "size": 1024, "evaluated": 2,
    }  # fmt: skip
    trainer = trainer_of(parse_config(tree))
    kept = trainer.policy.encode._kept
    sizes = []
    reward_leaves = trainer.run.rewarder.reward_leaves

    def measured(*arguments):
        sizes.append(kept.held)
        return reward_leaves(*arguments)

    trainer.run.rewarder.reward_leaves = measured
    [_, (_, encoded, features), _] = by_phase(trainer, prompts, towers)
    assert len(encoded) == len(features) == 64 and set(encoded.values()) == set(features.values()) == {1}
    # more than is kept between iterations, and within the bound of one
    assert kept.limit < sizes[0] < kept.iteration_limit


# ---- the cache ------------------------------------------------------------------------------------------------------

OPERATION = st.one_of(st.just("begin"), st.tuples(st.integers(0, 9), st.integers(0, 2000)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 6000), st.lists(OPERATION, max_size=40))
def test_a_cache_stays_within_both_bounds_and_keeps_what_an_iteration_has_room_for(limit, of_iteration, operations):
    cache = ByteCache(limit, of_iteration)
    begun, held = False, {}
    for operation in operations:
        if operation == "begin":
            cache.begin_iteration()
            begun, held = True, {}
            continue
        key, size = operation
        held.pop(key, None)
        cache.put(key, (key, size), size)
        room = begun and sum(s + 512 for s in held.values()) + size + 512 <= of_iteration
        if room:
            held[key] = size
        assert cache.get(key) == ((key, size) if room or size + 512 <= limit else None)
        assert cache.used <= limit and cache.held <= of_iteration
        assert all(cache.get(k) == (k, s) for k, s in held.items())
    cache.clear()
    assert (len(cache), cache.used, cache.held) == (0, 0, 0)


def test_an_iteration_with_more_than_fits_says_so_once(caplog):
    cache = ByteCache(0, 2000, name="encoded prompts")
    cache.put("before", 0, 600)
    for _ in range(2):
        cache.begin_iteration()
        for key in "abc":
            cache.put(key, key, 600)
        assert [cache.get(k) for k in "abc"] == ["a", None, None]
    [told] = [r.getMessage() for r in caplog.records]
    assert told.startswith("the encoded prompts of an iteration take more than 0.0 GiB in this process")


# ---- what a pass over a forest costs --------------------------------------------------------------------------------


def forest(prompts, steps=6):
    """A chain of so many steps for every prompt."""
    n = prompts * steps
    parent = torch.where(torch.arange(n) % steps == 0, -1, torch.arange(n) - 1)
    status = torch.where(torch.arange(n) % steps == steps - 1, 2, 0)
    return StepTree(parent, torch.arange(n) // steps, status, torch.full((n,), torch.nan))


class Elements(TorchDispatchMode):
    """The elements of every tensor made inside the block, and of every list made of one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.total, original = 0, torch.Tensor.tolist

        def counted(tensor):
            self.total += tensor.numel()
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        self.total += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


@pytest.mark.parametrize("prompts", [50, 200])
def test_a_pass_over_a_forest_takes_as_long_as_there_are_steps(monkeypatch, prompts):
    """It took prompts times steps: every prompt looked at the whole forest."""
    tree, steps = forest(prompts), torch.arange(prompts * 6)
    with monkeypatch.context() as patch, Elements(patch) as elements:
        parts = micro_batches(tree, steps, [3] * len(tree), dict.fromkeys(range(prompts), 5), 100)
        own = [closure(tree, ids) for _, ids in by_prompt(tree, steps)]
    assert torch.equal(torch.cat(parts), steps) and all(parent == [-1, *range(6)] for _, parent in own)
    assert elements.total < 20 * len(tree)


def test_the_benchmark_counts_both_ways(monkeypatch):
    monkeypatch.setattr(vision.inputs.prompts, "ENCODED_BYTES", 3 * 80_000)
    [[prompts, _, recent, _, kept, *_]] = bench_encoding.measure([6], 56)
    assert (prompts, recent, kept) == ("6", "36", "6")

"""What a video agent looked at beside its reference: overlaps by hand, refused turns, and a recipe."""

import math
import sys
from pathlib import Path

import pytest
import torch

from mmrl.config import ConfigError, parse_config
from mmrl.readings import ReadingContext, fill
from mmrl.rollout import Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.run import Run
from video.readings import VideoEvidence

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder

CONTEXT = ReadingContext(policy=None, outcome=lambda samples: torch.zeros(len(samples)))
CLIP = {"frame_count": 400, "duration": 40.0, "size": [96, 64]}


def prompt(name, **reference):
    return Prompt(name, {"question": "?", "videos": ["x.mp4"]}, CLIP | reference)


def seconds(a, b):
    return f'FIND_SEGMENT(it) = {{"start": {a}, "end": {b}}}'


def test_overlaps_in_seconds_and_repeated_looks():
    looks = [seconds(0, 10), seconds(5, 15), seconds(0, 10.2), "FINAL_ANSWER: B"]
    asked = [prompt("p", segments=[[0.0, 10.0], [20.0, 30.0]]), prompt("q"), prompt("r", segments=[[0.0, 20.0]])]
    rollout = solution_forest(asked, [[looks], [looks[:1]], [[seconds(0, 10)], [seconds(90, 95)]]])[0]
    got = VideoEvidence(max_golds=2, max_items=3)(rollout, CONTEXT)
    nan = math.nan
    want = [[1, 0], [5 / 15, 0], [10 / 10.2, 0], [0, 0], [nan, nan], [0.5, nan], [0, nan]]
    torch.testing.assert_close(got["tags.similarity"], torch.tensor(want, dtype=torch.float64), equal_nan=True)
    shown = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]  # beyond the clip: refused
    assert got["tags.documents"].long().tolist() == shown


def test_all_kinds_stand_beside_each_other():
    reference = prompt("p", segment_ids=[2], frames=[[4, 8]], boxes=[{"frame": 5, "box": [0.0, 0.0, 0.5, 0.5]}])
    looks = ["FIND_SEGMENT(it) = [2]", "FIND_FRAME(it) = 6", "SPATIAL_ZOOM(it) = [0, 0, 1000, 500]"]
    rollout = solution_forest([reference], [[looks]])[0]
    got = VideoEvidence("all", coords="norm1000", max_golds=3, max_items=3)(rollout, CONTEXT)
    # the frame 6 is number 5 from 0; the box is half right
    torch.testing.assert_close(got["tags.similarity"], torch.diag(torch.tensor([1.0, 1.0, 0.5])).double())
    assert got["tags.documents"].long().tolist() == torch.eye(3).long().tolist()
    one = VideoEvidence("frame", max_golds=1, max_items=1)(rollout, CONTEXT)
    assert one["tags.similarity"].tolist() == [[0], [1], [0]] and one["tags.documents"].tolist() == [[0], [1], [0]]
    _, records = fill(
        rollout, {"e": (VideoEvidence("all", max_golds=2), ("tags.similarity", "tags.documents"))}, CONTEXT, limit=1.0
    )
    assert records["e"].failed_prompts == 1  # more items than columns: nothing is cut off


class Referenced:
    """Questions about clips whose reference names a segment; the reward is the share of digits."""

    rewards = ("agent_tiny:digits",)

    def __init__(self, folder: str):
        from agent_tiny import Questions

        asked = Questions(folder).prompts[:4]
        clip = {"frame_count": 250, "duration": 10.0, "size": [64, 96], "segments": [[2.0, 5.0]]}
        self.prompts = [Prompt(p.id, p.inputs, clip) for p in asked]
        self.eval_prompts = self.prompts[:1]

    def judges(self, samples):
        return {}


def test_stepsearch_on_looks(tmp_path):
    tree = {
        "task": {"name": "test_video_readings:Referenced", "folder": str(tmp_path)},
        "policy": {"name": "agent_tiny:agent", "model": str(family_folder("qwen2_5_vl"))},
        "plan": {0: 4}, "rewards": [{"name": "agent_tiny:digits", "timeout_s": 0}],
        "readings": [{"name": "tree_value"}, {"name": "video_evidence", "coords": "norm1000"}],
        "credit": {"estimators": [{"name": "stepsearch"}]},
        "run": {"output": str(tmp_path / "run"), "iterations": 1, "prompts_per_iteration": 2, "trackers": [],
                "report": False, "cpu": True},
    }  # fmt: skip
    metrics = BranchGrpo(parse_config(tree)).train()
    assert metrics["policy/grad_norm"] > 0 and metrics["reading/video_evidence/failed_prompts"] == 0
    assert metrics["reading/video_evidence/tags.similarity"] == pytest.approx(0)  # noise finds nothing


def run_with(folder, **sections):
    tree = {
        "task": {"name": "test_video_readings:Referenced", "folder": str(folder)},
        "policy": {"name": "agent_tiny:agent", "model": str(family_folder("qwen3_vl"))},
        "plan": {0: 4}, "rewards": [{"name": "agent_tiny:digits", "timeout_s": 0}, {"name": "video_com"}],
        "run": {"output": str(folder / "run"), "iterations": 1, "prompts_per_iteration": 2, "trackers": [],
                "report": False, "cpu": True},
    }  # fmt: skip
    return Run(parse_config(tree | sections))


def test_rewards_and_readings_take_the_form_of_turns_from_the_policy(tmp_path):
    """The tiny agent writes Video-CoM with thousandths, and sees stills of 64 * 64 pixels in tokens of 32."""
    step_rewards = [{"name": name} for name in ("manipulations", "video_virl", "lcs_progress", "video_answer_step")]
    run = run_with(tmp_path, step_rewards=step_rewards, readings=[{"name": "video_evidence", "kind": "box"}])
    scorers = {name: scorer for name, (scorer, _) in run.rewarder.step_rewards.items()}
    assert scorers.pop("video_answer_step").syntax == "videocom"
    scorers["video_com"] = run.rewarder.rewards["video_com"][0]
    evidence = run.rewarder.readings["video_evidence"][0]
    assert evidence.kind == "box"
    scorers["evidence"] = evidence._reading
    for scorer in scorers.values():
        options = (scorer.syntax, scorer.coords, scorer.frame_pixels, scorer.factor)
        assert options == ("videocom", "norm1000", 64 * 64, run.policy.encode.factor)
    assert run.policy.encode.factor == 32


@pytest.mark.parametrize(
    "section, entry",
    [
        ("step_rewards", {"name": "manipulations", "coords": "pixels"}),
        ("step_rewards", {"name": "video_answer_step", "syntax": "tags"}),
        ("readings", {"name": "video_evidence", "syntax": "tool_call"}),
    ],
)
def test_another_form_of_turns_than_the_policys_is_refused(tmp_path, section, entry):
    option = list(entry)[1]
    with pytest.raises(
        ConfigError, match=rf"{section}\.0\.{option}='{entry[option]}': the policy has .* leave it out"
    ):
        run_with(tmp_path, **{section: [entry]})

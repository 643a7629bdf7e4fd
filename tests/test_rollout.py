import pytest
import torch

from mmrl.rollout import Actions, BranchPlan, Prompt, Rollout
from mmrl.tree import StepTree

NFE = [  # T, splits, K, leaves, calls, steps, independent
    (20, (0, 3, 6, 9), 2, 16, 203, 218, 320),
    (20, (0, 5, 10, 15), 2, 16, 135, 150, 320),
    (20, (0, 1, 2, 3), 2, 16, 271, 286, 320),
    (20, (9, 12, 15, 18), 2, 16, 68, 83, 320),
    (16, (0, 3, 6, 9), 2, 16, 139, 154, 256),
    (10, (0, 2, 4), 2, 8, 53, 60, 80),
    (10, (0, 2, 4, 6), 2, 16, 77, 92, 160),
    (4, (0, 2), 2, 4, 9, 12, 16),
    (6, (1, 3), 3, 9, 26, 34, 54),
    (20, (4,), 16, 16, 245, 260, 320),
]


@pytest.mark.parametrize("steps, splits, k, leaves, calls, edges, independent", NFE)
def test_forecast_table(steps, splits, k, leaves, calls, edges, independent):
    f = BranchPlan(dict.fromkeys(splits, k)).forecast(steps)
    assert (f.leaves, f.calls, f.steps, f.independent_calls) == (leaves, calls, edges, independent)


def test_trained_states_of_split_only():
    plan = BranchPlan({0: 2, 3: 2, 6: 2, 9: 2})
    assert plan.forecast(20, trained_depths=plan.splits).trained_states == 15


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BranchPlan({-1: 2}), "depth -1 is negative"),
        (lambda: BranchPlan({0: 0}), "depth 0 has factor 0"),
        (lambda: BranchPlan(dict.fromkeys(range(11), 2)), "makes 2048 leaves per prompt, more than 1024"),
        (lambda: BranchPlan({10: 2}).check(10), "depth 10 lies beyond the last step; 10 steps have depths 0..9"),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def two_prompts(ids=("a", "b")):
    tree = StepTree([-1, 0, -1, 2], [0, 0, 1, 1], [0, 1, 0, 1], [float("nan"), 1.0, float("nan"), 0.0])
    logp = torch.tensor([-1.0, float("nan"), -2.0, -3.0])
    actions = Actions(logp, ~logp.isnan(), {"latent": torch.randn(4, 2, 2)})
    prompts = [Prompt(i, {"text": i}) for i in ids]
    return Rollout(prompts, tree, actions, {"init": torch.randn(2, 2, 2)}, {"calls": 4, "leaves": 2}, {"seed": 1})


def test_save_load_and_select(tmp_path):
    rollout = two_prompts()
    again = Rollout.load(rollout.save(tmp_path / "r"))
    torch.testing.assert_close(again.actions.payload["latent"], rollout.actions.payload["latent"])
    assert again.prompts == rollout.prompts and again.about == {"seed": 1} and again.counts == rollout.counts
    one = rollout.select([1])
    assert one.prompts[0].id == "b" and one.tree.parent.tolist() == [-1, 0]
    torch.testing.assert_close(one.actions.logp, torch.tensor([-2.0, -3.0]))
    torch.testing.assert_close(one.prompt_payload["init"], rollout.prompt_payload["init"][1:])


def test_cut_file_is_a_clear_error(tmp_path):
    two_prompts().save(tmp_path)
    file = tmp_path / "actions.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="holds no readable rollout"):
        Rollout.load(tmp_path)


def test_inconsistent_rollouts_are_refused():
    with pytest.raises(ValueError, match="id 'a' occurs twice"):
        two_prompts(("a", "a"))
    with pytest.raises(ValueError, match="action 1 is trainable but its logp is not finite"):
        Actions(torch.tensor([0.0, float("nan")]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="2 groups for 3 prompts"):
        two_prompts(("a", "b", "c"))


def test_prompts_of_different_length_are_padded_anew():
    short, long = two_prompts(), two_prompts(("c", "d"))
    for rollout, length in ((short, 2), (long, 3)):
        rollout.prompt_payload["text"] = torch.ones(2, length, 4)
        rollout.prompt_payload["text.length"] = torch.tensor([length, 1])
    both = Rollout.concatenate([short, long]).prompt_payload
    assert both["text"].shape == (4, 3, 4) and both["text.length"].tolist() == [2, 1, 3, 1]
    assert bool(both["text"][:2, :2].all()) and not bool(both["text"][:2, 2:].any())

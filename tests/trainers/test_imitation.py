"""Imitation as a trainer: it learns references and its own best samples, exactly, whatever the batching."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import recipe
from vision_tiny import Words, vision_recipe

from mmrl.config import load_config, parse_config
from mmrl.rollout import Prompt
from mmrl.trainers import trainer_of
from mmrl.trainers.imitation import ImitationConfig, ImitationTrainer
from mmrl.trainers.references import best_leaves, imitation_losses

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder


class Solved(Words):
    """The questions of Words with a reference each, but for the last `unsolved`."""

    def __init__(self, folder: str, unsolved: int = 0) -> None:
        super().__init__(folder, pictures=0)
        for i, p in enumerate(self.prompts):
            reference = {"steps": [f"step {i}", "so 7"]} if i < 8 - unsolved else None
            self.prompts[i] = Prompt(p.id, p.inputs, reference)
        self.eval_prompts = self.prompts[:2]


def text_recipe(tmp_path, output, unsolved=0, **sections):
    sections["task"] = {"name": "test_imitation:Solved", "unsolved": unsolved}
    tree = vision_recipe(family_folder("text"), tmp_path, tmp_path / output, **sections)
    for key in ("credit", "loss"):
        del tree[key]
    return {**tree, "trainer": "imitation"}


def latent_recipe(model, output, **sections):
    tree = recipe(model, output, **{"source": "samples", "keep_above": -10.0, **sections})
    del tree["loss"]
    return {**tree, "trainer": "imitation"}


def run(tree):
    trainer = ImitationTrainer(parse_config(tree, model=ImitationConfig))
    trainer.train()
    return trainer


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_references_are_learned(tmp_path):
    run(text_recipe(tmp_path, "r", run={"iterations": 12}, optim={"lr": 1e-2}))
    rows = [r for r in metrics(tmp_path / "r") if "imitation/nll" in r]
    assert rows[-1]["imitation/nll"] < rows[0]["imitation/nll"] / 2
    assert rows[0]["imitation/solutions_per_prompt"] == 1
    assert "eval/reward" in metrics(tmp_path / "r")[0] and (tmp_path / "r" / "model").is_dir()


def test_the_loss_is_the_mean_over_all_reference_tokens(tmp_path):
    trainer = ImitationTrainer(parse_config(text_recipe(tmp_path, "r"), model=ImitationConfig))
    rollout, weight = trainer.solutions(0)
    whole = trainer.policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    first = trainer.iterate(0)
    assert first["imitation/nll"] == pytest.approx(-float(whole.logp.detach().mean()), rel=1e-5)
    assert first["imitation/actions"] == len(whole.logp) and bool((weight == 1).all())


def test_accumulation_changes_nothing(tmp_path):
    for name, max_tokens in (("whole", 4096), ("parts", 30)):
        optim = {"lr": 1e-3, "eps": 1e-3}
        run(text_recipe(tmp_path, name, policy={"max_tokens": max_tokens}, optim=optim, run={"iterations": 2}))
    a, b = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "parts"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)


def test_only_prompts_with_a_reference_are_used(tmp_path, caplog):
    trainer = ImitationTrainer(parse_config(text_recipe(tmp_path, "r", unsolved=3), model=ImitationConfig))
    assert len(trainer.prompts) == 5 and "3 of 8 prompts have no reference solution" in caplog.text
    with pytest.raises(ValueError, match="none of 8 prompts has a reference solution"):
        ImitationTrainer(parse_config(text_recipe(tmp_path, "s", unsolved=8), model=ImitationConfig))


def test_a_policy_that_cannot_write_takes_samples(tiny_model, tmp_path):
    tree = latent_recipe(tiny_model, tmp_path / "r", source="reference")
    with pytest.raises(
        ValueError, match="source: reference .* needs the protocol OutputWriter .*those that do: video, vision"
    ):
        ImitationTrainer(parse_config(tree, model=ImitationConfig))


def test_best_samples_raise_the_reward_of_a_diffusion_model(tiny_model, tmp_path):
    run(latent_recipe(tiny_model, tmp_path / "r", run={"iterations": 25, "eval_every": 25}))
    evals = [r["eval/reward"] for r in metrics(tmp_path / "r") if "eval/reward" in r]
    assert evals[-1] > evals[0] + 0.03


def test_samples_below_the_threshold_teach_nothing(tiny_model, tmp_path):
    before = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    run(latent_recipe(tiny_model, tmp_path / "r", keep_above=10.0, run={"iterations": 2}))
    after = load_file(tmp_path / "r" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert metrics(tmp_path / "r")[1]["imitation/solutions_per_prompt"] == 0


def test_best_leaves_by_hand(t8):
    """Leaves 2, 4, 5, 6 have outcomes 1, 0, 1, 0; 7 is unfinished."""
    assert best_leaves(t8, 0.0).tolist() == [2]
    assert best_leaves(t8, 0.0, 9).tolist() == [2, 5]
    assert best_leaves(t8, -1.0, 3).tolist() == [2, 4, 5]
    assert best_leaves(t8, 1.0).tolist() == []


def test_shared_steps_count_once_per_chosen_solution(tiny_model, tmp_path):
    """Weights of a step add up the chosen leaves below it; unweighted steps have no part in the loss."""
    trainer = ImitationTrainer(
        parse_config(
            latent_recipe(tiny_model, tmp_path / "r", per_prompt=2, policy={"noise": "all"}), model=ImitationConfig
        )
    )
    rollout, weight = trainer.solutions(0)
    for g in range(len(rollout.prompts)):
        assert float(weight[(rollout.tree.parent < 0) & (rollout.tree.group == g)].sum()) == 2
    losses = imitation_losses(trainer.policy, rollout, 3.0, weight=weight)
    got = sum(float(f().detach()) for f in losses)
    steps = rollout.actions.trainable.nonzero().flatten()
    new = trainer.policy.log_probs(rollout, steps)
    assert got == pytest.approx(-float((weight[new.index] * new.logp.detach()).sum()) / 3, rel=1e-5)


def test_the_command_line_finds_it(tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(text_recipe(tmp_path, "r")))
    assert isinstance(trainer_of(load_config(tmp_path / "r.yaml")), ImitationTrainer)

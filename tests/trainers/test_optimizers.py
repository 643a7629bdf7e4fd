"""Optimizers and schedules by name, epochs, and what is refused before anything is loaded."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import recipe

from mmrl.cli import train
from mmrl.config import ConfigError, parse_config
from mmrl.recipe import OptimConfig, RunConfig
from mmrl.registry import ComponentError, names
from mmrl.trainers import trainer_of
from mmrl.trainers.optimizers import build_optimizer, check_optim, lr_schedule


def run(model, output, **sections):
    """Train in this process; the weights and the rates of the iterations."""
    trainer_of(parse_config(recipe(model, output, **sections))).train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(output / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    return weights, [row["policy/lr"] for row in rows if "policy/lr" in row]


def test_the_default_is_adamw_of_torch_bit_for_bit():
    o = OptimConfig(lr=0.1, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3)
    mine, theirs = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    pair = [
        (mine, build_optimizer(o, [mine])),
        (theirs, torch.optim.AdamW([theirs], lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)),
    ]
    for step in range(3):
        for p, optimizer in pair:
            p.grad = torch.cos(torch.arange(6.0) + step).view(2, 3)
            optimizer.step()
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "optim, kind, settings",
    [
        ({"options": {"fused": True}}, "AdamW", {"fused": True, "weight_decay": 1e-4}),
        ({"name": "sgd", "options": {"momentum": 0.5}}, "SGD", {"momentum": 0.5, "weight_decay": 1e-4}),
        ({"name": "adafactor", "weight_decay": 0.1}, "Adafactor", {"relative_step": False, "weight_decay": 0.1}),
    ],
)
def test_options_reach_the_library(optim, kind, settings):
    optimizer = build_optimizer(OptimConfig(lr=0.1, **optim), [torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer).__name__ == kind
    assert {key: optimizer.defaults[key] for key in settings} == settings and optimizer.defaults["lr"] == 0.1


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adamw_8bit"])
def test_resumed_equals_uninterrupted_for_every_optimizer(tiny_model, tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    extra = {"optim": {"name": name, "lr": 1e-2, "warmup": 2}, "run": {"checkpoint_every": 1, "iterations": 3}}
    straight, rates = run(tiny_model, tmp_path / "straight", **extra)
    assert rates == [0.005, 0.01, 0.01]
    run(tiny_model, tmp_path / "broken", **extra | {"run": {"checkpoint_every": 1, "iterations": 1}})
    extra["run"]["resume"] = True
    resumed, again = run(tiny_model, tmp_path / "broken", **extra)
    assert again == rates and straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_schedules_are_those_of_transformers_behind_a_warm_up_that_learns_at_once():
    o = OptimConfig(warmup=2, schedule="linear")
    assert [lr_schedule(o, 6)(i) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert lr_schedule(OptimConfig(warmup=0.25), 8)(0) == 0.5  # a share of the run
    assert [lr_schedule(OptimConfig(), 4)(i) for i in range(4)] == [1.0] * 4
    cosine = lr_schedule(OptimConfig(schedule="cosine"), 7)
    assert [cosine(i) for i in range(7)] == [0.5 * (1 + math.cos(math.pi * (i / 7))) for i in range(7)]
    lowest = lr_schedule(OptimConfig(schedule="cosine_with_min_lr", schedule_options={"min_lr_rate": 0.1}), 10)
    assert lowest(10) == pytest.approx(0.1)
    assert lr_schedule(OptimConfig(schedule="polynomial", lr=1e-3, schedule_options={"power": 2.0}), 4)(
        2
    ) == pytest.approx(0.25, rel=1e-3)
    stable = OptimConfig(schedule="warmup_stable_decay", warmup=1, schedule_options={"num_decay_steps": 2})
    assert [lr_schedule(stable, 5)(i) for i in range(4)] == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "optim, message",
    [
        ({"name": "adam"}, r"unknown optimizer 'adam' \(did you mean adamw\?\)"),
        ({"options": {"fuse": True}}, r"unknown key optim.options.fuse=True \(did you mean fused\?\)"),
        ({"name": "sgd", "betas": (0.5, 0.9)}, "optim.betas=.*sgd has no such setting"),
        ({"schedule": "cosine", "schedule_options": {"min": 1}}, "optim.schedule=cosine with schedule_options="),
        ({"schedule": "constant", "schedule_options": {"a": 1}}, "it has no options"),
        ({"schedule": "warmup_stable_decay"}, "optim.schedule=warmup_stable_decay"),
    ],
)
def test_optimizers_and_schedules_that_cannot_be_made(optim, message):
    with pytest.raises(ValueError, match=message):
        check_optim(OptimConfig(**optim), 10)


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr("mmrl.trainers.optimizers.find_spec", lambda name: None)
    for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        with pytest.raises(ComponentError, match=r"bitsandbytes is not installed; pip install 'mmrl\[bnb\]'"):
            check_optim(OptimConfig(name=name), 10)
    assert {"adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adamw", "sgd", "adafactor"} == set(names("optimizers"))


def test_epochs_count_the_prompts_of_the_task(tiny_model, tmp_path):
    config = parse_config(recipe(tiny_model, tmp_path / "r", run={"epochs": 2, "prompts_per_iteration": 4}))
    trainer = trainer_of(config)  # of ten prompts, two batches of four an epoch
    assert trainer.loop.config.run.iterations == 4
    counted = RunConfig(epochs=0.6, prompts_per_iteration=4)
    counted.count_epochs(10)
    assert counted.iterations == 2


# ---- before anything is loaded --------------------------------------------------------------------------------------


class Never:
    """A task that must not be made."""

    def __init__(self) -> None:
        raise AssertionError("the task was made")


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"plan": {9: 2}}, r"depth 9 lies beyond the last step.*policy.steps="),
        ({"policy": {"model": "./nowhere"}}, "policy.model='./nowhere': there is no such folder"),
        ({"policy": {"kernal": "ode"}}, r"did you mean kernel\?"),
        ({"rewards": [{"name": "brightnes"}]}, "unknown reward 'brightnes'"),
        ({"optim": {"name": "adam"}}, "unknown optimizer"),
        ({"run": {"trackers": ["wandbb"]}}, "unknown tracker"),
    ],
)
def test_what_a_recipe_cannot_be_is_told_before_the_task_is_made(tiny_model, tmp_path, sections, message):
    config = parse_config(recipe(tiny_model, tmp_path / "r", **sections) | {"task": "test_optimizers:Never"})
    with pytest.raises(ValueError, match=message):
        trainer_of(config)


def test_a_folder_that_holds_a_run_is_told_before_the_task_is_made(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "r", run={"iterations": 1})
    file = tmp_path / "r.yaml"
    file.write_text(
        yaml.safe_dump(recipe(tiny_model, tmp_path / "r", run={"iterations": 1}) | {"task": "test_optimizers:Never"})
    )
    for overrides, message in (
        ([], "already holds a run"),
        (["run.resume=true"], "made by another recipe: task"),
        (["run.output=/proc/nowhere/run"], "nothing can be written into /proc/nowhere/run"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(file, overrides)

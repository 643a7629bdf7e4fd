"""Callbacks: from a recipe, from Python and in every run; they agree over ranks, and resuming changes nothing."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny import recipe as latent_recipe
from tiny import write_recipe

from mmrl.config import ConfigError, parse_config
from mmrl.registry import ComponentError
from mmrl.trainers import trainer_of
from mmrl.trainers.callback import Callback
from mmrl.trainers.callbacks import EarlyStop, PushToHub


def recipe(output, *callbacks, **sections):
    """Walks on a line: a run of milliseconds."""
    tree = {
        "trainer": "branch_grpo",
        "task": "walks:WalkTask",
        "policy": "walks:WalkPolicy",
        "plan": {0: 4},
        "rewards": [{"name": "walks:near_goal", "timeout_s": 0}],
        "optim": {"lr": 0.1},
        "run": {"output": str(output), "iterations": 4, "prompts_per_iteration": 4, "eval_every": 1,
                "checkpoint_every": 1, "trackers": [], "report": False, "cpu": True},
        "callbacks": list(callbacks),
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def run(tree, **own):
    trainer = trainer_of(parse_config(tree), **own)
    trainer.train()
    return trainer


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def evaluated(folder):
    return [row["iteration"] for row in rows(folder) if "eval/reward" in row]


class Script(Callback):
    """Evaluations have the metric eval/script, one value of a list after the other, by their iteration."""

    def __init__(self, values: list[float], of_rank: bool = False) -> None:
        self.values, self.of_rank = values, of_rank

    def on_evaluation(self, trainer, metrics):
        sign = -1 if self.of_rank and not trainer.loop.is_main else 1
        metrics["eval/script"] = sign * self.values[trainer.loop.state.iteration]


def script(*values, **options):
    return {"name": "test_callbacks:Script", "values": list(values), **options}


class Diary(Callback):
    """Writes every hook into a list; its own state is the number of iterations that it has seen."""

    def __init__(self) -> None:
        self.lines, self.seen = [], 0

    def setup(self, loop):
        self.lines.append(f"setup, {sum(p.numel() for p in loop.parameters)} weights")

    def on_start(self, trainer):
        self.lines.append(f"start at {trainer.loop.state.iteration}, {self.seen} seen")

    def on_update(self):
        self.lines.append("update")

    def on_rollout(self, trainer, rollout, mark):
        self.lines.append(f"rollout of {len(rollout.prompts)} prompts")
        assert len(mark) == len(rollout.tree)

    def on_iteration(self, trainer, metrics):
        self.seen += 1
        metrics["diary/seen"] = float(self.seen)
        self.lines.append(f"iteration {trainer.loop.state.iteration}")

    def on_evaluation(self, trainer, metrics):
        self.lines.append("evaluation")
        assert any(name.startswith("eval/") for name in metrics) and not torch.is_grad_enabled()

    def on_checkpoint(self, trainer, folder):
        self.lines.append(f"checkpoint {folder.name}")
        assert (folder / "manifest.json").is_file()

    def on_end(self, trainer, metrics):
        self.lines.append(f"end, done: {trainer.loop.done}")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_every_hook_is_called_in_order_and_state_comes_back(tmp_path):
    diary = Diary()
    run(recipe(tmp_path, run={"iterations": 2, "eval_every": 2}), callbacks=[diary])
    iteration = ["update", "rollout of 4 prompts"]
    assert diary.lines == [
        "setup, 243 weights", "start at 0, 0 seen", "evaluation", *iteration, "iteration 1", "checkpoint 000001",
        *iteration, "iteration 2", "evaluation", "checkpoint 000002", "end, done: True",
    ]  # fmt: skip
    assert [row["diary/seen"] for row in rows(tmp_path) if "diary/seen" in row] == [1, 2]
    again = Diary()
    run(recipe(tmp_path, run={"iterations": 3, "eval_every": 2, "resume": True}), callbacks=[again])
    assert again.lines[1] == "start at 2, 2 seen" and rows(tmp_path)[-2]["diary/seen"] == 3


def test_a_callback_of_ones_own_in_a_recipe(tmp_path):
    run(recipe(tmp_path, script(3, 1, 2, 5, 4)))
    assert [row["eval/script"] for row in rows(tmp_path) if "eval/script" in row] == [3, 1, 2, 5, 4]


class Half:
    """Has one hook, and is no callback."""

    def on_end(self, trainer, metrics): ...


@pytest.mark.parametrize(
    "section, message",
    [
        ("early_stopp", r"unknown callback 'early_stopp' \(did you mean early_stop\?\)"),
        ({"name": "early_stop"}, "callbacks.0.metric is missing"),
        ({"name": "early_stop", "metric": "eval/reward", "patience": 0}, "callbacks.0.patience=0: .* greater than 0"),
        ({"name": "early_stop", "metric": "eval/reward", "mode": "maximum"}, "callbacks.0.mode='maximum'"),
        ({"name": "push_to_hub", "repo": "a/b", "api": "x"}, "unknown key callbacks.0.api"),
        ("test_callbacks:Half", "needs the protocol Callback"),
    ],
)
def test_callbacks_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path, section, message):
    tree = recipe(tmp_path, section) | {"task": "walks:nothing_is_loaded"}
    with pytest.raises(ComponentError, match=message):
        trainer_of(parse_config(tree))


def test_an_object_that_is_no_callback_is_refused(tmp_path):
    with pytest.raises(ComponentError, match="needs the protocol Callback .* Half does not have it"):
        trainer_of(parse_config(recipe(tmp_path)), callbacks=[Half()])


# ---- early stop -----------------------------------------------------------------------------------------------------

PLATEAU = (1.0, 2.0, 2.0, 1.5, 3.0, 9.0, 9.0, 9.0)  # by iteration; the first is before any training


@pytest.mark.parametrize(
    "options, last",
    [
        ({"patience": 1}, 2),  # equal is no improvement
        ({"patience": 2}, 3),
        ({"patience": 3}, 7),  # the fourth iteration improves, and 9 does not improve on 9
        ({"patience": 2, "min_delta": 1.5}, 2),
        ({"patience": 1, "mode": "min"}, 1),
    ],
)
def test_early_stop_ends_the_run(tmp_path, caplog, options, last):
    tree = recipe(tmp_path, script(*PLATEAU), {"name": "early_stop", "metric": "eval/script", **options})
    tree["run"] |= {"iterations": 7, "checkpoint_every": 100}
    with caplog.at_level(logging.INFO):
        run(tree)
    assert evaluated(tmp_path) == list(range(last + 1))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"{last:06d}"]
    assert (tmp_path / "model").is_dir()
    assert ("eval/script has not improved on" in caplog.text) == (last < 7 or options["patience"] == 1)


def test_early_stop_watches_iterations_too_and_evaluates_at_the_end(tmp_path):
    stop = EarlyStop("policy/lr", patience=2)  # it is constant
    run(recipe(tmp_path, run={"iterations": 9, "eval_every": 9}), callbacks=[stop])
    assert evaluated(tmp_path) == [0, 3] and rows(tmp_path)[-1]["iteration"] == 3


def test_a_metric_that_is_not_measured_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"'eval/acuracy' is not measured \(did you mean eval/accuracy\?\)"):
        run(recipe(tmp_path, {"name": "early_stop", "metric": "eval/acuracy"}))


WATCHING = (
    {"name": "early_stop", "metric": "eval/script", "patience": 3},
    {"name": "best_model", "metric": "eval/script"},
)


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_resumed_equals_uninterrupted(tmp_path, first):
    """5 after three iterations is not improved on in the next three; every second one has a checkpoint."""
    values = script(1, 4, 3, 5, 5, 2, 0, 9, 9)

    def train(name, **options):
        tree = recipe(tmp_path / name, values, *WATCHING, optim={"ema": 0.5})
        tree["run"] |= {"iterations": 8, "checkpoint_every": 2, "keep_checkpoints": 9, **options}
        return run(tree)

    train("whole")
    train("parts", iterations=first)
    train("parts", resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts") and rows(tmp_path / "whole")[-1]["iteration"] == 6
    for file in ("model/walk.pt", "best/000003/model/walk.pt"):
        a, b = (torch.load(tmp_path / name / file) for name in ("whole", "parts"))
        assert torch.equal(a["weight"], b["weight"])
    assert [p.name for p in (tmp_path / "parts" / "best").iterdir()] == ["000003"]
    a, b = (json.loads((tmp_path / n / "checkpoints/000006/state.json").read_text()) for n in ("whole", "parts"))
    assert a["callbacks/EarlyStop"] == b["callbacks/EarlyStop"] == {"best": 5.0, "last": 6, "waited": 3}
    # a run that has ended stays at its end
    before = rows(tmp_path / "parts")
    train("parts", resume=True)
    assert rows(tmp_path / "parts") == before


@pytest.mark.multiproc
def test_ranks_stop_together_at_the_word_of_the_first(tmp_path):
    """The metric of the second rank has the other sign, so it would go on, and keep other models."""
    tree = recipe(tmp_path / "r", script(5, 4, 3, 2, 1, of_rank=True), *WATCHING)
    run_ranks(2, "train", write_recipe(tmp_path / "recipe.yaml", tree))
    assert evaluated(tmp_path / "r") == [0, 1, 2, 3] and (tmp_path / "r" / "best" / "000000").is_dir()


# ---- best model, EMA ------------------------------------------------------------------------------------------------


def test_two_best_models_are_refused(tmp_path):
    both = [{"name": "best_model", "metric": metric} for metric in ("eval/reward", "reward/mean")]
    with pytest.raises(ConfigError, match="there for eval/reward and reward/mean; a run keeps one"):
        trainer_of(parse_config(recipe(tmp_path, *both)))


def test_the_best_model_is_kept_as_it_was_evaluated(tmp_path):
    """The averaged weights; the last model is another."""

    class Copy(Callback):
        def on_evaluation(self, trainer, metrics):
            self.best = trainer.policy.model.weight.clone() if trainer.loop.state.iteration == 2 else self.best

        best = None

    copy = Copy()
    tree = recipe(tmp_path, script(1, 2, 7, 3, 4), {"name": "best_model", "metric": "eval/script"}, optim={"ema": 0.5})
    run(tree, callbacks=[copy])
    [best] = (tmp_path / "best").iterdir()
    kept, last = torch.load(best / "model/walk.pt"), torch.load(tmp_path / "model/walk.pt")
    assert torch.equal(kept["weight"], copy.best) and not torch.equal(kept["weight"], last["weight"])
    about = json.loads((best / "best.json").read_text())
    assert about == {"metric": "eval/script", "value": 7.0, "iteration": 2} and best.name == "000002"


def test_the_recipes_ema_is_the_callback(tmp_path):
    run(recipe(tmp_path / "a", optim={"ema": 0.7}))
    run(recipe(tmp_path / "b", {"name": "ema", "decay": 0.7}))
    run(recipe(tmp_path / "c"))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    a, b, c = (torch.load(tmp_path / n / "model/walk.pt")["weight"] for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_report_of_a_run_from_python(tmp_path):
    run(recipe(tmp_path / "a", run={"report": True, "iterations": 1}))
    run(recipe(tmp_path / "b", "report", run={"iterations": 1}))
    assert (tmp_path / "a" / "report.html").is_file() and (tmp_path / "b" / "report.html").is_file()


# ---- push -----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Has the two calls of `HfApi`; keeps what they got. failing: the name of one that raises."""

    def __init__(self, failing=""):
        self.calls, self.failing = [], failing

    def create_repo(self, repo_id, *, private, exist_ok):
        self._note("create_repo", repo_id, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._note("upload_folder", repo_id, sorted(p.name for p in Path(folder_path).iterdir()), commit_message)

    def _note(self, name, *arguments):
        if name == self.failing:
            raise PermissionError("401 Unauthorized")
        self.calls.append((name, *arguments))


def test_the_model_is_pushed_when_it_is_there(tmp_path):
    hub = FakeHub()
    run(recipe(tmp_path), callbacks=[PushToHub("me/walk", api=hub)])
    assert hub.calls == [
        ("create_repo", "me/walk", True, True),
        ("upload_folder", "me/walk", ["walk.pt"], "Model after 4 iterations of branch_grpo"),
    ]


def test_a_hub_that_refuses_is_told_before_training_and_loses_nothing_after_it(tmp_path):
    with pytest.raises(ConfigError, match="nothing can be pushed to me/walk: 401 Unauthorized"):
        run(recipe(tmp_path / "a"), callbacks=[PushToHub("me/walk", api=FakeHub("create_repo"))])
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match=r"was not pushed: 401 .* try `hf upload me/walk \S+b/model`"):
        run(recipe(tmp_path / "b"), callbacks=[PushToHub("me/walk", api=FakeHub("upload_folder"))])
    assert (tmp_path / "b" / "model" / "walk.pt").is_file() and len(rows(tmp_path / "b")) == 9


def test_nothing_is_pushed_unless_a_recipe_asks(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", hub := FakeHub())
    run(recipe(tmp_path / "a"))
    assert hub.calls == []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    run(recipe(tmp_path / "b", {"name": "push_to_hub", "repo": "me/walk", "private": False}))
    assert [call[:3] for call in hub.calls] == [
        ("create_repo", "me/walk", False),
        ("upload_folder", "me/walk", ["walk.pt"]),
    ]


# ---- other trainers, and Python -------------------------------------------------------------------------------------


def test_callbacks_of_a_scorers_trainer(tmp_path):
    from test_step_reward import recipe as scorer_recipe

    diary = Diary()
    run(scorer_recipe(tmp_path, run={"iterations": 1}), callbacks=[diary])
    assert diary.lines[1:] == [
        "start at 0, 0 seen", "evaluation", "update", "iteration 1", "evaluation", "checkpoint 000001",
        "end, done: True",
    ]  # fmt: skip


def test_a_signal_ends_a_run_that_is_not_done(tiny_model, tmp_path):
    """Nothing is exported and nothing pushed; callbacks are told."""
    task = {"name": "tiny:InterruptedTask", "flag": str(tmp_path / "flag")}
    tree = latent_recipe(tiny_model, tmp_path / "run", task=task)
    hub, diary = FakeHub(), Diary()
    run(tree, callbacks=[PushToHub("me/walk", api=hub), diary])
    assert [c[0] for c in hub.calls] == ["create_repo"] and diary.lines[-1] == "end, done: False"
    assert not (tmp_path / "run" / "model").exists()


def test_the_guide_of_python_runs_as_it_is_shown(tmp_path, monkeypatch, capsys):
    docs = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
    code = re.search(r"^```python\n(.*?)^```", docs.read_text(), flags=re.MULTILINE | re.DOTALL)[1]
    shutil.copy(Path(__file__).parents[1] / "walks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(docs), "exec"), {"__name__": "guide"})
    told = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ 0|\d+ 1", line)]
    assert float(told[0][1]) < 0.5 < 0.8 < float(told[-1][1])
    assert (tmp_path / "runs" / "walks" / "model" / "walk.pt").is_file()

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Command, run_ranks
from safetensors.torch import load_file
from tiny import recipe, write_recipe
from vision_tiny import vision_recipe

from mmrl.config import ConfigError, parse_config
from mmrl.rewards import RewardError
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.data import prompt_batch
from mmrl.trainers.policy_update import Sums, policy_loss

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS / "vision"))
from families import family_folder  # noqa: E402


def run(model, output, **sections):
    """Train in this process; returns the trainer."""
    trainer = BranchGrpo(parse_config(recipe(model, output, **sections)))
    trainer.train()
    return trainer


def weights(output):
    return load_file(output / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def metrics(output, timing=False):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows if timing else [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


def assert_same_weights(a, b, **tolerance):
    for k in a:
        torch.testing.assert_close(a[k], b[k], **tolerance or {"atol": 0, "rtol": 0})


def test_reward_rises_and_the_log_tells_the_cost(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "r", run={"iterations": 30, "eval_every": 10}, loss={"kl": 0.0})
    rows = metrics(tmp_path / "r")
    evals = [r["eval/reward"] for r in rows if "eval/reward" in r]
    assert evals[-1] > evals[0] + 0.1
    train = [r for r in rows if "reward/mean" in r]
    assert all(r["policy/ratio_dev_max"] < 1e-6 for r in train)
    assert train[0]["rollout/calls_per_leaf"] == (1 + 2 + 2 + 4 + 4 + 4) / 4
    assert train[0]["rollout/trained_states_per_leaf"] == 3 / 4
    assert {"eval/judge", "eval/diversity"} <= set(rows[0])


@pytest.mark.parametrize("credit", ["grpo", "rloo", "dr_grpo", "tree_rpo", "branch_depth", "child_minus_parent"])
def test_every_estimator_trains(tiny_model, tmp_path, credit):
    before = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    run(tiny_model, tmp_path / "r", credit={"estimators": [{"name": credit}]}, run={"iterations": 1})
    after = weights(tmp_path / "r")
    assert all(
        not torch.equal(before[k], after[k]) for k in before if "weight" in k and "null" not in k and "label" not in k
    )


def surrogate_of(log_ratio, adv, logp, loss):
    """Of one action, in plain numbers."""
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    if loss.surrogate == "cispo":
        return -clipped * adv * logp
    if loss.surrogate == "sapo":
        tau = 1.0 if adv >= 0 else 1.05
        return -adv * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    worst = max(-adv * ratio, -adv * clipped)
    return min(worst, -adv * loss.dual_clip) if loss.dual_clip and adv < 0 else worst


def loss_by_loops(rollout, adv, new, loss):
    """The policy loss of a tree of tokens, path by path; new: log-probs by action, of the policy of now."""
    tree, old = rollout.tree, new if loss.recompute_old_logp else rollout.actions.logp.tolist()
    of_step = [tree.actions_of(torch.tensor([v])).tolist() for v in range(len(tree))]
    if loss.drop_zero_spread:
        spread = [
            len(set(tree.outcome[tree.is_finished & (tree.group == g)].tolist())) for g in range(tree.num_groups)
        ]
        of_step = [own if spread[int(tree.group[v])] > 1 else [] for v, own in enumerate(of_step)]
    paths = []
    for leaf in tree.is_finished.nonzero().flatten().tolist():
        path = [leaf]
        while int(tree.parent[path[-1]]) >= 0:
            path.append(int(tree.parent[path[-1]]))
        paths.append(path)
    below = [[p for p in paths if v in p] for v in range(len(tree))]

    def mean_ratio(steps):
        actions = [i for v in steps for i in of_step[v]]
        return sum(new[i] - old[i] for i in actions) / len(actions)

    value, weight = {}, {}  # of every action
    for v, own in enumerate(of_step):
        for i in own:
            ratios = {"action": [new[i] - old[i]], "step": [mean_ratio([v])],
                      "trajectory": [mean_ratio(p) for p in below[v]]}[loss.ratio]  # fmt: skip
            value[i] = sum(surrogate_of(r, float(adv[v]), new[i], loss) for r in ratios) / len(ratios)
            lengths = [sum(len(of_step[u]) for u in p) for p in below[v]]
            weight[i] = {
                "step-mean": 1 / len(own),
                "seq-mean-token-mean": sum(1 / n for n in lengths) / len(lengths),
            }.get(loss.aggregation, 1.0)
    rows = sum(any(of_step[u] for u in p) for p in paths)
    total = {"constant": rows * (loss.max_len or 0), "seq-mean-token-sum": rows}.get(
        loss.aggregation, sum(weight.values())
    )
    return sum(weight[i] * value[i] for i in value) / total


@pytest.mark.parametrize(
    "loss",
    [{}, {"ratio": "step"}, {"ratio": "trajectory"}, {"aggregation": "step-mean"}, {"aggregation": "seq-mean-token-mean"},
     {"aggregation": "seq-mean-token-sum"}, {"surrogate": "cispo"}, {"surrogate": "sapo"},
     {"aggregation": "constant", "max_len": 6}, {"dual_clip": 1.02}, {"recompute_old_logp": True},
     {"drop_zero_spread": True}, {"clip_low": 0.5}],
    ids=str,
)  # fmt: skip
def test_every_loss_option_is_what_it_says(tmp_path, loss):
    """Off-policy, against loops over the paths of the tree."""
    (tmp_path / "pictures").mkdir()
    tree = vision_recipe(
        family_folder("text"), tmp_path / "pictures", tmp_path / "r",
        policy={"steps": {"name": "entropy", "limit": 1.0}, "temperature": 0.2, "max_new_tokens": 16},
        plan={0: 2, 1: 2}, loss={"clip_low": 0.05, "clip_high": 0.03, **loss},
    )  # fmt: skip
    tree["task"]["pictures"] = 0
    if "drop_zero_spread" in loss:
        tree["rewards"] = [{"name": "vision_tiny:digits_or_none", "timeout_s": 0}]
    trainer = BranchGrpo(parse_config(tree))
    policy, config = trainer.policy, trainer.config.loss
    rollout = trainer.sample(0)
    credit = trainer.credit(rollout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.loop.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    every = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    new = dict(zip(every.index.tolist(), every.logp.tolist(), strict=True))
    ratios = [math.exp(x - float(rollout.actions.logp[i])) for i, x in new.items()]
    assert max(ratios) > 1.1 and min(ratios) < 0.9 and len({int(d) for d in rollout.tree.depth}) > 1
    (batch,) = trainer.select(rollout, credit, 0)
    parts = policy.micro_batches(rollout, batch.steps, whole_prompts=config.ratio == "trajectory")
    got = sum(float(policy_loss(policy, batch, config, part, Sums()).detach()) for part in parts)
    assert got == pytest.approx(loss_by_loops(rollout, credit.adv, new, config), rel=1e-4, abs=1e-6)


def test_refill_replaces_groups_without_spread(tiny_model, tmp_path):
    """Every even class has equal rewards, so five of ten prompts are worth training on."""
    sections = {"rewards": [{"name": "tiny:constant_for_even", "timeout_s": 0}], "loss": {"kl": 0.0}}
    trainer = BranchGrpo(
        parse_config(recipe(tiny_model, tmp_path / "r", **sections, run={"refill": 3, "prompts_per_iteration": 5}))
    )
    rollout = trainer.sample(0)
    assert sorted(p.inputs["label"] for p in rollout.prompts) == [1, 3, 5, 7, 9]
    assert trainer.iterate(0)["rollout/refills"] >= 1
    none = BranchGrpo(
        parse_config(
            recipe(tiny_model, tmp_path / "s", rewards=[{"name": "tiny:constant", "timeout_s": 0}], run={"refill": 2})
        )
    )
    assert len(none.sample(0).prompts) == 4  # nothing found: the first rollout stays, and the limit holds


@pytest.mark.parametrize(
    "names, refused", [(["grpo"], True), (["rloo", "salt"], True), (["grpo", "process_grpo"], False)]
)
def test_a_group_of_one_is_refused_where_nothing_else_teaches(tmp_path, names, refused):
    tree = recipe(
        tmp_path / "no model there", tmp_path, plan={0: 1}, credit={"estimators": [{"name": n} for n in names]}
    )
    tree["step_rewards"] = [{"name": "vision_tiny:step_digits"}]
    with pytest.raises((ConfigError, ValueError)) as error:
        BranchGrpo(parse_config(tree))
    assert ("every advantage is 0" in str(error.value)) is refused


def test_bad_credit_is_refused_before_anything_runs(tiny_model, tmp_path):
    for credit, message in (
        ({"estimators": [{"name": "grpoo"}]}, r"unknown estimator 'grpoo' \(did you mean grpo"),
        (
            {"transforms": ["delta"], "estimators": [{"name": "process_grpo"}]},
            "transform 'delta' reads step_reward, which nothing in this recipe writes",
        ),
        (
            {"estimators": [{"name": "grpo", "scales": "none"}]},
            r"credit.estimators.0.scales='none' \(did you mean scale",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BranchGrpo(parse_config(recipe(tiny_model, tmp_path / "r", credit=credit)))


@pytest.mark.parametrize(
    "sections",
    [{"prune": {"width": "top"}, "policy": {"noise": "all"}}, {"prune": {"width": "extreme"}, "policy": {"noise": "all"}},
     {"prune": {"depth_first": 4, "depth_stop": 2}, "policy": {"noise": "all"}}],
    ids=str,
)  # fmt: skip
def test_pruning_acts_on_gradients_only(tiny_model, tmp_path, sections):
    run(tiny_model, tmp_path / "all", policy=sections["policy"], run={"iterations": 1})
    run(tiny_model, tmp_path / "pruned", **sections, run={"iterations": 1})
    whole, pruned = metrics(tmp_path / "all")[1], metrics(tmp_path / "pruned")[1]
    assert pruned["rollout/trained_states_per_leaf"] < whole["rollout/trained_states_per_leaf"]
    for same in ("reward/mean", "reward/std", "rollout/calls_per_leaf", "credit/adv_abs_max"):
        assert pruned[same] == whole[same]


def test_ratio_forms_agree_where_they_must(tiny_model, tmp_path):
    """Split-only chains {0: G} have one action each, so action, step and trajectory ratio are one number. Several
    updates per rollout, so that the ratios leave 1."""
    logs = []
    for ratio in ("action", "step", "trajectory"):
        run(tiny_model, tmp_path / ratio, plan={0: 4}, loss={"ratio": ratio, "clip_low": 1e-3, "clip_high": 1e-3},
            optim={"updates_per_rollout": 3, "lr": 1e-3}, run={"iterations": 2})  # fmt: skip
        logs.append(metrics(tmp_path / ratio)[1:3])
    assert logs[0][0]["policy/clip_frac"] > 0
    for other in logs[1:]:
        for a, b in zip(logs[0], other, strict=True):
            for k in ("policy/loss", "policy/grad_norm", "policy/clip_frac", "policy/log_ratio", "policy/kl"):
                assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-7), k


def test_accumulation_changes_nothing(tiny_model, tmp_path):
    for name, max_batch in (("whole", 256), ("parts", 1)):
        run(tiny_model, tmp_path / name, policy={"max_batch": max_batch}, optim={"lr": 1e-3}, run={"iterations": 2})
    # one AdamW step divides by the gradient's own size, which amplifies rounding of tiny gradients
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"), atol=2e-4, rtol=0)
    a, b = metrics(tmp_path / "whole")[1], metrics(tmp_path / "parts")[1]
    assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-4)


def test_zero_spread_groups_teach_nothing(tiny_model, tmp_path):
    before = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    run(
        tiny_model,
        tmp_path / "r",
        rewards=[{"name": "tiny:constant", "timeout_s": 0}],
        loss={"kl": 0.0},
        run={"iterations": 2},
    )
    assert metrics(tmp_path / "r")[1]["reward/zero_spread_frac"] == 1
    assert_same_weights(before, weights(tmp_path / "r"))


def test_non_finite_update_is_skipped_and_counted(tiny_model, tmp_path, caplog):
    trainer = BranchGrpo(parse_config(recipe(tiny_model, tmp_path / "r", run={"iterations": 1})))
    before = [p.detach().clone() for p in trainer.loop.parameters]
    bad = lambda: trainer.loop.parameters[0].sum() * float("nan")  # noqa: E731
    with caplog.at_level(logging.WARNING):
        trainer.loop.update([bad], bad)
    assert trainer.loop.state.skipped_updates == 1 and "update skipped" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.loop.parameters, strict=True))


def test_ema_is_evaluated_and_saved(tiny_model, tmp_path):
    trainer = run(tiny_model, tmp_path / "r", optim={"ema": 0.9}, run={"iterations": 3})
    saved = weights(tmp_path / "r")
    own = trainer.policy.model.state_dict()
    assert any(not torch.equal(saved[k], own[k]) for k in saved)


def test_unscored_samples_leave_the_statistics(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "r", rewards=[{"name": "tiny:nan_for_first", "timeout_s": 0}], run={"iterations": 2})
    assert metrics(tmp_path / "r")[1]["reward/unscored_frac"] == 1 / 16


@pytest.mark.parametrize("reward, message", [("raising", "KeyError: 'answer'"), ("wrong_length", "returned 1 values")])
def test_broken_rewards_stop_the_run(tiny_model, tmp_path, reward, message):
    rewards = [{"name": f"tiny:{reward}", "timeout_s": 0}]
    trainer = BranchGrpo(parse_config(recipe(tiny_model, tmp_path / "r", rewards=rewards)))
    with pytest.raises(RewardError, match=message):
        trainer.iterate(0)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"plan": {9: 2}}, "depth 9 lies beyond the last step"),
        ({"run": {"processes": 2}}, "run.processes=2 but 1 started"),
        ({"run": {"prompts_per_iteration": 11}}, "the task has 10 prompts"),
        ({"policy": {"model": "tests"}}, "no transformer/config.json"),
        ({"policy": {"kernal": "ode"}}, r"did you mean kernel\?"),
    ],
)
def test_recipes_that_cannot_run(tiny_model, tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        BranchGrpo(parse_config(recipe(tiny_model, tmp_path / "r", **sections))).iterate(0)


def test_a_folder_is_not_overwritten_nor_continued_with_another_recipe(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "r", run={"iterations": 1})
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny_model, tmp_path / "r", run={"iterations": 1})
    with pytest.raises(ConfigError, match="made by another recipe: optim"):
        run(tiny_model, tmp_path / "r", run={"iterations": 1, "resume": True}, optim={"lr": 1.0})


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_model, tmp_path):
    extra = {"optim": {"ema": 0.9, "schedule": "cosine", "warmup": 1}, "run": {"checkpoint_every": 1}}
    run(tiny_model, tmp_path / "straight", **extra)
    run(tiny_model, tmp_path / "broken", **extra)
    # as after a kill in the fourth iteration: its checkpoint half written, a metrics line cut
    checkpoints = tmp_path / "broken" / "checkpoints"
    (checkpoints / "000004").rename(checkpoints / ".000004.part")
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as f:
        f.write('{"iteration": 5, "rew')
    extra["run"] |= {"resume": True}
    run(tiny_model, tmp_path / "broken", **extra)
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "broken")


def test_outcomes_of_earlier_iterations_are_in_the_checkpoint(tiny_model, tmp_path):
    """DDPO's statistics per prompt: all ten prompts come back, so what was forgotten would show."""
    extra = {"credit": {"estimators": [{"name": "ddpo", "buffer": 12, "min_count": 6}]}}
    sizes = {"iterations": 5, "prompts_per_iteration": 5, "checkpoint_every": 1}
    run(tiny_model, tmp_path / "straight", run=sizes, **extra)
    run(tiny_model, tmp_path / "broken", run=sizes, **extra)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "000005")
    run(tiny_model, tmp_path / "broken", run=sizes | {"resume": True}, **extra)
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "broken")


def wait_for_lines(process, file, lines):
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert process.is_running(), process.stderr
        time.sleep(0.005)


@pytest.mark.multiproc
@pytest.mark.parametrize("lines", [2, 6])
def test_sigkill_and_resume(tiny_model, tmp_path, lines):
    """Killed once `lines` metrics lines are on disk, wherever the run is then."""
    tree = recipe(tiny_model, tmp_path / "killed", run={"iterations": 8, "checkpoint_every": 1})
    file = write_recipe(tmp_path / "killed.yaml", tree)
    process = Command("train", file)
    wait_for_lines(process, tmp_path / "killed" / "metrics.jsonl", lines)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    again = Command("train", file, "run.resume=true")
    assert again.wait() == 0, again.stderr
    run(tiny_model, tmp_path / "straight", run={"iterations": 8})
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "killed"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")


@pytest.mark.multiproc
def test_sigterm_leaves_a_checkpoint(tiny_model, tmp_path):
    tree = recipe(tiny_model, tmp_path / "r", run={"iterations": 10_000, "checkpoint_every": 10_000})
    process = Command("train", write_recipe(tmp_path / "r.yaml", tree))
    wait_for_lines(process, tmp_path / "r" / "metrics.jsonl", 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.stderr
    assert "stopped by signal" in process.stderr
    assert len(list((tmp_path / "r" / "checkpoints").glob("[0-9]*"))) == 1


def test_checkpoints_rotate(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "r", run={"iterations": 4, "checkpoint_every": 1, "keep_checkpoints": 2})
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["000003", "000004"]


def test_prompt_order_is_a_function_of_the_iteration():
    from tiny import TinyTask

    prompts = TinyTask().prompts
    ids = [[p.id for p in prompt_batch(prompts, 5, i, seed=1)] for i in range(6)]
    assert sorted(ids[0] + ids[1]) == sorted(p.id for p in prompts) == sorted(ids[2] + ids[3])
    assert ids[0] != ids[2] and ids[3] == [p.id for p in prompt_batch(prompts, 5, 3, seed=1)]
    assert ids[0] != [p.id for p in prompt_batch(prompts, 5, 0, seed=2)]


# ---- several processes ----------------------------------------------------------------------------------------------


def write_ranks_recipe(model, tmp_path, name, **sections):
    tree = recipe(model, tmp_path / name, **sections)
    tree["run"]["processes"] = 2
    return write_recipe(tmp_path / f"{name}.yaml", tree)


@pytest.mark.multiproc
def test_two_processes_equal_one(tiny_model, tmp_path):
    """Started by tools/launch.sh, as the docs say, from a recipe that says nothing of processes or devices."""
    tree = recipe(tiny_model, tmp_path / "two", optim={"lr": 1e-3})
    del tree["run"]["cpu"]
    file = write_recipe(tmp_path / "two.yaml", tree)
    done = subprocess.run(
        ["bash", TESTS.parent / "tools" / "launch.sh", "2", "train", file],
        env=os.environ | {"PYTHONPATH": str(TESTS), "MMRL_PYTHON": sys.executable},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es), MULTI_CPU" in done.stderr
    run(tiny_model, tmp_path / "one", optim={"lr": 1e-3})
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-4, rtol=0)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4), k


@pytest.mark.multiproc
def test_every_sample_of_an_evaluation_is_scored_once(tiny_model, tmp_path):
    """By two rewards, of which the first leaves one sample unscored, and once by the task's judges."""
    for ranks in (1, 2):
        log = str(tmp_path / f"asked{ranks}")
        sections = {
            "task": {"name": "tiny:LoggingTask", "log": log},
            "rewards": [{"name": "tiny:Logging", "log": log, "timeout_s": 0, "weight": 2.0},
                        {"name": "tiny:brightness", "timeout_s": 0}],
            "run": {"iterations": 2},
        }  # fmt: skip
        if ranks == 1:
            run(tiny_model, tmp_path / "one", **sections)
        else:
            run_ranks(2, "train", write_ranks_recipe(tiny_model, tmp_path, "two", **sections))
        lines = (tmp_path / f"asked{ranks}").read_text().splitlines()
        assert lines.count("judges 10 samples") == 2  # before the first iteration and after the last
        assert sorted(x for x in lines if "/eval" in x) == sorted(f"class-{i}/eval" for i in (*range(10), *range(10)))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        evaluated = [k for k in a if k.startswith("eval/")]
        assert evaluated == [k for k in b if k.startswith("eval/")]
        assert [a[k] for k in evaluated] == pytest.approx([b[k] for k in evaluated], rel=1e-3, abs=1e-4)
    shown = [(tmp_path / run / "samples" / "000000" / "samples.json").read_text() for run in ("one", "two")]
    assert shown[0] == shown[1]


@pytest.mark.multiproc
def test_a_rank_without_spread_keeps_in_step(tiny_model, tmp_path):
    """Prompts alternate over ranks; with two prompts of which one is constant, one rank has nothing to train."""
    sections = {
        "rewards": [{"name": "tiny:constant_for_even", "timeout_s": 0}], "loss": {"kl": 0.0}, "optim": {"lr": 1e-3},
        "run": {"prompts_per_iteration": 2, "iterations": 6},
    }  # fmt: skip
    run_ranks(2, "train", write_ranks_recipe(tiny_model, tmp_path, "two", **sections))
    run(tiny_model, tmp_path / "one", **sections)
    spread = [r["reward/zero_spread_frac"] for r in metrics(tmp_path / "two") if "reward/zero_spread_frac" in r]
    assert 0.5 in spread  # it did happen
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=5e-4, rtol=0)


@pytest.mark.multiproc
def test_ranks_share_the_outcomes_of_earlier_iterations(tiny_model, tmp_path):
    """A prompt that comes back may be another rank's then: DDPO's statistics must not depend on whose it was."""
    sections = {
        "credit": {"estimators": [{"name": "ddpo", "buffer": 12, "min_count": 6}]},
        "run": {"prompts_per_iteration": 5, "iterations": 4},
    }
    run_ranks(2, "train", write_ranks_recipe(tiny_model, tmp_path, "two", **sections))
    run(tiny_model, tmp_path / "one", **sections)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=5e-4, rtol=0)


@pytest.mark.multiproc
def test_ranks_end_with_identical_weights(tiny_model, tmp_path):
    code = (
        "import sys, torch\n"
        "from mmrl.config import load_config\n"
        "from mmrl.trainers.branch_grpo import BranchGrpo\n"
        "t = BranchGrpo(load_config(sys.argv[1]))\n"
        "assert t.loop.accelerator.num_processes == 2\n"
        "def check(folder):\n"
        "    mine = torch.cat([p.detach().flatten() for p in t.loop.parameters])\n"
        "    both = t.loop.accelerator.gather(mine[None])\n"
        "    assert torch.equal(both[0], both[1])\n"
        "    if t.loop.is_main:\n"
        "        folder.mkdir()\n"
        "    print('IDENTICAL')\n"
        "t.save_model = check\n"
        "t.train()\n"
    )
    file = write_recipe(tmp_path / "r.yaml", recipe(tiny_model, tmp_path / "r", run={"iterations": 2}))
    (tmp_path / "check.py").write_text(code)
    assert [r.stdout.count("IDENTICAL") for r in run_ranks(2, tmp_path / "check.py", file)] == [1, 1]

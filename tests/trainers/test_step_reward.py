"""The step-reward trainer: it learns, and neither accumulation, trees, resuming nor processes change what it learns."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from tiny import write_recipe

from mmrl.config import parse_config
from mmrl.losses.reward import step_loss
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import labelled_forest
from mmrl.registry import ComponentError
from mmrl.rollout import Prompt
from mmrl.scorers.labelled import Labelled
from mmrl.scorers.scoring import load_scorer
from mmrl.trainers.step_reward import RewardModelConfig, StepRewardTrainer

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "vision"))
from families import family_folder, picture  # noqa: E402


class Signs:
    """A step is right if it says "y". Solutions of a question share beginnings and have 1 to 4 steps.

    pictures: so many questions show one. flat: every solution stands alone. odd: questions whose steps cannot be read
    (too_long) or have no label (blind). broken: questions whose picture does not exist. soft: labels .9 and .2.
    """

    def __init__(
        self, questions=8, folder="", pictures=0, flat=False, too_long=0, blind=0, broken=0, soft=False, seed=0
    ):
        g, self.flat, self.soft = random.Random(seed), flat, soft
        self.prompts, self.known = [], {}
        for i in range(questions + 2):
            images = []
            if i < pictures:
                file = Path(folder) / f"{i}.png"
                picture(i).save(file)
                images = [str(file)]
            images = [str(Path(folder) / "none.png")] if i < broken else images
            self.prompts.append(Prompt(f"q{i}", {"question": "is it " * (1 + i % 3), "images": images}))
            words = [f"{g.choice('abcd')}{g.choice('ny')}{g.choice('abcd')}" for _ in range(6)]
            texts = [[*words[: k + 1], *(g.choice(words) for _ in range(g.randint(0, 2)))] for k in range(3)]
            if i < too_long:
                texts = [["y" * 3000]]
            self.known[f"q{i}"] = [self.record(f"{i}.{k}", t, blind=i < blind) for k, t in enumerate(texts)]
        self.prompts, self.eval_prompts = self.prompts[:questions], self.prompts[questions:]

    def record(self, name, texts, blind):
        right, wrong = (0.9, 0.2) if self.soft else (1, 0)
        labels = tuple(None if blind else (right if "y" in t else wrong) for t in texts)
        return SolutionRecord(name, "?", tuple(Step(t) for t in texts), labels=labels)

    def labelled(self, prompts):
        if not self.flat:
            return labelled_forest(prompts, [self.known[p.id] for p in prompts])
        own = [(Prompt(f"{p.id}/{k}", p.inputs), r) for p in prompts for k, r in enumerate(self.known[p.id])]
        return labelled_forest([p for p, _ in own], [[r] for _, r in own])


def recipe(output, family="text", **sections):
    tree = {
        "trainer": "step_reward",
        "task": {"name": "test_step_reward:Signs"},
        "scorer": {"name": "vision_prm", "model": str(family_folder(family)), "format": {"marker": "\n\n"}},
        "optim": {"lr": 1e-3, "eps": 1e-3},  # rounding of tiny gradients is not blown up to whole steps
        "run": {"output": str(output), "iterations": 2, "prompts_per_iteration": 4, "eval_every": 10,
                "trackers": [], "report": False, "cpu": True},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def trainer_of(output, family="text", **sections):
    return StepRewardTrainer(parse_config(recipe(output, family, **sections), model=RewardModelConfig))


def run(output, family="text", **sections):
    trainer = trainer_of(output, family, **sections)
    trainer.train()
    return trainer


def rows(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def weights(output):
    model = output / "model"
    found = load_file(model / "model.safetensors")
    head = model / "head.safetensors"
    return found | ({f"head.{k}": v for k, v in load_file(head).items()} if head.exists() else {})


def check_same(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=atol, rtol=0, msg=lambda m, k=k: f"{k}: {m}")


def gradient(trainer):
    """The gradient of one iteration, without the step."""
    kept = []
    trainer.loop.optimizer.step = lambda *a, **k: kept.append(
        torch.cat([p.grad.flatten().clone() for p in trainer.loop.parameters if p.grad is not None])
    )
    trainer.config.optim.max_grad_norm = 1e9
    metrics = trainer.iterate(0)
    return (kept[0] if kept else None), metrics


# ---- learning --------------------------------------------------------------------------------------------------

LEARN = {"task": {"questions": 24}, "optim": {"lr": 3e-3, "eps": 1e-8},
         "run": {"iterations": 12, "prompts_per_iteration": 8, "eval_every": 6}}  # fmt: skip


@pytest.mark.parametrize(
    "scorer, loss",
    [
        ({}, {}),
        ({"head": "tokens", "format": {"marker": "\n", "positive": "+", "negative": "-"}}, {"balance": "class"}),
        ({"head": "buffer"}, {"name": "free_prm"}),
        ({}, {"name": "q_rank"}),
        ({}, {"name": "mse", "balance": "solution", "smoothing": 0.1}),
    ],
    ids=str,
)
def test_it_learns_a_separable_task(tmp_path, scorer, loss):
    trainer = run(tmp_path / "r", scorer=scorer, loss=loss, **LEARN)
    log = rows(tmp_path / "r")
    losses = [r["loss/mean"] for r in log if "loss/mean" in r]
    assert losses[-1] < 0.9 * losses[0]
    evals = [r["eval/auc"] for r in log if "eval/auc" in r]
    assert len(evals) == 3 and evals[-1] > 0.8
    data = trainer.task.labelled(trainer.task.eval_prompts)
    saved = load_scorer(tmp_path / "r" / "model")(data.rollout)
    torch.testing.assert_close(saved, trainer.scorer(data.rollout), atol=1e-6, rtol=0)


def test_loss_at_the_start_is_ln_2_for_balanced_logits(tmp_path):
    """vl_prm.md, 4.4."""
    trainer = trainer_of(tmp_path / "r")
    with torch.no_grad():
        trainer.scorer._network.head.linear.weight.zero_()
    _, metrics = gradient(trainer)
    assert metrics["loss/mean"] == pytest.approx(0.6931472, abs=1e-6)
    known = trainer.batch(trainer.task.prompts[:4])[0].data.label
    assert metrics["data/unreadable_steps"] == 0 and len(known) > 8


def test_the_gradient_of_soft_labels_is_p_minus_y(tmp_path):
    trainer = trainer_of(tmp_path / "r", task={"soft": True})
    batch, _ = trainer.batch(trainer.task.prompts)
    steps = torch.unique(batch.data.node)
    z = trainer.scorer.logits(batch.data.rollout, steps).detach().requires_grad_()
    trainer.scorer.logits = lambda rollout, asked: z
    trainer.loss(batch, steps, []).backward()
    want = torch.zeros(len(steps)).index_add(0, batch.data.node, torch.sigmoid(z[batch.data.node, 0]) - batch.target)
    assert set(batch.target.tolist()) == {0.8999999761581421, 0.20000000298023224}
    torch.testing.assert_close(z.grad[:, 0], (want / len(batch.target)).detach(), atol=1e-7, rtol=1e-5)


# ---- what must not change the result ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [{}, {"balance": "class"}, {"balance": "solution"}, {"name": "q_rank"}], ids=str)
def test_accumulation_changes_nothing(tmp_path, loss):
    """Small micro-batches equal one: losses are shares of one global mean (prm.md, convention 2)."""
    for name, size in (("whole", 100_000), ("parts", 50)):
        run(tmp_path / name, scorer={"max_tokens": size}, loss=loss, run={"iterations": 1})
    check_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    a, b = rows(tmp_path / "whole")[1], rows(tmp_path / "parts")[1]
    assert a["loss/mean"] == pytest.approx(b["loss/mean"], abs=1e-6)
    assert a["data/labelled_steps"] == b["data/labelled_steps"] > 20


@pytest.mark.parametrize("loss", [{}, {"balance": "solution"}, {"name": "q_rank"}, {"last_step_only": True}], ids=str)
def test_a_tree_of_shared_prefixes_equals_its_chains(tmp_path, loss):
    trees = trainer_of(tmp_path / "a", loss=loss)
    chains = trainer_of(tmp_path / "b", loss=loss, task={"flat": True})
    (one, m), (two, n) = gradient(trees), gradient(chains)
    size = [len(t.task.labelled(t.task.prompts).rollout.tree) for t in (trees, chains)]
    assert size[0] < size[1]
    assert m["loss/mean"] == pytest.approx(n["loss/mean"], abs=1e-6)
    assert m["data/labelled_steps"] == n["data/labelled_steps"]
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    extra = {"optim": {"ema": 0.9, "schedule": "cosine", "warmup": 1}, "run": {"iterations": 4, "eval_every": 2}}
    extra["run"]["checkpoint_every"] = 1
    run(tmp_path / "straight", **extra)
    run(tmp_path / "broken", **extra)
    checkpoints = tmp_path / "broken" / "checkpoints"
    (checkpoints / "000004").rename(checkpoints / ".000004.part")
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as f:
        f.write('{"iteration": 5, "los')
    extra["run"] |= {"resume": True}
    run(tmp_path / "broken", **extra)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert rows(tmp_path / "straight") == rows(tmp_path / "broken")


# ---- which labels count ----------------------------------------------------------------------------------------


class Fixed:
    """Question "a": solutions of 1, 2 and 3 steps; "b": one solution of 2. Labels as given."""

    def __init__(self, a=((1,), (1, 0), (1, 1, 1)), b=((0, 0),)):
        self.prompts = [Prompt(n, {"question": n * 3}) for n in "ab"]
        self.eval_prompts = []
        self.known = {
            n: [SolutionRecord(f"{n}{k}", n, tuple(Step(f"{n}{k}{t}") for t in range(len(y))), labels=tuple(y))
                for k, y in enumerate(own)]
            for n, own in (("a", a), ("b", b))
        }  # fmt: skip

    def labelled(self, prompts) -> Labelled:
        return labelled_forest(prompts, [self.known[p.id] for p in prompts])


def fixed(output, loss, **labels):
    return trainer_of(output, loss=loss, task={"name": "test_step_reward:Fixed", **labels},
                      run={"prompts_per_iteration": 2})  # fmt: skip


@pytest.mark.parametrize(
    "balance, weight",
    [("none", [1] * 8), ("class", [1 / 5, 1 / 5, 1 / 3, 1 / 5, 1 / 5, 1 / 5, 1 / 3, 1 / 3]),
     ("solution", [1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])],
)  # fmt: skip
def test_balance_by_hand(tmp_path, balance, weight):
    """Labels 1 | 1 0 | 1 1 1 | 0 0: shares of the mean of all steps, of two class means, of four solution means."""
    trainer = fixed(tmp_path / "r", {"balance": balance})
    batch, unread = trainer.batch(trainer.task.prompts)
    torch.testing.assert_close(batch.weight / batch.total, torch.tensor(weight) / sum(weight))
    assert unread == 0 and batch.total == pytest.approx(sum(weight))


def test_last_step_only_by_hand(tmp_path):
    trainer = fixed(tmp_path / "r", {"last_step_only": True, "smoothing": 0.2})
    batch, _ = trainer.batch(trainer.task.prompts)
    assert batch.weight.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert batch.target[batch.weight > 0].tolist() == pytest.approx([0.9, 0.1, 0.9, 0.1])


def test_whole_solutions_stay_together_for_q_rank(tmp_path):
    """Its loss compares the steps of a solution, so no micro-batch may hold half of one."""
    trainer = trainer_of(tmp_path / "r", loss={"name": "q_rank"}, scorer={"max_tokens": 20})
    batch, _ = trainer.batch(trainer.task.prompts)
    parts = trainer.scorer.micro_batches(batch.data.rollout, torch.unique(batch.data.node), whole_prompts=True)
    seen = [set(batch.data.solution[batch.part(steps)].tolist()) for steps in parts]
    assert len(parts) == 8 and sum(map(len, seen)) == len(set().union(*seen)) == 24
    for steps in parts:
        got = batch.part(steps)
        assert len(got) == int(torch.isin(batch.data.solution, batch.data.solution[got]).sum())


def test_unlabelled_steps_teach_nothing(tmp_path):
    """A step's label may be unknown while those around it are known; its logit gets exactly no gradient."""
    trainer = fixed(tmp_path / "r", {}, a=[[1], [1, None], [None, 1, 1]], b=[[0, None]])
    batch, _ = trainer.batch(trainer.task.prompts)
    steps = torch.unique(batch.data.node)
    z = torch.zeros(len(steps), 1, requires_grad=True)
    trainer.scorer.logits = lambda rollout, asked: z
    trainer.loss(batch, steps, []).backward()
    assert (z.grad[:, 0] != 0).tolist() == [True, True, False, False, True, True, True, False]
    assert batch.total == 5


def test_a_batch_without_labels_changes_nothing(tmp_path):
    """All labels masked: zero, not NaN (vl_prm.md, 11.5)."""
    trainer = trainer_of(tmp_path / "r", task={"blind": 8}, optim={"weight_decay": 0.0})
    before = [p.detach().clone() for p in trainer.loop.parameters]
    metrics = trainer.iterate(0)
    assert metrics["loss/mean"] == 0 and metrics["policy/grad_norm"] == 0 and metrics["data/labelled_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.loop.parameters, strict=True))
    batch, _ = trainer.batch(trainer.task.prompts)
    zero = trainer.loss(batch, torch.unique(batch.data.node), [])
    assert zero.grad_fn is not None


def test_some_questions_without_labels_leave_the_others_as_they_are(tmp_path):
    trainer = trainer_of(tmp_path / "r", task={"blind": 3}, run={"prompts_per_iteration": 8})
    metrics = trainer.iterate(0)
    assert metrics["data/labelled_steps"] > 0 and metrics["policy/grad_norm"] > 0


def test_steps_that_cannot_be_read_are_counted_and_left_out(tmp_path):
    trainer = trainer_of(tmp_path / "r", task={"too_long": 2}, run={"prompts_per_iteration": 8})
    metrics = trainer.iterate(0)
    assert metrics["data/unreadable_steps"] == 2 and metrics["policy/grad_norm"] > 0
    idle = trainer.idle(trainer.batch(trainer.task.prompts[:2])[0])  # none of its steps can be read
    assert idle.requires_grad and torch.isfinite(idle)


def test_unusable_questions_are_replaced_counted_and_limited(tmp_path):
    broken = {"task": {"broken": 2, "folder": str(tmp_path)}, "run": {"prompts_per_iteration": 8}}
    metrics = trainer_of(
        tmp_path / "r", "gemma3", **broken | {"run": {"prompts_per_iteration": 8, "max_unusable": 0.5}}
    ).iterate(0)
    assert metrics["data/unusable_prompts"] == 2 and metrics["policy/grad_norm"] > 0
    with pytest.raises(ValueError, match="2 of 8 prompts cannot be used"):
        trainer_of(tmp_path / "s", "gemma3", **broken).iterate(0)


def test_evaluation_measures_whole_solutions_and_counts_the_others(tmp_path):
    task = Signs(questions=2)
    task.known["q2"][0] = task.record("x", ["ay", "y" * 3000, "an"], blind=False)
    trainer = trainer_of(tmp_path / "r", run={"prompts_per_iteration": 2})
    trainer.task = task
    metrics = trainer.evaluate(0)
    assert metrics["eval/unread_solutions"] == 1 and 0 <= metrics["eval/auc"] <= 1
    task.eval_prompts = []
    assert "eval/auc" not in trainer.evaluate(0)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": {"name": "q_ranc"}}, "did you mean q_rank"),
        ({"scorer": {"hed": "linear"}}, "did you mean head"),
        ({"scorer": {"train_language": False, "head": "tokens", "format": {"positive": "+", "negative": "-"}}}, "no trainable parameter"),
        ({"run": {"prompts_per_iteration": 99}}, "the task has 8 prompts"),
    ],
    ids=str,
)  # fmt: skip
def test_recipes_that_cannot_run(tmp_path, sections, message):
    with pytest.raises((ValueError, ComponentError), match=message):
        trainer_of(tmp_path / "r", **sections).iterate(0)


def test_a_prompt_id_in_training_and_evaluation_is_refused(tmp_path):
    task = Fixed()
    task.eval_prompts = task.prompts[:1]
    config = parse_config(recipe(tmp_path / "r"), model=RewardModelConfig)
    with pytest.raises(ValueError, match="id 'a' occurs twice"):
        StepRewardTrainer(config, task=task)


def test_frozen_parts_stay_as_they_were(tmp_path):
    """Head only (PURE's first stage): the backbone is saved bit for bit."""
    run(tmp_path / "r", scorer={"train_language": False})
    before, after = load_file(family_folder("text") / "model.safetensors"), weights(tmp_path / "r")
    assert all(torch.equal(before[k], after[k]) for k in before)
    start = trainer_of(tmp_path / "s").scorer.model.head.linear.weight
    assert not torch.equal(after["head.linear.weight"], start)


# ---- several processes -----------------------------------------------------------------------------------------


def run_two(tmp_path, family="text", **sections):
    tree = recipe(tmp_path / "two", family, **sections)
    tree["run"]["processes"] = 2
    run_ranks(2, "train", write_recipe(tmp_path / "two.yaml", tree))


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"balance": "class"}, "task": {"blind": 3}},
        {"loss": {"balance": "solution"}, "task": {"blind": 2, "too_long": 3}, "run": {"prompts_per_iteration": 2}},
    ],
    ids=str,
)
def test_two_processes_equal_one(tmp_path, sections):
    """Unequal numbers of labels per rank: sums over the global number, not means of means (vl_prm.md, 4.1)."""
    sections = sections | {"run": {"iterations": 3, **sections.get("run", {})}}
    run_two(tmp_path, **sections)
    run(tmp_path / "one", **sections)
    check_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-6)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5), k


@pytest.mark.multiproc
def test_a_rank_without_pictures_keeps_in_step(tmp_path):
    """One picture among eight questions and a trained image encoder: a rank often has text alone."""
    sections = {"task": {"pictures": 1, "folder": str(tmp_path)}, "scorer": {"train_vision": True, "max_tokens": 150},
                "run": {"iterations": 3, "prompts_per_iteration": 8}}  # fmt: skip
    run_two(tmp_path, "idefics3", **sections)
    run(tmp_path / "one", "idefics3", **sections)
    check_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=5e-6)


def test_class_balance_gives_the_worked_number():
    """Balanced BCE = mean of the class means: logits (.5, 1.5, -1), labels (1, 1, 0) (prm.md, C2)."""
    from types import SimpleNamespace

    stub = SimpleNamespace(
        config=SimpleNamespace(loss=SimpleNamespace(balance="class")), loop=SimpleNamespace(all_sum=lambda *x: list(x))
    )
    label = torch.tensor([1.0, 1.0, 0.0])
    weight = StepRewardTrainer._weights(stub, label, torch.zeros(3, dtype=torch.int64))
    loss = step_loss("bce")(torch.tensor([[0.5], [1.5], [-1.0]]), label, weight)
    assert float(loss.sum() / weight.sum()) == pytest.approx(0.325503, abs=1e-6)

"""The implicit process reward model: log-ratios of a policy against its start (numbers: prm.md, C4)."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmrl.config import parse_config
from mmrl.losses.reward import step_loss
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import labelled_forest
from mmrl.registry import ComponentError
from mmrl.rollout import ActionLogProbs, Actions, Prompt, Rollout
from mmrl.scorers.implicit import ImplicitPrm
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import load_scorer, score_solutions
from mmrl.trainers.step_reward import StepRewardTrainer
from mmrl.tree import FINISHED, INTERNAL, StepTree

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder, picture

NAME = "mmrl.scorers.implicit:ImplicitPrm.build"


class Table:
    """A policy of any kind: a log-prob and a reference log-prob per action, from tables."""

    def __init__(self, logp, ref):
        self.model = nn.ParameterList([nn.Parameter(torch.tensor(logp))])
        self.ref, self.frozen, self.parts = torch.tensor(ref), 0, 1

    def freeze_reference(self):
        self.frozen += 1

    def admit(self, prompts):
        return list(prompts)

    def micro_batches(self, rollout, steps, *, whole_prompts=False):
        return [steps] if whole_prompts else list(steps.chunk(self.parts))

    def log_probs(self, rollout, steps, *, reference=False):
        at = rollout.tree.actions_of(steps)
        return ActionLogProbs(at, self.model[0][at], ref_logp=self.ref[at] if reference else None)


def chain(sizes, parent=None):
    n = len(sizes)
    parent = parent or list(range(-1, n - 1))
    leaf = torch.tensor([i not in parent for i in range(n)])
    end = torch.tensor(sizes).cumsum(0)
    tree = StepTree(parent, [0] * n, torch.where(leaf, FINISHED, INTERNAL), torch.where(leaf, 1.0, torch.nan),
                    tok_start=end - torch.tensor(sizes), tok_end=end)  # fmt: skip
    total = sum(sizes)
    return Rollout([Prompt("p", {})], tree, Actions(torch.zeros(total), torch.ones(total, dtype=torch.bool)))


LOGP, REF = [-1.0, -0.5, -0.2, -0.8], [-1.2, -0.4, -0.6, -0.5]


@pytest.mark.parametrize("parts", [1, 2])
def test_worked_example(parts):
    """prm.md C4: tokens (.01, -.005, .02, -.015), steps (.005, .005), q (.005, .01)."""
    policy = Table(LOGP, REF)
    prm, rollout = ImplicitPrm(policy, beta=0.05), chain([2, 2])
    policy.parts = parts
    assert policy.frozen == 1
    torch.testing.assert_close(prm(rollout), torch.tensor([0.005, 0.005]).double(), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(prm.logits(rollout, torch.arange(2)), torch.tensor([[0.005], [0.01]]))
    torch.testing.assert_close(prm.logits(rollout, torch.tensor([1, 0])), torch.tensor([[0.01], [0.005]]))
    assert not prm(rollout).requires_grad and prm.readable(rollout).all()


def test_the_mean_over_a_turn_and_pairs_of_trajectories():
    """SWEET-RL (credit.md): turns of 2 and 3 tokens have .05 and .166667; Bradley-Terry against a trajectory of -.08."""
    policy = Table([-1.0, -0.5, -2.0, -0.2, -0.3], [-1.2, -0.4, -1.5, -0.6, -0.9])
    turns = ImplicitPrm(policy, beta=1.0, reduce="mean")(chain([2, 3]))
    torch.testing.assert_close(turns, torch.tensor([0.05, 0.166667]).double(), atol=1e-6, rtol=0)
    for beta, want in ((0.1, 0.678424), (1.0, 0.555775)):
        q = ImplicitPrm(policy, beta=beta, reduce="mean").logits(chain([2, 3]), torch.tensor([1]))
        pair = torch.cat([q, torch.tensor([[beta * -0.08]])])
        loss = step_loss("bradley_terry")(pair, torch.tensor([1.0, 0.0]), path=torch.zeros(2).long())
        torch.testing.assert_close(loss, torch.full((2,), want), atol=1e-6, rtol=0)


def test_q_telescopes_along_every_path_of_a_tree():
    """q is the sum of the rewards from the root; siblings share what is above them."""
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(12, generator=g).tolist(), torch.randn(12, generator=g).tolist()
    prm, rollout = ImplicitPrm(Table(logp, ref), beta=0.1), chain([2, 3, 1, 2, 4], parent=[-1, 0, 0, 1, -1])
    r, q = prm(rollout).float(), prm.logits(rollout, torch.arange(5))[:, 0]
    torch.testing.assert_close(q, torch.stack([r[0], r[0] + r[1], r[0] + r[2], r[0] + r[1] + r[3], r[4]]))
    assert float(r.sum()) == pytest.approx(0.1 * float(torch.tensor(logp).sum() - torch.tensor(ref).sum()), abs=1e-6)
    torch.testing.assert_close(prm.logits(rollout, torch.tensor([3])), q[3:4, None])


def test_the_gradient_reaches_the_path_alone():
    """d q_t / d log pi = beta on the path's own actions, 0 elsewhere; none on the reference."""
    policy = Table([0.0] * 6, [0.0] * 6)
    prm, rollout = ImplicitPrm(policy, beta=0.5), chain([1, 2, 3], parent=[-1, 0, 0])
    prm.logits(rollout, torch.tensor([1])).sum().backward()
    assert policy.model[0].grad.tolist() == [0.5, 0.5, 0.5, 0, 0, 0]


def test_bad_options():
    with pytest.raises(ValueError, match="scorer.beta=0"):
        ImplicitPrm(Table(LOGP, REF), beta=0)
    with pytest.raises(ComponentError, match="did you mean beta"):
        load_scorer(NAME, {"policy": {"name": "vision", "model": "x"}, "betta": 1})
    with pytest.raises(ValueError, match="no actions and this policy cannot make them"):
        ImplicitPrm(Table(LOGP, REF))(solution_forest([Prompt("p", {})], [[["a"]]])[0])


# ---- on a language model ---------------------------------------------------------------------------------------


def build(family="text", **options):
    policy = {"name": "vision", "model": str(family_folder(family))} | options
    return load_scorer(NAME, {"policy": policy, "beta": 0.05})


def shake(prm):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in prm.policy.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=g))


P = Prompt("p", {"question": "how many?"})
CANDIDATES = [[["1 + 1", "= 2"], ["1 + 1", "= 3", "so 3"], ["two"]]]


@pytest.mark.parametrize("rank", [0, 2])
def test_rewards_are_zero_at_the_start_and_the_log_ratio_later(rank):
    """Policy and reference begin as one model; then the sum over a solution is beta * its log-ratio."""
    prm = build(lora_rank=rank)
    assert all(s == 0 for one in score_solutions(prm, [P], CANDIDATES)[0] for s in one)
    shake(prm)
    scores = score_solutions(prm, [P], CANDIDATES)[0]
    for texts, own in zip(CANDIDATES[0], scores, strict=True):
        rollout = prm.policy.write_steps(solution_forest([P], [[texts]])[0])
        with torch.no_grad():
            lp = prm.policy.log_probs(rollout, torch.arange(len(texts)), reference=True)
        assert sum(own) == pytest.approx(0.05 * float((lp.logp - lp.ref_logp).sum()), abs=1e-6) and sum(own) != 0


def test_the_end_of_the_answer_is_part_of_the_last_step():
    prm = build()
    rollout = prm.policy.write_steps(solution_forest([P], [[["ab", "c\n"], ["ab\n", "d"]]])[0])
    spans = zip(rollout.tree.tok_start.tolist(), rollout.tree.tok_end.tolist(), strict=True)
    texts = [prm.policy.tokenizer.decode(rollout.actions.payload["token"][a:b]) for a, b in spans]
    assert texts == ["ab\n", "c\n<|end|>", "ab\n", "d<|end|>"]  # raw texts differ, so they are not merged


def test_a_placeholder_in_a_step_is_spelt_out(tmp_path):
    """As a token it would ask for picture features that do not exist: NaN, or every later picture shifted."""
    picture(0).save(tmp_path / "0.png")
    prm = build("qwen2_5_vl")
    p = Prompt("p", {"question": "?", "images": [str(tmp_path / "0.png")]})
    shake(prm)
    ((one,),) = score_solutions(prm, [p], [[["see <|image_pad|> there", "b"]]])
    assert all(torch.isfinite(torch.tensor(one))) and 0 not in one


def test_parts_and_micro_batches_change_nothing():
    whole, cut = build(), build(max_tokens=20)
    for prm in (whole, cut):
        shake(prm)
    rollout = solution_forest([P], CANDIDATES)[0]
    assert len(cut.policy.micro_batches(cut._with_actions(rollout), torch.arange(5))) > 1
    torch.testing.assert_close(cut(rollout), whole(rollout), atol=1e-6, rtol=0)
    assert [p.tolist() for p in cut.micro_batches(rollout, torch.arange(5))] == [[0, 1, 2, 3, 4]]


class Outcomes:
    """Solutions that end in "y" are right. Only the outcome is known: the label of the last step."""

    def __init__(self):
        g = random.Random(0)
        self.prompts = [Prompt(f"q{i}", {"question": "?" * (1 + i % 4)}) for i in range(20)]
        self.known = {}
        for p in self.prompts:
            ends = ["y", "n"] * 2
            self.known[p.id] = [
                SolutionRecord(f"{p.id}{k}", "?", (Step(g.choice("ab")), Step(g.choice("ab")), Step(f"so {y}")),
                               labels=(None, None, int(y == "y")))
                for k, y in enumerate(ends)
            ]  # fmt: skip
        self.prompts, self.eval_prompts = self.prompts[:16], self.prompts[16:]

    def labelled(self, prompts):
        return labelled_forest(prompts, [self.known[p.id] for p in prompts])


def test_outcomes_teach_it_which_solutions_and_steps_are_right(tmp_path):
    """CE on the outcome through the trainer; the last step, where they differ, gets the reward."""
    config = parse_config({
        "trainer": "step_reward", "task": {"name": "test_implicit:Outcomes"},
        "scorer": {"name": NAME, "policy": {"name": "vision", "model": str(family_folder("text"))}},
        "loss": {"name": "bce", "last_step_only": True}, "optim": {"lr": 3e-3},
        "run": {"output": str(tmp_path / "r"), "iterations": 10, "prompts_per_iteration": 8, "eval_every": 10,
                "checkpoint_every": 10, "trackers": [], "report": False, "cpu": True},
    })  # fmt: skip
    trainer = StepRewardTrainer(config)
    batch, _ = trainer.batch(trainer.task.prompts[:4])
    assert float(batch.weight.sum()) == 16
    with torch.no_grad():
        whole = trainer.scorer.micro_batches(batch.data.rollout, torch.unique(batch.data.node))
        start = sum(float(trainer.loss(batch, part, [])) for part in whole)
    assert start == pytest.approx(0.6931472, abs=1e-5)  # all rewards are 0
    trainer.train()
    data = trainer.task.labelled(trainer.task.eval_prompts)
    r = trainer.scorer(data.rollout)
    with torch.no_grad():
        last = torch.stack([p[-1] for p in data.paths])
        q = trainer.scorer.logits(data.rollout, torch.unique(data.node[last]))[:, 0]
    right = torch.tensor([data.rollout.texts[v].endswith("y") for v in torch.unique(data.node[last]).tolist()])
    assert q[right].min() > q[~right].max()
    own = r[torch.unique(data.node[last])]
    assert own[right].mean() > own[~right].mean() + 0.01
    assert load_file(tmp_path / "r" / "model" / "model.safetensors")
    frozen = trainer.scorer.policy._reference._copy.state_dict()
    first = load_file(family_folder("text") / "model.safetensors")
    assert all(torch.equal(first[k], frozen[f"hf.{k}"]) for k in first)  # the reference stays


def test_temperature_and_dropout_do_not_enter_twice():
    """Policy and reference run in one mode and by one temperature, or the start would not be zero."""
    prm = build(temperature=0.5, gradient_checkpointing=True)
    rollout = solution_forest([P], CANDIDATES)[0]
    assert float(prm.logits(rollout, torch.arange(5)).abs().max()) < 1e-7
    prm.policy.options = replace(prm.policy.options, max_tokens=20)
    assert float(prm.logits(rollout, torch.arange(5)).abs().max()) < 1e-7

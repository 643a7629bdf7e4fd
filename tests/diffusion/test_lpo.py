"""LPO: candidates of one parent, judged as latents, on flow and epsilon models; published numbers; search by the judge."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import TinyTask, recipe
from torch import nn

from diffusion.adapters.base import Level
from diffusion.adapters.dit import DiTAdapter
from diffusion.kernels import to_x0_eps
from diffusion.latent.lpo import LatentJudge
from diffusion.latent.reward import LatentReward
from diffusion.policy import DiffusionPolicy
from diffusion.preferences import dynamic_threshold
from diffusion.schedule import SamplingConfig, plan_schedule
from mmrl.config import load_config, parse_config
from mmrl.losses.preference import Side, preference_loss, preset
from mmrl.preference import build_pairs
from mmrl.rewards.scoring import write_outcomes
from mmrl.rollout import BranchPlan, Prompt, Rollout
from mmrl.scorers.scoring import good_logits
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
PROMPTS = TinyTask().prompts[:3]
LPO = {"steps": 6, "noise": "all", "split_noise": "independent", "candidates": 4}

# std of DDIM with eta 1 on Stable Diffusion's schedule at t = 1, 51, .. 951 (methods of LPO's code)
SD_STD = [.0206, .0406, .1673, .2144, .2509, .2836, .3144, .3442, .3732, .4016,
          .4293, .4565, .4829, .5087, .5336, .5576, .5807, .6029, .6241, .6444]  # fmt: skip


class EpsilonAdapter:
    """Predicts noise on Stable Diffusion's schedule, as its 20 DDIM steps see it; a linear net on 4 latent values."""

    prediction = "epsilon"

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(5, 4)
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = (1 - beta).cumprod(0)

    def encode(self, prompts):
        return {"label": torch.tensor([p.inputs["label"] for p in prompts])}

    def schedule(self, num_steps):
        times = [*range(1000 - 1000 // num_steps + 1, 0, -1000 // num_steps), 0]
        return [Level(float(self.abar[t] ** 0.5), float((1 - self.abar[t]) ** 0.5), float(t)) for t in times]

    def init(self, generator):
        return torch.randn((1, 2, 2), generator=generator)

    def predict(self, model, x, level, cond, own):
        told = cond["label"][own].float()[:, None] / 10
        return to_x0_eps(x, model(torch.cat([x.flatten(1), told], 1)).view_as(x), level.a, level.s, "epsilon")

    def decode(self, x0):
        return (x0 / 2 + 0.5).clamp(0, 1)


def policy(kind, folder, max_batch=256, **sampling):
    if kind == "flow":
        return DiffusionPolicy(DiTAdapter.from_pretrained(folder), SamplingConfig(**LPO | sampling), max_batch)
    ddim = {"steps": 20, "kernel": "ddim", "final_step": "sample"}
    return DiffusionPolicy(EpsilonAdapter(), SamplingConfig(**LPO | ddim | sampling), max_batch)


@pytest.fixture(params=["flow", "epsilon"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def judge_folder(tiny_model, tmp_path_factory):
    """A saved latent reward on the tiny model, its scores spread so that gaps are not all alike."""
    torch.manual_seed(1)
    reward = LatentReward.build(str(tiny_model))
    nn.init.normal_(reward._network.visual_projection.weight, std=1.0)
    folder = tmp_path_factory.mktemp("judge")
    reward.save(folder)
    return folder


def brightest(x, level, cond, own):
    return x.flatten(1).mean(1)


# ---- the tree ---------------------------------------------------------------------------------------------------


def test_one_of_the_candidates_goes_on(kind, tiny_model):
    p = policy(kind, tiny_model)
    rollout = p.rollout(PROMPTS, BranchPlan({}), seed=0)
    tree, noisy = rollout.tree, int(p.noise_schedule(BranchPlan({})).noisy.count(True))
    side = tree.tags["side"]
    steps = p.sampling.steps
    assert len(tree) == 3 * (4 * noisy + (steps - noisy)) == 3 * p.forecast(BranchPlan({})).steps
    assert rollout.counts == {"calls": 3 * steps, "leaves": 3}  # candidates cost no call
    families = torch.bincount(tree.sibling_set)
    assert sorted(set(families.tolist())) == ([1, 4] if kind == "flow" else [4])
    live = torch.zeros(len(families), dtype=torch.long).index_add(0, tree.sibling_set, (~side).long())
    assert bool((live == 1).all())
    assert bool((tree.num_children[side] == 0).all()) and bool(tree.is_leaf[side].all())
    assert bool(rollout.actions.trainable[side].all())  # both members of a pair need a density


def test_the_choice_is_random_and_repeatable(tiny_model):
    p = policy("flow", tiny_model)

    def place(seed):
        tree = p.rollout(PROMPTS, BranchPlan({}), seed=seed).tree
        return [
            int((~tree.tags["side"])[m].nonzero()) for m in tree.sibling_set.unique() for m in [tree.sibling_set == m]
        ]

    first = place(0)
    assert first == place(0) and first != place(1) and len(set(first)) > 1


def test_a_prompt_does_not_depend_on_its_company(tiny_model):
    p = policy("flow", tiny_model)
    many, one = p.rollout(PROMPTS, BranchPlan({0: 2}), seed=3), p.rollout(PROMPTS[1:2], BranchPlan({0: 2}), seed=3)
    own = many.tree.group == 1
    torch.testing.assert_close(many.actions.payload["latent"][own], one.actions.payload["latent"], atol=1e-6, rtol=0)
    assert torch.equal(many.tree.tags["side"][own], one.tree.tags["side"])


def test_where_the_plan_splits_all_go_on(tiny_model):
    p = policy("flow", tiny_model)
    plan = BranchPlan({1: 3})
    rollout = p.rollout(PROMPTS, plan, seed=0)
    tree = rollout.tree
    assert not bool(tree.tags["side"][tree.depth == 1].any()) and len(p.samples(rollout)) == 9
    assert len(tree) == 3 * p.forecast(plan).steps == 3 * (4 + 3 + 3 * (4 + 4 + 4) + 3)


def test_without_candidates_nothing_changes(tiny_model):
    """The same latents as before the option was there: no extra random number is drawn."""
    plain, one = (policy("flow", tiny_model, candidates=1, noise=n) for n in ("all", "all"))
    a, b = plain.rollout(PROMPTS, BranchPlan({0: 2}), seed=0), one.rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    assert "side" not in a.tree.tags and torch.equal(a.actions.payload["latent"], b.actions.payload["latent"])


def test_only_what_was_finished_is_decoded_and_rewarded(kind, tiny_model):
    p = policy(kind, tiny_model)
    rows = []
    decode, p.adapter.decode = p.adapter.decode, lambda x: rows.append(len(x)) or decode(x)
    rollout = p.rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    samples = p.samples(rollout)
    assert sum(rows) == len(samples) == 6
    tree = write_outcomes(rollout, samples, torch.arange(6.0)).tree
    assert int(tree.is_finished.sum()) == 6 and bool(tree.outcome[tree.tags["side"]].isnan().all())


def test_saved_and_read_again(tiny_model, tmp_path):
    p = policy("flow", tiny_model)
    rollout = p.rollout(PROMPTS, BranchPlan({}), seed=0)
    back = Rollout.load(rollout.save(tmp_path / "r"))
    assert torch.equal(back.tree.tags["side"], rollout.tree.tags["side"])
    assert len(p.samples(back.select([1]))) == 1


def test_candidates_need_noise(tiny_model):
    levels = DiTAdapter.from_pretrained(tiny_model).schedule(6)
    with pytest.raises(ValueError, match="policy.noise: all"):
        plan_schedule(SamplingConfig(steps=6, candidates=4), BranchPlan({0: 2}), levels)
    with pytest.raises(ValueError, match="policy.candidates=0"):
        SamplingConfig(candidates=0)


# ---- densities --------------------------------------------------------------------------------------------------


def test_first_ratio_is_exactly_1(kind, tiny_model):
    p = policy(kind, tiny_model, storage="bfloat16")
    rollout = p.rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    every = rollout.actions.trainable.nonzero().flatten()
    for part in p.micro_batches(rollout, every):
        with torch.no_grad():
            new = p.log_probs(rollout, part)
        assert torch.equal(new.logp, rollout.actions.logp[new.index])


def test_std_of_stable_diffusion(tiny_model):
    """Tag std = the table of LPO's code, and the thresholds that follow from it."""
    tree = policy("epsilon", tiny_model).rollout(PROMPTS[:1], BranchPlan({}), seed=0).tree
    std = torch.stack([tree.tags["std"][tree.depth == d][0] for d in range(20)]).flip(0)
    torch.testing.assert_close(std, torch.tensor(SD_STD), atol=6e-5, rtol=0)
    tau = dynamic_threshold(std, 0.35, 0.5)
    for t, want in {1: 0.35, 51: 0.3548, 101: 0.3853, 251: 0.4132, 501: 0.4483, 751: 0.4791, 951: 0.5}.items():
        assert float(tau[t // 50]) == pytest.approx(want, abs=1e-4)


def test_deterministic_steps_have_no_std(tiny_model):
    tree = policy("flow", tiny_model).rollout(PROMPTS, BranchPlan({}), seed=0).tree
    assert bool((tree.tags["std"].isnan() == (tree.depth == 5)).all())


# ---- the judge and its pairs ------------------------------------------------------------------------------------


def test_the_judge_reads_latents_alone(tiny_model, judge_folder, monkeypatch):
    p = policy("flow", tiny_model)
    rollout = p.rollout(PROMPTS, BranchPlan({}), seed=0)
    monkeypatch.setattr(DiTAdapter, "decode", lambda *a: pytest.fail("decoded"))
    judge = LatentJudge(str(judge_folder))
    score, tree = judge(rollout), rollout.tree
    assert torch.equal(score.isnan(), tree.depth == 5)  # alone there, and nothing to compare with
    torch.testing.assert_close(
        score[tree.depth < 5], good_logits(judge.reward, rollout)[tree.depth < 5], atol=1e-5, rtol=0
    )


def test_the_judge_keeps_to_its_range(tiny_model, judge_folder):
    p = policy("flow", tiny_model)
    rollout = p.rollout(PROMPTS, BranchPlan({}), seed=0)
    judge, rows = LatentJudge(str(judge_folder), first_depth=2, last_depth=3), []
    judge.model.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    score = judge(rollout)
    depth = rollout.tree.depth
    assert torch.equal(~score.isnan(), (depth >= 2) & (depth <= 3)) and sum(rows) == 3 * 2 * 4
    pairs = build_pairs(
        rollout.with_tree(rollout.tree.replace(step_reward=score)).tree, "extremes", {"by": "step_reward"}
    )
    assert sorted(set(depth[pairs.chosen].tolist())) == [2, 3] and len(pairs) == 6


def test_the_judge_can_be_told_the_step_before(tiny_model, judge_folder):
    rollout = policy("flow", tiny_model).rollout(PROMPTS, BranchPlan({}), seed=0)
    after, before = (LatentJudge(str(judge_folder), told=t)(rollout) for t in ("after", "before"))
    assert not torch.allclose(after, before, equal_nan=True)
    steps = (rollout.tree.depth == 2).nonzero().flatten()
    x, own = rollout.actions.payload["latent"][steps], rollout.tree.group[steps]
    want = LatentReward.build(str(judge_folder)).score(
        x, Level(*rollout.about["course"]["levels"][2]), {"label": torch.arange(3)}, own
    )
    torch.testing.assert_close(before[steps].float(), want)


def test_best_and_worst_of_four_above_the_dynamic_threshold(kind, tiny_model):
    """Scores 20.1 19.3 20.9 19.8: third against second, gap tanh .8 = .664; a threshold above it drops the pair."""
    p = policy(kind, tiny_model)
    tree = p.rollout(PROMPTS, BranchPlan({}), seed=0).tree
    family = torch.bincount(tree.sibling_set)[tree.sibling_set] == 4
    score = torch.full((len(tree),), torch.nan, dtype=torch.float64)
    score[family] = torch.tensor([20.1, 19.3, 20.9, 19.8], dtype=torch.float64).repeat(int(family.sum()) // 4)
    tree = tree.replace(step_reward=score)
    lpo = {"by": "step_reward", "squash": True, "noise": "std"}
    pairs = build_pairs(tree, "noise_extremes", {**lpo, "threshold": [0.35, 0.5]})
    assert len(pairs) == int(family.sum()) // 4 and torch.allclose(
        pairs.gap.double(), torch.tensor(0.8).tanh().double()
    )
    assert bool((score[pairs.chosen] == 20.9).all()) and bool((score[pairs.rejected] == 19.3).all())
    some = build_pairs(tree, "noise_extremes", {**lpo, "threshold": [0.35, 0.9]})
    std = tree.tags["std"]
    assert 0 < len(some) < len(pairs)
    assert float(std[some.chosen].max()) < float(std[pairs.chosen].max())  # the noisiest steps fall out


def test_the_published_loss():
    """lp_w -.4, ref -.4002, lp_l -.55, ref -.5495: margin .35, loss .5333822; clipped at 1e-4: .1 and .6443967."""
    one = torch.tensor([0])
    sides = [Side(torch.tensor([a]), torch.tensor([b]), one) for a, b in ((-0.4, -0.4002), (-0.55, -0.5495))]
    loss = preference_loss(*sides, 1, preset("lpo"))
    assert float(loss.margin) == pytest.approx(0.35, abs=1e-4) and float(loss.loss) == pytest.approx(
        0.5333822, abs=1e-4
    )
    clipped = preference_loss(*sides, 1, preset("lpo", clip=1e-4))
    assert float(clipped.margin) == pytest.approx(0.1, abs=1e-4)
    assert float(clipped.loss) == pytest.approx(0.6443967, abs=1e-4)
    assert float(preference_loss(*sides, 1, preset("spo")).loss) == pytest.approx(0.6896533, abs=1e-5)


# ---- training ---------------------------------------------------------------------------------------------------


def lpo_recipe(model, judge, output, **sections):
    tree = recipe(model, output, **{"policy": LPO, **sections})
    tree |= {"trainer": "step_preference", "plan": {0: 2}, "loss": {"name": "lpo"}}
    tree["step_rewards"] = [{"name": "latent_judge", "model": str(judge)}]
    tree["pairs"] = {"name": "noise_extremes", "by": "step_reward", "squash": True, "threshold": 0.0, "noise": "std"}
    return parse_config(tree, model=StepPreferenceConfig)


def test_margin_0_and_log_2_before_the_first_update(tiny_model, judge_folder, tmp_path):
    trainer = StepPreferenceTrainer(lpo_recipe(tiny_model, judge_folder, tmp_path / "r"))
    first = trainer.iterate(0)
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["preference/margin"] == 0
    assert first["pairs/forks_per_prompt"] == 1 + 2 * 4  # the split at step 0, then two trajectories of 4 noisy steps
    assert first["preference/pairs"] == 4 * 9 and first["policy/grad_norm"] > 0
    assert first["reward/unscored_frac"] == 0  # side candidates are no samples


def test_margin_0_and_log_2_on_an_epsilon_model(judge_folder, tmp_path):
    adapter = EpsilonAdapter()
    p = DiffusionPolicy(adapter, SamplingConfig(**LPO | {"steps": 20, "kernel": "ddim", "final_step": "sample"}))
    config = lpo_recipe("unused", judge_folder, tmp_path / "r")
    config.step_rewards[0] = type(config.step_rewards[0])(name="test_lpo:mean_latent")
    trainer = StepPreferenceTrainer(config, policy=p)
    first = trainer.iterate(0)
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["preference/margin"] == 0
    assert first["preference/pairs"] == 4 * (1 + 2 * 19) and first["policy/grad_norm"] > 0
    second = trainer.iterate(1)
    assert second["preference/margin"] != 0


def mean_latent(rollout):
    return rollout.actions.payload["latent"].flatten(1).mean(1).double()


def test_the_judge_score_rises(tiny_model, tmp_path):
    """With the mean of the latent as the judge, pictures become brighter: candidates alone carry the signal."""
    config = lpo_recipe(
        tiny_model, "unused", tmp_path / "r", run={"iterations": 12, "eval_every": 12}, optim={"lr": 3e-3}
    )
    config.step_rewards[0] = type(config.step_rewards[0])(name="test_lpo:mean_latent")
    StepPreferenceTrainer(config).train()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    reward = [r["eval/reward"] for r in rows if "eval/reward" in r]
    assert reward[-1] > reward[0] + 0.02


@pytest.mark.parametrize("name", ["digits_lpo", "lpo_sd15", "lpo_sdxl"])
def test_recipes_are_read(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    sampling = {k: v for k, v in config.policy.options.items() if k in SamplingConfig.__dataclass_fields__}
    assert SamplingConfig(**sampling).candidates == 4 and config.plan is not None
    assert preset(config.loss.name, **config.loss.options).clip == 0.1 and config.pairs.options["noise"] == "std"


# ---- search -----------------------------------------------------------------------------------------------------


def test_the_best_candidate_goes_on_with_a_judge(kind, tiny_model):
    p = policy(kind, tiny_model)
    rollout = p.sample_best(PROMPTS, k=4, score=brightest, seed=0)
    tree, mean = rollout.tree, rollout.actions.payload["latent"].flatten(1).mean(1)
    for members in (tree.sibling_set == s for s in tree.sibling_set.unique()):
        assert bool((~tree.tags["side"])[members][mean[members].argmax()])
    plain = p.rollout(PROMPTS, BranchPlan({}), seed=0)
    assert rollout.counts == plain.counts

    def bright(r):
        return float(torch.stack([s.output for s in p.samples(r)]).mean())

    assert bright(rollout) > bright(plain)


def test_the_judge_of_a_search_is_told_level_and_prompt(tiny_model):
    p, seen = policy("flow", tiny_model), []

    def judge(x, level, cond, own):
        seen.append((len(x), level.s, cond["label"][own].tolist()))
        return x.flatten(1).mean(1)

    p.sample_best([Prompt("a", {"label": 3}), Prompt("b", {"label": 7})], k=4, score=judge, seed=0)
    levels = p.adapter.schedule(6)
    assert seen == [(8, levels[i + 1].s, [3] * 4 + [7] * 4) for i in range(5)]

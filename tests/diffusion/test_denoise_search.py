"""Best of k per denoising step and best of n samples: what is counted, what is compared, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from tiny import TinyTask, brightness
from tiny import recipe as latent_recipe
from torch import nn

from diffusion.adapters.dit import DiTAdapter
from diffusion.latent.reward import LatentReward
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig
from diffusion.search import best_of_k
from mmrl.config import ConfigError, load_section, parse_config, trainer_config
from mmrl.registry import ComponentError
from mmrl.rewards.scoring import RewardError
from mmrl.rollout import BranchPlan, Forecast, Prompt, Rollout, Sample
from mmrl.search.recipe import SearchConfig
from mmrl.search.samples import SearchResult, search_samples
from mmrl.search.verb import run_search
from mmrl.trainers import trainer_of

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
PROMPTS = TinyTask().eval_prompts[:3]
STEPS = 6


class Brightest:
    """A judge of latents that sees what the reward sees, up to clamping."""

    def score(self, x, level, cond, own):
        return x.flatten(1).mean(1)


@pytest.fixture
def policy(tiny_model):
    return DiffusionPolicy(DiTAdapter.from_pretrained(tiny_model), SamplingConfig(steps=STEPS, noise="all"))


# ---- the policy ---------------------------------------------------------------------------------------------------


def test_plain_sampling_is_the_policy_s_own(policy):
    found = best_of_k(policy, PROMPTS, Brightest(), n=2, k=1, seed=5)
    copies = [Prompt(f"{p.id}#{j}", p.inputs) for p in PROMPTS for j in (0, 1)]
    own = policy.samples(policy.rollout(copies, BranchPlan({}), seed=5))
    got = [s for samples in found.samples for s in samples]
    assert all(torch.equal(a.output, b.output) for a, b in zip(got, own, strict=True))
    assert [s.prompt.id for s in got] == [p.id for p in PROMPTS for _ in (0, 1)]
    assert (found.policy_calls, found.scorer_calls) == (3 * 2 * STEPS, 0)


def test_the_best_candidate_goes_on_and_is_paid_for(policy):
    plain, searched = (best_of_k(policy, PROMPTS, Brightest(), n=2, k=k, seed=0) for k in (1, 4))
    better = [a > b for x, y in zip(searched.scores, plain.scores, strict=True) for a, b in zip(x, y, strict=True)]
    assert len(better) == 6 and all(better)
    assert searched.policy_calls == plain.policy_calls  # candidates share their parent's call
    assert searched.scorer_calls == 3 * 2 * 4 * (STEPS - 1)  # the last step draws no noise
    assert policy.sampling.candidates == 1  # the policy itself is left as it was


def test_scores_are_those_of_the_clean_latents(policy, tiny_model):
    seen = []

    class Told(Brightest):
        def score(self, x, level, cond, own):
            seen.append((level.s, len(x), cond["label"][own].tolist()))
            return super().score(x, level, cond, own)

    found = best_of_k(policy, PROMPTS[:2], Told(), n=2, k=3, seed=0)
    twin = DiffusionPolicy(DiTAdapter.from_pretrained(tiny_model), SamplingConfig(steps=STEPS, noise="all"))
    copies = [Prompt(f"{p.id}#{j}", p.inputs) for p in PROMPTS[:2] for j in (0, 1)]
    rollout = twin.sample_best(copies, k=3, score=Brightest().score, seed=0)
    leaves = [s.step for s in twin.samples(rollout)]
    want = rollout.actions.payload["latent"][leaves].flatten(1).mean(1).tolist()
    assert [x for own in found.scores for x in own] == want
    levels = policy.adapter.schedule(STEPS)
    assert seen[:-1] == [(levels[i + 1].s, 12, [0] * 6 + [1] * 6) for i in range(STEPS - 1)]
    assert seen[-1] == (0.0, 4, [0, 0, 1, 1])


def test_a_prompt_does_not_depend_on_its_company(policy):
    many, one = best_of_k(policy, PROMPTS, Brightest(), n=2, k=3, seed=1), None
    one = best_of_k(policy, PROMPTS[1:2], Brightest(), n=2, k=3, seed=1)
    assert many.scores[1] == pytest.approx(one.scores[0], abs=1e-5)
    assert many.scores[0] != pytest.approx(best_of_k(policy, PROMPTS[:1], Brightest(), n=2, k=3, seed=2).scores[0])


def test_a_saved_latent_reward_searches(policy, tiny_model, tmp_path):
    torch.manual_seed(1)
    reward = LatentReward.build(str(tiny_model))
    nn.init.normal_(reward._network.visual_projection.weight, std=1.0)
    plain, searched = (best_of_k(policy, PROMPTS, reward, n=4, k=k, seed=0) for k in (1, 6))
    assert sum(map(sum, searched.scores)) > sum(map(sum, plain.scores))


def test_what_cannot_be_searched(policy, tiny_model):
    with pytest.raises(
        ValueError, match="needs the protocol LatentScorer .*function does not have it; those that do: latent_reward"
    ):
        best_of_k(policy, PROMPTS, brightness, n=1, k=2, seed=0)
    split = DiffusionPolicy(DiTAdapter.from_pretrained(tiny_model), SamplingConfig(steps=STEPS))
    with pytest.raises(ValueError, match="noise='split' draws noise where a plan splits"):
        best_of_k(split, PROMPTS, Brightest(), n=1, k=2, seed=0)
    policy.sampling = SamplingConfig(steps=STEPS, noise="all", eval_steps=STEPS + 1)
    with pytest.raises(ValueError, match="eval_steps: a search is compared at equal steps"):
        best_of_k(policy, PROMPTS, Brightest(), n=1, k=2, seed=0)


# ---- the report ---------------------------------------------------------------------------------------------------

SCORES = {"a": [1.0, 2.0, 0.0], "b": [3.0, 1.0, 2.0]}
REWARDS = {"a": [0.25, 1.0, 0.5], "b": [0.5, 0.75, 0.0]}


class Known:
    """Samples with known scores; their output is the reward, a k above 1 adds 1 to both."""

    def generate(self, prompts, *, seed):
        return [Sample(p, 0.125, -1) for p in prompts]

    def forecast(self, plan):
        return Forecast(1, 10, 10, 9, 10)


def known_search(policy, prompts, scorer, *, n, k, seed):
    more = float(k > 1)
    samples = [[Sample(p, x + more, -1) for x in REWARDS[p.id][:n]] for p in prompts]
    scores = [[x + more for x in SCORES[p.id][:n]] for p in prompts]
    return SearchResult(samples, scores, 10 * n * len(prompts), 7 * k * n * len(prompts) * (k > 1))


def told(samples):
    return [s.output for s in samples]


def means(samples):
    return {"judge": sum(s.output for s in samples) / len(samples)}


def report(folder, verifier=told, **options):
    prompts = [Prompt("a", {}), Prompt("b", {})]
    rest = {"folder": folder, "n": 3, "k": (2,), "judges": means, "progress": False, "prompts_per_batch": 1}
    return search_samples(prompts, Known(), known_search, None, verifier, **rest | options)


def test_numbers_worked_out_by_hand(tmp_path):
    r = report(tmp_path)
    got = {name: row["mean"] for name, row in r["reward"].items()}
    # n2: of the pairs (0,1), (0,2), (1,2) the higher score: a 1, .25, 1; b .5, .5, 0; n3: a 1, b .5
    want = {"generate": 0.125, "n1/k1": 0.5, "n2/k1": (2.25 + 1) / 6, "n3/k1": 0.75}
    assert got == pytest.approx(want | {"n1/k2": 1.5, "n2/k2": 1 + 3.25 / 6, "n3/k2": 1.75})
    assert r["gain"]["n3/k1"]["mean"] == pytest.approx(0.25) and r["gain"]["n1/k1"]["high"] == 0
    assert r["bound"]["n3/k1"] == pytest.approx((1 + 0.75) / 2)
    assert r["judges"]["n1/k1"] == {"judge": (0.25 + 0.5) / 2}  # the first sample of each prompt
    assert r["judges"]["n2/k1"] == {"judge": (1 + 0.5) / 2}
    calls = {name: (c["policy_calls"], c["scorer_calls"]) for name, c in r["cost"].items()}
    assert calls == {
        "generate": (10, 0), "n1/k1": (10, 0), "n2/k1": (20, 2), "n3/k1": (30, 3),
        "n1/k2": (10, 14), "n2/k2": (20, 30), "n3/k2": (30, 45),
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[1]["k1"] == {"scores": [3.0, 1.0, 2.0], "rewards": [0.5, 0.75, 0.0]}
    assert json.loads((tmp_path / "report.json").read_text()) == r


def test_batches_change_nothing(tmp_path):
    one, two = report(tmp_path / "1"), report(tmp_path / "2", prompts_per_batch=2)
    same = ("reward", "gain", "bound", "judges")
    assert {k: one[k] for k in same} == {k: two[k] for k in same}


def test_a_prompt_without_verdict_is_left_out_and_counted(tmp_path):
    def verifier(samples):
        return [None if s.prompt.id == "a" and s.output == 0.5 else s.output for s in samples]

    r = report(tmp_path, verifier, max_unscored=0.5)
    assert r["unscored_prompts"] == 1 and r["reward"]["n1/k1"]["mean"] == pytest.approx(1.25 / 3)
    with pytest.raises(RewardError, match="have no reward"):
        report(tmp_path, verifier)
    with pytest.raises(ValueError, match="every prompt has a sample without verdict"):
        report(tmp_path, lambda samples: [None, *(1.0 for _ in samples[1:])], max_unscored=1.0)


@pytest.mark.parametrize("options", [{"n": 0}, {"k": (0,)}])
def test_numbers_below_1(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        report(tmp_path, **options)


def test_a_folder_holds_one_search(tmp_path):
    report(tmp_path)
    report(tmp_path)
    with pytest.raises(ValueError, match="holds another search: settings.n: 3 -> 2"):
        report(tmp_path, n=2)


# ---- from a recipe ------------------------------------------------------------------------------------------------


def recipe(model, output, **sections):
    tree = {
        "task": {"name": "tiny:TinyTask"},
        "policy": {"name": "diffusion", "model": str(model), "steps": STEPS, "noise": "all"},
        "verifier": {"name": "tiny:brightness", "timeout_s": 0},
        "scorer": "test_denoise_search:Brightest",
        "method": {"name": "best_of_k", "n": 2, "k": [4]},
        "output": str(output),
        "prompts": 5,
    }
    return parse_config(tree | sections, model=SearchConfig)


def test_a_search_from_a_recipe(tiny_model, tmp_path):
    r = run_search(recipe(tiny_model, tmp_path / "s"))
    reward = {name: row["mean"] for name, row in r["reward"].items()}
    assert list(reward) == ["generate", "n1/k1", "n2/k1", "n1/k4", "n2/k4"]
    assert reward["n1/k1"] < reward["n2/k1"] < reward["n2/k4"] and reward["n1/k1"] < reward["n1/k4"]
    assert reward["n2/k1"] == pytest.approx(r["bound"]["n2/k1"], abs=1e-3)  # the scorer is the reward
    assert r["cost"]["n2/k4"]["policy_calls"] == 2 * STEPS
    assert r["cost"]["n2/k4"]["scorer_calls"] == 2 * 4 * (STEPS - 1) + 2
    assert set(r["judges"]["n1/k1"]) == {"judge", "diversity"} and r["parameters"]["policy"] > 0
    assert r == json.loads((tmp_path / "s" / "report.json").read_text())


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"scorer": None}, "needs a `scorer`"),
        (
            {"scorer": "vision_prm"},
            "'best_of_k' needs the protocol LatentScorer .*'vision_prm' does not .*: latent_reward$",
        ),
        ({"max_tokens": 9}, "no tokens to limit"),
        (
            {"method": {"name": "best_of_n"}},
            "best_of_k: for policies without text.*needs the protocol Extender.*: vision",
        ),
        (
            {"policy": {"name": "toy_extender:ToyExtender"}},
            "best_of_n, greedy .* needs the protocol CandidateSampler .*: diffusion$",
        ),
        ({"method": {"name": "best_of_k", "kk": 2}}, r"method: unknown key kk=2 \(did you mean k\?\)"),
    ],
)
def test_recipes_that_cannot_run(tiny_model, tmp_path, sections, match):
    with pytest.raises((ConfigError, ComponentError), match=match):
        run_search(recipe(tiny_model, tmp_path, **sections))


def test_the_recipe_is_read():
    config = load_section(CONFIGS / "digits_search.yaml", SearchConfig, [])
    assert config.method.name == "best_of_k" and config.policy.options["noise"] == "all"


# ---- the trees it keeps -------------------------------------------------------------------------------------------


def test_a_stored_search_trains_step_preferences(tiny_model, tmp_path):
    """The candidates that were tried are siblings of those that went on: LPO learns from them without sampling."""
    sections = {"split": "train", "rollouts": str(tmp_path / "trees"), "prompts": 4}
    for _ in range(2):  # started again it stores the same
        report = run_search(recipe(tiny_model, tmp_path / "s", **sections))
    stored = [Rollout.load(f) for f in sorted((tmp_path / "trees").glob("0*"))]
    assert [[p.id for p in r.prompts] for r in stored] == [[p.id for p in TinyTask().prompts[:4]]] * 2
    rows = [json.loads(line) for line in (tmp_path / "s" / "results.jsonl").read_text().splitlines()]
    for j, rollout in enumerate(stored):
        tree = rollout.tree
        assert bool((torch.bincount(tree.sibling_set)[tree.sibling_set[tree.depth < STEPS - 1]] == 4).all())
        ends = tree.is_finished.nonzero().flatten()
        assert len(ends) == 4 and torch.equal(tree.value[ends], tree.value[~tree.value.isnan()])
        assert tree.outcome[ends].tolist() == pytest.approx([row["k4"]["rewards"][j] for row in rows])
        assert tree.value[ends].tolist() == pytest.approx([row["k4"]["scores"][j] for row in rows])
    outcomes = torch.cat([r.tree.outcome for r in stored])
    assert report["reward"]["n1/k4"]["mean"] == pytest.approx(float(outcomes.nanmean()))
    tree = latent_recipe(
        tiny_model, tmp_path / "r", rollouts=str(tmp_path / "trees"), trainer="step_preference",
        policy={"steps": STEPS, "noise": "all", "candidates": 4},
        pairs={"name": "extremes", "by": "step_reward"},
        step_rewards=[{"name": "test_denoise_search:latent_mean"}],
    )  # fmt: skip
    tree = {k: v for k, v in tree.items() if k not in ("credit", "plan")} | {"loss": {"name": "dpo", "beta": 100.0}}
    trainer = trainer_of(parse_config(tree, model=trainer_config(tree)))
    told = trainer.iterate(0)
    assert told["preference/pairs"] == 4 * (STEPS - 1) and told["policy/grad_norm"] > 0
    assert told["preference/loss"] == pytest.approx(0.693147, abs=1e-5)


def latent_mean(rollout):
    return rollout.actions.payload["latent"].float().flatten(1).mean(1)

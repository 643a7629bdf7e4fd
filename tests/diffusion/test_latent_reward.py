import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from tiny import TinyTask, brightness

from diffusion.adapters.base import Level
from diffusion.adapters.dit import DiTAdapter
from diffusion.digits_base import DigitsBase, classifier_net, new_dit
from diffusion.latent.data import (
    TreePairs,
    labelled_pairs,
    noised,
    pair_accuracy,
    ranked_pairs,
)
from diffusion.latent.features import caught
from diffusion.latent.reward import LatentNetwork, LatentReward, Space, levels_of, space_of
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig
from diffusion.tasks.digits_pairs import DigitsPairs
from mmrl.credit import compose
from mmrl.losses.reward import bradley_terry, preference, step_loss
from mmrl.registry import find
from mmrl.rewards.scoring import write_outcomes
from mmrl.rewards.steps import score_steps
from mmrl.rollout import BranchPlan, Prompt, Rollout
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import good_logits, load_scorer
from mmrl.trainers.step_reward import RewardModelConfig, StepRewardTrainer

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
SD = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
}  # fmt: skip


# ---- the loss ---------------------------------------------------------------------------------------------------


def rows(*x):
    return torch.tensor(x)[:, None]


def test_lrm_loss_on_worked_numbers():
    s = rows(0.31, 0.27) * math.exp(2.6592)  # cosines times logit scale 14.284857
    path = torch.tensor([5, 5])
    win, tie = preference(s, torch.tensor([1.0, 0.0]), path), preference(s, torch.tensor([0.5, 0.5]), path)
    torch.testing.assert_close(win, torch.full((2,), 0.447718), atol=1e-5, rtol=0)  # both steps carry the pair's loss
    torch.testing.assert_close(tie, torch.full((2,), 0.040268), atol=1e-5, rtol=0)
    centred = preference(s, torch.tensor([1.0, 0.0]), path, center=0.1)
    assert float(centred[0] - win[0]) == pytest.approx(0.1 * (0.29 * 14.284857) ** 2, rel=1e-4)


def test_preference_of_a_pair_is_bradley_terry_and_reads_differences_only():
    q = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    path, label = torch.tensor([0, 1, 0, 2, 1, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    gap = torch.stack([q[0] - q[2], q[4] - q[1], q[3] - q[5]])[:, 0]
    want = -torch.nn.functional.logsigmoid(gap)[path]
    torch.testing.assert_close(preference(q, label, path), want)
    torch.testing.assert_close(bradley_terry(q, label, path), want)
    torch.testing.assert_close(preference(q + 7, label, path), want)
    assert step_loss("preference").needs_path and math.isfinite(
        float(preference(rows(300.0, -300.0), rows(0, 1)[:, 0] * 1.0, torch.zeros(2))[0])
    )


def test_an_identical_pair_gives_log_2_and_a_swap_flips_the_gradient():
    grads = []
    for label in ([1.0, 0.0], [0.0, 1.0]):
        q = torch.zeros(2, 1, requires_grad=True)
        loss = step_loss("preference")(q, torch.tensor(label), path=torch.zeros(2, dtype=torch.int64))
        assert float(loss.detach().mean()) == pytest.approx(math.log(2))
        loss.mean().backward()
        grads.append(q.grad)
    torch.testing.assert_close(grads[0], -grads[1])
    torch.testing.assert_close(grads[0], rows(-0.5, 0.5))


def test_a_path_without_a_better_step_is_an_error():
    with pytest.raises(ValueError, match="path 3 has no label above 0"):
        preference(rows(0.0, 1.0), torch.zeros(2), torch.tensor([3, 3]))


# ---- pairs ------------------------------------------------------------------------------------------------------


def test_ranked_pairs_by_hand():
    value, group = torch.tensor([0.1, 0.5, 0.3, 0.9, math.nan]), torch.tensor([0, 0, 0, 1, 0])
    assert ranked_pairs(value, group).tolist() == [[1, 0], [1, 2], [2, 0]]
    assert ranked_pairs(value, group, margin=0.25).tolist() == [[1, 0]]


def pair_data(sigma=0.5, noise=None):
    prompts = [Prompt("a", {"label": 0}), Prompt("b", {"label": 1})]
    x0, own = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1])
    noise = torch.ones(4, 1, 4, 4) if noise is None else noise
    levels = [Level(1 - sigma, sigma, sigma * 1000), Level(1.0, 0.0, 0.0)]
    return noised(prompts, x0, own, levels, noise, {"label": torch.tensor([0, 1])})


def test_noised_latents_and_their_levels():
    r = pair_data(0.25)
    assert r.actions.payload["latent"][:, 0, 0, 0].tolist() == [1.0, 1.75, 3.0, 4.0]  # .75 x0 + .25, and x0
    assert levels_of(r)[:, 1].tolist() == [0.25, 0.25, 0.0, 0.0]


def test_pair_accuracy_by_hand():
    r = pair_data()
    data = labelled_pairs(r, torch.tensor([[1, 0], [2, 3], [3, 2], [0, 1]]), tie=torch.tensor([False] * 3 + [True]))
    score = torch.tensor([2.0, 1.0, 5.0, 5.0, 1.0, 3.0, 0.0, 9.0])
    assert pair_accuracy(data, score) == {
        "pair_acc": 0.5, "pair_acc/s0.00": 0.25, "pair_acc/s0.50": 1.0
    }  # an even score counts half, a tie of labels nothing  # fmt: skip


# ---- spaces -----------------------------------------------------------------------------------------------------


def test_levels_of_flow_and_variance_preserving_schedules():
    flow, sd = Space((1, 4, 4), FLOW), Space((4, 8, 8), SD)
    assert flow.level(250.0) == Level(0.75, 0.25, 250.0) and flow.prediction == "flow"
    assert [v.t for v in sd.grid(20)] == [1 + 50 * k for k in range(20)] and sd.prediction == "epsilon"
    level = sd.level(1)
    assert level.a**2 + level.s**2 == pytest.approx(1) and level.a == pytest.approx((1 - 0.00085) ** 0.5, abs=1e-3)


def test_variance_exploding_latents_are_brought_to_the_own_space():
    sd = Space((4, 8, 8), SD)
    vp = sd.level(501)
    sigma = vp.s / vp.a
    x = torch.randn(2, 4, 8, 8)
    got = sd.known(x / vp.a, torch.tensor([[1.0, sigma, 501.0]] * 2))
    torch.testing.assert_close(got, x)  # (x0 + sigma eps) / sqrt(1 + sigma^2) = a x0 + s eps


@pytest.mark.parametrize(
    "space, shape, level, prediction, message",
    [
        (Space((1, 4, 4), FLOW), (1, 8, 8), None, None, r"trained on latents of shape \(1, 4, 4\) and got \(1, 8, 8\)"),
        (Space((1, 4, 4), FLOW), (1, 4, 4), None, "epsilon", "predicts 'flow'; the policy predicts 'epsilon'"),
        (Space((1, 4, 4), FLOW), (1, 4, 4), Space((1,), SD).level(501), None, "another schedule: at t = 501"),
        (Space((1, 4, 4), SD), (1, 4, 4), Level(0.5, 0.5, 500.0), None, r"another schedule.*\(epsilon\)"),
        (Space((1, 4, 4), SD), (1, 4, 4), Space((1,), SD | {"beta_end": 0.02}).level(501), None, "another schedule"),
        (Space((1, 4, 4), FLOW), (1, 4, 4), Level(0.5, 0.5, 0.5), None, "another schedule"),  # t / 1000 by mistake
    ],
)  # fmt: skip
def test_latents_it_was_not_trained_on_are_refused(space, shape, level, prediction, message):
    with pytest.raises(ValueError, match=message):
        space.check(shape, [level] if level else [], prediction)


# ---- features and network ---------------------------------------------------------------------------------------


def tiny_dit(**changes):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{
        "sample_size": 4, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 10} | changes)  # fmt: skip
    return shaken(model)


def tiny_unet(xl=False):
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36,
    } if xl else {}  # fmt: skip
    cross = ("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D")
    return shaken(UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        down_block_types=cross, up_block_types=tuple(c.replace("Down", "Up") for c in reversed(cross)),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4, **added))  # fmt: skip


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def unet_cond(xl=False):
    g = torch.Generator().manual_seed(1)
    width = 12 if xl else 16  # SDXL: 36 - 6 * 4
    cond = {"text": torch.randn(2, 5, 16, generator=g), "pooled": torch.randn(2, width, generator=g)}
    cond |= {"null_text": torch.zeros(2, 5, 16), "null_pooled": torch.zeros(2, width)}
    return cond | ({"time_ids": torch.ones(2, 6)} if xl else {})


CASES = {
    "dit": lambda enhance=1.0: (LatentReward(LatentNetwork(tiny_dit(), enhance), Space((1, 4, 4), FLOW)), {"label": torch.tensor([3, 7])}),
    "sd15": lambda enhance=7.5: (LatentReward(LatentNetwork(tiny_unet(), enhance), Space((4, 8, 8), SD)), unet_cond()),
    "sdxl": lambda enhance=7.5: (LatentReward(LatentNetwork(tiny_unet(True), enhance), Space((4, 8, 8), SD)), unet_cond(True)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    scorer, cond = CASES[request.param]()
    x = torch.randn(6, *scorer.space.shape, generator=torch.Generator().manual_seed(2))
    return scorer, x, scorer.space.level(501), cond, torch.tensor([0, 0, 1, 1, 0, 1])


def test_widths_of_the_published_models():
    unet = find("latent_families", "UNet2DConditionModel").target
    sd15 = SimpleNamespace(
        config=SimpleNamespace(
            block_out_channels=(320, 640, 1280, 1280), addition_embed_type=None, cross_attention_dim=768
        )
    )
    scales, width = unet.widths(sd15)
    assert (sum(scales), width) == (4800, 768)
    xl = SimpleNamespace(
        config=SimpleNamespace(
            block_out_channels=(320, 640, 1280),
            addition_embed_type="text_time",
            projection_class_embeddings_input_dim=2816,
            addition_time_embed_dim=256,
        )
    )
    scales, width = unet.widths(xl)
    assert (sum(scales), width) == (3520, 1280)


@pytest.mark.parametrize("xl", [False, True])
def test_unet_features_are_the_last_residuals_of_the_whole_unet(xl):
    unet, cond = tiny_unet(xl), unet_cond(xl)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if xl else None
    with caught([*unet.down_blocks, unet.mid_block]) as got:
        unet(x, t, encoder_hidden_states=cond["text"], added_cond_kwargs=added)
    flat = [r for _, residuals in got[:-1] for r in residuals]  # without conv_in's, so LRM's index 2, 5 is 1, 4
    want = [h.mean((2, 3)) for h in (flat[1], flat[4], got[-1])]
    family = find("latent_families", "UNet2DConditionModel").target
    family.prepare(unet)
    found = family.features(unet, x, t, cond)
    assert [f.shape[1] for f in found.scales] == family.widths(unet)[0] == [8, 16, 16]
    torch.testing.assert_close(found.scales, want)
    assert not unet.up_blocks and not unet.down_blocks[0]._forward_hooks


def test_dit_reads_four_blocks_at_even_distances():
    model = tiny_dit(num_layers=9)
    family = find("latent_families", "DiTTransformer2DModel").target
    found = family.features(
        model, torch.randn(3, 1, 4, 4), torch.full((3,), 500.0), {"label": torch.tensor([0, 1, 2])}
    )
    assert [f.shape for f in found.scales] == [(3, 16)] * 4 and found.condition.shape == (3, 16)
    with caught([model.transformer_blocks[i] for i in (2, 4, 6, 8)]) as got:
        model(torch.zeros(1, 1, 4, 4), timestep=torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64))
    again = family.features(
        model, torch.zeros(1, 1, 4, 4), torch.zeros(1), {"label": torch.zeros(1, dtype=torch.int64)}
    )
    torch.testing.assert_close(again.scales[0], F.layer_norm(got[0].mean(1), (16,)))
    with pytest.raises(
        ValueError, match="unknown family of latent features 'Linear'; known: DiTTransformer2DModel, UN"
    ):
        LatentNetwork(torch.nn.Linear(1, 1))


def test_score_is_scale_times_cosine_with_the_middle_enhanced():
    scorer, cond = CASES["sd15"]()
    net = scorer.model
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([501.0, 501.0])
    with torch.no_grad():
        c = net.family.features(net.denoiser, x, t, cond)
        u = net.family.features(net.denoiser, x, t, cond | {"text": cond["null_text"]})
        mid = u.scales[-1] + 7.5 * (c.scales[-1] - u.scales[-1])  # VFE; the other scales are the conditional ones
        image = torch.cat([*c.scales[:-1], mid], 1) @ net.visual_projection.weight.T
        want = (
            math.exp(2.6592) * F.normalize(image) @ F.normalize(cond["pooled"]).T
        )  # its projection starts as identity
        torch.testing.assert_close(net(x, t, cond), want.diagonal())
        plain = CASES["sd15"](1.0)[0].model  # one forward, no empty prompt needed
        assert plain(x, t, {k: cond[k] for k in ("text", "pooled")}).shape == (2,)


def test_gradient_reaches_denoiser_and_heads(case):
    scorer, x, level, cond, own = case
    parameters = dict(scorer.model.named_parameters())
    rows = {k: v[own] for k, v in cond.items()}
    scorer.model(x, torch.full((6,), level.t), rows).square().sum().backward()
    still = {
        n for n, p in parameters.items() if p.requires_grad and (p.grad is None or not bool(p.grad.abs().sum() > 0))
    }
    # keys have no bias effect in softmax attention, and later blocks of a DiT embed labels and times of their own
    assert {n for n in still if ".to_k." not in n} == set()
    assert all(
        parameters[n].grad is not None for n in ("visual_projection.weight", "text_projection.weight", "logit_scale")
    )


def test_score_does_not_depend_on_batch_or_company(case):
    scorer, x, level, cond, own = case
    together = scorer.score(x, level, cond, own)
    scorer.max_batch = 2
    torch.testing.assert_close(scorer.score(x, level, cond, own), together)
    torch.testing.assert_close(scorer.score(x[4:], level, cond, own[4:]), together[4:])
    assert together.shape == (6,) and not together.requires_grad and together.std() > 1e-4
    assert not torch.allclose(scorer.score(x, level, cond, 1 - own), together)


def test_save_and_load(case, tmp_path):
    scorer, x, level, cond, own = case
    scorer.save(tmp_path / "lr")
    loaded = load_scorer(tmp_path / "lr")
    torch.testing.assert_close(loaded.score(x, level, cond, own), scorer.score(x, level, cond, own), rtol=0, atol=0)
    assert loaded.space == scorer.space and not any("up_blocks" in n for n, _ in loaded.model.named_parameters())
    with pytest.raises(ValueError, match="was trained with"):
        load_scorer(tmp_path / "lr", {"enhance": 2.0})
    (tmp_path / "lr" / "latent_reward.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        load_scorer(tmp_path / "lr")


@pytest.mark.parametrize("gone", ["pooled", "text", "null_pooled"])
def test_missing_text_features_are_named(gone):
    scorer, cond = CASES["sd15"]()
    del cond[gone]
    with pytest.raises(ValueError, match=rf"the conditions have no {gone} .*one row per prompt"):
        scorer.score(torch.zeros(1, 4, 8, 8), scorer.space.level(1), cond, torch.tensor([0]))


def test_a_folder_that_holds_nothing_and_bad_options(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="neither a saved latent reward .* nor a denoiser"):
        LatentReward.build(str(tmp_path))
    (tmp_path / "step_format.json").write_text(json.dumps({"scorer": "vision_prm"}))
    with pytest.raises(ValueError, match="holds a 'vision_prm', no latent reward"):
        LatentReward.build(str(tmp_path))
    with pytest.raises(ValueError, match="max_batch=0"):
        LatentReward.build(str(tiny_model), max_batch=0)
    head_only = LatentReward.build(str(tiny_model), train_denoiser=False)
    assert {n for n, p in head_only.model.named_parameters() if p.requires_grad} == {
        "visual_projection.weight", "text_projection.weight", "logit_scale"
    }  # fmt: skip


def test_a_unet_folder(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD))
    scorer = LatentReward.build(str(tmp_path))
    assert scorer.space == Space((4, 8, 8), SD) and scorer.model.enhance == 7.5
    assert space_of(tiny_dit(), FLOW) == Space((1, 4, 4), FLOW)


# ---- rollouts ---------------------------------------------------------------------------------------------------

PLAN = BranchPlan({0: 2, 2: 2})
PROMPTS = TinyTask().prompts[:3]


def rewarded(folder, prompts=PROMPTS, seed=0):
    p = DiffusionPolicy(DiTAdapter.from_pretrained(folder), SamplingConfig(steps=5))
    rollout = p.rollout(prompts, PLAN, seed=seed)
    samples = p.samples(rollout)
    return write_outcomes(rollout, samples, torch.tensor(brightness(samples), dtype=torch.float64))


def test_scores_of_a_rollout_are_those_of_its_states(tiny_model):
    scorer, rollout = LatentReward.build(str(tiny_model)), rewarded(tiny_model)
    tree, latent = rollout.tree, rollout.actions.payload["latent"]
    values = good_logits(scorer, rollout)
    for depth, s in ((0, 0.8), (2, 0.4), (4, 0.0)):  # the state after step i of 5 has sigma 1 - (i + 1) / 5
        at = (tree.depth == depth).nonzero().flatten()
        own = scorer.score(latent[at], Level(1 - s, s, 1000 * s), {"label": torch.arange(3)}, tree.group[at])
        torch.testing.assert_close(values[at].float(), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scorer(rollout), values.sigmoid(), atol=1e-5, rtol=1e-5)
    scorer.leaves_only = True
    assert scorer(rollout).isnan().tolist() == (~tree.is_leaf).tolist()


def test_as_leaf_value_and_as_value_per_step_in_branch_grpo(tiny_model):
    scorer, rollout = LatentReward.build(str(tiny_model), leaves_only=True), rewarded(tiny_model)
    scored, _ = score_steps(rollout, {"latent": (scorer, 1.0)})
    adv = compose(scored.tree, [{"name": "process_grpo"}], []).adv
    best = scored.tree.step_reward.nan_to_num(nan=-1)[scored.tree.group == 0].argmax()
    own = adv[scored.tree.group == 0]
    assert own[best] == own.max() > 0 > own.min()
    scorer.leaves_only = False
    scored, _ = score_steps(rollout, {"latent": (scorer, 1.0)})
    steps = compose(scored.tree, [{"name": "process_grpo"}], ["delta"], kind="value")
    assert bool(steps.adv.isfinite().all()) and float(steps.adv.abs().max()) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_micro_batches_keep_prompts_whole_and_change_nothing(tiny_model, whole):
    scorer, rollout = LatentReward.build(str(tiny_model), max_batch=40), rewarded(tiny_model)
    steps = torch.arange(len(rollout.tree))
    parts = scorer.micro_batches(rollout, steps, whole_prompts=whole)
    assert len(parts) > 1 and sorted(torch.cat(parts).tolist()) == steps.tolist()
    if whole:
        assert sum(len(rollout.tree.group[p].unique()) for p in parts) == 3
    joined = torch.cat([scorer.logits(rollout, p) for p in parts])
    torch.testing.assert_close(joined, scorer.logits(rollout, torch.cat(parts)), atol=1e-4, rtol=1e-4)


def test_rollouts_it_cannot_score(tiny_model):
    scorer, rollout = LatentReward.build(str(tiny_model)), rewarded(tiny_model)
    written, _ = solution_forest([Prompt("q", {})], [[["1"]]])
    for bad, message in (
        (written, "the rollout has no latents"),
        (Rollout(rollout.prompts, rollout.tree, rollout.actions, rollout.prompt_payload), "no noise levels"),
        (Rollout(rollout.prompts, rollout.tree, rollout.actions, {}, about=rollout.about), "have no label"),
        (Rollout(rollout.prompts, rollout.tree, rollout.actions, rollout.prompt_payload, about={**rollout.about, "prediction": "v"}), "predicts 'v'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            scorer.logits(bad, torch.tensor([0]))


# ---- training ---------------------------------------------------------------------------------------------------


def config(output, iterations, **run):
    return RewardModelConfig.model_validate({
        "task": {"name": "given"}, "scorer": {"name": "given"}, "loss": {"name": "preference", "center": 0.01},
        "optim": {"lr": 3e-3},
        "run": {"output": output, "iterations": iterations, "eval_every": 100, "checkpoint_every": 3, "cpu": True,
                "report": False, "trackers": [], "prompts_per_iteration": 5} | run,
    })  # fmt: skip


def test_trained_on_the_node_values_of_saved_trees(tiny_model, tmp_path):
    for seed in range(4):
        rewarded(tiny_model, TinyTask().prompts, seed).save(tmp_path / ("eval" if seed == 3 else "train") / str(seed))
    task = TreePairs(str(tmp_path / "train"), str(tmp_path / "eval"))
    assert len(task.prompts) == 30 and len({p.id for p in task.prompts}) == 30
    data = task.labelled(task.prompts[:2])
    first, second = data.node.view(-1, 2).unbind(1)
    tree = data.rollout.tree
    assert bool((tree.group[first] == tree.group[second]).all()) and bool(
        (tree.depth[first] == tree.depth[second]).all()
    )
    leaf = tree.is_leaf[first]
    assert bool((tree.outcome[first] > tree.outcome[second])[leaf].all())
    siblings = TreePairs(str(tmp_path / "train"), str(tmp_path / "eval"), among="siblings").labelled(task.prompts[:2])
    assert (
        bool((siblings.rollout.tree.sibling_set[siblings.node.view(-1, 2)].diff() == 0).all())
        and len(siblings.node) == 12
    )
    trainer = StepRewardTrainer(config(tmp_path / "run", 30), LatentReward.build(str(tiny_model)), task)
    before = trainer.evaluate(0)["eval/pair_acc"]
    last = trainer.train()
    assert last["eval/pair_acc"] > max(before, 0.5) + 0.1 and "eval/pair_acc/s0.00" in last
    saved = LatentReward.build(str(tmp_path / "run" / "model"))
    assert saved.space == trainer.scorer.space


def test_only_consistent_pairs_of_trees(tiny_model, tmp_path):
    """The winner also leads in another score, where it has one."""
    r = rewarded(tiny_model)
    other = torch.rand(len(r.tree), generator=torch.Generator().manual_seed(0)).double()
    other[0] = torch.nan
    r.with_tree(r.tree.replace(tags={"sharp": other})).save(tmp_path / "t")
    folder = str(tmp_path / "t")
    every, kept = (TreePairs(folder, folder, consistent=c) for c in (None, {"tags.sharp": -0.1}))
    pairs = [
        {tuple(p) for p in t._pairs(r.with_tree(r.tree.replace(tags={"sharp": other}))).tolist()}
        for t in (every, kept)
    ]
    assert pairs[1] == {(a, b) for a, b in pairs[0] if float(other[a] - other[b]) > -0.1} and 0 < len(pairs[1]) < len(
        pairs[0]
    )
    with pytest.raises(ValueError, match="no step of the rollout has one|no tag 'blunt'"):
        TreePairs(folder, folder, consistent={"tags.blunt": 0.0})


def test_bad_trees_are_named(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"no rollout in .*rollout.save"):
        TreePairs(str(tmp_path), str(tmp_path))
    good = rewarded(tiny_model)
    unrewarded = good.with_tree(
        good.tree.with_outcomes(good.tree.is_leaf.nonzero().flatten(), torch.full((12,), torch.nan))
    )
    unrewarded.save(tmp_path / "none")
    with pytest.raises(ValueError, match="no leaf of the rollouts in .* has a reward"):
        TreePairs(str(tmp_path / "none"), str(tmp_path / "none"))
    good.save(tmp_path / "good")
    with pytest.raises(ValueError, match=r"no two states of one depth differ by more than task.margin=9"):
        TreePairs(str(tmp_path / "good"), str(tmp_path / "good"), margin=9.0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """DigitsPairs on an untrained base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("base") / "digits-untrained"
        DiTAdapter(shaken(new_dit(16, 1, 2))).save(shaken(new_dit(16, 1, 2)), folder)
        base = DigitsBase(folder, classifier_net().eval(), classifier_net().eval())
        small = {"sets_per_class": 2, "set_size": 3, "eval_pairs_per_class": 2, "base": base}
        make = lambda **options: DigitsPairs(**small | options)  # noqa: E731
        make.folder = str(folder)
        yield make


def test_digits_pairs_are_noised_alike_and_evaluation_is_fixed(digits):
    task = digits()
    assert len(task.prompts) == 20 and len(task.eval_prompts) == 10 * 2 * 7
    a, b = task.labelled(task.eval_prompts), task.labelled(task.eval_prompts)
    torch.testing.assert_close(a.rollout.actions.payload, b.rollout.actions.payload, rtol=0, atol=0)
    data = task.labelled(task.prompts[:4])
    assert len(data.rollout.tree) == 12 and len(data.node) == 4 * 3 * 2  # 3 pairs of 3 samples
    level = levels_of(data.rollout).view(4, 3, 3)
    assert bool((level == level[:, :1]).all()) and len(level[:, 0, 1].unique()) > 1
    again = task.labelled(task.prompts[:4]).rollout.actions.payload["latent"]
    assert not torch.equal(again, data.rollout.actions.payload["latent"])  # noised anew
    with pytest.raises(ValueError, match="set_size=1"):
        digits(set_size=1)


def test_digits_pixel_reward_orders_clean_pairs_exactly(digits):
    task = digits(eval_sigmas=(0.0, 0.9))
    data = task.labelled(task.eval_prompts)
    found = task.measures(data, torch.zeros(len(data.node)))
    assert found["pair_acc"] == 0.5 and found["pixel_pair_acc/s0.00"] == 1.0 and "pixel_pair_acc/s0.90" in found


def test_a_resumed_run_equals_one_that_was_not_stopped(digits, tmp_path):
    def run(name, iterations, **options):
        torch.manual_seed(0)  # of the new head
        trainer = StepRewardTrainer(
            config(tmp_path / name, iterations, **options), LatentReward.build(digits.folder), digits()
        )
        trainer.train()
        return trainer

    whole = run("a", 6)
    run("b", 3)
    rest = run("b", 6, resume=True)
    torch.testing.assert_close(
        dict(rest.scorer.model.state_dict()), dict(whole.scorer.model.state_dict()), rtol=0, atol=0
    )

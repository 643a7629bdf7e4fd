import pytest
import torch
from tiny import TinyTask, brightness

from diffusion.adapters.dit import DiTAdapter
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig, noisy_steps, plan_schedule
from mmrl.rewards.scoring import write_outcomes
from mmrl.rollout import BranchPlan, Prompt, Rollout

PROMPTS = TinyTask().prompts[:3]
PLAN = BranchPlan({0: 2, 2: 2})


def policy(folder, max_batch=256, guidance=1.0, **sampling):
    return DiffusionPolicy(
        DiTAdapter.from_pretrained(folder, guidance), SamplingConfig(**{"steps": 6} | sampling), max_batch
    )


def trained(rollout):
    return rollout.actions.trainable.nonzero().flatten()


@torch.no_grad()
def deviation(p, rollout):
    worst = 0.0
    for part in p.micro_batches(rollout, trained(rollout)):
        new = p.log_probs(rollout, part)
        worst = max(worst, float(((new.logp - rollout.actions.logp[new.index]).exp() - 1).abs().max()))
    return worst


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": "bfloat16"},
        {"storage": "bfloat16", "kernel": "flow", "noise": "all"},
        {"kernel": "dance", "noise": "all"},
        {"kernel": "cps", "noise": "window", "window_size": 2},
        {"guidance": 2.0, "storage": "bfloat16"},
        {"split_noise": "scaled"},
        {"split_noise": "independent", "reduce": "sum"},
        {"tail": 1},
        {"final_step": "sample", "kernel": "dance", "noise": "all"},
        {"final_step": "x0"},
        {"max_batch": 3},
    ],
    ids=str,
)
def test_ratio_is_exactly_1_before_the_first_update(tiny_model, options):
    p = policy(tiny_model, **options)
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    assert deviation(p, rollout) == 0.0
    assert bool(rollout.actions.trainable.any())


@pytest.mark.parametrize("options", [{}, {"noise": "all"}, {"noise": "window"}, {"tail": 2}], ids=str)
def test_network_rows_equal_the_forecast(tiny_model, options):
    p = policy(tiny_model, **options)
    rows = []
    p.model.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    f = p.forecast(PLAN)
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    assert sum(rows) == rollout.counts["calls"] == 3 * f.calls
    assert len(rollout.tree) == 3 * f.steps and rollout.counts["leaves"] == 3 * f.leaves
    rows.clear()
    for part in p.micro_batches(rollout, trained(rollout)):
        p.log_probs(rollout, part)
    assert sum(rows) == 3 * f.trained_states  # siblings share their parent's forward in the update too


def test_counts_of_the_published_settings(tiny_model):
    twenty = policy(tiny_model, steps=20).forecast(BranchPlan({0: 2, 3: 2, 6: 2, 9: 2}))
    assert (twenty.calls, twenty.calls / 16, twenty.trained_states) == (203, 12.6875, 15)
    ten = policy(tiny_model, steps=10).forecast(BranchPlan({0: 2, 2: 2, 4: 2, 6: 2}))
    assert (ten.calls, ten.trained_states) == (77, 15)
    assert policy(tiny_model, steps=10, tail=2).forecast(BranchPlan({0: 2, 2: 2, 4: 2, 6: 2})).calls == 61


def test_a_prompt_does_not_depend_on_its_batch(tiny_model):
    p = policy(tiny_model)
    together = p.rollout(PROMPTS, PLAN, seed=3, iteration=5)
    alone = p.rollout(PROMPTS[1:2], PLAN, seed=3, iteration=5)
    one = together.select([1])
    torch.testing.assert_close(one.actions.payload["latent"], alone.actions.payload["latent"])
    other = p.rollout(PROMPTS[1:2], PLAN, seed=3, iteration=6)
    assert not torch.equal(other.actions.payload["latent"], alone.actions.payload["latent"])


def test_chunking_changes_nothing(tiny_model):
    a, b = (policy(tiny_model, max_batch=m).rollout(PROMPTS, PLAN, seed=0) for m in (256, 2))
    torch.testing.assert_close(a.actions.payload["latent"], b.actions.payload["latent"])


def test_siblings_differ_and_share_their_parent(tiny_model):
    rollout = policy(tiny_model).rollout(PROMPTS, PLAN, seed=0)
    tree, latent = rollout.tree, rollout.actions.payload["latent"]
    first = (tree.depth == 0).nonzero().flatten()
    assert tree.group[first].tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(latent[first[0]], latent[first[1]])
    ode = (tree.depth == 1).nonzero().flatten()
    assert bool(rollout.actions.logp[ode].isnan().all()) and not bool(rollout.actions.trainable[ode].any())


def test_split_at_0_equals_independent_rollouts_from_the_same_noise(tiny_model):
    """{0: G} with noise everywhere is the plain GRPO group: G chains from one initial latent."""
    rollout = policy(tiny_model, noise="all").rollout(PROMPTS[:1], BranchPlan({0: 4}), seed=0)
    assert rollout.tree.is_chains and int(rollout.tree.is_leaf.sum()) == 4


def test_gradient_reaches_only_trained_steps(tiny_model):
    p = policy(tiny_model)
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    steps = trained(rollout)
    assert set(rollout.tree.depth[steps].tolist()) == {0, 2}
    out = p.log_probs(rollout, steps[:4])
    out.logp.sum().backward()
    assert all(q.grad is not None for q in p.model.parameters() if q.requires_grad)
    assert sorted(out.index.tolist()) == steps[:4].tolist()


def test_closed_kl_is_zero_at_the_start_and_positive_after(tiny_model):
    p = policy(tiny_model)
    with pytest.raises(RuntimeError, match="call freeze_reference"):
        p.log_probs(p.rollout(PROMPTS, PLAN, seed=0), torch.tensor([0]), reference=True)
    p.freeze_reference()
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    steps = trained(rollout)
    assert float(p.log_probs(rollout, steps, reference=True).kl.detach().max()) == 0
    with torch.no_grad():
        for q in p.model.parameters():
            q.add_(0.01)
    assert float(p.log_probs(rollout, steps, reference=True).kl.detach().min()) > 0


def test_lora_uses_the_switched_off_adapter_as_reference(tiny_model, tmp_path):
    p = DiffusionPolicy.build(str(tiny_model), lora_rank=2, steps=6)
    p.freeze_reference()
    assert p._reference._copy is None
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    assert deviation(p, rollout) == 0.0
    names = [n for n, q in p.model.named_parameters() if q.requires_grad]
    assert names and all("lora" in n for n in names)
    with torch.no_grad():
        for n, q in p.model.named_parameters():
            if "lora_B" in n:
                q.add_(0.1)
    assert float(p.log_probs(rollout, trained(rollout), reference=True).kl.detach().max()) > 0
    p.save(tmp_path)
    from diffusers import DiTTransformer2DModel
    from peft import PeftModel

    base = DiTTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    again = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    x, label = torch.randn(2, 1, 4, 4), torch.tensor([1, 2])
    t = torch.full((2,), 300.0)
    torch.testing.assert_close(
        again(x, timestep=t, class_labels=label).sample, p.model(x, timestep=t, class_labels=label).sample
    )


def test_a_lora_goes_on_as_its_own_reference_and_is_merged(tiny_model, tmp_path):
    from diffusers import DiTTransformer2DModel

    first = DiffusionPolicy.build(str(tiny_model), lora_rank=2, steps=6)
    with torch.no_grad():
        for name, weight in first.model.named_parameters():
            if "lora_" in name:
                weight.add_(0.1)
    first.save(tmp_path / "first")
    again = DiffusionPolicy.build(str(tiny_model), lora_rank=2, steps=6, lora_start=str(tmp_path / "first" / "lora"))
    again.freeze_reference()
    rollout = again.rollout(PROMPTS, PLAN, seed=0)
    assert float(again.log_probs(rollout, trained(rollout), reference=True).kl.detach().max()) == 0
    x, label, t = torch.randn(2, 1, 4, 4), torch.tensor([1, 2]), torch.full((2,), 300.0)
    want = first.model(x, timestep=t, class_labels=label).sample
    again.merge_adapter()
    again.save(tmp_path / "whole")
    whole = DiTTransformer2DModel.from_pretrained(tmp_path / "whole", subfolder="transformer").eval()
    torch.testing.assert_close(whole(x, timestep=t, class_labels=label).sample, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="of its layers do not fit"):
        DiffusionPolicy.build(str(tiny_model), lora_rank=4, lora_start=str(tmp_path / "first" / "lora"))


def test_saved_model_loads_in_plain_diffusers(tiny_model, tmp_path):
    from diffusers import DiTTransformer2DModel

    p = policy(tiny_model)
    p.save(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    for a, b in zip(again.parameters(), p.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rollout_replays_from_disk(tiny_model, tmp_path):
    p = policy(tiny_model, noise="window", kernel="flow")
    rollout = p.rollout(PROMPTS, PLAN, seed=0, iteration=30)
    samples = p.samples(rollout)
    total = torch.tensor(brightness(samples))
    again = Rollout.load(write_outcomes(rollout, samples, total).save(tmp_path))
    other = policy(tiny_model, steps=9)  # the record decides, not the config of the reader
    assert deviation(other, again) == 0.0
    assert int(again.tree.is_finished.sum()) == 12
    for a, b in zip(other.samples(again), samples, strict=True):
        assert torch.equal(a.output, b.output) and a.prompt == b.prompt


def test_pictures_of_leaves_and_inner_steps(tiny_model):
    p = policy(tiny_model)
    rollout = p.rollout(PROMPTS, PLAN, seed=0)
    pictures = p.describe(rollout, torch.arange(len(rollout.tree)))
    assert len(pictures) == len(rollout.tree)
    assert all(x.shape == (1, 4, 4) and x.min() >= 0 and x.max() <= 1 for x in pictures)


def test_evaluation_is_deterministic_and_uses_no_exploration_noise(tiny_model):
    p = policy(tiny_model)
    a, b = p.generate(PROMPTS, seed=1), p.generate(PROMPTS[1:], seed=1)
    torch.testing.assert_close(a[1].output, b[0].output)


def test_window_slides_and_is_never_empty():
    s = SamplingConfig(steps=10, noise="window", window_size=4, window_every=25)
    starts = [noisy_steps(s, (), i).index(True) for i in range(0, 400, 25)]
    assert starts == [0, 1, 2, 3, 4, 5] * 2 + [0, 1, 2, 3]
    assert all(sum(noisy_steps(s, (), i)) == 4 for i in range(0, 400, 25))
    assert all(sum(noisy_steps(SamplingConfig(steps=3, noise="window"), (), i)) == 2 for i in range(100))
    assert noisy_steps(SamplingConfig(steps=6), [0, 3]) == [True, False, False, True, False, False]
    assert sum(noisy_steps(SamplingConfig(steps=6, noise="all"), [])) == 5
    assert sum(noisy_steps(SamplingConfig(steps=6, noise="all", final_step="sample"), [])) == 6


def starts_of(iterations, **options):
    s = SamplingConfig(noise="window", **options)
    return [noisy_steps(s, (), i).index(True) for i in iterations]


def test_a_window_stays_longest_early_with_exp_decay():
    """ceil(tau exp(-(start - 13) / 10)), tau 10: 10 iterations each up to start 13, then 10, 9, 8 for 14, 15, 16."""
    got = starts_of(range(180), steps=20, window_size=3, window_every=10, window_start="exp_decay")
    assert [got[:167].count(k) for k in range(17)] == [10] * 14 + [10, 9, 8]
    assert got == sorted(got[:167]) + [0] * 10 + [1] * 3  # then from the start again


def test_a_random_window_stays_in_its_range_and_is_everyone_s():
    options = {"steps": 10, "window_size": 2, "window_start": "random", "window_range": (2, 6)}
    got = starts_of(range(60), **options)
    assert set(got) == {2, 3, 4} and got == starts_of(range(60), **options)
    assert starts_of([0], steps=10, window_size=9, window_range=(4, 6)) == [4]


def test_a_group_shares_the_ode_prefix_before_its_window(tiny_model):
    """Flow-GRPO-Fast: one state until the window begins, then the group; only the window has densities."""
    options = {"noise": "window", "window_size": 2, "window_every": 1, "plan_in_window": True}
    p = policy(tiny_model, split_noise="independent", **options)
    for iteration, start in ((0, 0), (2, 2)):
        rollout = p.rollout(PROMPTS[:2], BranchPlan({0: 4}), seed=0, iteration=iteration)
        tree = rollout.tree
        width = [int((tree.depth == d).sum()) // 2 for d in range(6)]
        assert width == [1] * start + [4] * (6 - start)
        assert set(tree.depth[rollout.actions.trainable].tolist()) == {start, start + 1}
        assert rollout.counts == {"calls": 2 * (start + 1 + 4 * (5 - start)), "leaves": 8}
    assert p.forecast(BranchPlan({0: 4})).trained_states == 1 + 4


def test_what_is_recorded_of_a_rollout_of_before_is_recorded_still(tiny_model):
    """Fields that came later are there only where they are set."""
    plain = policy(tiny_model).rollout(PROMPTS[:1], BranchPlan({0: 2}), seed=0).about["sampling"]
    assert not {"window_start", "window_range", "plan_in_window"} & set(plain)
    moved = policy(tiny_model, noise="window", window_range=(1, 4)).rollout(PROMPTS[:1], BranchPlan({1: 2}), seed=0)
    assert moved.about["sampling"]["window_range"] == [1, 4]
    assert SamplingConfig(**moved.about["sampling"]).steps == 6


@pytest.mark.parametrize(
    "options, plan, message",
    [
        ({}, {6: 2}, "depth 6 lies beyond the last step; 6 steps have depths 0..5"),
        ({}, {5: 2}, "plan splits at step 5, the last, which draws no noise"),
        ({}, {}, "no step of this rollout draws noise"),
        ({"kernel": "ode"}, {0: 2}, "draws no noise, so there is nothing to train"),
    ],
)
def test_plans_that_do_not_fit(tiny_model, options, plan, message):
    with pytest.raises(ValueError, match=message):
        policy(tiny_model, **options).forecast(BranchPlan(plan))


def test_bad_options():
    for options, message in [
        ({"steps": 0}, "at least one denoising step"),
        (
            {"kernel": "flows"},
            r"unknown kernel 'flows' \(did you mean flow\?\); known: cps, dance, ddim, flow, ode, post",
        ),
        ({"eta": -0.1}, "policy.eta=-0.1: input should be greater than or equal to 0"),
        ({"tail": 0}, "at least 1 step"),
        ({"window_size": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**options)


def test_unknown_label_names_the_prompt(tiny_model):
    with pytest.raises(ValueError, match=r"prompt 'x': inputs.label is 11; the model has classes 0..9"):
        policy(tiny_model).rollout([Prompt("x", {"label": 11})], PLAN, seed=0)


def test_tail_keeps_the_schedule_up_to_the_last_noisy_step(tiny_model):
    p = policy(tiny_model, steps=20, tail=2)
    schedule = plan_schedule(p.sampling, BranchPlan({0: 2, 9: 2}), p.adapter.schedule(20))
    assert [round(v.s, 3) for v in schedule.levels[9:]] == [0.55, 0.5, 0.25, 0.0] and len(schedule) == 12

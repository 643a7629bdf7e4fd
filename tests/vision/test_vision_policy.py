"""The vision-language policy: rollouts, exact log-probs, one image encoding, and whole runs of the trainer."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from families import FAMILIES, family_folder
from processes import Command, run_ranks
from safetensors.torch import load_file
from tiny import write_recipe
from vision_tiny import vision_recipe

from mmrl.config import parse_config
from mmrl.rollout import BranchPlan, Prompt, Rollout
from mmrl.trainers.branch_grpo import BranchGrpo
from vision.growth.rollouts import text_states
from vision.inputs.loading import vision_tower
from vision.policy import VisionPolicy

TREE = BranchPlan({0: 2, 1: 2, 2: 2})


def build(family="qwen2_5_vl", **options):
    defaults = {"temperature": 0.7, "max_new_tokens": 40, "max_steps": 3}
    return VisionPolicy.build(model=str(family_folder(family)), **(defaults | options))


def prompts(pictures, family="qwen2_5_vl", n=3):
    shown = [] if family == "text" else [str(pictures / "0.png")]
    return [Prompt(f"p{i}", {"question": "how many " * (i + 1), "images": shown}) for i in range(n)]


def eager_newlines(policy):
    """Steps end often, so that trees are deep: the newline gets a share of every distribution."""
    newline = policy.tokenizer.convert_tokens_to_ids(policy.tokenizer.tokenize("\n"))[-1]
    head = policy.model.hf.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out.index_add(
        -1, torch.tensor([newline]), torch.full((*out.shape[:-1], 1), 1.5, dtype=out.dtype)))  # fmt: skip
    return policy


def every_step(rollout):
    return torch.arange(len(rollout.tree))


def deviation(policy, rollout, **options):
    new = policy.log_probs(rollout, every_step(rollout), **options)
    return float((new.logp.detach() - rollout.actions.logp[new.index]).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_is_one_on_a_tree(family, pictures):
    policy = eager_newlines(build(family))
    rollout = policy.rollout(prompts(pictures, family), TREE, seed=1)
    assert int(rollout.tree.depth.max()) == 2 and rollout.counts["leaves"] > 3
    assert rollout.counts["tokens"] == len(rollout.actions.logp)
    with torch.no_grad():
        assert deviation(policy, rollout) < 1e-5


def test_ratio_is_one_in_bfloat16(pictures):
    policy = eager_newlines(build(dtype="bfloat16"))
    rollout = policy.rollout(prompts(pictures), TREE, seed=1)
    with torch.no_grad():
        new = policy.log_probs(rollout, every_step(rollout))
    gap = (new.logp - rollout.actions.logp[new.index]).abs()
    assert new.logp.dtype == torch.float32
    assert float(gap.mean()) < 0.01 and float(gap.max()) < 0.1  # as far as bf16 rows lie from bf16 trees


def test_a_prompt_samples_the_same_in_any_company(pictures):
    policy = build()
    ps = prompts(pictures)
    whole = policy.rollout(ps, TREE, seed=3)
    turned = policy.rollout(ps[::-1], TREE, seed=3)
    alone = policy.rollout(ps[:1], TREE, seed=3)
    policy.options = replace(policy.options, max_batch=8)  # one prompt at a time
    parts = policy.rollout(ps, TREE, seed=3)
    for other, at in ((turned, 2), (alone, 0), (parts, 0)):
        one = other.select([at])
        assert one.texts == whole.select([0]).texts
        torch.testing.assert_close(one.actions.logp, whole.select([0]).actions.logp, atol=1e-5, rtol=0)
    assert policy.rollout(ps, TREE, seed=4).texts != whole.texts
    assert policy.rollout(ps, TREE, seed=3, iteration=1).texts != whole.texts


def test_siblings_differ_and_share_what_is_above(pictures):
    rollout = eager_newlines(build()).rollout(prompts(pictures), TREE, seed=1)
    tree = rollout.tree
    roots = (tree.parent < 0).nonzero().flatten()
    assert len(roots) == 6 and len({rollout.texts[i] for i in roots.tolist()}) > 3
    for i in range(len(tree)):  # only a step that ended by its rule branches
        if int(tree.parent[i]) >= 0:
            assert rollout.texts[int(tree.parent[i])].endswith("\n")


def test_temperature_is_that_of_the_update(pictures):
    policy = build(temperature=0.7)
    rollout = policy.rollout(prompts(pictures), BranchPlan({0: 2}), seed=1)
    policy.sampling = replace(policy.sampling, temperature=1.0)
    with torch.no_grad():
        assert deviation(policy, rollout) > 0.05


def test_placeholders_are_never_sampled(pictures):
    policy = build(max_new_tokens=20)
    banned = torch.tensor(policy.sampling.banned)
    head = policy.model.hf.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out.index_add(
        -1, banned, torch.full((*out.shape[:-1], len(banned)), 30.0)))  # fmt: skip
    rollout = policy.rollout(prompts(pictures), BranchPlan({0: 4}), seed=1)
    assert not torch.isin(rollout.actions.payload["token"], banned).any()
    with torch.no_grad():
        assert deviation(policy, rollout) < 1e-4


@pytest.mark.parametrize("train_vision", [False, True])
def test_the_image_tower_runs_once_per_distinct_picture(pictures, train_vision):
    policy = build(train_vision=train_vision)
    ps = [Prompt(f"p{i}", {"question": "?" * (i + 1), "images": [str(pictures / f"{i % 2}.png")]}) for i in range(4)]
    encoded = []
    tower = vision_tower(policy.model.hf)
    tower.register_forward_hook(lambda m, a, kw, out: encoded.append(len(kw["grid_thw"])), with_kwargs=True)
    rollout = policy.rollout(ps, BranchPlan({0: 4}), seed=1)
    assert sum(encoded) == 2  # four prompts, sixteen completions, two pictures
    policy.log_probs(rollout, every_step(rollout)).logp.sum().backward()
    assert sum(encoded) == (4 if train_vision else 2)  # frozen: kept; trained: once more, with its gradient
    grads = [p.grad is not None for p in tower.parameters()]
    assert all(grads) if train_vision else not any(grads)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "text"])
def test_every_trained_weight_has_a_gradient(family, pictures):
    """With images and without: DDP waits for the gradient of every weight that trains."""
    policy = build(family, train_vision=True)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    tower = {id(p) for p in vision_tower(policy.model.hf).parameters()}
    assert any(id(p) in tower and p.requires_grad for p in policy.model.parameters())
    for shown in (prompts(pictures, family, 1), prompts(pictures, "text", 1)):
        policy.model.zero_grad()
        rollout = policy.rollout(shown, BranchPlan({0: 2}), seed=1)
        policy.log_probs(rollout, every_step(rollout)).logp.sum().backward()
        assert {n for n, p in policy.model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("budget", [60, 90, 10_000])
def test_micro_batches_split_trees_exactly(pictures, budget):
    policy = eager_newlines(build())
    rollout = policy.rollout(prompts(pictures), TREE, seed=1)
    steps = every_step(rollout)
    policy.options = replace(policy.options, max_tokens=10_000)
    weight = torch.randn(len(rollout.actions.logp), generator=torch.Generator().manual_seed(0))

    def gradient():
        policy.model.zero_grad()
        parts = policy.micro_batches(rollout, steps)
        assert sorted(torch.cat(parts).tolist()) == steps.tolist()
        logp = torch.full((len(weight),), torch.nan)
        for part in parts:
            new = policy.log_probs(rollout, part)
            (weight[new.index] * new.logp).sum().backward()
            logp[new.index] = new.logp.detach()
        return len(parts), logp, torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    count, logp, grads = gradient()
    assert count == 1
    policy.options = replace(policy.options, max_tokens=budget)
    cut, its, other = gradient()
    assert cut > 1 or budget == 10_000
    torch.testing.assert_close(its, logp, atol=1e-5, rtol=0)
    assert float((other - grads).norm() / grads.norm()) < 1e-5
    whole = policy.micro_batches(rollout, steps, whole_prompts=True)
    groups = [set(rollout.tree.group[p].tolist()) for p in whole]
    assert groups == ([{0, 1, 2}] if budget == 10_000 else [{0}, {1}, {2}])


def test_a_saved_rollout_trains_the_same(pictures, tmp_path):
    policy = build()
    rollout = policy.rollout(prompts(pictures), TREE, seed=1)
    again = Rollout.load(rollout.save(tmp_path / "r"))
    assert again.texts == rollout.texts
    with torch.no_grad():
        torch.testing.assert_close(
            policy.log_probs(again, every_step(again)).logp, policy.log_probs(rollout, every_step(rollout)).logp
        )
    changed = VisionPolicy.build(model=str(family_folder("qwen2_5_vl")), instruction="Say more.")
    with pytest.raises(ValueError, match="use the processor, instruction and pictures of that run"):
        changed.log_probs(again, every_step(again))


def test_written_solutions_are_the_tokens_of_their_text(pictures):
    policy = build()
    rollout = policy.write(prompts(pictures, n=2), ["a = 1\nb = 2\n3", ""])
    assert rollout.texts[:2] == ["a = 1\n", "b = 2\n"] and len(rollout.tree) == 4
    assert [s.output for s in policy.samples(rollout)] == ["a = 1\nb = 2\n3", ""]
    ends = rollout.actions.payload["token"][rollout.tree.tok_end[rollout.tree.is_leaf] - 1]
    assert all(int(e) in policy.sampling.eos for e in ends)
    assert torch.isfinite(policy.log_probs(rollout, every_step(rollout)).logp).all()


def test_reference_is_the_initial_model(pictures):
    for rank in (0, 4):
        policy = build(lora_rank=rank)
        policy.freeze_reference()
        rollout = policy.rollout(prompts(pictures), BranchPlan({0: 2}), seed=1)
        with torch.no_grad():
            for p in policy.model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
            new = policy.log_probs(rollout, every_step(rollout), reference=True)
        torch.testing.assert_close(new.ref_logp, rollout.actions.logp[new.index], atol=1e-5, rtol=0)
        assert float((new.logp - new.ref_logp).abs().max()) > 1e-3
        assert float(new.entropy.min()) > 0


def test_states_are_what_was_written_before():
    parent, group = [-1, -1, 0, 1, -1], [0, 0, 0, 0, 1]
    keys = text_states(parent, group, ["a\n", "a \n", "b", "c", "a\n"])
    state, edge = keys["state_key"], keys["edge_key"]
    assert state[0] == state[1] != state[4] and state[2] == state[3]  # same lines, same state; prompts apart
    assert edge[0] == edge[1] and edge[2] != edge[3]


def test_prompts_are_kept_by_content_not_by_id(pictures):
    policy = build()
    a, b = (Prompt("1", {"question": q, "images": []}) for q in ("one", "quite another"))
    assert len(policy.encode(a).ids) != len(policy.encode(b).ids)
    assert policy.encode(a) is policy.encode(Prompt("2", a.inputs))


# ---- bad prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"images": ["{dir}/none.png"]}, "none.png"),
        ({"images": ["{dir}/cut.png"]}, "cut.png"),
        ({"question": "what <|image_pad|> is"}, "placeholder '<|image_pad|>'"),
        ({"question": "long " * 100}, "the limit is policy.max_prompt_tokens=120"),
    ],
)
def test_bad_prompts_are_quarantined_with_their_reason(pictures, caplog, inputs, message):
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:50])
    policy = build(max_prompt_tokens=120)
    inputs = {"question": "?"} | inputs
    inputs["images"] = [f.replace("{dir}", str(pictures)) for f in inputs.get("images", [])]
    good = prompts(pictures, n=1)
    assert policy.admit([Prompt("bad", inputs), *good]) == good
    assert message in caplog.text and "'bad'" in caplog.text


@pytest.mark.slow
def test_flex_attention_scores_as_sdpa_does(pictures):
    """Forward only: flex attention has no backward on a CPU, and compiles for a minute."""
    rollout = eager_newlines(build()).rollout(prompts(pictures), TREE, seed=1)
    flex = eager_newlines(build(attn="mmrl_flex"))
    with torch.no_grad():
        assert deviation(flex, rollout) < 1e-4
    assert flex.rollout(prompts(pictures), TREE, seed=1).texts == rollout.texts  # sampled by sdpa
    with pytest.raises(ValueError, match="flex attention"):
        build(attn="mmrl_flex", mode="prefix_packed")


def test_attention_is_as_before_after_sampling_failed():
    policy = build("text", attn="mmrl_flex")

    def fail(module, args, out):
        raise OSError("no memory")

    policy.model.hf.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(OSError, match="no memory"):
        policy.rollout([Prompt("a", {"question": "count it"})], TREE, seed=0)
    assert policy.model.hf.config._attn_implementation == "mmrl_flex"


def test_images_for_a_text_model_are_refused(pictures, caplog):
    policy = build("text")
    assert policy.admit(prompts(pictures)) == []
    assert "the model reads text only" in caplog.text


def test_a_completion_without_stop_is_cut_and_counted(pictures):
    policy = build(max_new_tokens=5)
    head = policy.model.hf.get_output_embeddings()
    ends = torch.tensor(policy.sampling.eos)
    head.register_forward_hook(lambda m, a, out: out.index_fill(-1, ends, -100.0))
    rollout = policy.rollout(prompts(pictures), BranchPlan({0: 2}), seed=1)
    leaves = rollout.tree.is_leaf
    assert rollout.counts["truncated"] == 6 and rollout.tree.tags["truncated"][leaves].all()


def test_an_empty_completion_is_a_sample(pictures):
    policy = build()
    head = policy.model.hf.get_output_embeddings()
    end = torch.tensor(policy.sampling.eos[:1])
    head.register_forward_hook(lambda m, a, out: out.index_fill(-1, end, 100.0))
    rollout = policy.rollout(prompts(pictures), TREE, seed=1)
    assert len(rollout.actions.logp) == 6 and {s.output for s in policy.samples(rollout)} == {""}
    assert deviation(policy, rollout) < 1e-5


# ---- whole runs ------------------------------------------------------------------------------------------------


def train(tmp_path, name="r", family="qwen2_5_vl", **sections):
    (tmp_path / "pictures").mkdir(exist_ok=True)
    tree = vision_recipe(family_folder(family), tmp_path / "pictures", tmp_path / name, **sections)
    AcceleratorState._reset_state(reset_partial_state=True)  # a process keeps its first precision otherwise
    trainer = BranchGrpo(parse_config(tree))
    return trainer, trainer.train()


@pytest.mark.parametrize(
    "sections",
    [
        {"policy": {"lora_rank": 4}, "loss": {"kl": 0.1, "kl_form": "k3"}},
        {"policy": {"gradient_checkpointing": True, "train_vision": True}, "run": {"refill": 1}},
        {"step_rewards": [{"name": "vision_tiny:step_digits"}], "credit": {"estimators": [{"name": "process_grpo"}]}},
        {"credit": {"estimators": [{"name": "gigpo"}]}, "loss": {"ratio": "trajectory"}},
        {"credit": {"estimators": [{"name": "tree_rpo"}]}, "run": {"mixed_precision": "bf16"}},
    ],
)
def test_runs_with_the_options_of_the_recipes(tmp_path, sections):
    _, metrics = train(tmp_path, **sections)
    assert metrics["policy/skipped_updates"] == 0 and metrics["policy/grad_norm"] > 0
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = sections.get("run", {}).get("mixed_precision") == "bf16"
    assert metrics["policy/ratio_dev_max"] < (0.1 if bf16 else 1e-4)
    assert metrics["rollout/tokens_per_leaf"] > 0 and metrics["policy/entropy"] > 0
    assert ("step_reward/vision_tiny:step_digits" in metrics) == ("step_rewards" in sections)
    report = json.loads((tmp_path / "r" / "samples" / "000002" / "samples.json").read_text())
    assert report[0]["prompt"] == "prompt_0000.png" and "text" in report[0]["cells"][0]["output"]


def test_unsolved_prompts_imitate_their_solution(tmp_path):
    trainer, _ = train(tmp_path, run={"iterations": 1})
    for p in trainer.run.task.prompts:
        object.__setattr__(p, "reference", {"steps": ["1", "2"]})
    rollout = trainer.sample(0)
    trainer.config.imitation.weight = 1.0
    written = trainer.policy.write(rollout.prompts, ["1\n2"] * len(rollout.prompts))

    def likelihood():
        with torch.no_grad():
            return float(trainer.policy.log_probs(written, every_step(written)).logp.sum())

    before = likelihood()
    metrics = trainer.imitate(rollout)
    assert metrics["imitation/unsolved_frac"] == 1 and likelihood() > before
    trainer.config.imitation.solved_at = -1.0  # everything counts as solved
    before = likelihood()
    assert trainer.imitate(rollout)["imitation/unsolved_frac"] == 0 and likelihood() == before


def test_broken_pictures_leave_the_run_and_are_counted(tmp_path):
    sections = {"task": {"broken": 2}, "run": {"prompts_per_iteration": 8, "max_unusable": 0.3}}
    _, metrics = train(tmp_path, **sections)
    assert metrics["rollout/unusable_prompts"] == 2 and metrics["reward/unscored_frac"] == 0
    sections["run"]["max_unusable"] = 0.1
    with pytest.raises(ValueError, match="2 of 8 prompts cannot be used"):
        train(tmp_path, "s", **sections)


def test_a_reward_that_exits_leaves_its_samples_unscored(tmp_path):
    rewards = [{"name": "foreign_rewards:exits_on_q0", "timeout_s": 30}]
    _, metrics = train(
        tmp_path, rewards=rewards, run={"prompts_per_iteration": 8, "iterations": 1, "max_unscored": 0.5}
    )
    assert 0.05 < metrics["reward/unscored_frac"] < 0.3 and metrics["policy/grad_norm"] > 0


def test_saved_model_loads_in_transformers(tmp_path):
    from vision.inputs.loading import load_model, load_processor

    trainer, _ = train(tmp_path)
    saved = load_model(tmp_path / "r" / "model")
    ours = dict(trainer.policy._network.hf.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in saved.named_parameters())
    assert load_processor(tmp_path / "r" / "model").image_processor is not None


def start(tmp_path, output, *extra):
    tree = vision_recipe(
        family_folder("qwen2_5_vl"),
        tmp_path / "pictures",
        output,
        run={"iterations": 4, "checkpoint_every": 1},
        policy={"train_vision": True},
    )
    file = write_recipe(tmp_path / f"{output.name}.yaml", tree)
    return Command("train", file, *extra)


@pytest.mark.multiproc
def test_sigkill_in_the_middle_of_an_update_and_resume(tmp_path):
    (tmp_path / "pictures").mkdir()
    assert start(tmp_path, tmp_path / "straight").wait() == 0
    process = start(tmp_path, tmp_path / "killed")
    file = tmp_path / "killed" / "metrics.jsonl"
    while process.is_running() and not (file.exists() and file.read_text().count("reward/mean") >= 2):
        time.sleep(0.01)
    time.sleep(0.1)  # inside the third iteration
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    assert start(tmp_path, tmp_path / "killed", "run.resume=true").wait() == 0
    a, b = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("straight", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.multiproc
@pytest.mark.parametrize("pictures", [8, 1])
def test_two_processes_with_uneven_trees_and_a_rank_without_images(tmp_path, pictures):
    """Prompts go to ranks in turn; with one picture among eight questions a rank often trains on text alone."""
    (tmp_path / "pictures").mkdir()
    runs = {}
    for processes in (1, 2):
        tree = vision_recipe(
            family_folder("qwen2_5_vl"), tmp_path / "pictures", tmp_path / f"r{processes}",
            task={"pictures": pictures}, policy={"train_vision": True, "max_tokens": 120},
            run={"iterations": 2, "processes": processes}, optim={"eps": 1e-3},
        )  # fmt: skip
        file = write_recipe(tmp_path / f"r{processes}.yaml", tree)
        run_ranks(processes, "train", file)
        runs[processes] = load_file(tmp_path / f"r{processes}" / "model" / "model.safetensors")
    for name, tensor in runs[1].items():
        torch.testing.assert_close(runs[2][name], tensor, atol=2e-4, rtol=0)

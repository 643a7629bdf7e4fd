"""Readings that run a policy of tokens: values by completions, answer probabilities, divergence, opposite instructions,
samples of the initial model. Each against a slow way of the same thing, and in a run."""

import functools
from dataclasses import replace

import pytest
import torch
from families import family_folder
from vision_tiny import vision_recipe

from mmrl.config import parse_config
from mmrl.losses.preference import token_rewards
from mmrl.readings import ReadingContext, fill
from mmrl.readings.baseline import Baseline
from mmrl.readings.contrast import divergence, instructed
from mmrl.readings.monte_carlo import MonteCarlo
from mmrl.reasoning.readings.answers import AnswerProbability
from mmrl.registry import ComponentError
from mmrl.rewards import score
from mmrl.rollout import Answer, BranchPlan, Place, Prompt
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer
from vision.forward.network import token_kl
from vision.growth.answers import spell
from vision.policy import VisionPolicy

TREE = BranchPlan({0: 2, 1: 2, 2: 2})
VALUES = ("value", "root_value", "tags.visits", "tags.q_sum")
FAMILIES = ("qwen2_5_vl", "llava", "gemma3", "text")


@functools.cache
def policy_of(family="qwen2_5_vl", mode="auto"):
    """A policy that ends lines often, so that trees are deep."""
    policy = VisionPolicy.build(
        model=str(family_folder(family)), temperature=0.8, max_new_tokens=24, max_steps=4, mode=mode
    )
    line = policy.tokenizer.encode("\n", add_special_tokens=False)

    def shift(module, args, out):
        more = torch.zeros(out.shape[-1])
        more[line] = 3.0
        return out + more

    policy.model.hf.get_output_embeddings().register_forward_hook(shift)
    policy.freeze_reference()
    return policy


def prompts(pictures, family, n=3):
    return [
        Prompt(
            f"p{i}",
            {"question": "how many " * (i + 1), "images": [] if family == "text" else [str(pictures / f"{i}.png")]},
            {"answer": str(12 + i)},
        )
        for i in range(n)
    ]


def digits(samples):
    return [sum(c.isdigit() for c in s.output) / max(len(s.output), 1) for s in samples]


def outcome(samples):
    return score(samples, {"digits": (digits, 1.0)}).total


def rewarded(policy, pictures, family, n=3, plan=TREE):
    rollout = policy.rollout(prompts(pictures, family, n), plan, seed=1)
    samples = policy.samples(rollout)
    leaves = torch.tensor([s.step for s in samples])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, outcome(samples)))


def answer(prompt):
    return Answer("answer ", prompt.reference["answer"])


def filled(rollout, policy, reading, writes, **context):
    context = ReadingContext(policy, outcome, answer=answer, **context)
    return fill(rollout, {"it": (reading, writes)}, context, limit=0.0)[0]


def path_ids(rollout, step):
    ids = []
    while step >= 0:
        tree = rollout.tree
        ids = rollout.actions.payload["token"][int(tree.tok_start[step]) : int(tree.tok_end[step])].tolist() + ids
        step = int(tree.parent[step])
    return ids


def inner_places(rollout):
    inner = (~rollout.tree.is_leaf).nonzero().flatten().tolist()
    return [Place(g) for g in range(len(rollout.prompts))] + [Place(int(rollout.tree.group[v]), v) for v in inner]


@torch.no_grad()
def logits_of(policy, prompt, ids, pixels=True):
    """(P + n, V) logits of one unpacked row."""
    from mmrl.reference import bare
    from vision.forward.attention import style_of
    from vision.forward.network import _outputs
    from vision.forward.passes import TokenTree, build_reading

    given = policy.encode(prompt)
    tokens = (given if pixels else given.blank).followed_by(torch.tensor(ids, dtype=torch.long))
    job = build_reading([TokenTree(tokens, [-1], [tokens.ids])], [torch.arange(len(tokens.ids))], "rows",
                        style_of(bare(policy.model.hf)))  # fmt: skip
    rows, _ = _outputs(policy.model.hf, job, None, None)
    return torch.cat(rows)[job.source]


def greedy(policy, prompt, ids, room):
    """The greedy completion of some ids, a whole forward a token."""
    ids = list(ids)
    for _ in range(room):
        scores = logits_of(policy, prompt, ids)[-1].float()
        scores[list(policy.sampling.banned)] = -torch.inf
        ids.append(int(scores.argmax()))
        if ids[-1] in policy.sampling.eos:
            break
    return policy.tokenizer.decode(ids, skip_special_tokens=True)


# ---- completions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_whole_forwards(family, pictures):
    policy = policy_of(family)
    rollout = rewarded(policy, pictures, family, n=2)
    places = inner_places(rollout)
    assert len(places) > 5
    found = policy.complete(rollout, places, 3, seeds=range(len(places)), temperature=0.0)
    for place, own in zip(places, found, strict=True):
        written = path_ids(rollout, place.step)
        want = greedy(policy, rollout.prompts[place.prompt], written, 24 - len(written))
        assert [s.output for s in own] == [want] and own[0].prompt is rollout.prompts[place.prompt]
    leaves = rollout.tree.is_leaf.nonzero().flatten().tolist()
    assert policy.complete(rollout, [Place(0, leaves[0])], 3, seeds=[0], temperature=None) == [[]]


def test_values_are_means_over_completions_and_a_prompt_is_on_its_own(pictures):
    policy = policy_of()
    rollout = rewarded(policy, pictures, "qwen2_5_vl")
    whole = filled(rollout, policy, MonteCarlo(n=3), VALUES, seed=5).tree
    assert bool((whole.tags["visits"][~whole.is_leaf] == 3).all())
    torch.testing.assert_close(whole.value[whole.is_leaf], whole.outcome[whole.is_leaf])
    one = filled(rollout.select([2]), policy, MonteCarlo(n=3), VALUES, seed=5).tree
    torch.testing.assert_close(whole.value[whole.group == 2], one.value)
    torch.testing.assert_close(whole.root_value[2:], one.root_value)
    options = policy.options
    policy.options = replace(options, max_batch=6, max_tokens=120)  # in many parts
    try:
        parts = filled(rollout, policy, MonteCarlo(n=3), VALUES, seed=5).tree
    finally:
        policy.options = options
    torch.testing.assert_close(parts.value, whole.value)
    other = filled(rollout, policy, MonteCarlo(n=3), VALUES, seed=6).tree
    assert not torch.allclose(other.root_value, whole.root_value)


def test_all_states_are_run_once_before_completions_begin(pictures, monkeypatch):
    policy = policy_of("text")
    rollout = rewarded(policy, pictures, "text")
    sizes = []
    forward = policy.model.hf.forward
    monkeypatch.setattr(
        policy.model.hf, "forward", lambda *a, **k: sizes.append(k["input_ids"].shape) or forward(*a, **k)
    )
    filled(rollout, policy, MonteCarlo(n=2), VALUES)
    first, *rest = sizes
    tree = rollout.tree
    inner = (~tree.is_leaf).double()
    unique = [
        int(rollout.prompt_payload["prompt_tokens"][g] + (tree.span * inner)[tree.group == g].sum()) for g in range(3)
    ]
    assert tuple(first) == (3, max(unique))  # a row per prompt, every token of its tree once
    assert len(rest) < 24 and all(shape[1] == 1 for shape in rest)
    assert rest[0][0] <= 2 * len(inner_places(rollout))


def test_a_prover_with_another_tokenizer_reads_the_text(pictures):
    policy = policy_of("text")
    rollout = rewarded(policy, pictures, "text", n=2)
    prover = VisionPolicy.build(model=str(family_folder("llava")), temperature=0.8, max_new_tokens=24, max_steps=4)
    assert prover.tokenizer.get_vocab() != policy.tokenizer.get_vocab()
    places = inner_places(rollout)
    found = prover.complete(rollout, places, 2, seeds=range(len(places)), temperature=None)
    for place, own in zip(places, found, strict=True):
        before = policy.tokenizer.decode(path_ids(rollout, place.step), skip_special_tokens=True)
        assert len(own) == 2 and all(s.output.startswith(before) for s in own)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rows", "packed", "prefix_packed"])
@pytest.mark.parametrize("sight", ["given", "blank"])
def test_answer_probabilities_are_those_of_separate_rows(mode, sight, pictures):
    policy = policy_of("qwen2_5_vl", mode)
    rollout = rewarded(policy, pictures, "qwen2_5_vl")
    reading = AnswerProbability(sight=sight)
    tree = filled(rollout, policy, reading, ("value", "root_value")).tree
    for place in inner_places(rollout):
        prompt, written = rollout.prompts[place.prompt], path_ids(rollout, place.step)
        lead, right = (policy.tokenizer.encode(t) for t in answer(prompt))
        logits = logits_of(policy, prompt, written + lead + right, pixels=sight == "given").float()
        logits[:, list(policy.sampling.banned)] = -torch.inf
        logp = logits.log_softmax(-1)
        n = len(right)
        mean = float(sum(logp[-n - 1 + k, right[k]] for k in range(n))) / n
        got = tree.root_value[place.prompt] if place.step < 0 else tree.value[place.step]
        assert float(got.log()) == pytest.approx(mean, abs=1e-4)
    torch.testing.assert_close(tree.value[tree.is_leaf], tree.outcome[tree.is_leaf])


def test_what_seeing_adds_is_a_tag(pictures):
    policy = policy_of()
    rollout = rewarded(policy, pictures, "qwen2_5_vl")
    reading = AnswerProbability(sight="given", minus="blank", into="tags.gain")
    gain = filled(rollout, policy, reading, ("tags.gain",)).tree.tags["gain"]
    seen, blind = (
        filled(rollout, policy, AnswerProbability(sight=s), ("value", "root_value")).tree.value
        for s in ("given", "blank")
    )
    inner = ~rollout.tree.is_leaf
    torch.testing.assert_close(gain[inner], (seen - blind)[inner])
    assert float(gain[inner].abs().max()) > 1e-6 and bool(gain[~inner].isnan().all())
    with pytest.raises(ComponentError, match="a difference of probabilities is no value"):
        AnswerProbability(minus="blank")


def test_a_token_between_lead_and_answer_is_the_answers():
    policy = policy_of("text")
    ids, first = spell(Answer("answer ", "12"), policy._rollouts.ids_of)
    assert policy.tokenizer.decode(ids[:first]) == "answer " and policy.tokenizer.decode(ids[first:]) == "12"
    with pytest.raises(ValueError, match="no token of its own"):
        spell(Answer("answer ", ""), policy._rollouts.ids_of)


def test_a_tree_is_read_in_one_pass(pictures, monkeypatch):
    policy = policy_of("text", "packed")
    rollout = rewarded(policy, pictures, "text")
    sizes = []
    forward = policy.model.hf.forward
    monkeypatch.setattr(
        policy.model.hf, "forward", lambda *a, **k: sizes.append(k["input_ids"].shape) or forward(*a, **k)
    )
    filled(rollout, policy, AnswerProbability(), ("value", "root_value"))
    tree = rollout.tree
    tail, inner = len("answer 12"), ~tree.is_leaf
    unique = [
        int(rollout.prompt_payload["prompt_tokens"][g]) + tail
        + int((tree.span + tail)[inner & (tree.group == g)].sum())
        for g in range(3)
    ]  # fmt: skip
    assert [tuple(s) for s in sizes] == [(3, max(unique))]


# ---- divergence -----------------------------------------------------------------------------------------------------


def test_token_kl_on_worked_numbers():
    """Of logits, which may be shifted: only their softmax counts."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.34, 0.33, 0.33]]).log()
    q = torch.tensor([[0.4, 0.4, 0.2], [0.33, 0.34, 0.33]]).log()
    torch.testing.assert_close(token_kl(p, q + 3), torch.tensor([0.18379, 0.000299]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_divergence_is_the_mean_kl_to_a_blind_policy(family, pictures):
    policy = policy_of(family)
    rollout = rewarded(policy, pictures, family)
    got = filled(rollout, policy, divergence, ("tags.divergence",)).tree.tags["divergence"]
    for v in range(len(rollout.tree)):
        ids, prompt = path_ids(rollout, v), rollout.prompts[int(rollout.tree.group[v])]
        p, q = (logits_of(policy, prompt, ids, pixels=seen).float().log_softmax(-1) for seen in (True, False))
        n = int(rollout.tree.span[v])
        kl = (p.exp() * (p - q)).sum(-1)[-n - 1 : -1].mean()
        assert float(got[v]) == pytest.approx(float(kl), abs=1e-5)
    assert float(got.max()) > 1e-5


def test_nothing_to_see_is_no_divergence_and_nothing_to_shuffle_is_told(pictures):
    policy = policy_of("text")
    rollout = rewarded(policy, pictures, "text")
    got = filled(rollout, policy, divergence, ("tags.divergence",)).tree.tags["divergence"]
    assert float(got.abs().max()) < 1e-6
    with pytest.raises(RuntimeError, match="has no frames to shuffle"):
        filled(rollout, policy, functools.partial(divergence, sight="shuffled"), ("tags.divergence",))


# ---- instructions and the initial model -----------------------------------------------------------------------------


def test_token_rewards_compare_two_instructions_under_the_reference(pictures):
    policy = policy_of()
    rollout = rewarded(policy, pictures, "qwen2_5_vl")
    reading = functools.partial(instructed, better="do well", worse="do badly")
    got = filled(rollout, policy, reading, ("actions.token_reward",)).actions.payload["token_reward"]
    tree = rollout.tree
    for v in (~tree.is_leaf).nonzero().flatten().tolist():
        prompt, ids, n = rollout.prompts[int(tree.group[v])], path_ids(rollout, v), int(tree.span[v])
        logps = []
        for told in ("do well", "do badly"):
            asked = replace(prompt, inputs={**prompt.inputs, "question": f"{prompt.inputs['question']}\n{told}"})
            logits = logits_of(policy, asked, ids).float()
            logits[:, list(policy.sampling.banned)] = -torch.inf
            logp = logits.log_softmax(-1)[-n - 1 : -1]
            logps.append(logp.gather(1, torch.tensor(ids[-n:])[:, None])[:, 0])
        own = got[int(tree.tok_start[v]) : int(tree.tok_end[v])]
        torch.testing.assert_close(own, token_rewards(*logps), atol=1e-5, rtol=0)
    assert float(got.abs().max()) > 1e-4


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_baselines_are_samples_of_the_initial_model_whatever_was_learned(lora_rank, pictures):
    policy = VisionPolicy.build(model=str(family_folder("text")), max_new_tokens=12, max_steps=3, lora_rank=lora_rank)
    policy.freeze_reference()
    rollout = rewarded(policy, pictures, "text", plan=BranchPlan({0: 2}))
    calls = []
    sample = policy.initial_samples
    policy.initial_samples = lambda ps, n, **k: calls.append([p.id for p in ps]) or sample(ps, n, **k)
    reading = Baseline(n=4)
    first = filled(rollout, policy, reading, ("tags.baseline",), seed=1).tree.tags["baseline"]
    assert first.shape == (len(rollout.tree), 4) and len(first.unique()) > 3
    direct = torch.stack([outcome(own) for own in sample(rollout.prompts, 4, seed=0)])
    torch.testing.assert_close(first, direct[rollout.tree.group])
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.2 if p.requires_grad else 0.0)
    assert policy.rollout(rollout.prompts, BranchPlan({0: 2}), seed=1).texts != rollout.texts
    again = filled(rollout, policy, reading, ("tags.baseline",), seed=2).tree.tags["baseline"]
    resumed = filled(rollout.select([1]), policy, Baseline(n=4), ("tags.baseline",)).tree.tags["baseline"]
    assert torch.equal(first, again) and torch.equal(resumed, first[rollout.tree.group == 1])
    assert calls == [["p0", "p1", "p2"], ["p1"]]  # the second call found all prompts known


# ---- in a run -------------------------------------------------------------------------------------------------------

RUNS = {
    "gae": {"credit": {"estimators": [{"name": "gae"}]}, "readings": [{"name": "monte_carlo", "n": 2}]},
    "vsrm": {
        "plan": {0: 3}, "credit": {"estimators": [{"name": "vsrm"}]}, "readings": [{"name": "monte_carlo", "n": 2}],
    },
    "pav": {"credit": {"estimators": [{"name": "pav"}]}},
    "igpo": {
        "credit": {"estimators": [{"name": "igpo"}], "transforms": ["progress"]},
        "readings": [{"name": "answer_probability"}], "task": "Answering",
    },
    "potential": {
        "credit": {"estimators": [{"name": "process_grpo"}], "transforms": ["potential"]},
        "step_rewards": [{"name": "vision_tiny:step_digits"}],
        "readings": [{"name": "answer_probability", "lead": "answer "}],
    },
    "contrastive": {
        "credit": {"estimators": [{"name": "grpo"}], "transforms": ["contrastive"]},
        "readings": [{"name": "baseline", "n": 2}],
    },
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_methods_of_grpo_run_from_recipes(method, tmp_path):
    sections = dict(RUNS[method])
    task = sections.pop("task", "Asked")
    if method == "pav":
        prover = {"name": "vision", "model": str(family_folder("text"))}
        sections["readings"] = [{"name": "monte_carlo", "n": 1, "policy": prover}]
    (tmp_path / "pictures").mkdir()
    tree = vision_recipe(
        family_folder("text"),
        tmp_path / "pictures",
        tmp_path / "run",
        run={"iterations": 1, "eval_every": 9},
        **sections,
    )
    tree["task"] = {"name": f"test_token_readings:{task}", "folder": str(tmp_path / "pictures")}
    metrics = BranchGrpo(parse_config(tree)).train()
    name = sections["readings"][0]["name"]
    assert metrics["policy/grad_norm"] > 0 and metrics[f"reading/{name}/failed_prompts"] == 0


class Asked:
    """Eight questions with an answer each, without a word on how it is written."""

    rewards = ("vision_tiny:digits",)

    def __init__(self, folder):
        from vision_tiny import Words

        self.prompts = [replace(p, reference={"answer": str(i)}) for i, p in enumerate(Words(folder, 0).prompts)]
        self.eval_prompts = self.prompts[:1]


class Answering(Asked):
    """The same, with a word on it."""

    def answer(self, prompt):
        return Answer("answer ", prompt.reference["answer"])


@pytest.mark.parametrize("loss, reading", [("t_reg", "instructed"), ("pdpo", "divergence")])
def test_preference_losses_run_from_recipes(loss, reading, tmp_path):
    (tmp_path / "pictures").mkdir()
    tree = vision_recipe(
        family_folder("qwen2_5_vl"), tmp_path / "pictures", tmp_path / "run", run={"iterations": 1, "eval_every": 9},
        readings=[{"name": reading}], trainer="step_preference",
    )  # fmt: skip
    del tree["credit"]
    tree["loss"] = {"name": loss}
    metrics = StepPreferenceTrainer(parse_config(tree, model=StepPreferenceConfig)).train()
    assert metrics["policy/grad_norm"] > 0 and metrics["preference/pairs"] > 0
    del tree["readings"]
    tree["run"] = tree["run"] | {"output": tmp_path / "without_reading"}
    with pytest.raises(ValueError, match=f"readings {reading}[, ]"):
        StepPreferenceTrainer(parse_config(tree, model=StepPreferenceConfig))


def test_a_task_without_answers_is_told_what_to_give(tmp_path):
    (tmp_path / "pictures").mkdir()
    tree = vision_recipe(
        family_folder("text"), tmp_path / "pictures", tmp_path / "run", readings=[{"name": "answer_probability"}],
        credit={"estimators": [{"name": "gae"}]},
    )  # fmt: skip
    with pytest.raises(ComponentError, match="needs the protocol AnswerGiver"):
        BranchGrpo(parse_config(tree))

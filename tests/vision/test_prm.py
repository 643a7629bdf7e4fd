"""The vision-language process reward model: what its scores depend on, and what it saves."""

import functools
import json

import pytest
import torch
from families import FAMILIES, family_folder, make, picture
from safetensors.torch import load_file

from mmrl.losses.reward import good_logit
from mmrl.reasoning.slots import lay_out
from mmrl.rollout import BranchPlan, Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import aggregate_of, load_scorer, score_solutions
from vision.inputs.loading import load_model, load_processor, tokenizer_of, vision_tower
from vision.policy import VisionPolicy
from vision.prm import VisionPrm

TURNS = {
    "markers": "turns", "read_offset": -1, "marker": "+", "positive": "+", "negative": "-", "opening": "\nSteps:\n"
}  # fmt: skip
INLINE = {"marker": "#", "joiner": "\n", "positive": "+", "negative": "-"}
FORMS = {
    "linear": ("linear", {"marker": "\n\n"}), "bare": ("linear", {"marker": "", "joiner": "\n"}),
    "buffer": ("buffer", {}), "tokens": ("tokens", INLINE), "turns": ("tokens", TURNS),
    "ahead": ("tokens", INLINE | {"read_offset": -1}), "likelihood": ("likelihood", {"marker": "#", "joiner": "\n"}),
}  # fmt: skip
FIVE = ("qwen2_5_vl", "idefics3", "gemma3", "internvl", "text")
WHOLE = ["2 + 3 = 5", "the red one - is left\nof it", "+", "so 5"]


def make_prm(family="qwen2_5_vl", form="linear", **options):
    head, format = FORMS[form]
    prm = VisionPrm.build(model=str(family_folder(family)), head=head, format=format, **options)
    if head == "likelihood":  # a random model finds every text so unlikely that all scores would be 0
        prm.model.head.likelihood.data.fill_(0.02)
    return prm


prm_of = functools.cache(make_prm)  # for tests that change nothing


def prompt(pictures, family="qwen2_5_vl", i=0, shown=0):
    images = [] if family == "text" else [str(pictures / f"{shown}.png")]
    return Prompt(f"p{i}", {"question": "how many - or + " * (i + 1), "images": images})


def scores(prm, prompts, solutions):
    """(...) flat float64, in the order of prompts and solutions."""
    out = score_solutions(prm, prompts, solutions)
    return torch.tensor([s for own in out for one in own for s in one], dtype=torch.float64)


def check_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ---- what a score depends on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, form",
    [
        *((f, "linear") for f in FAMILIES),
        *((f, "turns") for f in FIVE),
        *((f, "likelihood") for f in ("qwen2_5_vl", "gemma3")),
        *(("text", f) for f in FORMS),
    ],
)
def test_a_whole_solution_scores_as_each_of_its_prefixes(family, form, pictures):
    """Causality (vl_prm.md, 5): p_t depends on s_<=t; also that slots are those of the separate rows."""
    prm, p = prm_of(family, form), prompt(pictures, family)
    whole = scores(prm, [p], [[WHOLE]])
    prefixes = [scores(prm, [p], [[WHOLE[: t + 1]]])[-1] for t in range(len(WHOLE))]
    check_close(whole, torch.stack(prefixes))
    assert whole.std() > 1e-4 and ((whole > 0) & (whole < 1)).all()
    changed = scores(prm, [p], [[[*WHOLE[:2], "quite another", WHOLE[3]]]])
    check_close(changed[:2], whole[:2])
    assert (changed[2:] - whole[2:]).abs().min() > 1e-6


@pytest.mark.parametrize("mode", ["rows_shared_image", "packed", "prefix_packed"])
@pytest.mark.parametrize("family", FIVE)
def test_a_tree_of_candidates_scores_as_one_row_each(family, mode, pictures):
    """Packed tree == a row per candidate, batch of 1 == batch of n, in every layout the family can take."""
    form = {"packed": "turns", "rows_shared_image": "tokens"}.get(mode, "likelihood")
    prompts = [prompt(pictures, family, i, i) for i in range(3)]
    candidates = [
        [[*WHOLE[:t], f"other {i}", "x" * (9 * i + 1)] for t in range(3) for i in range(2)],
        [WHOLE],
        [["a"], ["b", ""]],
    ]
    try:
        prm = prm_of(family, form, mode=mode)
    except ValueError as error:
        assert "attention is not plain causal" in str(error) and mode == "prefix_packed" and family == "gemma3"
        return
    together = scores(prm, prompts, candidates)
    rows = prm_of(family, form, mode="rows")
    single = [scores(rows, [p], [[one]]) for p, own in zip(prompts, candidates, strict=True) for one in own]
    torch.testing.assert_close(together, torch.cat(single), atol=1e-5, rtol=0, equal_nan=True)


def test_permutation_of_candidates_and_prompts(pictures):
    prm = prm_of()
    prompts = [prompt(pictures, i=i, shown=i) for i in range(3)]
    candidates = [[["a", str(i), "c" * k] for k in range(1, 4)] for i in range(3)]
    one = score_solutions(prm, prompts, candidates)
    two = score_solutions(prm, prompts[::-1], [own[::-1] for own in candidates[::-1]])
    check_close(torch.tensor(one), torch.tensor([own[::-1] for own in two[::-1]]))


@pytest.mark.parametrize("budget", [40, 70, 10_000])
def test_micro_batches_change_no_score(pictures, budget):
    prompts = [prompt(pictures, i=i) for i in range(2)]
    candidates = [[[*WHOLE[:t], f"{i}"] for t in range(4) for i in range(2)] for _ in prompts]
    cut = make_prm(max_tokens=budget)
    rollout, _ = solution_forest(prompts, candidates)
    parts = cut.micro_batches(rollout, torch.arange(len(rollout.tree)))
    assert (len(parts) > 1) == (budget < 10_000)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(rollout.tree)))
    check_close(scores(cut, prompts, candidates), scores(prm_of(), prompts, candidates))


@pytest.mark.parametrize("family", [f for f in FIVE if f != "text"])
def test_the_picture_matters_and_is_encoded_once(family, pictures):
    """An image-free copy must score otherwise, or the vision path is not connected (vl_prm.md, 12)."""
    prm = make_prm(family)
    encoded = []
    vision_tower(prm.model.hf).register_forward_hook(lambda *_: encoded.append(1))
    candidates = [[["a", str(i)] for i in range(5)]]
    one = scores(prm, [prompt(pictures, family)], candidates)
    assert len(encoded) == 1
    assert torch.equal(scores(prm, [prompt(pictures, family)], candidates), one) and len(encoded) == 1  # frozen: kept
    other = scores(prm, [prompt(pictures, family, shown=1)], candidates)
    blind = scores(prm, [prompt(pictures, "text")], candidates)
    assert len(encoded) == 2 and (one - other).abs().min() > 1e-6 and (one - blind).abs().min() > 1e-5


def test_other_layouts_of_the_same_model_score_otherwise(pictures):
    """Reading at another place gives plausible but meaningless scores: the format matters (prm.md, convention 3)."""
    p = prompt(pictures)
    at, ahead = (scores(prm_of("qwen2_5_vl", form), [p], [[WHOLE]]) for form in ("tokens", "ahead"))
    assert (at - ahead).abs().max() > 1e-3
    told = make_prm(instruction="Judge each step.")
    assert (scores(told, [p], [[WHOLE]]) - scores(prm_of(), [p], [[WHOLE]])).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_the_filled_in_answer_of_a_turn_does_not_leak_into_its_own_score(family, pictures):
    """Flip + to - in the answer to step 1: p_0 and p_1 stay, later ones may change (vl_prm.md, 1.2 and 11.2)."""
    prm, p = make_prm(family, "turns"), prompt(pictures, family)
    before = scores(prm, [p], [[WHOLE]])
    run = prm._trees.step_ids(WHOLE[1])
    plus, minus = prm._verdict
    assert run[-1] == plus
    prm._trees._cache[WHOLE[1]] = [*run[:-1], minus]
    after = scores(prm, [p], [[WHOLE]])
    check_close(after[:2], before[:2])
    assert (after[2:] - before[2:]).abs().min() > 1e-5


def test_inline_markers_are_the_same_for_every_step(pictures):
    """Nothing of a verdict enters the context: the ids do not hold + or - but for those of the texts."""
    prm = prm_of("qwen2_5_vl", "tokens")
    rollout, _ = solution_forest([prompt(pictures)], [[["a", "b", "c"]]])
    asked = prm._trees.of_steps(rollout, torch.arange(3))
    (tree,), (reads,) = asked.trees, asked.slots
    ids = tree.packed.ids
    (marker,) = tokenizer_of(prm._body.processor).encode("#", add_special_tokens=False)
    assert ids[reads].tolist() == [marker] * 3
    assert not torch.isin(ids[tree.packed.prompt :], torch.tensor(prm._verdict)).any()


def test_a_sampled_tree_is_scored_as_its_texts(pictures):
    """The scorer takes a policy's rollout: line ends around the steps do not matter."""
    policy = VisionPolicy.build(model=str(family_folder("qwen2_5_vl")), max_new_tokens=30, max_steps=4)
    p = prompt(pictures)
    rollout = policy.rollout([p], BranchPlan({0: 3, 1: 2}), seed=2)
    out = prm_of()(rollout)
    for leaf in rollout.tree.is_leaf.nonzero().flatten().tolist():
        path = [leaf]
        while (above := int(rollout.tree.parent[path[0]])) >= 0:
            path.insert(0, above)
        texts = [rollout.texts[v].strip() for v in path]
        torch.testing.assert_close(out[path], scores(prm_of(), [p], [[texts]]), atol=1e-5, rtol=0, equal_nan=True)


# ---- steps without a score -------------------------------------------------------------------------------------


def test_blank_steps_have_no_score_and_leave_no_trace(pictures):
    for form in ("linear", "turns"):
        prm, p = prm_of("qwen2_5_vl", form), prompt(pictures)
        whole = scores(prm, [p], [[["", *WHOLE[:2], " \n", WHOLE[2]]]])
        assert whole.isnan().tolist() == [True, False, False, True, False]
        check_close(whole[~whole.isnan()], scores(prm, [p], [[WHOLE[:3]]]))


def test_too_long_solutions_lose_whole_steps_from_the_end(pictures, caplog):
    p, steps = prompt(pictures), ["a" * 20, "b" * 20, "c" * 20]
    prm = make_prm()
    size = len(prm._body.encode(p).ids)
    full = scores(prm, [p], [[steps]])
    for room, kept in ((22 * 3, 3), (22 * 3 - 1, 2), (22 * 2, 2), (22, 1), (21, 0)):
        short = make_prm(max_length=size + room)
        got = scores(short, [p], [[steps]])
        assert got.isnan().tolist() == [t >= kept for t in range(3)] and short.dropped == 3 - kept
        check_close(got[:kept], full[:kept])
    assert "2 steps of a batch have no score" in caplog.text


def test_joiners_count_toward_the_length(pictures):
    p = prompt(pictures)
    prm = make_prm(form="tokens")
    size = len(prm._body.encode(p).ids)
    for room, kept in ((5, [True, True]), (4, [True, False])):  # "a#", "\nb#"
        short = make_prm(form="tokens", max_length=size + room)
        assert short.readable(solution_forest([p], [[["a", "b"]]])[0]).tolist() == kept
        assert short.readable(solution_forest([p], [[["", "a", "b"]]])[0]).tolist() == [False, *kept]


def test_a_placeholder_in_a_step_costs_that_step_and_what_follows(pictures):
    """User text with <|image_pad|> makes placeholders and features differ (vl_prm.md, 1.2)."""
    prm = make_prm()
    got = scores(prm, [prompt(pictures)], [[["a", "see <|image_pad|>", "c"], ["a", "d"]]])
    assert got.isnan().tolist() == [False, True, True, False, False] and prm.dropped == 2
    rollout, _ = solution_forest([prompt(pictures)], [[["<|image_pad|>"]]])
    with pytest.raises(ValueError, match="step 0 holds a marker"):
        prm.logits(rollout, torch.tensor([0]))


def test_bad_prompts_are_left_out_with_their_reason(pictures, caplog):
    prm, good = make_prm(), prompt(pictures)
    bad = Prompt("bad", {"question": "?", "images": [str(pictures / "none.png")]})
    assert prm.admit([bad, good]) == [good] and "none.png" in caplog.text


# ---- heads -----------------------------------------------------------------------------------------------------


def test_probability_of_two_tokens_of_one_logit_and_of_three_classes():
    """vl_prm.md, 10.1: z = (2, 0.5) -> 0.8175745; FreePRM reads right / (right + wrong)."""
    assert float(good_logit(torch.tensor([[2.0 - 0.5]])).sigmoid()) == pytest.approx(0.8175745, abs=1e-6)
    three = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]])
    torch.testing.assert_close(good_logit(three.log()).sigmoid(), three[:, 0] / (three[:, 0] + three[:, 1]))


def test_a_probability_that_underflows_does_not_shift_later_steps(pictures):
    """prm.md, convention 5: exact zeros are scores like any other."""
    prm = make_prm()
    rollout, _ = solution_forest([prompt(pictures)], [[WHOLE]])
    z = prm.logits(rollout, torch.arange(4)).detach().sort(0).values
    with torch.no_grad():
        prm.model.head.linear.weight.mul_(1e7)
        prm.model.head.linear.bias.copy_(-1e7 * (z[1] + z[2]) / 2)  # two of the four steps get exactly 0
    got, logits = prm(rollout), prm.logits(rollout, torch.arange(4))[:, 0]
    assert logits.abs().min() > 200 and int((got == 0).sum()) == 2
    assert got.tolist() == (logits > 0).double().tolist()


@pytest.mark.parametrize("mode", ["packed", "prefix_packed"])
def test_the_likelihood_head_adds_up_the_steps_own_tokens(mode):
    """Linear in the hidden state at the slot, plus the multiple times ln p of the step's tokens, markers left out."""
    prm, p = make_prm("text", "likelihood", mode=mode), Prompt("p", {"question": "?"})
    rollout, _ = solution_forest([p], [[["ab", "cde"], ["ab", "f"]]])
    got = prm.logits(rollout, torch.arange(3))[:, 0]
    head, encode = prm.model.head, prm._encode_text
    for steps, node in ((["ab"], 0), (["ab", "cde"], 1), (["ab", "f"], 2)):
        ids = prm._body.encode(p).ids.tolist()
        for i, step in enumerate(steps):
            ids += encode("\n") if i else []
            start = len(ids)
            ids += encode(step) + encode("#")
        out = prm.model.hf(torch.tensor([ids]), output_hidden_states=True)
        own = torch.tensor(ids[start:-1])
        logp = out.logits[0, start - 1 : -2].log_softmax(-1).gather(1, own[:, None]).mean()
        want = head.linear(out.hidden_states[-1][0, -1]) + 0.02 * logp
        torch.testing.assert_close(got[node : node + 1], want, atol=1e-5, rtol=0)
    got.sum().backward()
    assert head.likelihood.grad is not None


def test_logits_follow_the_order_they_are_asked_in(pictures):
    prm = prm_of()
    prompts = [prompt(pictures, i=i) for i in range(2)]
    rollout, _ = solution_forest(prompts, [[["a", "b"], ["a", "c"]], [["d", "e"]]])
    whole = prm.logits(rollout, torch.arange(5))
    some = torch.tensor([4, 0, 3, 2])
    check_close(prm.logits(rollout, some), whole[some])
    assert whole.dtype == torch.float32 and whole.shape == (5, 1)
    assert prm_of("qwen2_5_vl", "buffer").logits(rollout, some).shape == (4, 3)


def test_heads_that_do_not_fit_the_format():
    folder = str(family_folder("text"))
    for head, format in (("linear", INLINE), ("tokens", {}), ("buffer", TURNS)):
        with pytest.raises(ValueError, match=f"head='{head}'"):
            VisionPrm.build(model=folder, head=head, format=format)
    with pytest.raises(ValueError, match="becomes 3 tokens"):
        VisionPrm.build(model=folder, head="tokens", format={"positive": "Yes", "negative": "-"})


def test_softmax_and_head_stay_in_float32_on_a_bfloat16_backbone(pictures):
    """prm.md, convention 6."""
    for form in ("linear", "tokens"):
        prm = make_prm(form=form, dtype="bfloat16")
        rollout, _ = solution_forest([prompt(pictures)], [[WHOLE]])
        z = prm.logits(rollout, torch.arange(4))
        assert z.dtype == torch.float32 and prm(rollout).dtype == torch.float64
        assert form == "tokens" or prm.model.head.linear.weight.dtype == torch.float32
        torch.testing.assert_close(prm(rollout), prm_of("qwen2_5_vl", form)(rollout), atol=0.05, rtol=0)


# ---- training --------------------------------------------------------------------------------------------------


def gradients(prm, pictures, family="qwen2_5_vl", weight=None):
    """Names of the weights that got a gradient, and those that train."""
    prm.model.zero_grad()
    rollout, _ = solution_forest([prompt(pictures, family)], [[WHOLE]])
    z = prm.logits(rollout, torch.arange(4))[:, 0]
    (z * (torch.ones(4) if weight is None else weight)).sum().backward()
    named = dict(prm.model.named_parameters())
    return {n for n, p in named.items() if p.grad is not None}, {n for n, p in named.items() if p.requires_grad}


@pytest.mark.parametrize(
    "family, form",
    [*((f, "linear") for f in FIVE), ("text", "tokens"), ("gemma3", "tokens"), ("internvl", "likelihood")],
)
def test_every_trained_weight_gets_a_gradient(family, form, pictures):
    """With a picture and without; DDP waits for the gradient of every weight that trains."""
    prm = make_prm(family, form, train_vision=True)
    for shown in {family, "text"}:
        got, trained = gradients(prm, pictures, shown)
        assert got == trained
    tower = vision_tower(prm.model.hf)
    assert tower is None or any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize(
    "options, some, none",
    [
        ({}, "language_model", "visual"),
        ({"train_vision": True}, "visual", "nothing"),
        ({"train_language": False}, "head.", "hf."),
        ({"train_language": False, "train_vision": True}, "head.", "hf."),
        ({"lora_rank": 2}, "lora_A", "visual"),
        ({"gradient_checkpointing": True}, "language_model", "visual"),
    ],
    ids=str,
)
def test_which_weights_train(options, some, none, pictures):
    got, trained = gradients(make_prm(**options), pictures)
    assert got == trained and any(some in n for n in trained) and not any(none in n for n in trained)
    assert any(n.startswith("head.") for n in trained)
    assert "lora_rank" not in options or all("lora_" in n or n.startswith("head.") for n in trained)


def test_lora_and_a_trained_image_encoder_are_refused_together():
    """PEFT freezes everything but its adapter, so the option would do nothing, silently."""
    with pytest.raises(ValueError, match="lora_rank=2 trains the language model alone"):
        make_prm(lora_rank=2, train_vision=True)


def test_gradient_checkpointing_changes_no_gradient(pictures):
    grads = []
    for on in (False, True):
        prm = make_prm(gradient_checkpointing=on, train_vision=True)
        gradients(prm, pictures)
        grads.append(torch.cat([p.grad.flatten() for p in prm.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["linear", "tokens", "turns"])
def test_gradient_comes_from_slots_alone(form, pictures):
    """vl_prm.md, 12: the loss of a step reaches the tokens up to its slot, and none after or beside it."""
    prm = make_prm("text", form)
    rollout, _ = solution_forest([prompt(pictures, "text")], [[["bcd", "xzq"], ["bcd", "fgj"]]])
    seen = []

    def keep(module, args, out):
        out.retain_grad()
        seen.append((args[0], out))

    prm.model.hf.get_input_embeddings().register_forward_hook(keep)
    prm.logits(rollout, torch.arange(3))[0].sum().backward()
    touched = {int(i) for ids, out in seen for i in ids[out.grad.abs().sum(-1) > 0]}
    coded = {c: prm._encode_text(c)[0] for c in "bcdxzqfgj"}
    assert {coded[c] for c in "bcd"} <= touched and not {coded[c] for c in "xzqfgj"} & touched


def test_frozen_vision_runs_without_gradient(pictures):
    prm = make_prm()
    got, _ = gradients(prm, pictures)
    assert not any("visual" in n for n in got) and not prm.model.hf.training


# ---- saving ----------------------------------------------------------------------------------------------------


def trained_a_little(prm):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in prm.model.parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=g))
    return prm


@pytest.mark.parametrize("form", ["linear", "buffer", "turns"])
def test_saved_and_loaded_scores_are_equal(form, pictures, tmp_path):
    prm, p = trained_a_little(make_prm(form=form, instruction="Judge.", system="You judge.")), prompt(pictures)
    prm.save(tmp_path / "m")
    again = load_scorer(tmp_path / "m")
    assert torch.equal(scores(again, [p], [[WHOLE]]), scores(prm, [p], [[WHOLE]]))
    assert again.format == prm.format and again.head == prm.head and again.options.instruction == "Judge."
    again.save(tmp_path / "n")
    assert torch.equal(scores(load_scorer(tmp_path / "n"), [p], [[WHOLE]]), scores(prm, [p], [[WHOLE]]))
    assert aggregate_of(tmp_path / "m") == "min"


@pytest.mark.parametrize("form", ["linear"])
def test_a_saved_adapter_loads_with_its_base(form, pictures, tmp_path):
    prm, p = trained_a_little(make_prm(form=form, lora_rank=2)), prompt(pictures)
    assert (scores(prm, [p], [[WHOLE]]) - scores(prm_of("qwen2_5_vl", form), [p], [[WHOLE]])).abs().max() > 1e-3
    prm.save(tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").exists()
    again = load_scorer(tmp_path / "m")
    assert torch.equal(scores(again, [p], [[WHOLE]]), scores(prm, [p], [[WHOLE]]))
    _, trains = gradients(again, pictures)
    assert trains and all("lora_" in n or n.startswith("head.") for n in trains)
    again.save(tmp_path / "n")
    assert torch.equal(scores(load_scorer(tmp_path / "n"), [p], [[WHOLE]]), scores(prm, [p], [[WHOLE]]))
    with pytest.raises(ValueError, match="has rank 2 and trains on"):
        load_scorer(tmp_path / "m", {"lora_rank": 4})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "linear"}, "scorer.head='linear' but .* was trained with 'tokens'"),
        ({"head": "buffer"}, "scorer.head='buffer'"),
        ({"format": {"marker": "x"}}, "scorer.format=.*trained with {'marker': '#'}"),
        ({"format": {"read_offset": -1}}, "scorer.format"),
        ({"instruction": "Else."}, "scorer.instruction='Else.'"),
        ({"system": "Else."}, "scorer.system='Else.'"),
    ],
    ids=str,
)
def test_options_that_contradict_a_saved_model(options, message, saved_tokens):
    with pytest.raises(ValueError, match=message):
        load_scorer(saved_tokens, options)


@pytest.fixture(scope="module")
def saved_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "m"
    make_prm("text", "tokens").save(folder)
    return folder


def test_options_that_agree_with_a_saved_model(saved_tokens):
    again = load_scorer(saved_tokens, {"head": "tokens", "format": {"marker": "#", "joiner": "\n"}, "max_length": 99})
    assert again.options.max_prompt_tokens == 99 and again.format.positive == "+"


@pytest.mark.parametrize("family, form", [("gemma3", "linear"), ("idefics3", "tokens"), ("llava", "linear")])
def test_a_saved_model_loads_and_scores_in_plain_transformers(family, form, pictures, tmp_path):
    """Nothing of this package at use: ids by the recorded format, the head from its own file."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    prm, p = trained_a_little(make_prm(family, form)), prompt(pictures, family)
    prm.save(tmp_path)
    want = scores(prm, [p], [[WHOLE]])

    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    record = json.loads((tmp_path / "step_format.json").read_text())
    f = record["format"]
    content = [{"type": "image"}, {"type": "text", "text": p.inputs["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[picture(0)], return_tensors="pt")
    encode = functools.partial(processor.tokenizer.encode, add_special_tokens=False)
    ids, slots = inputs["input_ids"][0].tolist(), []
    for i, step in enumerate(WHOLE):
        ids += [*(encode(f["joiner"]) if i else []), *encode(step), *encode(f["marker"])]
        slots.append(len(ids) - 1)
    more = len(ids) - inputs["input_ids"].shape[1]
    for key in ("attention_mask", "token_type_ids"):
        if key in inputs:
            fill = int(key == "attention_mask")
            inputs[key] = torch.cat([inputs[key], torch.full((1, more), fill)], 1)
    inputs["input_ids"] = torch.tensor([ids])
    with torch.no_grad():
        if form == "linear":
            head = load_file(tmp_path / "head.safetensors")
            hidden = model.model(**inputs).last_hidden_state[0, slots]
            got = torch.sigmoid(hidden @ head["linear.weight"].T + head["linear.bias"])[:, 0]
        else:
            z = model(**inputs).logits[0, slots]
            plus, minus = (encode(f[k])[0] for k in ("positive", "negative"))
            got = z[:, [plus, minus]].softmax(1)[:, 0]
    check_close(got.double(), want)


def test_a_saved_text_model_and_adapter_score_in_plain_transformers(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prm, p = trained_a_little(make_prm("text", "turns", lora_rank=2)), Prompt("p", {"question": "how?"})
    prm.save(tmp_path)
    record = json.loads((tmp_path / "step_format.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(record["base"]), tmp_path).eval()
    tokenizer = tokenizer_of(load_processor(record["base"]))
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    said = [p.inputs["question"] + record["format"]["opening"] + WHOLE[0], *WHOLE[1:]]
    chat = [m for s in said for m in ({"role": "user", "content": s}, {"role": "assistant", "content": "+"})]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
    # the answers are where the template puts them, and the score is read one token earlier
    plus = [n - 1 for n in _ends(tokenizer, chat)]
    with torch.no_grad():
        z = model(ids).logits[0, [n - 1 for n in plus]]
    assert ids[0, plus].tolist() == encode("+") * 4
    check_close(z[:, [encode("+")[0], encode("-")[0]]].softmax(1)[:, 0].double(), scores(prm, [p], [[WHOLE]]))


def _ends(tokenizer, chat):
    """Length of the rendered chat up to and with the "+" of each answer."""
    out = []
    for n in range(1, len(chat), 2):
        opened = tokenizer.apply_chat_template(chat[:n], add_generation_prompt=True, return_dict=False)
        out.append(len(opened) + 1)
    return out


def test_the_tree_is_what_lay_out_joins(pictures):
    """One layout for training data on disk and for trees: the ids and slots of both are equal."""
    for form in FORMS:
        prm = prm_of("qwen2_5_vl", form)
        p = prompt(pictures)
        rollout, _ = solution_forest([p], [[WHOLE]])
        asked = prm._trees.of_steps(rollout, torch.arange(4))
        (tree,), (reads,) = asked.trees, asked.slots
        encode = functools.partial(prm._body.tokenizer.encode, add_special_tokens=False)
        out = lay_out(prm._body.encode(p).ids.tolist(), [encode(s) for s in WHOLE], prm._slots)
        assert tree.packed.ids.tolist() == out.ids and reads.tolist() == out.slots


def test_saved_files_are_safe_and_name_the_reader(tmp_path):
    make_prm("text").save(tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    assert {k: tuple(v.shape) for k, v in head.items()} == {"linear.weight": (1, 64), "linear.bias": (1,)}
    record = json.loads((tmp_path / "step_format.json").read_text())
    assert record["scorer"] == "vision_prm" and record["base"] is None and record["format"]["marker"] == "\n\n"
    assert load_model(tmp_path).config.model_type == "llama"
    (tmp_path / "head.safetensors").unlink()  # a head that is missing is no random head (vl_prm.md, 11.9)
    with pytest.raises(FileNotFoundError, match="head.safetensors"):
        load_scorer(tmp_path)


def test_equal_seeds_give_equal_heads(tmp_path):
    folder = str(make("text", tmp_path / "m"))
    torch.manual_seed(1)
    one = VisionPrm.build(model=folder).model.head.linear.weight
    torch.manual_seed(2)
    assert torch.equal(one, VisionPrm.build(model=folder).model.head.linear.weight)

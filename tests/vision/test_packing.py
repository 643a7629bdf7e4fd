"""Tree packing: arrays against a slow definition, and every layout against plain rows of the plain model."""

import pytest
import torch
from families import FAMILIES, family_folder, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.rollout import Prompt
from vision.forward.attention import FLEX, AttentionStyle, style_of, tree_attention
from vision.forward.lora import LoraOptions, add_lora
from vision.forward.network import Network, run_job
from vision.forward.packing import ancestors, choose_mode, cost, leaf_rows, pack, rows_of, split, tree_mask
from vision.forward.passes import TokenTree, build_job
from vision.inputs.loading import banned_ids, eos_ids, load_model, load_processor, tokenizer_of, vision_tower
from vision.inputs.options import PolicyOptions
from vision.inputs.prompts import PromptEncoder
from vision.inputs.tokens import PromptTokens
from vision.policy import VisionPolicy

WORKED = ([-1, 0, 1, 1, 0], [torch.tensor(x) for x in ([0, 1], [2, 3], [4], [5, 6], [7])])  # AB; CD, F, GH; E


def test_worked_example():
    p = pack(*WORKED)
    assert p.ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert p.path.tolist() == [0, 1, 2, 3, 4, 4, 5, 2]
    assert p.end.tolist() == [8, 8, 7, 7, 5, 7, 7, 8]
    assert p.pred.tolist() == [-1, 0, 1, 2, 3, 3, 5, 1]
    assert tree_mask(p).sum(1).tolist() == [1, 2, 3, 4, 5, 5, 6, 3]
    assert sum(len(r) for r in leaf_rows(p, [2, 3, 4])) == 14 and len(p) == 8


@st.composite
def forests(draw):
    n = draw(st.integers(1, 12))
    parent = [-1, *(draw(st.integers(0, v - 1)) for v in range(1, n))]
    sizes = [draw(st.integers(1, 4)), *(draw(st.integers(0, 4)) for _ in range(n - 1))]
    return parent, sizes


@settings(max_examples=150, deadline=None)
@given(forests())
def test_arrays_by_their_definition(tree):
    parent, sizes = tree
    tokens = iter(range(1000))
    ids = [torch.tensor([next(tokens) for _ in range(n)], dtype=torch.int64) for n in sizes]
    p = pack(parent, ids)
    assert (tree_mask(p).sum(1) == p.path + 1).all()
    leaves = [v for v in range(len(parent)) if v not in parent]
    for v, row in zip(leaves, leaf_rows(p, leaves), strict=True):
        path = torch.cat([ids[u] for u in reversed(ancestors(parent, v))])
        assert p.ids[row].tolist() == path.tolist()
        assert p.path[row].tolist() == list(range(len(path)))
        assert p.pred[row].tolist() == [-1, *row[:-1].tolist()]


@settings(max_examples=100, deadline=None)
@given(forests(), st.integers(1, 20), st.data())
def test_split_covers_every_wanted_step_within_the_budget(tree, budget, data):
    parent, sizes = tree
    wanted = sorted(data.draw(st.sets(st.integers(0, len(parent) - 1), min_size=1)))
    parts = split(parent, sizes, wanted, budget)
    assert sorted(v for part in parts for v in part) == wanted
    for part in parts:
        closure = {u for v in part for u in ancestors(parent, v)}
        assert sum(sizes[u] for u in closure) <= budget or len(part) == 1


def test_pack_refuses_what_is_no_tree():
    with pytest.raises(ValueError, match="node 0 must be the prompt"):
        pack([0], [torch.tensor([1])])
    with pytest.raises(ValueError, match="node 1 has parent 2"):
        pack([-1, 2, 0], [torch.tensor([1])] * 3)


def test_cost_model_follows_its_formula_and_picks_the_cheapest():
    parent, ids = [-1, *[0] * 8], [torch.arange(256), *[torch.arange(96)] * 8]
    p = pack(parent, ids)
    assert cost(p, parent, "rows", 10) == 12 * 100 * 8 * 352 + 2 * 10 * 8 * 352**2
    assert cost(p, parent, "packed", 10) == 12 * 100 * 1024 + 2 * 10 * 1024**2
    assert cost(p, parent, "prefix_packed", 10) == 12 * 100 * 1024 + 2 * 10 * (256**2 + 8 * 96 * 352)
    modes = ["rows_shared_image", "prefix_packed", "packed"]
    assert choose_mode([(p, parent)], modes, 10) == "prefix_packed"
    alone = pack([-1, 0], [torch.arange(9), torch.arange(5)])
    assert choose_mode([(alone, [-1, 0])], modes, 10) == "prefix_packed"  # 9^2 + 5 * 14 pairs, against 14^2
    long = pack([-1, *[0] * 16], [torch.arange(4), *[torch.arange(96)] * 16])
    assert choose_mode([(long, [-1, *[0] * 16])], ["rows_shared_image", "packed"], 16) == "rows_shared_image"


# ---- against the plain model -----------------------------------------------------------------------------------

PARENT = [-1, 0, 0, 1, 1, 2, 3, 3]
LENGTHS = (4, 3, 5, 2, 0, 1, 7)  # node 5 is empty


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "p.png"
    picture(0).save(file)
    return str(file)


def load(family):
    folder = family_folder(family)
    return load_model(folder), load_processor(folder)


def two_trees(family, hf, processor, file):
    encode = PromptEncoder(hf, processor, PolicyOptions(max_prompt_tokens=500))
    tokenizer = tokenizer_of(processor)
    banned = banned_ids(hf.config, tokenizer, keep=eos_ids(hf, tokenizer))
    usable = torch.tensor([i for i in range(len(tokenizer)) if i not in banned])
    g = torch.Generator().manual_seed(0)
    trees = []
    for name, question in (("a", "count it"), ("b", "how many are red")):
        prompt = encode(Prompt(name, {"question": question, "images": [] if family == "text" else [file]}))
        ids = [prompt.ids, *(usable[torch.randint(len(usable), (n,), generator=g)] for n in LENGTHS)]
        trees.append(TokenTree(prompt, PARENT, ids))
    return encode, trees, banned


def by_layout(network, trees, mode, style, encode, banned, grad=True):
    wanted = [torch.arange(t.packed.prompt, len(t.packed)) for t in trees]
    job = build_job(trees, wanted, mode, style)
    network.zero_grad()
    out = network(run_job, job, 0.7, banned, None, None)
    if not grad:
        return out["logp"].detach(), None, job
    weight = torch.randn(len(out["logp"]), generator=torch.Generator().manual_seed(1))
    (weight * out["logp"]).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return out["logp"].detach(), grads, job


def plain_rows(hf, trees, banned):
    """The obvious way: every leaf alone through the model's own forward, pixels and masks its own."""
    out = []
    for tree in trees:
        logp = torch.full((len(tree.packed),), torch.nan)
        for take in rows_of(tree.packed, PARENT, "rows"):
            ids, types = tree.packed.ids[take][None], tree.packed.types[take][None]
            extra = dict(tree.prompt.pixels.tensors) if tree.prompt.pixels else {}
            if hf.config.model_type.startswith("qwen"):
                extra["mm_token_type_ids"] = types
            if hf.config.model_type == "gemma3":
                extra["token_type_ids"] = types
            logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0].float() / 0.7
            logits[:, banned] = -torch.inf
            logp[take[1:]] = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        out.append(logp[tree.packed.prompt :])
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_plain_rows(family, picture_file):
    hf, processor = load(family)
    encode, trees, banned = two_trees(family, hf, processor, picture_file)
    style, network = style_of(hf), Network(hf)
    with torch.no_grad():
        want = plain_rows(hf, trees, banned)
    logp, grads, _ = by_layout(network, trees, "rows", style, encode, banned)
    torch.testing.assert_close(logp, want, atol=1e-5, rtol=0)
    for mode in ["rows_shared_image", "packed", *(["prefix_packed"] if style.plain else [])]:
        other, its, job = by_layout(network, trees, mode, style, encode, banned)
        torch.testing.assert_close(other, want, atol=1e-5, rtol=0)
        assert float((its - grads).norm() / grads.norm()) < 1e-5, mode
        assert job.mode == mode


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "text"])
@pytest.mark.parametrize("lora, checkpointing", [(True, False), (False, True), (True, True)])
def test_layouts_with_lora_and_gradient_checkpointing(family, lora, checkpointing, picture_file):
    hf, processor = load(family)
    encode, trees, banned = two_trees(family, hf, processor, picture_file)
    style = style_of(hf)
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        torch.manual_seed(0)
        hf = add_lora(hf, LoraOptions(4))
        for name, p in hf.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    network = Network(hf)
    hf.train(checkpointing)
    logp, grads, _ = by_layout(network, trees, "rows", style, encode, banned)
    for mode in ["packed"] if checkpointing else ["packed", "prefix_packed"]:
        other, its, _ = by_layout(network, trees, mode, style, encode, banned)
        torch.testing.assert_close(other, logp, atol=1e-5, rtol=0)
        assert float((its - grads).norm() / grads.norm()) < 1e-5, mode


def test_eager_attention_gets_an_additive_mask(picture_file):
    folder = family_folder("qwen2_5_vl")
    hf, processor = load_model(folder, attn="eager"), load_processor(folder)
    encode, trees, banned = two_trees("qwen2_5_vl", hf, processor, picture_file)
    assert style_of(hf).implementation == "eager"
    with torch.no_grad():
        want = plain_rows(hf, trees, banned)
        for mode in ("packed", "prefix_packed"):
            logp, _, job = by_layout(Network(hf), trees, mode, style_of(hf), encode, banned, grad=False)
            assert job.rows.attention.is_floating_point()
            torch.testing.assert_close(logp, want, atol=1e-5, rtol=0)


def test_flex_block_mask_says_the_same_as_the_dense_one():
    from torch.nn.attention.flex_attention import create_mask

    trees = [pack(*WORKED), pack([-1, 0, 0], [torch.arange(3), torch.arange(2), torch.arange(4)])]
    parents = [WORKED[0], [-1, 0, 0]]
    for mode, ahead in (("packed", None), ("prefix_packed", True)):
        rows = [(p, take) for p, parent in zip(trees, parents, strict=True) for take in rows_of(p, parent, mode)]
        prefix = [p.prompt for p, _ in rows] if ahead else None
        dense = tree_attention(rows, AttentionStyle(), prefix)
        block = tree_attention(rows, AttentionStyle(FLEX), prefix)
        made = create_mask(block.mask_mod, len(rows), None, dense.shape[2], dense.shape[3], device="cpu")
        assert torch.equal(made, dense)


def test_images_in_branches_take_the_positions_of_their_rows(picture_file):
    """An observation with a picture below one step, another below a deeper one (three-dimensional positions)."""
    for family in ("qwen2_5_vl", "qwen3_vl", "llava"):
        hf, processor = load(family)
        encode, (tree, _), banned = two_trees(family, hf, processor, picture_file)
        shown = encode(Prompt("seen", {"question": "x", "images": [picture_file]}))
        ids = list(tree.ids)
        ids[2] = ids[6] = shown.ids
        mixed = TokenTree(tree.prompt, PARENT, ids, {2: shown, 6: shown})
        network, style = Network(hf), style_of(hf)
        wanted = [torch.cat([mixed.packed.start[v] + torch.arange(len(ids[v])) for v in (1, 3, 5, 7)])]
        out = {}
        for mode in ("rows", "packed", "prefix_packed"):
            with torch.no_grad():
                out[mode] = network(run_job, build_job([mixed], wanted, mode, style), 1.0, banned, None, None)
        torch.testing.assert_close(out["packed"]["logp"], out["rows"]["logp"], atol=1e-5, rtol=0)
        torch.testing.assert_close(out["prefix_packed"]["logp"], out["rows"]["logp"], atol=1e-5, rtol=0)
        if family != "llava":  # node by node, positions are those of the model's own rule along every row
            for take in rows_of(mixed.packed, PARENT, "rows"):
                row = encode.rope(mixed.packed.ids[take], mixed.packed.types[take], mixed.images_along(take))
                assert torch.equal(mixed.positions[:, take], row)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="takes no tree mask"):
        tree_attention([], AttentionStyle("flash_attention_2"))
    folder = str(family_folder("gemma3"))
    with pytest.raises(ValueError, match="prefix_packed"):
        VisionPolicy.build(model=folder, mode="prefix_packed")
    with pytest.raises(ValueError, match="gradient checkpointing"):
        VisionPolicy.build(model=str(family_folder("text")), mode="prefix_packed", gradient_checkpointing=True)
    prompt = PromptTokens(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.arange(3), 3)
    tree = TokenTree(prompt, [-1, 0], [prompt.ids, torch.arange(2)])
    with pytest.raises(ValueError, match="no predecessor"):
        build_job([tree], [torch.tensor([0])], "packed", AttentionStyle())


def test_cache_under_checkpointing_is_an_error_of_ours(picture_file):
    hf, processor = load("text")
    encode, trees, banned = two_trees("text", hf, processor, picture_file)
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.train()
    with pytest.raises(RuntimeError, match="the model returned no cache"):
        by_layout(Network(hf), trees, "prefix_packed", style_of(hf), encode, banned)


@pytest.mark.parametrize("mode", ["rows_shared_image", "packed", "prefix_packed"])
def test_one_tower_call_for_a_shared_picture(mode, picture_file):
    hf, processor = load("qwen2_5_vl")
    encode, trees, banned = two_trees("qwen2_5_vl", hf, processor, picture_file)  # two prompts, one picture
    seen = []
    vision_tower(hf).register_forward_hook(
        lambda module, args, kw, out: seen.append(len(kw["grid_thw"])), with_kwargs=True
    )
    by_layout(Network(hf), trees, mode, style_of(hf), encode, banned)
    assert seen == [1]

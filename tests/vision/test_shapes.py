"""The shapes task: scenes, checker, rewards, and the base model's fast path against the real one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmrl.rollout import Actions, Prompt, Rollout, Sample
from mmrl.seeding import numpy_generator
from mmrl.tree import StepTree
from vision.inputs.loading import load_model, load_processor
from vision.tasks.shapes import (
    ShapesAnswer,
    ShapesSteps,
    ShapesTask,
    check_steps,
    final_answer,
    split_steps,
    tree_rewards,
)
from vision.tasks.shapes_base import LONGEST_TRACE, Recipe, accuracy, census, greedy, question, shapes_base
from vision.tasks.shapes_model import (
    VOCABULARY,
    decode,
    encode,
    encode_picture,
    hidden_states,
    new_model,
    new_processor,
    new_tokenizer,
    patch_table,
)
from vision.tasks.shapes_scene import (
    EIGHTHS,
    KINDS,
    VARIANTS,
    Question,
    count,
    count_kinds,
    draw,
    layout_eighth,
    sample_question,
    sample_scene,
    solve,
    sprites,
)

# three red things, two circles: one red circle, two red squares, one blue circle, one green triangle
REFERENCE = {
    "answer": "5", "steps": ["red = 3", "circle = 2", "3 + 2 = 5", "answer 5"], "operation": "sum",
    "terms": ["red", "circle"],
    "scene": {"red circle": 1, "red square": 2, "blue circle": 1, "green triangle": 1},
}  # fmt: skip
GAP = {**REFERENCE, "operation": "gap", "answer": "1", "steps": ["red = 3", "circle = 2", "| 3 - 2 | = 1", "answer 1"]}
P, R, A, U = "perception", "reasoning", "answer", "unknown"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, cache):
    monkeypatch.setenv("MMRL_CACHE", str(cache))


def verdict(lines, reference=REFERENCE):
    return [(c.kind, c.right) for c in check_steps(lines, reference)]


# ---- scenes


def test_the_same_key_gives_the_same_scene_picture_and_question():
    a, b = (sample_scene(numpy_generator(3, "x", 7), "train", grid=4, filled=(10, 14)) for _ in range(2))
    other = sample_scene(numpy_generator(3, "x", 8), "train", grid=4, filled=(10, 14))
    assert (a == b).all() and not (a == other).all()
    assert (draw(a) == draw(b)).all()
    assert draw(a).shape == (64, 64, 3) and draw(a).dtype == np.uint8


def test_drawing_puts_each_sprite_into_its_cell():
    cells = np.full((2, 2), -1)
    cells[0, 1] = KINDS.index("blue square") * VARIANTS
    picture = draw(cells)
    assert (picture[:16, 16:] == sprites()[KINDS.index("blue square") * VARIANTS]).all()
    assert (picture[16:] == 232).all()
    red, green, blue = picture[8, 24]
    assert blue > red and blue > green


def test_sprites_of_one_kind_differ_and_none_touches_its_border():
    drawn = sprites()
    assert len({s.tobytes() for s in drawn}) == len(KINDS) * VARIANTS + 1
    edge = np.concatenate([drawn[:, 0], drawn[:, -1], drawn[:, :, 0], drawn[:, :, -1]])
    assert (edge > 200).mean() > 0.6


@given(st.integers(0, 2**32), st.sampled_from(sorted(EIGHTHS)), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_scenes_have_the_asked_density_and_belong_to_their_split(seed, split, grid):
    cells = sample_scene(numpy_generator(seed), split, grid=grid, filled=(3, grid * grid))
    assert cells.shape == (grid, grid)
    assert 3 <= (cells >= 0).sum() <= grid * grid
    assert layout_eighth(cells) in EIGHTHS[split]
    assert sum(count_kinds(cells).values()) == (cells >= 0).sum()


def test_no_layout_can_belong_to_two_splits():
    owners = [e for eighths in EIGHTHS.values() for e in eighths]
    assert sorted(owners) == list(range(8))
    cells = sample_scene(numpy_generator(0), "train", grid=4, filled=(5, 9))
    again = np.where(cells >= 0, cells // VARIANTS * VARIANTS, -1)  # other drawings of the same kinds
    assert layout_eighth(again) == layout_eighth(cells)


@pytest.mark.parametrize("filled", [(2, 5), (5, 4), (10, 17)])
def test_impossible_densities_are_refused(filled):
    with pytest.raises(ValueError, match="filled"):
        sample_scene(numpy_generator(0), "train", grid=4, filled=filled)


def test_counts_of_words_and_kinds():
    scene = REFERENCE["scene"]
    assert [count(scene, t) for t in ("red", "circle", "red circle", "yellow", "triangle")] == [3, 2, 1, 0, 1]


def test_solved_traces():
    assert solve(Question("sum", ("red", "circle")), [3, 2]) == REFERENCE["steps"]
    assert solve(Question("gap", ("circle", "red")), [2, 3])[2:] == ["| 2 - 3 | = 1", "answer 1"]
    assert solve(Question("sum", ("red", "blue", "circle")), [1, 2, 3])[3:] == ["1 + 2 + 3 = 6", "answer 6"]


def test_questions_have_distinct_terms_and_both_operations():
    rng = numpy_generator(0)
    asked = [sample_question(rng, terms=2, conjunctions=True) for _ in range(100)]
    assert all(len(set(q.terms)) == 2 for q in asked)
    assert {q.operation for q in asked} == {"sum", "gap"}
    assert any(" " in term for q in asked for term in q.terms)
    assert {sample_question(rng, terms=3).operation for _ in range(20)} == {"sum"}


# ---- checker


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        (REFERENCE["steps"], [(P, True), (P, True), (R, True), (A, True)]),
        (["red = 3\n", "circle = 2\n", "3 + 2 = 5\n", "answer 5"], [(P, True), (P, True), (R, True), (A, True)]),
        (["red = 4", "circle = 2", "4 + 2 = 6", "answer 6"], [(P, False), (P, True), (R, True), (A, False)]),
        (["red = 4", "circle = 2", "3 + 2 = 5", "answer 5"], [(P, False), (P, True), (R, False), (A, True)]),
        (["red = 3", "circle = 2", "3 + 2 = 6", "answer 6"], [(P, True), (P, True), (R, False), (A, False)]),
        (["red = 3", "circle = 2", "2 + 3 = 5", "answer 5"], [(P, True), (P, True), (R, False), (A, True)]),
        (["circle = 2", "red = 3", "3 + 2 = 5", "answer 5"], [(P, True), (P, True), (R, True), (A, True)]),
        (["red = 3", "circle = 2", "| 3 - 2 | = 1", "answer 5"], [(P, True), (P, True), (R, False), (A, True)]),
        (["red = 3", "3 + 2 = 5", "answer 5"], [(P, True), (R, False), (A, True)]),
        (["red = 3", "red = 3", "blue = 1"], [(P, True), (P, False), (P, False)]),
        (["red = 3", "circle = 2", "3 + 2 = 5", "3 + 2 = 5"], [(P, True), (P, True), (R, True), (R, False)]),
        (["answer 5", "answer 5", "red = 3"], [(A, True), (A, False), (P, False)]),
        (["red is 3", "", "red = ", "purple = 1", "red = 3 circle = 2", "answer five"], [(U, False)] * 6),
        (["red = " + "9" * 5000, " answer 5", "red = ³"], [(U, False)] * 3),
        (["red = 3\n\n"], [(U, False)]),
        ([], []),
    ],
)  # fmt: skip
def test_steps_by_hand(lines, want):
    assert verdict(lines) == want


def test_gap_steps_by_hand():
    assert verdict(GAP["steps"], GAP) == [(P, True), (P, True), (R, True), (A, True)]
    assert verdict(["red = 3", "circle = 5", "| 3 - 5 | = 2", "answer 2"], GAP) == [
        (P, True), (P, False), (R, True), (A, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "want"),
    [("red = 3\nanswer 5", "5"), ("answer 5\n", "5"), ("answer 05", "5"), ("answer 5\nred = 3", None), ("", None),
     ("\n", None), ("answer", None), ("answer 4\nanswer 5", "5"), ("the answer 5", None)],
)  # fmt: skip
def test_final_answer(text, want):
    assert final_answer(text) == want


@given(st.text(alphabet="red =3+|-answ\n5", max_size=40))
def test_no_text_breaks_the_checker(text):
    lines = split_steps(text)
    assert "\n".join(lines) == text.removesuffix("\n")
    assert len(check_steps(lines, REFERENCE)) == len(lines)


@given(st.integers(0, 2**32), st.integers(2, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_solved_trace_is_right(seed, terms, conjunctions):
    rng = numpy_generator(seed)
    scene = count_kinds(sample_scene(rng, "sft", grid=4, filled=(3, 16)))
    asked = sample_question(rng, terms=terms, conjunctions=conjunctions)
    lines = solve(asked, [count(scene, t) for t in asked.terms])
    reference = {
        "answer": lines[-1].split()[1], "operation": asked.operation, "terms": asked.terms, "scene": scene,
    }  # fmt: skip
    assert all(c.right for c in check_steps(lines, reference))


# ---- rewards


def test_step_rewards_follow_the_branches_of_a_tree():
    #  red = 3 -> circle = 2 -> (3 + 2 = 5, 3 + 2 = 6);  red = 4 -> circle = 2 -> 4 + 2 = 6
    texts = ["red = 3\n", "red = 4\n", "circle = 2\n", "circle = 2\n", "3 + 2 = 5\n", "3 + 2 = 6\n", "4 + 2 = 6\n"]
    parent = [-1, -1, 0, 1, 2, 2, 3]
    got = tree_rewards(texts, parent, [REFERENCE] * 7)
    assert got.dtype == torch.float64
    assert got.tolist() == [1, 0, 1, 1, 1, 0, 1]


def rollout_of(texts):
    tree = StepTree([-1, 0, -1], [0, 0, 1], [0, 1, 1], [torch.nan, 1.0, 0.0])
    actions = Actions(torch.zeros(3), torch.ones(3, dtype=torch.bool), {})
    prompts = [Prompt("a", {}, REFERENCE), Prompt("b", {}, {**REFERENCE, "answer": "7"})]
    return Rollout(prompts, tree, actions, texts=texts)


def test_the_step_reward_reads_texts_and_references_of_a_rollout():
    assert ShapesSteps()(rollout_of(["red = 3\n", "answer 5", "answer 5"])).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="texts"):
        ShapesSteps()(rollout_of([]))


def test_judges_and_answer_reward_by_hand(tmp_path):
    prompt = Prompt("a", {}, REFERENCE)
    outputs = ["red = 3\ncircle = 2\n3 + 2 = 5\nanswer 5", "red = 4\nanswer 5", ""]
    samples = [Sample(prompt, text, i) for i, text in enumerate(outputs)]
    assert ShapesAnswer()(samples) == [1.0, 1.0, 0.0]
    judged = ShapesTask(train=1, held_out=1).judges(samples)
    assert judged == pytest.approx({"accuracy": 2 / 3, "steps": 5 / 6, "format": 1 / 3})


# ---- task


def test_the_task_writes_pictures_once_and_gives_complete_prompts():
    task, again = (ShapesTask(train=6, held_out=3, seed=5) for _ in range(2))
    assert [p.id for p in task.prompts] == [f"shapes/train/{i}" for i in range(6)]
    assert task.prompts == again.prompts and len(task.eval_prompts) == 3
    for prompt in task.prompts + task.eval_prompts:
        assert "".join(task.answer(prompt)) == prompt.reference["steps"][-1]
        assert json.loads(json.dumps(prompt.reference)) == prompt.reference
        assert all(c.right for c in check_steps(prompt.reference["steps"], prompt.reference))
        assert 10 <= sum(prompt.reference["scene"].values()) <= 14
        with Image.open(prompt.inputs["images"][0]) as picture:
            assert picture.size == (64, 64)
    other = ShapesTask(train=6, held_out=3, seed=6)
    assert [p.reference["scene"] for p in other.prompts] != [p.reference["scene"] for p in task.prompts]


def test_pictures_on_disk_are_the_scenes_that_were_counted():
    prompt = ShapesTask(train=6, held_out=3, seed=5).prompts[2]
    with Image.open(prompt.inputs["images"][0]) as picture:
        cells = np.asarray(picture).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    known = {s.tobytes(): i for i, s in enumerate(sprites()[:-1].reshape(len(KINDS) * VARIANTS, -1))}
    found = np.array([known.get(cell.tobytes(), -1) for cell in cells])
    assert count_kinds(found) == prompt.reference["scene"]


def test_a_missing_picture_is_drawn_again():
    picture = Path(ShapesTask(train=2, held_out=1, seed=9).prompts[1].inputs["images"][0])
    drawn = picture.read_bytes()
    picture.unlink()
    ShapesTask(train=2, held_out=1, seed=9)
    assert picture.read_bytes() == drawn


def test_damaged_scenes_are_an_error_that_names_the_folder():
    """Damage that leaves the size of a file as it was is found when the file is read."""
    folder = Path(ShapesTask(train=2, held_out=1, seed=9).prompts[1].inputs["images"][0]).parent
    scenes = folder / "train.json"
    scenes.write_text("{" * scenes.stat().st_size)
    with pytest.raises(RuntimeError, match="damaged.*delete that folder"):
        ShapesTask(train=2, held_out=1, seed=9)


def test_a_task_without_two_terms_is_refused():
    with pytest.raises(ValueError, match="terms"):
        ShapesTask(terms=1)


# ---- base model


@pytest.fixture(scope="module")
def processor():
    return new_processor()


def test_words_survive_the_tokenizer_whole_and_line_by_line():
    tokenizer = new_tokenizer()
    trace = "red = 3\ncircle = 2\n| 3 - 2 | = 1\nanswer 1"
    ids = tokenizer(trace)["input_ids"]
    assert ids == encode(trace) and len(ids) == 18
    assert tokenizer.decode(ids) == trace == decode(ids)
    newline = encode("\n")[0]
    ends = [i + 1 for i, t in enumerate(ids) if t == newline]
    parts = [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]
    assert "".join(tokenizer.decode(part) for part in parts) == trace
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer) == len(VOCABULARY)


@pytest.mark.parametrize("grid", [2, 4])
def test_the_fast_path_equals_processor_and_model_bit_for_bit(processor, grid):
    rng = numpy_generator("fast", grid)
    scenes = [sample_scene(rng, "sft", grid=grid, filled=(3, 4)) for _ in range(3)]
    asked = [sample_question(rng, terms=2) for _ in scenes]
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": str(q)}]}] for q in asked
    ]  # fmt: skip
    texts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    batch = processor(text=texts, images=[Image.fromarray(draw(c)) for c in scenes], return_tensors="pt")
    ids = torch.tensor([encode_picture(grid * grid) + encode(f"{q}\n") for q in asked])
    assert torch.equal(batch["input_ids"], ids)
    assert (ids == processor.image_token_id).sum(1).tolist() == [grid * grid] * 3
    cells = torch.tensor(np.stack([c.ravel() for c in scenes]))
    assert torch.equal(batch["pixel_values"], patch_table()[cells.flatten()])

    torch.manual_seed(0)
    model = new_model().eval()
    with torch.no_grad():
        fast = model.lm_head(hidden_states(model, patch_table(), cells, ids))
        torch.testing.assert_close(fast, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_examples_learn_the_trace_and_of_a_census_the_counts_alone():
    rng = numpy_generator(0)
    cells = sample_scene(rng, "sft", grid=4, filled=(3, 9))
    ids, learn = question(cells, rng)
    assert learn.index(True) == 25 and all(learn[25:])
    assert decode(ids[25:]).split("\n")[-1].startswith("answer ")
    ids, learn = census(cells, rng)
    learnt = [VOCABULARY[i] for i, keep in zip(ids, learn, strict=True) if keep]
    assert len(learnt) == 7 and sum(map(int, learnt)) == 2 * (cells >= 0).sum()


MICRO = Recipe(align_steps=20, align_batch=16, steps=20, batch=8, width=64, layers=1)


def test_a_micro_base_is_made_once_and_loads_as_any_model():
    folder = shapes_base(MICRO)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes_base(MICRO) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not folder.with_name(folder.name + ".part").exists()
    model, processor = load_model(folder), load_processor(folder)
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert accuracy(model, filled=(3, 9), number=8) <= 1.0
    rng = numpy_generator(1)
    cells = sample_scene(rng, "held_out", grid=4, filled=(3, 9))
    asked = sample_question(rng, terms=2)
    batch = processor(
        text=processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": str(asked)}]}],
            add_generation_prompt=True, tokenize=False,
        ),
        images=[Image.fromarray(draw(cells))], return_tensors="pt",
    )  # fmt: skip
    out = model.generate(**batch, max_new_tokens=LONGEST_TRACE, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert decode(out.tolist()) == greedy(model, patch_table(), [cells], [asked])[0]


def test_the_same_recipe_gives_the_same_weights(tmp_path, monkeypatch):
    first = load_model(shapes_base(MICRO)).state_dict()
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path))
    torch.manual_seed(123)
    second = load_model(shapes_base(MICRO)).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_damaged_base_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    folder = shutil.copytree(shapes_base(MICRO), tmp_path / MICRO.key)
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path))
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(RuntimeError, match="damaged.*delete that folder"):
        shapes_base(MICRO)

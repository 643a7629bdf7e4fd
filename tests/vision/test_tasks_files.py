import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from mmrl.reasoning.answers import ExactAnswer, MultipleChoice
from mmrl.reasoning.questions import with_options
from mmrl.registry import ComponentError, build
from mmrl.rollout import Prompt, Sample, check_prompts
from vision.inputs.images import load_image
from vision.tasks.jsonl import JsonlTask
from vision.tasks.puzzles import PuzzleTask, split_position

PUZZLES = Path(__file__).parents[1] / "data" / "puzzles"


def write(file, rows):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    Image.new("L", (4, 4)).save(folder / "b.jpg")
    (folder / "text.png").write_text("no picture")
    (tmp_path / "outside.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def task(tmp_path, media, rows, **options):
    train = write(tmp_path / "train.jsonl", rows)
    held_out = write(tmp_path / "eval.jsonl", [{"id": "e", "question": "Why?", "answer": "so"}])
    return JsonlTask(train, held_out, str(media), **options)


def test_rows_become_prompts(tmp_path, media):
    rows = [
        {"id": "one", "question": "<image>\nWhich?", "images": ["a.png"], "options": ["x", 2], "answer": "B", "key_steps": ["k"]},
        "",
        {"question": "What and what?", "images": ["a.png", str(media / "b.jpg")], "answer": 7},
        {"id": 0, "question": "Is 2 < 3 <image>", "image": "b.jpg"},
    ]  # fmt: skip
    made = task(tmp_path, media, rows, rewards=["exact_answer"])
    a, b = str((media / "a.png").resolve()), str((media / "b.jpg").resolve())
    assert made.prompts == [
        Prompt("one", {"question": "Which?\n(A) x\n(B) 2", "images": [a], "options": ["x", "2"]}, {"answer": "B", "key_steps": ["k"]}),
        Prompt("train.jsonl:3", {"question": "What and what?", "images": [a, b]}, {"answer": 7}),
        Prompt("0", {"question": "Is 2 < 3", "images": [b]}, {"answer": None}),
    ]  # fmt: skip
    assert [p.id for p in made.eval_prompts] == ["e"] and made.quarantined == [] and made.rewards == ("exact_answer",)
    right = [Sample(p, "".join(made.answer(p)), 0) for p in made.prompts[:2]]
    assert ExactAnswer()(right) == [1.0, 1.0] and made.answer(made.prompts[1]).text == "7"
    check_prompts(made.prompts)
    json.dumps([dict(p.inputs) for p in made.prompts])


@pytest.mark.parametrize("row, reason", [
    ("{not json", "no JSON"),
    ("[1]", "no JSON object but list"),
    ('{"question": "a", "answer": NaN}', "NaN is no JSON"),
    ({"answer": "7"}, "no text in column 'question'"),
    ({"question": "  "}, "no text"),
    ({"question": "a", "images": ["none.png"]}, "does not exist"),
    ({"question": "a", "images": ["text.png"]}, "known format"),
    ({"question": "a", "images": ["../outside.png"]}, "outside of the media root"),
    ({"question": "a", "images": {"height": 3}}, "neither a path nor a list"),
    ({"question": "a", "images": [""]}, "neither a path nor a list"),
    ({"question": "<image><image>a", "images": ["a.png"]}, "2 <image> in the text for 1 pictures"),
    ({"question": "<image> a"}, "1 <image> in the text for 0 pictures"),
    ({"question": "Is <image> red or <image>?", "images": ["a.png"]}, "2 <image> in the text for 1 pictures"),
    ({"question": "<image>", "images": ["a.png"]}, "nothing but <image>"),
    ({"question": "a <|image_pad|>", "images": ["a.png"]}, "placeholder '<|image_pad|>'"),
    ({"question": "a", "options": ["x", "<|im_end|>"]}, "placeholder '<|im_end|>'"),
    ({"question": "a", "options": ["x", "<image>"]}, "placeholder '<image>'"),
    ({"question": "a", "options": "xy"}, "no list of texts"),
    ({"question": "a", "options": ["x"] * 27}, "27 options"),
    ({"id": "good", "question": "again"}, "id 'good' occurs before"),
    ({"question": "a", "image_path": "a.png"}, "unread column 'image_path': it looks like pictures; name it as task.images"),
    ({"question": "a", "images": ["a.png"], "picture": "b.png"}, "unread column 'picture'"),
    ({"question": "a", "images": ["a.png"], "image": "a.png"}, "unread column 'image'"),
    ({"question": "a", "video": "a.mp4"}, "unread column 'video': it looks like a film"),
    ({"question": "a", "videos": ["a.mp4"]}, "video_jsonl"),
    ('{"question": "what is \\ud83d this?"}', "half of a character cut in two"),
    ('{"question": "a", "id": "\\udc00"}', "half of a character cut in two"),
    ('{"question": "a", "question": "b"}', "the key 'question' stands twice"),
    ('{"question": "a", "meta": {"x": 1, "x": 2}}', "the key 'x' stands twice"),
    ('{"question": "a", "n": ' + "[" * 5000 + "]" * 5000 + "}", "no JSON"),
])  # fmt: skip
def test_bad_rows_are_set_aside_with_their_reason(tmp_path, media, row, reason):
    made = task(tmp_path, media, [{"id": "good", "question": "a"}, row], max_bad=0.5)
    assert [p.id for p in made.prompts] == ["good"]
    (bad,) = made.quarantined
    assert (Path(bad.file).name, bad.row) == ("train.jsonl", 2) and reason in bad.reason


def test_bytes_that_are_no_text_are_one_bad_row(tmp_path, media):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"question": "a"}\n{"question": "\xff"}\n')
    made = JsonlTask(str(file), write(tmp_path / "e.jsonl", [{"question": "a"}]), max_bad=0.5)
    assert len(made.prompts) == 1 and "no JSON" in made.quarantined[0].reason


def test_too_many_bad_rows_stop_the_load(tmp_path, media, caplog):
    rows = [{"question": "a"}] * 19 + [{"question": ""}]
    assert len(task(tmp_path, media, rows).quarantined) == 1
    assert "1 of 20 rows set aside" in caplog.text
    with pytest.raises(ValueError, match=r"2 of 20 rows are bad, more than max_bad=0.05; line 1: no text"):
        task(tmp_path, media, [{"question": ""}, *rows[1:]])
    with pytest.raises(ValueError, match="no usable row"):
        task(tmp_path, media, [])
    with pytest.raises(ValueError, match="no file"):
        JsonlTask(str(tmp_path / "none.jsonl"), str(tmp_path / "eval.jsonl"))


def test_a_chosen_option_is_an_answer(tmp_path, media):
    made = task(tmp_path, media, [{"question": "a", "options": ["red", "blue"]}])
    said = ("B", "it is blue", "(A)", "both red and blue", "no idea", "")
    assert made.judges([Sample(made.prompts[0], t, i) for i, t in enumerate(said)]) == {"answered": 3 / 6}


def test_limit_counts_usable_rows(tmp_path, media):
    rows = [{"question": q} for q in ("a", "", "b", "c")]
    made = task(tmp_path, media, rows, limit=2, max_bad=0.5)
    assert [p.inputs["question"] for p in made.prompts] == ["a", "b"] and len(made.quarantined) == 1


def test_own_column_names(tmp_path, media):
    rows = [{"q": "a", "pics": "a.png", "gold": "7", "choices": ["7", "8"], "question": "kept"}]
    write(tmp_path / "e.jsonl", rows)
    names = {"question": "q", "images": "pics", "answer": "gold", "options": "choices"}
    made = JsonlTask(write(tmp_path / "t.jsonl", rows), str(tmp_path / "e.jsonl"), str(media), **names)
    assert made.prompts[0].reference == {"question": "kept", "answer": "7"}
    assert made.prompts[0].inputs["options"] == ["7", "8"] and len(made.prompts[0].inputs["images"]) == 1


def test_as_a_component_of_a_recipe(tmp_path, media):
    file = write(tmp_path / "t.jsonl", [{"question": "a"}])
    made = build("tasks", "task", "vision.tasks.jsonl:JsonlTask", {"train": file, "eval": file, "rewards": ["r"]})
    said = ("so it is 7. Answer: 7", "\\boxed{8}", "seven apples", "<think>Answer: 7", " \n")
    assert made.judges([Sample(made.prompts[0], t, i) for i, t in enumerate(said)]) == {"answered": 2 / 5}
    assert made.judges([]) == {"answered": 0}
    with pytest.raises(ComponentError, match="max_bad"):
        build("tasks", "task", "vision.tasks.jsonl:JsonlTask", {"train": file, "eval": file, "max_badd": 1})


@pytest.mark.parametrize("row, pictures", [
    ({"image": "a.png"}, 1),
    ({"images": None, "image": "a.png"}, 1),
    ({"images": [], "image": "a.png"}, 1),
    ({"images": "", "image": ["a.png", "a.png"]}, 2),
    ({"images": ["a.png"], "image": None}, 1),
    ({"images": None, "image": None, "video": None}, 0),
    ({"images": []}, 0),
    ({"note": "a.png"}, 0),
])  # fmt: skip
def test_an_empty_column_is_no_column(tmp_path, media, row, pictures):
    made = task(tmp_path, media, [{"question": "a", **row}])
    assert len(made.prompts[0].inputs["images"]) == pictures and not made.quarantined


@pytest.mark.parametrize(
    "options",
    [["A. red", "B. blue"], ["(A) red", "(B) blue"], ["A) red", "B) blue"], ["A: red", "B: blue"], ["red", "blue"]],
)
def test_options_have_one_letter_each(options):
    assert with_options("Q?", options) == "Q?\n(A) red\n(B) blue"


def test_a_text_of_blanks_is_read_in_linear_time(tmp_path, media):
    start = time.process_time()
    made = task(tmp_path, media, [{"question": "a" + " " * 100_000 + "b<image>" + "\n" * 50_000, "images": "a.png"}])
    assert time.process_time() - start < 1.0 and made.prompts[0].inputs["question"].endswith("b")


def test_lettered_options():
    assert with_options("Q?", ["x", "y"]) == "Q?\n(A) x\n(B) y"
    assert with_options("Q?", []) == "Q?"


@pytest.mark.parametrize("name, count, seed", [("puzzlevqa", 4, 4), ("algopuzzlevqa", 3, 0)])
def test_puzzles_of_both_sets(name, count, seed):
    made = PuzzleTask(str(PUZZLES / f"{name}.jsonl"), eval_share=0.4, seed=seed)
    prompts = [*made.prompts, *made.eval_prompts]
    assert len(prompts) == count and made.quarantined == []
    for p in prompts:
        letter, text, options = (p.reference[k] for k in ("answer", "text", "options"))
        assert options["ABCD".index(letter)] == text
        assert f"\n({letter}) {text}" in p.inputs["question"] and p.inputs["options"] == options
        assert load_image(p.inputs["images"][0]).mode == "RGB"
        assert "solution" in p.reference or "deduction" in p.reference


def test_a_puzzle_word_by_word():
    made = PuzzleTask(str(PUZZLES / "puzzlevqa.jsonl"), eval_share=0.4, seed=4)
    assert all(MultipleChoice()([Sample(p, "".join(made.answer(p)), 0)]) == [1.0] for p in made.prompts)
    by_id = {p.id: p for p in [*made.prompts, *made.eval_prompts]}
    p = by_id["puzzlevqa/circle_size_number_0066"]
    assert p.inputs["question"] == (
        "What is the missing number of the part denoted with a question mark?\n(A) 2\n(B) 5\n(C) 1\n(D) 4"
    )
    assert (p.reference["answer"], p.reference["text"]) == ("A", "2")


def test_split_hangs_on_id_and_seed_alone(tmp_path):
    lines = (PUZZLES / "puzzlevqa.jsonl").read_text().splitlines()
    shutil.copytree(PUZZLES / "images", tmp_path / "images")
    whole = PuzzleTask(str(PUZZLES / "puzzlevqa.jsonl"), eval_share=0.4, seed=4)
    part = PuzzleTask(write(tmp_path / "p.jsonl", lines[::-1]), eval_share=0.4, seed=4)
    assert {p.id for p in part.eval_prompts} == {p.id for p in whole.eval_prompts}
    positions = [split_position(f"puzzle-{i}", 0) for i in range(2000)]
    assert all(0 <= x < 1 for x in positions) and abs(sum(x < 0.2 for x in positions) / 2000 - 0.2) < 0.03
    assert split_position("a", 0) != split_position("a", 1)


def test_unusable_puzzles(tmp_path):
    rows = [json.loads(line) for line in (PUZZLES / "puzzlevqa.jsonl").read_text().splitlines()]
    for change, message in (
        ({"answer": "99"}, "'99' is 0 times among the options"),
        ({"options": [2, "2"], "answer": "2"}, "'2' is 2 times"),
        ({"image": None}, "without picture"),
    ):
        file = write(tmp_path / "p.jsonl", [rows[0] | change, *rows[1:]])
        with pytest.raises(ValueError, match=message):
            PuzzleTask(file, str(PUZZLES))
    with pytest.raises(ValueError, match="both sides need some"):
        PuzzleTask(str(PUZZLES / "puzzlevqa.jsonl"), eval_share=1e-9)
    with pytest.raises(ValueError, match="eval_share=1"):
        PuzzleTask(str(PUZZLES / "puzzlevqa.jsonl"), eval_share=1)


def test_letters_are_what_the_choice_reward_reads():
    answers = pytest.importorskip("mmrl.reasoning.answers")
    p = PuzzleTask(str(PUZZLES / "puzzlevqa.jsonl"), eval_share=0.4, seed=4).prompts[0]
    wrong = next(x for x in "ABC" if x != p.reference["answer"])
    texts = [f"So.\nanswer: ({p.reference['answer']})", f"answer: {p.reference['text']}", f"answer: {wrong}"]
    assert answers.MultipleChoice()([Sample(p, t, i) for i, t in enumerate(texts)]) == [1.0, 1.0, 0.0]

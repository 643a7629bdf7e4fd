"""What becomes of rows as data sets publish them, in tasks of pictures and of films and in records of solutions.

docs/reference/data.md shows the table; the test that compares them prints it.
"""

import base64
import datetime
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from families import family_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from diffusion.tasks.text_prompts import TextPrompts
from mmrl.jsonl import RowError
from mmrl.reasoning.answers import MultipleChoice
from mmrl.reasoning.formats import convert, read_format
from mmrl.reasoning.questions import IMAGE_COLUMNS, VIDEO_COLUMNS, Columns, check_answer, plain_options, read_question
from mmrl.reasoning.records import SolutionRecord, plain_steps
from mmrl.reasoning.solutions import score_records
from mmrl.rollout import Prompt, Sample
from video.tasks.video_jsonl import VideoJsonlTask
from vision.inputs.loading import load_model, load_processor
from vision.inputs.options import PolicyOptions
from vision.inputs.prompts import PromptEncoder, PromptError
from vision.prm import VisionPrm
from vision.tasks.jsonl import JsonlTask

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "data.md"
COLOURS = ("red", "lime", "blue")


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


BYTES = png("lime")
URL = "data:image/png;base64," + base64.b64encode(BYTES).decode()
FILM = "unread column 'video': it looks like a film"
ASK = [{"role": "user", "content": "Which?"}]
PARTS = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "as"}, {"type": "image"}]
TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]

# columns of a row (beside the question "Which?" where it brings none) -> what `jsonl` and `video_jsonl` make of it;
# `=` is the same as before it, a number how many pictures or films are shown, other words the reason why it is set
# aside
SHAPES = [
    # one picture, and none
    ({"image": "a.png"}, 1, 1),
    ({"images": "a.png"}, 1, 1),
    ({"images": ["a.png", "b.png"]}, 2, 2),
    ({"images": None, "image": "a.png"}, 1, 1),
    ({"images": [], "image": "a.png"}, 1, 1),
    ({"images": "", "image": ["a.png", "b.png"]}, 2, 2),
    ({"image": {"path": "a.png"}}, 1, 1),
    ({"image": {"bytes": BYTES, "path": "x.png"}}, 1, 1),
    ({"images": [{"bytes": BYTES, "path": None}, {"bytes": None, "path": "a.png"}]}, 2, 2),
    ({"image": BYTES}, 1, 1),
    ({"image": URL}, 1, 1),
    ({"image": "data:image/png;base64,%"}, "broken data URL", "="),
    ({"image": "http://a.org/a.png"}, "web address", "="),
    ({"image": {"bytes": "iVBORw0", "path": None}}, "holds bytes as text", "="),
    ({"image": "none.png"}, "does not exist", "image missing"),
    ({"image": "../a.png"}, "outside of the media root", "outside the media root"),
    ({"images": [["a.png"]]}, "neither a path nor a list of paths", "="),
    ({"images": [None]}, "neither a path nor a list of paths", "="),
    ({"images": {"height": 3}}, "neither a path nor a list of paths", "="),
    ({"images": []}, 0, "give one of the two"),
    ({"images": None, "video": None}, 0, "give one of the two"),
    # columns that look like media
    ({"image_path": "a.png"}, "unread column 'image_path': it looks like pictures; name it as task.images", "="),
    ({"picture": "a.png"}, "unread column 'picture'", "="),
    ({"img": "a.png"}, "unread column 'img'", "="),
    ({"images": ["a.png"], "image": "b.png"}, "unread column 'image'", "="),
    ({"image": "a.png", "thumbnail": {"bytes": BYTES}}, "unread column 'thumbnail'", "="),
    ({"video": "a.mp4"}, FILM, 1),
    ({"videos": ["a.mp4"]}, "unread column 'videos'", 1),
    ({"videos": None, "video": "a.mp4"}, FILM, 1),
    ({"video": "none.mp4"}, FILM, "video missing"),
    ({"videos": ["a.mp4", "a.mp4"]}, "unread column 'videos'", "2 films in one row"),
    ({"video_path": "a.mp4"}, "unread column 'video_path'", "it looks like a film; name it"),
    ({"image": "a.png", "video": "a.mp4"}, FILM, "give one of the two"),
    # places of pictures
    ({"question": "<image>\nWhich?", "image": "a.png"}, 1, 1),
    ({"question": "Is <image> as <image>?", "images": ["a.png", "b.png"]}, 2, 2),
    ({"question": "<image><image> Which?", "image": "a.png"}, "2 <image> in the text for 1 pictures", "="),
    ({"question": "<image> Which?"}, "1 <image> in the text for 0 pictures", "="),
    ({"question": "<image>", "image": "a.png"}, "nothing but <image>", "="),
    ({"question": "<video>\nWhich?", "video": "a.mp4"}, FILM, 1),
    ({"question": "see <|image_pad|>", "image": "a.png"}, "placeholder '<|image_pad|>'", "="),
    # conversations
    ({"prompt": "Which?", "image": "a.png"}, 1, 1),
    ({"prompt": ASK, "image": "a.png"}, 1, 1),
    ({"prompt": [{"role": "system", "content": "Be brief."}, *ASK], "image": "a.png"}, 1, 1),
    ({"prompt": [*ASK, {"role": "assistant", "content": "It"}], "image": "a.png"}, "no policy here goes on with", "="),
    ({"messages": [{"role": "user", "content": PARTS}], "images": ["a.png", "b.png"]}, 2, 2),
    ({"messages": [{"role": "user", "content": PARTS}], "image": "a.png"}, "2 <image> in the text for 1 pictures", "="),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "Which?"}]}]}, 1, 1),
    ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Which?"}, {"type": "image", "image": "a.png"}]}]}, 1, 1),
    ({"messages": [{"role": "user", "content": [
        {"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Which?"}]}]}, "a film in 'messages'", 1),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part 'audio'", "="),
    ({"messages": [*ASK, {"role": "assistant", "content": "red"}, *ASK], "image": "a.png"}, 1, 1),
    ({"messages": [*ASK, {"role": "tool", "content": "3"}], "image": "a.png"}, "a turn of 'tool'", "="),
    ({"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls tools", "="),
    ({"messages": [{"role": "assistant", "content": "red"}], "image": "a.png"}, "holds no question", "="),
    ({"conversations": TURNS, "image": "a.png"}, 1, 1),
    ({"conversations": [*TURNS, *TURNS[:1]], "images": ["a.png", "b.png"]}, 2, 2),
    ({"history": [["What?", "a dog"]], "image": "a.png"}, 1, 1),
    ({"problem": "Which?", "question": None}, "name it as task.question: problem", "="),
    # options and answers
    ({"options": ["A. red", "B. blue"], "answer": "B", "image": "a.png"}, 1, 1),
    ({"options": "A. red\nB. blue", "answer": "B", "image": "a.png"}, 1, 1),
    ({"options": {"A": "red", "B": "blue", "C": None}, "answer": "B", "image": "a.png"}, 1, 1),
    ({"options": {"label": ["A", "B"], "text": ["red", "blue"]}, "answer": "B", "image": "a.png"}, 1, 1),
    ({"options": ["red", "blue"], "answer": "blue", "image": "a.png"}, 1, "bad answer"),
    ({"options": ["red", "blue"], "answer": 1, "image": "a.png"}, "names none of the 2 options", "bad answer"),
    ({"options": "red or blue", "image": "a.png"}, "no list of texts", "="),
]  # fmt: skip


def shown(value):
    """A value of a row as the table has it: bytes and long URLs are cut."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {shown(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    text = "BYTES" if isinstance(value, bytes) else json.dumps(value)
    return text.replace(json.dumps(URL), '"data:image/png;base64,.."')


def told(outcome, before=None, noun="picture"):
    if outcome == "=":
        return told(before)
    if isinstance(outcome, str):
        return f"set aside: `{outcome}`"
    return f"{outcome} {noun}{'' if outcome == 1 else 's'}" if outcome else "a text"


def table():
    lines = ["| columns | `jsonl` | `video_jsonl` |", "|---|---|---|"]
    for columns, pictures, films in SHAPES:
        noun = "film" if isinstance(films, int) and not isinstance(pictures, int) else "picture"
        cells = [f"`{shown(columns)}`".replace("|", "\\|"), told(pictures), told(films, pictures, noun)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "media"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        (folder / f"{name}.png").write_bytes(png(colour))
    (folder / "a.mp4").write_bytes(b"opened when it is looked at")
    (folder.parent / "a.png").write_bytes(png("red"))
    return folder


def write(folder, row):
    """A file of one row, as parquet where it holds bytes."""
    if "BYTES" in shown(row):
        parquet.write_table(pa.Table.from_pylist([row]), folder / "row.parquet")
        return str(folder / "row.parquet")
    (folder / "row.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "row.jsonl")


def loaded(make):
    """The prompt of a file with one row, or why that was set aside."""
    try:
        (prompt,) = make().prompts
    except ValueError as error:
        return str(error)
    return prompt


ROWS = [pytest.param(*shape, id=f"{i} {shown(shape[0])[:60]}") for i, shape in enumerate(SHAPES)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("columns, pictures, films", ROWS)
def test_what_becomes_of_a_row(tmp_path, media, columns, pictures, films):
    bare = columns.keys() & {"question", "prompt", "messages", "conversations"}
    file = write(tmp_path, columns if bare else {"question": "Which?", **columns})
    prompts = (
        loaded(lambda: JsonlTask(file, file, str(media))),
        loaded(lambda: VideoJsonlTask(file, file, media_root=str(media))),
    )
    for prompt, expected in zip(prompts, (pictures, pictures if films == "=" else films), strict=True):
        if isinstance(expected, str):
            assert isinstance(prompt, str) and expected in prompt, prompt
            continue
        assert not isinstance(prompt, str), prompt
        paths = [*prompt.inputs.get("images", []), *prompt.inputs.get("videos", [])]
        assert len(paths) == expected and all(Path(path).is_file() for path in paths)
        json.dumps([prompt.inputs, prompt.reference])


def test_the_docs_show_the_table():
    assert len(SHAPES) > 30
    assert table() in DOCS.read_text(), table()


# ---- what the policy sees -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode():
    folder = family_folder("qwen2_5_vl")
    return PromptEncoder(load_model(folder), load_processor(folder), PolicyOptions(system="Always."), keep_images=True)


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("columns, text, colours", [
    ({"question": "Which?", "images": ["a.png", "b.png"]}, f"{PICTURE}{PICTURE}Which?", "rb"),
    ({"question": "Is <image> as <image>?", "images": ["b.png", "a.png"]}, f"Is {PICTURE} as {PICTURE}?", "br"),
    ({"question": "Which? <image>", "image": "a.png"}, f"{PICTURE}Which?", "r"),
    ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Which?"}, {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "image": {"path": None, "bytes": BYTES}}]}]},
     f"Which?{PICTURE}{PICTURE}", "rl"),
    ({"prompt": [{"role": "system", "content": "Be brief."}, *ASK], "image": "a.png"}, f"{PICTURE}Which?", "r"),
    ({"conversations": [*TURNS, {"from": "human", "value": "And <image>?"}], "images": ["a.png", "b.png"]},
     f"And {PICTURE}?", "rb"),
    ({"history": [["What?", "a dog"]], "question": "Which?", "image": "a.png"}, "Which?", "r"),
    ({"question": "Which?", "options": {"A": "red", "B": "blue"}}, "Which?\n(A) red\n(B) blue", ""),
])  # fmt: skip
def test_a_policy_sees_the_pictures_where_the_row_has_them(tmp_path, media, encode, columns, text, colours):
    file = write(tmp_path, columns)
    (prompt,) = JsonlTask(file, file, str(media)).prompts
    seen = encode(prompt)
    assert seen.text.endswith(f"user:\n{text}<|end|>\nassistant:\n")
    values = {"r": (255, 0, 0), "l": (0, 255, 0), "b": (0, 0, 255)}
    assert [image.getpixel((0, 0)) for image in seen.images] == [values[c] for c in colours]
    assert seen.text.startswith(f"system:\n{'Be brief.' if 'prompt' in columns else 'Always.'}<|end|>\n")
    if "history" in columns:
        assert f"user:\n{PICTURE}What?<|end|>\nassistant:\na dog<|end|>\n" in seen.text


def test_a_template_that_moves_pictures_is_an_error_of_the_prompt(tmp_path, media):
    folder = family_folder("qwen2_5_vl")
    processor = load_processor(folder)
    processor.chat_template = (
        "{% for m in messages %}{% for p in m.content if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% endfor %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    encode = PromptEncoder(load_model(folder), processor, PolicyOptions())
    file = write(tmp_path, {"question": "Is <image> red?", "image": "a.png"})
    (between,) = JsonlTask(file, file, str(media)).prompts
    with pytest.raises(PromptError, match="puts pictures elsewhere"):
        encode(between)
    file = write(tmp_path, {"question": "<image>Red?", "image": "a.png"})
    (front,) = JsonlTask(file, file, str(media)).prompts
    assert encode(front).text.endswith("Red?")


def test_films_and_history_are_part_of_what_decides_the_tokens(tmp_path, media, encode):
    plain = Prompt("a", {"question": "Which?"})
    assert len(encode(plain).ids)
    with pytest.raises(PromptError, match="shows 1 films"):
        encode(Prompt("b", {"question": "Which?", "videos": [str(media / "a.mp4")]}))
    said = encode(Prompt("c", {"question": "Which?", "history": [{"role": "user", "content": "Hello."}]}))
    assert len(said.ids) > len(encode(plain).ids)


# ---- records of solutions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, outcome", [
    ({"image": "a.png"}, 1),
    ({"images": [], "image": "a.png"}, 1),
    ({"images": [{"bytes": BYTES, "path": None}]}, 1),
    ({"image": URL}, 1),
    ({"image": "http://a.org/a.png"}, "web address"),
    ({"image_path": "a.png"}, "unread column 'image_path'"),
    ({"video": "a.mp4"}, "unread column 'video': it looks like a film"),
    ({"videos": ["none.mp4"]}, "unread column 'videos'"),
])  # fmt: skip
def test_what_becomes_of_a_solution(tmp_path, media, columns, outcome):
    file = write(tmp_path, {"question": "Which?", "response": "Red.\n\nSo red.", **columns})
    try:
        (record,), _ = read_format(file, "responses", media_root=media, unlabelled=True)
    except ValueError as error:
        assert isinstance(outcome, str) and outcome in str(error), error
    else:
        assert len(record.images) == outcome


def test_a_solution_about_a_film_is_scored_by_nobody_without_it(tmp_path, media):
    """Films stay in the record, so a scorer of pictures refuses its question instead of judging it blind."""
    row = {"id": "s", "question": "Which?", "steps": ["Red."], "videos": ["a.mp4"]}
    row["history"] = [{"role": "system", "content": "Be brief."}]
    file = write(tmp_path, row)
    (record,), _ = read_format(file, "records", media_root=media, unlabelled=True)
    assert record.prompt.inputs["videos"] == [str(media / "a.mp4")]
    assert convert(file, tmp_path / "out.jsonl", "records", "records", media_root=media)[0] == 1
    (again,), _ = read_format(tmp_path / "out.jsonl", "records", unlabelled=True)
    assert again == record
    with pytest.raises(ValueError, match="films and earlier turns"):
        convert(file, tmp_path / "out.jsonl", "records", "responses", media_root=media)
    missing = write(tmp_path, row | {"videos": ["none.mp4"]})
    with pytest.raises(ValueError, match="video missing"):
        read_format(missing, "records", media_root=media, unlabelled=True)


def test_a_scorer_of_pictures_leaves_a_film_unscored(caplog):
    """The same question without the film is scored beside it, so nothing that was kept may answer for both."""
    scorer = VisionPrm.build(model=str(family_folder("qwen2_5_vl")))
    plain = SolutionRecord("plain", "Which?", plain_steps(["Red.", "So red."]))
    film = replace(plain, id="film", videos=("a.mp4",))
    told = replace(plain, id="told", history=({"role": "system", "content": "Be brief."},))
    scores = score_records(scorer, [plain, film, told])
    assert scores[1] is None and "shows 1 films" in caplog.text
    assert len(scores[0]) == len(scores[2]) == 2 and scores[0] != scores[2]


# ---- details --------------------------------------------------------------------------------------------------------


def test_a_last_turn_of_the_assistant_is_the_answer_or_a_solution(tmp_path, media):
    file = write(tmp_path, {"conversations": TURNS, "image": "a.png"})
    assert JsonlTask(file, file, str(media)).prompts[0].reference == {"answer": "red"}
    file = write(tmp_path, {"conversations": TURNS, "image": "a.png", "answer": "A"})
    assert JsonlTask(file, file, str(media)).prompts[0].reference == {"answer": "A", "solution": "red"}


def test_columns_that_resemble_missing_ones_are_told_at_load(tmp_path, media, caplog):
    file = write(tmp_path, {"question": "Which?", "solution": "red", "choices": ["red", "blue"]})
    JsonlTask(file, file, str(media))
    assert "'solution' (2 rows) resembles it; name it as task.answer: solution" in caplog.text
    assert "'choices' (2 rows) resembles it; name it as task.options: choices" in caplog.text
    caplog.clear()
    JsonlTask(file, file, str(media), answer="solution", options="choices")
    assert "resembles" not in caplog.text


def test_a_conversation_beside_the_question_is_told(tmp_path, media, caplog):
    file = write(tmp_path, {"question": "Which?", "messages": ASK, "answer": "red"})
    JsonlTask(file, file, str(media))
    assert "'messages' (2 rows) is not read beside 'question'; take task.question: messages" in caplog.text
    caplog.clear()
    assert JsonlTask(file, file, str(media), question="messages").prompts[0].inputs["question"] == "Which?"
    assert "not read" not in caplog.text


@pytest.mark.parametrize("name", [*IMAGE_COLUMNS[2:], *VIDEO_COLUMNS])
def test_no_column_that_looks_like_media_is_dropped(tmp_path, media, name):
    file = write(tmp_path, {"question": "Which?", name: "a.png"})
    with pytest.raises(ValueError, match=f"unread column '{name}'"):
        JsonlTask(file, file, str(media))
    if name in IMAGE_COLUMNS:
        assert len(JsonlTask(file, file, str(media), images=name).prompts[0].inputs["images"]) == 1


@pytest.mark.parametrize("options, plain", [
    (["A. red", "B. blue"], ("red", "blue")), (["(A) red", "(B) blue"], ("red", "blue")),
    (["A) red", "B) blue"], ("red", "blue")), (["A: red", "B: blue"], ("red", "blue")), (["A. red"], ("red",)),
    (["red", "blue"], ("red", "blue")), (["A. Smith", "Jones"], ("A. Smith", "Jones")),
    (["B. red", "A. blue"], ("B. red", "A. blue")), ([], ()),
])  # fmt: skip
def test_options_lose_their_letters_when_all_have_them(options, plain):
    assert plain_options(options) == plain


@pytest.mark.parametrize("answer", ["B", "(B)", "B. blue", "blue"])
def test_an_answer_by_letter_or_text_is_what_the_reward_expects(tmp_path, media, answer):
    file = write(tmp_path, {"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": answer})
    (prompt,) = JsonlTask(file, file, str(media)).prompts
    assert MultipleChoice()([Sample(prompt, f"Answer: {letter}", 0) for letter in "BA"]) == [1.0, 0.0]


def test_an_embedded_picture_is_stored_once_and_stays_readable(tmp_path, media):
    rows = [{"question": f"Which {i}?", "image": {"bytes": BYTES, "path": "x.png"}} for i in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    task = JsonlTask(str(tmp_path / "rows.parquet"), str(tmp_path / "rows.parquet"), str(media))
    (path,) = {prompt.inputs["images"][0] for prompt in task.prompts}
    assert Path(path).read_bytes() == BYTES and len(list(Path(path).parent.iterdir())) == 1


def test_values_of_tables_that_no_run_folder_can_hold_are_told(tmp_path, media):
    rows = [{"question": "Which?", "made": datetime.date(2025, 1, 2)}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="column 'made' is no JSON value"):
        JsonlTask(str(tmp_path / "rows.parquet"), str(tmp_path / "rows.parquet"), str(media))


@pytest.mark.parametrize("columns, outcome", [
    ({"prompt": "a red dog"}, "a red dog"),
    ({"prompt": [{"role": "user", "content": "a red dog"}]}, "a red dog"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a red dog"}]}]}, "a red dog"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, None),
    ({"prompt": [*ASK, {"role": "assistant", "content": "red"}, *ASK]}, None),
    ({"prompt": "a red dog", "jpg": BYTES}, None),
    ({"prompt": "a red dog", "image": "a.png"}, "a red dog"),
    ({"prompt": None}, None),
])  # fmt: skip
def test_what_becomes_of_a_prompt_for_pictures(tmp_path, columns, outcome, caplog):
    file = write(tmp_path, columns)
    prompt = loaded(lambda: TextPrompts(file, file))
    if outcome is None:
        assert isinstance(prompt, str) and "rows are bad" in prompt
        return
    assert prompt.inputs == {"prompt": outcome}
    assert ("['image'] look like media" in caplog.text) == ("image" in columns)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["A. x", "<image>", "user", "text", "image", "video", "a.png", "data:,"]) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([
            "role", "content", "from", "value", "type", "text", "image", "image_url", "url", "bytes", "path", "label", "A",
        ]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(
    st.sampled_from([
        "question", "messages", "conversations", "prompt", "history", "images", "image", "videos", "options", "answer",
        "thumbnail",
    ]), JSON, max_size=6), st.booleans())  # fmt: skip
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_is_read_or_set_aside(row, films):
    try:
        question = read_question(row, Columns(), films=films)
        check_answer(question.answer, question.options)
    except RowError:
        return
    json.dumps([question.inputs, question.reference])
    marks = sum(t["content"].count("<image>") for t in (*question.history, {"content": question.text}))
    assert marks <= len(question.images) and question.text.strip()

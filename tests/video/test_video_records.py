import json
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrl.jsonl import RowError, count_reasons
from mmrl.registry import build, names
from mmrl.rollout import Sample, check_prompts
from video.formats import read_format
from video.formats._values import media_file
from video.formats.ui_s1 import read_trajectories, step_prompts
from video.formats.videocom import split_options
from video.records import BoxLabel, VideoSample, to_prompt, with_info, with_seen
from video.rewards import ScreenAction
from video.tasks.recorded_screens import RecordedScreens

DATA = Path(__file__).parents[1] / "data" / "video"


@dataclass
class Info:
    """A clip of 3 s, 30 frames of 96 x 128 (height x width), without a file."""

    frames: int = 30
    duration: float = 3.0
    height: int = 96
    width: int = 128

    def index_at(self, seconds):
        return min(int(seconds * 10 + 1e-9), self.frames - 1)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "pictures").mkdir()
    for name in ("clips/a.mp4", "clips/b.mp4", "a.mp4", "b.webm", "c.avi"):
        (tmp_path / name).write_bytes(b"only its name matters")
    Image.new("RGB", (40, 20)).save(tmp_path / "pictures" / "sign.png")
    Image.new("RGB", (40, 80)).save(tmp_path / "pictures" / "screen.png")
    return tmp_path


def read(name, root, **options):
    file = next(DATA.glob(f"{name}.*"))
    return read_format(file, name, media_root=root, max_bad=0.5, **options)


def sample(**changes):
    return VideoSample("s", "What?", "a.mp4") if not changes else replace(sample(), **changes)


# ---- formats --------------------------------------------------------------------------------------------------------


def test_video_r1(root):
    samples, bad = read("video_r1", root)
    assert [(s.id, s.answer, s.answer_type) for s in samples] == [
        ("1", "B", "multiple choice"), ("2", "4", "numerical"), ("3", "STOP now", "OCR"), ("4", "12.5", "regression"),
    ]  # fmt: skip
    choice, _, picture, told = (to_prompt(s) for s in samples)
    assert choice.inputs == {
        "question": "Which ball hits the wall first?\n(A) the red one\n(B) the blue one\n(C) both at once\nAnswer with the letter of one option.",
        "videos": [str(root / "clips/a.mp4")], "options": ["the red one", "the blue one", "both at once"],
    }  # fmt: skip
    assert choice.reference == {"answer": "B", "answer_type": "multiple choice", "data_source": "made up"}
    assert picture.inputs["images"] == [str(root / "pictures/sign.png")] and "videos" not in picture.inputs
    assert picture.inputs["question"] == "What does the sign say?\nAnswer with the text as it is written there."
    assert picture.reference["size"] == [20, 40]
    assert told.reference["turns"] == ["<think>It is as long as\nfive cars.</think>\n<answer>12.5</answer>"]
    assert told.reference["solution"] == "<think>It is as long as five cars.</think> <answer>12.5</answer>"
    assert [(b.row, b.reason.partition(":")[0]) for b in bad] == [(5, "unknown answer_type")]


def test_videocom_conversations(root):
    samples, bad = read("videocom", root)
    told, labelled = samples
    assert told.question == "What colour is the cup on the shelf?\nThink step by step."
    assert (told.options, told.answer) == (("red", "blue", "green"), "B. blue")
    assert len(told.turns) == 4 and told.turns[0].endswith("FIND_SEGMENT(cup on the shelf) = [2]")
    assert told.meta["turn_fields"]["0"] == {"media": {"type": "video", "frame_list": [1, 5, 9]}}
    assert (labelled.options, labelled.answer) == (("J. Smith", "Tom"), "A. J. Smith")
    # painted numbers start at 1
    assert labelled.segment_ids == (1,) and labelled.frames == ((10, 19),)
    assert labelled.boxes == (BoxLabel((32, 24, 96, 72), 14, unit="pixels"),)
    assert labelled.meta["plan"] == "find, zoom" and labelled.meta["turn_fields"]["1"] == {"reasoning": "none"}
    assert [(b.row, b.reason) for b in bad] == [
        (3, "bad valid_bounding_box[0]: '[32, 24, 96]' is no [x1, y1, x2, y2]")
    ]


def test_pixels_become_shares_when_the_clip_is_known(root):
    (told, labelled), _ = read("videocom", root)
    assert not told.is_located and not labelled.is_located
    with pytest.raises(RowError, match="boxes not located"):
        to_prompt(labelled)
    reference = to_prompt(with_info(labelled, Info())).reference
    assert reference["boxes"] == [{"frame": 14, "box": [0.25, 0.25, 0.75, 0.75]}]
    assert (reference["frame_count"], reference["duration"], reference["size"]) == (30, 3.0, [96, 128])
    assert (reference["segment_ids"], reference["frames"]) == ([1], [[10, 19]])
    # annotated on a clip of half the size
    small = with_info(replace(labelled, size=(48, 64), boxes=(BoxLabel((32, 24, 64, 48), 14, unit="pixels"),)), Info())
    assert small.boxes[0].box == (0.5, 0.5, 1.0, 1.0) and small.size == (96, 128)
    looked = with_info(replace(told, size=(48, 64)), Info())
    assert looked.turns[2] == "SPATIAL_ZOOM(the cup) = [64, 48, 192, 144]" and not looked.is_located
    shown = with_seen(with_info(told, Info()), (192, 256))
    assert shown.turns[2] == "SPATIAL_ZOOM(the cup) = [64, 48, 192, 144]" and shown.is_located
    lines = to_prompt(shown).reference["solution"].split("\n")
    assert lines[0] == "The cup is put down late. FIND_SEGMENT(cup on the shelf) = [2]" and len(lines) == 4
    with pytest.raises(RowError, match="no size"):
        with_seen(told, (10, 10))


@pytest.mark.parametrize("text, want", [
    ("Who?", ("Who?", ())),
    ("Who?\nOptions: A. Ann, B. Bob", ("Who?", ("Ann", "Bob"))),
    ("Who?\nOptions:\n(A) Ann\n(B) Bob or Al\nAnswer.", ("Who?\nAnswer.", ("Ann", "Bob or Al"))),
    ("Who? Options: A. Ray B. Low, B. J. Doe", ("Who?", ("Ray", "Low, B. J. Doe"))),
])  # fmt: skip
def test_options_in_the_text(text, want):
    assert split_options(text) == want


@pytest.mark.parametrize("text", ["Options: Ann or Bob", "Options:", "Options: A. Ann", "Options: A. B. Ray, B. Low"])
def test_options_that_cannot_be_told_apart(text):
    with pytest.raises(RowError, match="bad options"):
        split_options(text)


def test_videochat_r1(root):
    samples, bad = read("videochat_r1", root)
    assert [(s.id, s.answer, s.segments, s.duration) for s in samples] == [
        ("a#0", "0.5 to 1.25", ((0.5, 1.25),), 3.0), ("a#1", "1.5 to 3", ((1.5, 3.0),), 3.0), ("c#0", "0 to 1", ((0.0, 1.0),), 2.0),
    ]  # fmt: skip
    prompt = to_prompt(samples[0])
    assert prompt.inputs["question"].startswith('When does this happen in the video: "a person opens a door"?\n')
    assert prompt.reference["answer_type"] == "interval" and prompt.reference["source"] == "made up"
    assert samples[2].video == str(root / "c.avi")  # named by its id alone
    assert [(b.row, b.reason[:12]) for b in bad] == [(2, "bad segments")] and "'b'" in bad[0].reason
    assert len(read("videochat_r1", root, limit=1)[0]) == 1


def test_keyed_files_that_are_none(root):
    for content in ("[]", "{}", "{", '{"a": 3}'):
        (root / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json"):
            read_format(root / "x.json", "videochat_r1", max_bad=1)
    with pytest.raises(ValueError, match=r"none\.json"):
        read_format(root / "none.json", "videochat_r1")


def test_canonical_rows(root):
    samples, bad = read("canonical", root)
    assert bad == [] and [s.id for s in samples] == ["q1", "canonical.jsonl:2", "q3"]
    assert samples[0].meta == {"source": "made up"} and samples[1].options == ("left", "right")
    assert samples[2].boxes == (BoxLabel((0.0, 0.0, 0.5, 0.5), 0),)  # a picture's size is known
    located = with_info(samples[1], Info())
    assert located.boxes == (BoxLabel((0.25, 0.25, 0.75, 0.75), 10),)  # 1.05 s


@pytest.mark.parametrize("change, reason", [
    ({"question": 3}, "'question'"), ({"video": None}, "give one of the two"), ({"images": ["pictures/sign.png"]}, "give one"),
    ({"video": "none.mp4"}, "video missing"), ({"video": "../x.mp4"}, "outside the media root"), ({"video": 3}, "bad video"),
    ({"answer_type": "guess"}, "unknown answer_type"), ({"answer_type": "interval", "answer": "soon"}, "bad answer"),
    ({"options": ["a", "b"], "answer": "C"}, "none of the 2 options"), ({"options": ["a", "b"], "answer": "a"}, "bad answer"),
    ({"segments": [[2, 1]]}, "segments[0]"), ({"segments": [[1]]}, "bad segments[0]"), ({"segments": [["a", 2]]}, "bad segments[0]"),
    ({"frames": [[0, 1], [-1, 2]]}, "frames[1]"), ({"frames": [[0, 1.5]]}, "bad frames[0]"), ({"frames": [[0, 9]], "frame_count": 9}, "of 9 frames"),
    ({"segment_ids": [0]}, "count from 1"), ({"boxes": [{"frame": 0, "box": [0, 0, 2, 1]}]}, "in [0, 1]"),
    ({"boxes": [{"frame": 0, "box": [0.5, 0, 0.5, 1]}]}, "x1 < x2"), ({"boxes": [{"box": [0, 0, 1, 1]}]}, "give one of them"),
    ({"boxes": [{"frame": 0, "time": 1, "box": [0, 0, 1, 1]}]}, "give one of them"), ({"boxes": [[0, 0, 1, 1]]}, "bad boxes[0]"),
    ({"boxes": [{"frame": 9, "box": [0, 0, 1, 1]}], "frame_count": 9}, "frame 9 of 9"), ({"boxes": [{"time": -1, "box": [0, 0, 1, 1]}]}, "-1.0 s"),
    ({"boxes": [{"frame": 0, "box": [0, 0, 1, 1], "unit": "inch"}]}, "bad unit"), ({"turns": [""]}, "bad turns"), ({"turn_boxes": "mm"}, "turn_boxes"),
    ({"size": [0, 4]}, "above 0"), ({"duration": "long"}, "bad duration"), ({"question": "see <|video_pad|>"}, "placeholder"),
    ({"video": None, "images": ["pictures/sign.png"], "boxes": [{"time": 1, "box": [0, 0, 1, 1]}]}, "of a picture"),
])  # fmt: skip
def test_bad_rows_name_file_line_and_field(root, change, reason):
    rows = [{"id": "good", "question": "What?", "video": "a.mp4"}]
    rows.append(rows[0] | {"id": "bad"} | change)
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples, (bad,) = read_format(root / "rows.jsonl", "canonical", max_bad=0.5)
    assert [s.id for s in samples] == ["good"] and (Path(bad.file).name, bad.row) == ("rows.jsonl", 2)
    assert reason in bad.reason, bad.reason
    assert sum(count_reasons([bad]).values()) == 1


@pytest.mark.parametrize("changes, reason", [
    ({"frames": ((28, 30),)}, "of 30 frames"), ({"segment_ids": (2,)}, "the clip has 1"), ({"segments": ((3.0, 4.0),)}, "starts at 3.0 s"),
    ({"boxes": (BoxLabel((0, 0, 1, 1), time=3.2),)}, "3.2 s of 3.00"), ({"boxes": (BoxLabel((0, 0, 131, 9), 0, unit="pixels"),)}, "128 x 96"),
    ({"boxes": (BoxLabel((0, 0, 1, 1), 30),)}, "frame 30 of 30"), ({"size": (128, 96)}, "other size"),
])  # fmt: skip
def test_labels_that_do_not_fit_the_clip(changes, reason):
    with pytest.raises(RowError, match=reason):
        with_info(sample(**changes), Info())


def test_boxes_a_little_outside_are_cut():
    made = with_info(sample(boxes=(BoxLabel((-1, 0, 129, 96), 29, unit="pixels"),)), Info())
    assert made.boxes[0].box == (0.0, 0.0, 1.0, 1.0)


def test_reading_options(root):
    with pytest.raises(ValueError, match="did you mean videocom"):
        read_format(DATA / "videocom.json", "video_com")
    with pytest.raises(ValueError, match="1 of 3 rows are bad"):
        read_format(DATA / "videocom.json", "videocom", media_root=root)
    assert len(read("video_r1", root, limit=2)[0]) == 2
    shutil.copy(DATA / "video_r1.json", root)
    assert len(read_format(root / "video_r1.json", "video_r1", max_bad=0.3)[0]) == 4  # relative to the file
    assert media_file("/clips/a.mp4", root, "video") == str(root / "clips/a.mp4")


# ---- trajectories ---------------------------------------------------------------------------------------------------


def test_expert_trajectories(root):
    (made,), (bad,) = read_trajectories(DATA / "ui_s1.jsonl", media_root=root, max_bad=0.5)
    assert (made.id, len(made.steps), made.meta) == ("7", 5, {"is_successful": True})
    prompts = step_prompts(made)
    assert [p.id for p in prompts] == [f"7/{t}" for t in range(5)]
    assert all(p.inputs["images"] == [str(root / "pictures/screen.png")] for p in prompts)
    assert prompts[0].inputs["question"] == "Open the notes and write hello"
    assert prompts[2].inputs["question"].split("\n")[1:] == [
        "Done so far:", '1. {"action": "open", "text": "Notes"}', '2. {"action": "click"}',
    ]  # fmt: skip
    assert [p.reference for p in prompts] == [
        {"expert": {"action": "open", "text": "Notes"}, "boxes": []},
        {"expert": {"action": "click", "coordinate": [0.25, 0.375]}, "boxes": [[0.125, 0.25, 0.375, 0.5]]},
        {"expert": {"action": "swipe", "direction": "down", "coordinate": [0.5, 0.875]}, "boxes": []},
        {"expert": {"action": "click", "coordinate": [0.975, 1.0]}, "boxes": [[0.75, 0.75, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]},
        {"expert": {"action": "terminate", "status": "success"}, "boxes": []},
    ]  # fmt: skip
    assert bad.row == 2 and "outside of the screen of 40 x 80" in bad.reason and "steps[0]" in bad.reason


@pytest.mark.parametrize("steps, reason", [
    ([], "no step"), ([{"screenshot": "pictures/screen.png"}], "no action"), ([{"action_content": {"action": "wait"}}], "screenshot"),
    ([{"action_content": {"action": "wait"}, "screenshot": "x.png"}], "screenshot missing"),
    ([{"action_content": {}, "screenshot": "pictures/screen.png"}], "'action'"),
    ([{"action_content": {"action": "click", "bbox": [50, 0, 60, 9]}, "screenshot": "pictures/screen.png"}], "empty on a screen"),
])  # fmt: skip
def test_bad_trajectories(root, steps, reason):
    good = {"goal": "g", "steps": [{"action_content": {"action": "wait"}, "screenshot": "pictures/screen.png"}]}
    (root / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {"steps": steps}) + "\n")
    made, (bad,) = read_trajectories(root / "t.jsonl", max_bad=0.5)
    assert len(made) == 1 and made[0].id == "t.jsonl:1" and reason in bad.reason


# ---- the task -------------------------------------------------------------------------------------------------------


def film(path, frames=30, size=(96, 128)):
    """30 grey frames at 10 a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 8 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def test_task_looks_into_clips_where_labels_need_it(root):
    film(root / "clips/a.mp4")
    options = {
        "media_root": str(root),
        "max_bad": 0.5,
        "rewards": ["video_answer"],
        "factor": 14,
        "frame_pixels": 64 * 196,
    }
    name = "video.tasks.video_jsonl:VideoJsonlTask"
    file = str(DATA / "videocom.json")
    task = build("tasks", "task", name, options | {"train": file, "eval": file, "format": "videocom"})
    check_prompts(task.prompts)
    told, labelled = (p.reference for p in task.prompts)
    assert labelled["boxes"] == [{"frame": 14, "box": [0.25, 0.25, 0.75, 0.75]}] and labelled["size"] == [96, 128]
    assert "SPATIAL_ZOOM(the cup) = [32, 24, 94, 74]" in told["solution"]  # shown as 98 x 126
    assert len(task.quarantined) == 2 and task.rewards == ("video_answer",)
    said = (
        "FIND_FRAME(it) = 3\nFINAL_ANSWER: red",
        "<answer>red</answer>",
        "\\boxed{4}",
        "FIND_FRAME(it) = 3",
        "x",
        " ",
    )
    assert task.judges([Sample(task.prompts[0], t, i) for i, t in enumerate(said)]) == {"answered": 3 / 6}


def test_probing_sets_unreadable_clips_aside(root):
    film(root / "clips/a.mp4")
    from video.acting.actions import parse_turn
    from video.tasks.video_jsonl import VideoJsonlTask

    file = str(DATA / "video_r1.json")
    plain = VideoJsonlTask(file, file, "video_r1", str(root), max_bad=0.3)
    assert len(plain.prompts) == 4 and "size" not in plain.prompts[0].reference
    right = [parse_turn("".join(plain.answer(p)), "videocom").answer for p in plain.prompts]
    assert right == [p.reference["answer"] for p in plain.prompts]
    probed = VideoJsonlTask(file, file, "video_r1", str(root), max_bad=0.5, probe=True)
    assert [p.id for p in probed.eval_prompts] == ["1", "3", "4"]  # b.mp4 is none
    assert probed.prompts[0].reference["duration"] == pytest.approx(3.0, abs=0.05)
    assert any("video unreadable" in b.reason for b in probed.quarantined)


def test_boxes_that_belong_to_no_picture_are_set_aside(root):
    from video.tasks.video_jsonl import VideoJsonlTask

    rows = [json.loads(line) for line in (DATA / "canonical.jsonl").read_text().splitlines()][2:]
    rows.append(rows[0] | {"id": "two", "images": rows[0]["images"] * 2})
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = VideoJsonlTask(str(root / "rows.jsonl"), str(root / "rows.jsonl"), media_root=str(root), max_bad=0.5)
    assert [p.id for p in task.prompts] == ["q3"] and "one of several pictures" in task.quarantined[0].reason


def test_recorded_screens_are_prompts_of_steps(root):
    lines = (DATA / "ui_s1.jsonl").read_text().splitlines()
    (root / "t.jsonl").write_text(lines[0])
    task = RecordedScreens(str(root / "t.jsonl"), str(root / "t.jsonl"), media_root=str(root))
    assert len(task.prompts) == 5 and task.rewards == ("screen_action",) and task.quarantined == []
    right = [Sample(p, f"<answer>{json.dumps(p.reference['expert'])}</answer>", 0) for p in task.prompts]
    assert ScreenAction(scale=1.0)(right) == [0.9] * 5
    judged = task.judges([Sample(right[1].prompt, '<answer>{"action": "click", "coordinate": [250, 375]}</answer>', 0),
                          Sample(right[1].prompt, '<answer>{"action": "click"}</answer>', 0)])  # fmt: skip
    assert judged == {"action_exact": 0.5, "action_type": 1.0}


def test_the_row_and_the_fields_of_the_docs_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "video_records.md").read_text()
    row = json.loads(page.split("```json\n")[1].split("```")[0])
    (tmp_path / row["video"]).write_bytes(b"not opened, since no label needs it")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (sample,), set_aside = read_format(tmp_path / "rows.jsonl", "canonical")
    prompt = to_prompt(sample)
    assert set_aside == [] and prompt.id == "traffic/7" and prompt.reference["answer_type"] == "multiple choice"
    assert prompt.reference["boxes"] == row["boxes"] and prompt.reference["segments"] == row["segments"]
    assert prompt.reference["solution"] == "FIND_FRAME(the car) = 41\nFINAL_ANSWER: B"
    for field in fields(VideoSample):
        assert f"`{field.name}`" in page, f"{field.name} is missing on the page"
    for name in ("canonical", "video_r1", "videochat_r1", "videocom"):
        assert f"| `{name}` |" in page and name in names("video_formats")

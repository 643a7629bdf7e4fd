"""Published files of prompts: what becomes of each row, and which are set aside."""

from pathlib import Path

import pytest

from diffusion.tasks.text_prompts import TextPrompts, load_prompts
from mmrl.registry import ComponentError, find, names

DATA = Path(__file__).parents[1] / "data" / "prompts"
BOAT, OWLS = "a paper boat on a red lake", "two owls reading a map"

# file -> format, prompts with their references, numbers of the rows set aside
FILES = {
    "hpdv2_style.json": ("hpdv2", {BOAT: {}, OWLS: {}}, [2]),
    "hpdv2_pairs.json": ("hpdv2", {BOAT: {}, OWLS: {}}, [4]),
    "pick_a_pic.jsonl": ("pick_a_pic", {BOAT: {}, OWLS: {}}, [3]),
    "drawbench.csv": (
        "drawbench",
        {"A green cup, left of a clock.": {"category": "Positional"}, "Three brown dogs": {"category": "Counting"}},
        [3],
    ),
    "parti.tsv": (
        "parti",
        {
            "A green cup": {"category": "Artifacts", "challenge": "Basic"},
            '"Stop" on a wall': {"category": "Outdoor Scenes", "challenge": "Writing & Symbols"},
        },
        [3],
    ),
    "geneval.jsonl": (
        "geneval",
        {
            "a photo of three cups": {
                "tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}],
            },
            "a photo of a dog and a clock": {
                "tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "clock", "count": 1}],
            },
        },
        [3],
    ),
    "ocr.txt": (
        "ocr",
        {
            'A shop sign that says "Open Late"': {"text": "Open Late"},
            "A note with \u201cgone\u201d and \"back at 5\"": {"text": "gone back at 5"},
        },
        [2],
    ),
    "vidprom.csv": (
        "vidprom",
        {
            "a boat turns, slowly": {"time": "2023-07-01 00:00:00", "toxicity": "0.001"},
            "an owl lands": {"time": "2023-07-01 00:00:20", "toxicity": "0.002"},
        },
        [2],
    ),
    "plain.txt": ("rows", {"a paper boat": {}, "two owls": {}}, [3]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_published_file(name):
    form, want, aside = FILES[name]
    task = TextPrompts(str(DATA / name), str(DATA / name), format=form, max_bad=0.5)
    assert {p.inputs["prompt"]: dict(p.reference) for p in task.prompts} == want
    assert len({p.id for p in task.prompts}) == len(task.prompts) == len(task.eval_prompts)
    assert sorted({q.row for q in task.quarantined}) == aside
    (one,), _ = load_prompts(DATA / name, "prompt", format=form, max_bad=0.5, limit=1)
    assert one.inputs == task.prompts[0].inputs


def test_every_format_has_a_file():
    assert {form for form, _, _ in FILES.values()} == set(names("prompt_formats"))


def test_vidprom_keeps_its_ids():
    prompts, _ = load_prompts(DATA / "vidprom.csv", "prompt", format="vidprom", max_bad=0.5)
    assert [p.id for p in prompts] == ["1f-a", "4f-d"]


def test_tables_with_bad_bytes_and_cells(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"prompt,tag\na,1\n\xff,2\nb,3,4\nc,5\n")
    prompts, bad = load_prompts(tmp_path / "t.csv", "prompt", max_bad=0.5)
    assert [(p.inputs["prompt"], p.reference) for p in prompts] == [("a", {"tag": "1"}), ("c", {"tag": "5"})]
    assert [(b.row, b.reason) for b in bad] == [
        (2, "no UTF-8"), (3, "another number of cells than the table has columns"),
    ]  # fmt: skip


def test_an_unknown_format_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ComponentError, match=r"unknown prompt format 'genevall' \(did you mean geneval\?\)"):
        find("tasks", "text_prompts").build({"train": "a", "eval": "b", "format": "genevall"}, "task")

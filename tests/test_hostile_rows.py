"""Every row is used or set aside with its line and a cause, whoever reads it; none ends the load or takes long."""

import json
import re
import time

import pytest
from hostile_rows import BROKEN, HOSTILE, LONG, READERS, lengthened, mutated, write_media

from mmrl.jsonl import read_rows
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.rows import without_image_marks, without_marks
from mmrl.registry import rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
    return folder


def text_of(row):
    return json.dumps(row).encode()


def cpu(function, *args):
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def account(reader, lines, folder, root, caplog):
    """What a file of rows gives: how many are used, and number -> cause of those set aside. They are all of them."""
    caplog.clear()
    path = reader.write(folder, lines)
    made, bad = reader.load(path, root)
    for one in made:
        reader.use(one).encode()
    assert made
    assert {b.file for b in bad} <= {str(path)}
    assert all(0 < len(b.reason) < 1200 for b in bad)
    causes = {b.row: b.reason for b in bad}
    assert len(causes) == len(bad)
    assert set(causes) <= set(range(1, len(lines) + 1))
    if bad:
        told = re.findall(r"(\d+) of (\d+) rows set aside", caplog.text)
        assert told == [(str(len(bad)), str(len(lines)))]
    return len(lines) - len(bad), causes


def test_every_format_is_in_the_corpus():
    assert {row.name for row in rows("formats") if "read" not in row.facts} | {"ui_s1"} <= set(READERS)
    assert {row.name for row in rows("video_formats")} <= set(READERS)


@pytest.mark.parametrize("name", list(READERS))
def test_whatever_stands_in_a_field_the_row_is_used_or_set_aside(root, tmp_path, caplog, name):
    reader = READERS[name]
    variants = [reader.row, *(row for put in HOSTILE for row in mutated(reader.row, put))]
    lines = [text_of(reader.named(row, i)) for i, row in enumerate(variants)]
    used, causes = account(reader, lines, tmp_path, root, caplog)
    assert 1 not in causes
    assert used > 1 and len(causes) > len(HOSTILE)  # the row itself was replaced once by each


@pytest.mark.parametrize("name", list(READERS))
def test_a_broken_row_does_not_take_the_others_with_it(root, tmp_path, caplog, name):
    reader = READERS[name]
    good = reader.named(reader.row, 0)
    lines = [text_of(good)]
    lines += [text_of(good)[:-1] + b', "extra": ' + value + b"}" for value, _ in BROKEN.values()]
    if reader.keyed:  # of a file that is one object, a value must at least end where it seems to
        del lines[1 + list(BROKEN).index("cut")]
        lines = [line for line in lines if b"\xed" not in line and b"\xe4" not in line]
    else:
        lines += [b"{", b"oops", b'"text"', b"[1]", b"3", b"null"]
    lines.append(text_of(reader.named(reader.row, 1)))
    used, causes = account(reader, lines, tmp_path, root, caplog)
    assert (used, list(causes)) == (2, list(range(2, len(lines))))
    told = [cause for value, cause in BROKEN.values() if any(value in line for line in lines)]
    for reason, cause in zip(causes.values(), told, strict=False):
        assert cause in reason


@pytest.mark.parametrize("name", list(READERS))
def test_long_texts_take_linear_time(root, tmp_path, name):
    reader = READERS[name]
    for kind, unit in LONG.items():
        variants = [reader.row, *lengthened(reader.row, unit * (16_000 // len(unit)))]
        path = reader.write(tmp_path, [text_of(reader.named(row, i)) for i, row in enumerate(variants)])
        assert cpu(reader.load, path, root) < 1, kind


def longer(value, times):
    """A row whose lists are so many times as long."""
    if isinstance(value, dict):
        return {key: longer(part, times) for key, part in value.items()}
    return [longer(part, 1) for part in value] * times if isinstance(value, list) else value


@pytest.mark.parametrize("name", list(READERS))
def test_long_lists_take_linear_time(root, tmp_path, name):
    reader = READERS[name]
    path = reader.write(tmp_path, [text_of(reader.row), text_of(longer(reader.named(reader.row, 1), 2000))])
    assert cpu(reader.load, path, root) < 1.5


@pytest.mark.parametrize("unit", [" ", "\n", "<image>", " <image>\n"])
def test_marks_of_pictures_are_stripped_in_linear_time(unit):
    for text in (unit * 100_000 + "a", "a" + unit * 100_000, "a" + unit * 100_000 + "b"):
        assert cpu(without_image_marks, text) < 1


@pytest.mark.parametrize("text, plain", [
    ("<image>What?", "What?"), (" <image> <image>\nWhat?\n<image> ", "What?"), ("What <image> is?", "What <image> is?"),
    (" What? ", " What? "), ("<image>", ""), ("<image><image>", ""), ("<images>", "<images>"), ("", ""), (" ", " "),
])  # fmt: skip
def test_a_question_without_marks_stays_as_it_is(text, plain):
    assert without_image_marks(text) == plain
    assert without_marks(text, "<image>") == plain.strip()


def prefixes(number):
    """Entries of one row: a chain of prefixes, from each of which another one goes off."""
    chain = ["Q?" + " a" * k for k in range(1, number)]
    return [{"solution_prefix": p, "mc_value": 0.5} for own in chain for p in (own, own + " b")]


def test_prefixes_that_go_on_from_each_other_take_linear_time(tmp_path):
    row = {"question": "Q?", "final_answer": "3"}
    seconds = []
    for number in (100, 400):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(text_of(row | {"reasoning_steps": prefixes(number)}))
        seconds.append(cpu(read_format, path, "math_aps_flat"))
        assert path.stat().st_size > 50_000 * (number // 100) ** 2 / 4
    assert seconds[1] < 3  # 16 times the text, and as many steps in the solutions


def test_the_solutions_of_one_row_are_bounded(tmp_path):
    row = READERS["prm800k"].row
    step = row["label"]["steps"][0]
    lines = [row, row | {"label": {"steps": [step] * 1000}}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(text_of, lines)))
    _, (bad,) = read_format(path, "prm800k", max_bad=0.9)
    assert (bad.row, bad.reason) == (2, "too many steps: the solutions of one row have more than 100000 in all")


@pytest.mark.parametrize("fault", [OverflowError("int too large"), RecursionError("deep"), "\ud800".encode])
def test_a_reader_of_ones_own_sets_aside_what_python_cannot_hold(tmp_path, fault):
    def make(row, name):
        if row["n"] == 1 and callable(fault):
            fault()
        elif row["n"] == 1:
            raise fault
        return [name] if row["n"] else []

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"n": n}) for n in (2, 1, 0, 2)))
    made, bad = read_rows(path, make, max_bad=1.0)
    assert made == ["rows.jsonl:1", "rows.jsonl:4"]
    assert [b.row for b in bad] == [2, 3]
    assert [b.reason.partition(":")[0] for b in bad] == ["beyond what can be read", "no content"]


@pytest.mark.parametrize("picture", ["eps.png", "huge.png", "thin.png", "moving.gif", "none.png"])
@pytest.mark.parametrize("name", [n for n, r in READERS.items() if b"good.png" in text_of(r.row)])
def test_one_rule_says_what_a_picture_is(root, tmp_path, name, picture):
    if picture == "cut.png" and READERS[name].use.__name__ not in ("_solution", "_item"):
        pytest.skip("tasks read headers alone; the damage is told when the picture is loaded")
    reader = READERS[name]
    row = text_of(reader.named(reader.row, 1)).replace(b"good.png", picture.encode())
    _, (bad,) = reader.load(reader.write(tmp_path, [text_of(reader.row), row]), root)
    assert bad.row == 2
    assert picture in bad.reason

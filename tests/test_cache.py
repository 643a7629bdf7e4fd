"""What is made once and kept: made anew where it is no longer what was made."""

import shutil

import pytest

from mmrl.cache import made_once


def make(work):
    (work / "part").mkdir()
    (work / "part" / "weights").write_bytes(b"12345")
    (work / "names").write_text("a b")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("mine")


def truncated(folder):
    (folder / "part" / "weights").write_bytes(b"123")


def without_a_file(folder):
    (folder / "names").unlink()


@pytest.mark.parametrize("spoil", [emptied, a_file, truncated, without_a_file])
def test_what_is_damaged_is_made_anew(tmp_path, spoil, caplog):
    folder = made_once(tmp_path / "cache" / "base", make)
    spoil(folder)
    made_once(folder, make)
    assert (folder / "part" / "weights").read_bytes() == b"12345" and (folder / "names").read_text() == "a b"
    assert f"{folder} is damaged and made anew" in caplog.text


def test_what_is_whole_is_left_alone(tmp_path, caplog):
    folder = made_once(tmp_path / "base", make)
    (folder / "notes").write_text("of somebody")
    made_once(folder, pytest.fail)
    assert (folder / "notes").exists() and not caplog.text


def test_making_that_fails_leaves_nothing(tmp_path):
    def fail(work):
        make(work)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        made_once(tmp_path / "base", fail)
    assert not (tmp_path / "base").exists()
    assert made_once(tmp_path / "base", make).is_dir()

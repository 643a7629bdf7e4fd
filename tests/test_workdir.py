"""Work folders: one owner, one set of settings, and nothing half written, whenever a process is killed."""

import json
import os
import signal
import time

import pytest
from processes import TESTS, Command, run_command
from publishers import PUBLISHERS

from mmrl.config import ConfigError
from mmrl.workdir import WorkDir, append, discard, publish, tidy, write_json, write_lines, write_text


def contents(path):
    """Of a file or of a folder with all that is in it."""
    if path.is_file():
        return path.read_bytes()
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


# ---- what is replaced -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Root of a folder per name, where version 0 was written and a process died at version 1; the first contents."""
    root = tmp_path_factory.mktemp("killed")
    before = {}
    for name, write_version in PUBLISHERS.items():
        (root / name).mkdir()
        write_version(root / name, 0)
        before[name] = contents(root / name / name)
    done = run_command(TESTS / "publishers.py", root)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, before


@pytest.mark.parametrize("name", PUBLISHERS)
def test_killed_between_write_and_rename_the_old_one_is_whole(killed, name):
    root, before = killed
    target, part = root / name / name, root / name / f".{name}.part"
    assert (root / name / "exit_status").read_text() == "9"
    assert part.exists() and before[name] and contents(target) == before[name]
    PUBLISHERS[name](root / name, 1)
    assert not part.exists()
    if name not in ("search.json", "recipe.json", "environment.json"):  # these say the same again
        assert contents(target) != before[name]


def test_an_error_in_the_block_leaves_the_old_one_and_no_rest(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), publish(tmp_path / "a") as part:
        part.write_text("ne")
        raise RuntimeError
    assert contents(tmp_path) == {"a": b"old"}


def test_what_is_published_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync

    def fsync(handle):
        flushed.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "folder").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with publish(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "file").write_text("x")
    assert [(name.removeprefix(str(tmp_path)), there) for name, there in flushed] == [
        ("/.folder.part/inner/file", False), ("/.folder.part/inner", False), ("/.folder.part", False), ("", True)
    ]  # fmt: skip


def test_links_stay_and_devices_are_written_to(tmp_path):
    write_text(tmp_path / "far" / "a", "old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "far" / "a").read_text()) == [1]
    write_lines("/dev/null", ["x"])
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("suffix, back", [(".part", False), (".gone", False), (".old", True)])
def test_what_a_kill_left_is_tidied(tmp_path, suffix, back):
    """A folder that was moved aside for a new one comes back, half a folder goes, foreign files stay."""
    (tmp_path / f".000001{suffix}").mkdir()
    (tmp_path / f".000001{suffix}" / "file").touch()
    (tmp_path / ".lock").touch()
    (tmp_path / "000002").mkdir()
    (tmp_path / ".000002.old").mkdir()
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", *["000001"] * back, "000002"]


def test_a_folder_goes_as_a_whole(tmp_path, monkeypatch):
    folder = tmp_path / "000001"
    (folder / "inner").mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmrl.workdir.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert not folder.exists()
    monkeypatch.undo()
    tidy(tmp_path)
    assert contents(tmp_path) == {} and not list(tmp_path.iterdir())


# ---- what grows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["", '{"a": 2', "x"])
def test_half_a_line_is_cut_before_the_next_one(tmp_path, half, caplog):
    file = tmp_path / "rows.jsonl"
    append(file, [{"a": 1}])
    with file.open("a") as f:
        f.write(half)
    append(file, [{"a": 3}, {"a": 4}])
    assert [json.loads(line)["a"] for line in file.read_text().splitlines()] == [1, 3, 4]
    assert ("cut by a kill" in caplog.text) is bool(half)


def test_a_file_that_is_half_a_line_becomes_empty(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a"')
    append(file, [1])
    assert file.read_text() == "1\n"


# ---- whose folder ---------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pathlib import Path
from mmrl.workdir import WorkDir
work = WorkDir(Path(sys.argv[1]) / "run")
with work.owned():
    work.identify("run.json", {"seed": 0}, "holds another run")
    (Path(sys.argv[1]) / "ready").touch()
    time.sleep(300)
"""


def test_two_processes_that_claim_one_folder(tmp_path):
    (tmp_path / "owner.py").write_text(OWNER)
    first = Command(tmp_path / "owner.py", tmp_path)
    while not (tmp_path / "ready").exists():
        assert first.is_running(), first.stderr
        time.sleep(0.01)
    second = run_command(tmp_path / "owner.py", tmp_path)
    assert second.returncode == 1 and "another process writes into" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    with WorkDir(tmp_path / "run").owned():  # the lock of a killed process is free
        WorkDir(tmp_path / "run").identify("run.json", {"seed": 0}, "holds another run")
        with WorkDir(tmp_path / "run").owned():  # its owner may claim it again
            pass
        assert run_command(tmp_path / "owner.py", tmp_path).returncode == 1


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_a_folder_of_other_settings_is_refused_with_those_that_differ(tmp_path, name):
    work = WorkDir(tmp_path)
    settings = {"seed": 0, "plan": {0: 8}, "run": {"output": "a", "lr": 0.1}, "more": [1, (2,)]}
    for output in ("a", "b"):
        work.identify(
            name, settings | {"run": {"output": output, "lr": 0.1}}, "holds another run", free={"run.output"}
        )
    other = {"seed": 1, "plan": {0: 8, 1: 2}, "run": {"output": "b", "lr": 0.2}, "more": [1, [2]]}
    with pytest.raises(ConfigError) as refused:
        work.identify(name, other, "holds another run", free={"run.output"})
    assert str(refused.value) == (
        f"{tmp_path} holds another run: plan.1: None -> 2; run.lr: 0.1 -> 0.2; seed: 0 -> 1. Use another folder"
    )
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=f"{name} is damaged"):
        work.identify(name, other, "holds another run")

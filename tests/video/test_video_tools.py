"""tools/bench_video.py and tools/check_videos.py, as a user runs them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_clips import cut_copy, write_clip

TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = pytest.mark.multiproc


def run(tool, *args):
    command = [sys.executable, str(TOOLS / tool), *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_the_comparison_keeps_to_its_memory_and_fails_where_it_breaks_its_promise(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", frames=60)
    done = run("bench_video.py", clip, "--rollouts=1", "--repeats=1", "--promised=1000", "--cache-mib=1",
               f"--json={tmp_path / 'r.json'}")  # fmt: skip
    assert "1000x was promised" in done.stderr
    assert done.returncode == 1
    assert "less CPU time" in done.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["kept"]["looks"], found["kept"]["asked"]) == (8, 2 * 16 + 6)
    assert 0 < found["kept"]["cache_mib"] <= 1
    assert found["reopened"]["seconds"] > 0


@pytest.mark.slow
def test_kept_frames_take_a_fifth_of_the_time():
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("needs scikit-video")
    done = run("bench_video.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_checked(tmp_path):
    plain = write_clip(tmp_path / "plain.mp4", frames=24)
    cut_copy(plain, tmp_path / "cut.mp4", start=0.8)
    (tmp_path / "text[0].mp4").write_text("no video")
    (tmp_path / "notes.txt").write_text("not looked at")
    report = tmp_path / "r.json"
    wanted = {
        "decord": {"plain.mp4": "ok", "cut.mp4": "untrusted_index", "text[0].mp4": "no_video_stream"},
        "stub_backends:next_frame": {"plain.mp4": "mismatch", "cut.mp4": "mismatch", "text[0].mp4": "no_video_stream"},
    }
    for backend, reasons in wanted.items():
        done = run("check_videos.py", tmp_path, f"--backend={backend}", f"--json={report}", "--probes=3")
        assert done.returncode == 1, done.stderr
        found = {Path(f["path"]).name: f["reason"] for f in json.loads(report.read_text())}
        assert found == reasons
        assert f"3 files, {sum(r == 'ok' for r in reasons.values())} fine" in done.stdout
    done = run("check_videos.py", plain, tmp_path / "cut.mp4")
    assert (done.returncode, done.stdout) == (0, "2 files, 2 fine\n")

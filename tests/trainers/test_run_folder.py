"""A run folder is safe, owned and shared: damaged checkpoints, foreign files, two starts, code in the place of state."""

import json
import logging
import os
import pickle
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import run_command, run_ranks, start_ranks
from safetensors.torch import load_file
from tiny import recipe, write_recipe

from mmrl.config import ConfigError, parse_config
from mmrl.trainers import run_folder
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.checkpoint import damage, load_tensors
from mmrl.trainers.run_folder import RunFolder

TENSORS = "tensors/shard-00001-model-00001-of-00001.safetensors"


def train(model, folder, iterations=3, resume=False, **run):
    run = {"iterations": iterations, "resume": resume, "eval_every": 1, "checkpoint_every": 1, **run}
    BranchGrpo(parse_config(recipe(model, folder, optim={"ema": 0.9}, run=run))).train()


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def weights(folder):
    return load_file(next((folder / "model").rglob("*.safetensors")))


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_model, folder)
    return folder


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def garbage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def removed(file):
    file.unlink()


@pytest.mark.parametrize("spoil", [truncated, emptied, garbage, removed])
@pytest.mark.parametrize("name", [TENSORS, "random_states_0.pkl", "state.json", "manifest.json"])
def test_damage_is_seen(whole, tmp_path, name, spoil):
    import shutil

    copy = tmp_path / "checkpoint"
    shutil.copytree(whole / "checkpoints" / "000003", copy)
    assert damage(copy) is None
    spoil(copy / name)
    assert (name if name != "manifest.json" or spoil is removed else "") in (damage(copy) or "-")


@pytest.mark.parametrize("spoil", [truncated, garbage])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny_model, tmp_path, whole, spoil, caplog):
    train(tiny_model, tmp_path, iterations=2)
    spoil(tmp_path / "checkpoints" / "000002" / TENSORS)
    (tmp_path / "checkpoints" / "9notes").mkdir()
    (tmp_path / "checkpoints" / "999999.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        train(tiny_model, tmp_path, resume=True)
    assert f"000002 is damaged ({TENSORS} has" in caplog.text
    for name, w in weights(whole).items():
        assert torch.equal(weights(tmp_path)[name], w)
    assert rows(tmp_path) == rows(whole)


def test_when_every_checkpoint_is_damaged_nothing_is_begun_anew(tiny_model, tmp_path):
    train(tiny_model, tmp_path, iterations=1, keep_checkpoints=1)
    emptied(tmp_path / "checkpoints" / "000001" / "state.json")
    with pytest.raises(ConfigError, match=r"every checkpoint is damaged: .*state.json has 0 bytes instead of"):
        train(tiny_model, tmp_path, resume=True)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MMRL_EVIL"],)


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "tensors/.metadata", TENSORS]
)
def test_resume_executes_nothing_from_the_run_folder(tiny_model, tmp_path, monkeypatch, name):
    """Even where an attacker has mended the manifest."""
    from mmrl.trainers.checkpoint import _seal

    monkeypatch.setenv("MMRL_EVIL", str(tmp_path / "executed"))
    train(tiny_model, tmp_path / "run", iterations=1)
    checkpoint = tmp_path / "run" / "checkpoints" / "000001"
    (checkpoint / name).write_bytes(pickle.dumps(Evil()))
    (checkpoint / "manifest.json").unlink()
    _seal(checkpoint)
    try:
        train(tiny_model, tmp_path / "run", iterations=2, resume=True)
    except Exception as error:  # whatever refuses it
        assert "executed" not in str(error)
    assert not (tmp_path / "executed").exists()


def test_a_folder_in_which_somebody_trains_is_refused(tiny_model, tmp_path):
    train(tiny_model, tmp_path, iterations=1)
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process writes into"):
        train(tiny_model, tmp_path, iterations=2, resume=True)
    train(tiny_model, tmp_path, iterations=2, resume=True)
    assert [r["iteration"] for r in rows(tmp_path) if "reward/mean" in r] == [1, 2]


def test_metrics_survive_lines_that_are_none_and_a_stop_in_the_first_evaluation(tiny_model, tmp_path, whole, caplog):
    train(tiny_model, tmp_path, iterations=2)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "garbage", "[1]", '{"a": 1}', *lines[2:], '{"iteration": 3, "rew']))
    with caplog.at_level(logging.WARNING):
        train(tiny_model, tmp_path, resume=True)
    assert rows(tmp_path) == rows(whole) and "3 lines could not be read" in caplog.text


@pytest.mark.parametrize(
    "content, message", [("", "holds no sections"), ("a: [1", "is damaged"), ("- 1\n", "holds no sections")]
)
def test_a_damaged_recipe_is_told(tiny_model, tmp_path, content, message):
    train(tiny_model, tmp_path, iterations=1)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        train(tiny_model, tmp_path, resume=True)


def test_a_signal_in_the_first_evaluation_doubles_no_row(tiny_model, tmp_path, whole):
    task = {"name": "tiny:InterruptedTask", "flag": str(tmp_path / "flag")}
    run = {"iterations": 3, "eval_every": 1, "checkpoint_every": 1}
    tree = recipe(tiny_model, tmp_path / "run", task=task, optim={"ema": 0.9}, run=run)
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    stopped = run_command("train", file)
    assert stopped.returncode == 0 and "stopped by signal after iteration 0" in stopped.stderr
    assert [r["iteration"] for r in rows(tmp_path / "run")] == [0]
    assert run_command("train", file, "run.resume=true").returncode == 0
    assert rows(tmp_path / "run") == rows(whole)


def test_later_folders_that_are_no_checkpoints_take_the_place_of_none(tiny_model, tmp_path, whole):
    """One damaged by a power loss and one of somebody else, with a single checkpoint to keep."""
    train(tiny_model, tmp_path, iterations=2)
    checkpoints = tmp_path / "checkpoints"
    truncated(checkpoints / "000002" / TENSORS)
    (checkpoints / "000002").rename(checkpoints / "000009")
    (checkpoints / "999999").mkdir()
    (checkpoints / ".000007.part").mkdir()
    train(tiny_model, tmp_path, resume=True, keep_checkpoints=1)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["000003", "000009", "999999"]
    assert rows(tmp_path) == rows(whole)


def test_files_of_a_run_are_replaced_and_never_half_written(tiny_model, tmp_path):
    train(tiny_model, tmp_path, iterations=1)
    before = {}
    for name in ("config.yaml", "environment.json"):
        os.link(tmp_path / name, tmp_path / f"{name}.before")
        before[name] = (tmp_path / name).read_text()
    train(tiny_model, tmp_path, iterations=2, resume=True)
    for name, text in before.items():
        assert (tmp_path / f"{name}.before").read_text() == text
        assert not (tmp_path / name).samefile(tmp_path / f"{name}.before")


@pytest.mark.parametrize(
    "output, message",
    [
        ("file", "is a file; name another folder"),
        ("file/below", "Not a directory; name"),
        ("/proc/run", "No such file"),
    ],
)
def test_a_place_that_can_be_no_folder_is_told(tiny_model, tmp_path, output, message):
    (tmp_path / "file").touch()
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_model, tmp_path / output))
    done = run_command("train", file)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert "nothing can be written into" in done.stderr


def test_a_model_that_was_being_replaced_comes_back(tmp_path):
    """Killed between the two renames that a folder needs."""
    tree = parse_config({"trainer": "branch_grpo", "policy": {"name": "diffusion"}, "task": {"name": "digits"}, "plan": {0: 2},
                         "run": {"output": str(tmp_path / "r"), "resume": True}})  # fmt: skip
    (tmp_path / "r" / ".model.old").mkdir(parents=True)
    (tmp_path / "r" / ".model.old" / "weights").write_text("1")
    RunFolder(tmp_path / "r").open(tree)
    assert (tmp_path / "r" / "model" / "weights").read_text() == "1" and not (tmp_path / "r" / ".model.old").exists()


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
runpy.run_module("mmrl", run_name="__main__")
"""


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tiny_model, tmp_path, whole):
    """As far as a test can fill one: no file may grow beyond 30 kB, then one lies on a full device."""
    run = {"iterations": 3, "eval_every": 1, "checkpoint_every": 1}
    tree = recipe(tiny_model, tmp_path / "run", optim={"ema": 0.9}, run=run)
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    (tmp_path / "limited.py").write_text(LIMITED)
    full = run_command(tmp_path / "limited.py", "train", file)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "checkpoints/000001 was not written: [Errno 27] File too large" in full.stderr

    part = tmp_path / "run" / ".environment.json.part"
    part.symlink_to("/dev/full")
    full = run_command("train", file, "run.resume=true")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "No space left on device; make room and repeat the command, with run.resume=true" in full.stderr

    part.unlink(missing_ok=True)
    assert run_command("train", file, "run.resume=true").returncode == 0
    assert rows(tmp_path / "run") == rows(whole)


APART = """
import os, sys
from pathlib import Path
import mmrl.workdir
from mmrl.config import ConfigError, load_config
from mmrl.trainers.branch_grpo import BranchGrpo
mmrl.workdir.PATIENCE_S = 0.2
output = Path(sys.argv[2]) / os.environ["RANK"]
try:
    BranchGrpo(load_config(sys.argv[1], [f"run.output={output}"])).train()
except ConfigError as error:
    output.with_suffix(".txt").write_text(str(error))
"""


@pytest.mark.multiproc
def test_a_folder_that_nodes_do_not_share_is_found_at_a_new_run(tiny_model, tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_model, tmp_path / "unused"))
    run_ranks(2, tmp_path / "apart.py", file, tmp_path)
    for rank in range(2):
        told = (tmp_path / f"{rank}.txt").read_text()
        assert f"{tmp_path / str(rank)} is not the same folder on every node" in told
    assert not (tmp_path / "0" / "metrics.jsonl").exists() and not (tmp_path / "1").exists()


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "sections, rank, cause",
    [
        ({"rewards": [{"name": "tiny:raising_on_one_rank", "timeout_s": 0}]}, 1, "have no reward"),
        ({"run": {"output": "/proc/run"}}, 0, "nothing can be written into /proc/run: No such file"),
    ],
    ids=["reward", "folder"],
)
def test_the_true_error_of_one_process_stands_alone(tiny_model, tmp_path, sections, rank, cause):
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_model, tmp_path / "run", **sections))
    ranks = start_ranks(2, "train", file)
    assert [r.wait() for r in ranks] == [2, 2]
    assert cause in ranks[rank].stderr and cause not in ranks[1 - rank].stderr
    other = ranks[1 - rank].stderr.strip().splitlines()[-1]
    assert other in (
        "error: another process of this run has ended; its own message says why",
        "error: the first process ended with an error",
    )


@pytest.mark.multiproc
def test_the_average_of_sharded_weights_comes_back_on_every_rank_and_on_one(tmp_path):
    """Five rows on two ranks; as one process would average them: half of the start, half of the start plus two."""
    run_ranks(2, Path(__file__).with_name("sharded_ema.py"), tmp_path)
    want = torch.arange(10.0).reshape(5, 2) + 1
    for rank in range(2):
        read = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert read == {"sharded": want.tolist(), "plain": [1.0, 1.0, 1.0]}
    whole = {"0": torch.zeros(5, 2), "1": torch.zeros(3)}
    load_tensors(tmp_path, whole)
    assert torch.equal(whole["0"], want) and whole["1"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"0 is \(5, 2\), this model has \(5, 3\)"):
        load_tensors(tmp_path, whole | {"0": torch.zeros(5, 3)})
    with pytest.raises(ConfigError, match="does not hold 2; it is of another recipe"):
        load_tensors(tmp_path, whole | {"2": torch.zeros(1)})


def test_other_versions_are_told_when_a_run_is_resumed(tmp_path, caplog):
    config = parse_config(recipe(tmp_path / "model", tmp_path / "run", run={"resume": True}))
    folder = RunFolder(tmp_path / "run")
    folder.open(config)
    folder.open(config)
    assert "other versions" not in caplog.text
    record = json.loads((folder.root / "environment.json").read_text())
    here = record["packages"]["pillow"]
    (folder.root / "environment.json").write_text(json.dumps({**record, "packages": {"pillow": "12.2.0"}}))
    folder.open(config)
    assert f"goes on with other versions (pillow 12.2.0 -> {here})" in caplog.text
    (folder.root / "environment.json").write_text("{")
    folder.open(config)
    assert "environment.json is damaged" in caplog.text
    assert json.loads((folder.root / "environment.json").read_text())["packages"]["pillow"] == here


def test_packages_of_other_modalities_need_not_be_there(monkeypatch):
    def version(name):
        if name in ("diffusers", "av", "decord"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(run_folder, "version", version)
    packages = run_folder.environment()["packages"]
    assert (packages["diffusers"], packages["decord"], packages["torch"]) == (None, None, "1.0")

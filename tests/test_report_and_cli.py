from pathlib import Path

import pytest
from processes import run_command
from tiny import recipe, write_recipe

from mmrl.config import parse_config
from mmrl.doctor import examine
from mmrl.report.page import ReportError, write_report
from mmrl.trainers.branch_grpo import BranchGrpo

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "r"
    BranchGrpo(parse_config(recipe(tiny_model, out))).train()
    return out


def test_report_is_one_self_contained_page(finished):
    html = write_report(finished).read_text()
    assert html.count("<svg") >= 5 and "Rollout tree, last iteration" in html
    assert html.count("data:image/png;base64,") > 30  # sample grids and tree pictures
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in html and 'src="/' not in html


def test_report_shows_rewards_and_advantages_of_the_tree(finished):
    from mmrl.rollout import Rollout

    html = write_report(finished).read_text()
    tree = Rollout.load(finished / "trees" / "last").tree
    for leaf in tree.is_finished.nonzero().flatten().tolist():
        assert f">{float(tree.outcome[leaf]):.3f}<" in html
    first = (tree.depth == 0).nonzero().flatten()
    assert all(f">{float(tree.tags['adv'][i]):+.2f}<" in html for i in first)


def test_report_of_a_stopped_run(finished, tmp_path):
    import shutil

    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    shutil.rmtree(cut / "samples")
    shutil.rmtree(cut / "trees")
    (cut / "metrics.jsonl").write_text('{"iteration": 0, "eval/reward": 0.5}\n{"iter')
    assert "Curves" in write_report(cut).read_text()


def test_report_of_damaged_files(finished, tmp_path, caplog):
    """A line that is none, in the middle, costs no other; neither does the record of the machine."""
    import shutil

    from mmrl.jsonl import read_metrics

    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (damaged / "metrics.jsonl").write_text("\n".join([*lines[:2], '{"iter', *lines[2:]]))
    (damaged / "environment.json").write_text('{"python": "3')
    assert "Curves" in write_report(damaged).read_text()
    assert "1 lines could not be read" in caplog.text
    assert read_metrics(damaged / "metrics.jsonl") == read_metrics(finished / "metrics.jsonl")


def test_report_of_no_run(tmp_path):
    with pytest.raises(ReportError, match="is no run folder"):
        write_report(tmp_path)


def test_run_folder_tells_how_it_was_made(finished):
    import json

    import yaml

    assert yaml.safe_load((finished / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.999]
    assert "torch" in json.loads((finished / "environment.json").read_text())["packages"]


def test_doctor(tiny_model, tmp_path):
    text = "\n".join(map(str, examine(parse_config(recipe(tiny_model, tmp_path / "r")))))
    assert "1 process(es)" in text and "as forecast" in text and "NOT as forecast" not in text
    assert "4 leaves, 20 steps, 17 network calls" in text and "fine" in text and "tiny:brightness: mean" in text
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (("train", "nothing.yaml"), "error: no recipe at nothing.yaml"),
        (("train", "{recipe}", "optim.lrr=1"), "did you mean optim.lr?"),
        (("train", "{recipe}", "plan={9: 2}"), "depth 9 lies beyond the last step"),
        (("report", "{here}"), "is no run folder"),
        (("doctor", "{recipe}", "rewards=[{name: 'tiny:raising'}]"), "last error: KeyError"),
    ],
)
def test_errors_on_the_command_line_are_one_message(tiny_model, tmp_path, args, message):
    file = write_recipe(tmp_path / "r.yaml", recipe(tiny_model, tmp_path / "r"))
    done = run_command(*(a.replace("{recipe}", str(file)).replace("{here}", str(tmp_path)) for a in args))
    assert done.returncode == 2 and message in done.stderr.replace("\n", " ")
    if "raising" not in str(args):
        assert "Traceback" not in done.stderr


def test_train_on_the_command_line(tiny_model, tmp_path):
    file = write_recipe(tmp_path / "r.yaml", recipe(tiny_model, tmp_path / "r"))
    done = run_command("train", file, "run.iterations=1", "run.report=true", "run.trackers=[tensorboard]")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "report.html").exists() and "report.html" in done.stdout
    assert list((tmp_path / "r" / "logs").glob("events.*"))


def test_reference_pages_are_made_from_the_docstrings():
    from mmrl.registry import names
    from mmrl.registry_pages import page as made

    page = (TESTS.parent / "docs" / "reference" / "credit.md").read_text()
    assert page == made("credit"), "run: mmrl list --page credit > docs/reference/credit.md"
    assert all(f"### {name}\n" in page for name in [*names("estimators"), *names("transforms")])
    readings = (TESTS.parent / "docs" / "reference" / "readings.md").read_text()
    assert readings == made("readings"), "run: mmrl list --page readings > docs/reference/readings.md"
    callbacks = (TESTS.parent / "docs" / "reference" / "callbacks.md").read_text()
    assert callbacks == made("callbacks"), "run: mmrl list --page callbacks > docs/reference/callbacks.md"
    capabilities = (TESTS.parent / "docs" / "reference" / "capabilities.md").read_text()
    assert capabilities == made("capabilities"), "run: mmrl list --page capabilities > docs/reference/capabilities.md"
    done = run_command("list", "estimators")
    assert done.returncode == 0 and all(name in done.stdout for name in names("estimators"))

"""Every estimator and transform runs in the modalities in which it has a meaning; docs/reference/credit_modalities.md says so."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def credit_table():
    sys.path.insert(0, str(TOOLS))
    import credit_table

    yield credit_table
    sys.path.remove(str(TOOLS))


def made(credit_table, folder, modalities, only=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRL_CACHE", str(folder))
        return credit_table.table([credit_table.Modality(name, folder) for name in modalities], only)


def test_some_rows_on_latents(credit_table, tmp_path):
    lines, errors = made(credit_table, tmp_path, ["diffusion"], ["gae", "prime", "reward_machine"])
    assert [line[2] for line in lines if line[0] != "reward_machine"] == ["runs", "runs"]
    # a row that runs nowhere is an error, whatever the reason
    assert errors == ["reward_machine runs nowhere"]


def test_a_row_that_raises_is_told(credit_table, tmp_path, monkeypatch):
    monkeypatch.setitem(credit_table.REQUIRED, "clip", {"eta": "half"})
    lines, errors = made(credit_table, tmp_path, ["diffusion"], ["clip"])
    assert lines[0][2] == "FAILS" and "clip on diffusion: ComponentError" in errors[0]


@pytest.mark.slow
def test_the_page_is_what_runs(credit_table, tmp_path):
    lines, errors = made(credit_table, tmp_path, credit_table.MODALITIES)
    assert not errors
    assert credit_table.PAGE.read_text() == credit_table.markdown(lines), "run: python tools/credit_table.py --write"

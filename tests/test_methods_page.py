"""docs/reference/methods.md names only what is there, in order, and its command lines run."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmrl", "vision", "diffusion", "video")
PAGE = (ROOT / "docs" / "reference" / "methods.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "(20" in (cells := [c.strip() for c in line.strip("|").split(" | ")])[0]
}
# An untrained model is never right and never read, so what rewards and judges is met by it; of a command that says
# nothing about them, so that there is something to learn from.
DIGITS = "{name: 'vision_tiny:digits', timeout_s: 0}"
SOLVER = (
    "policy={name: 'test_jobs:Writer', slips: 0.2}", "task={name: 'test_jobs:Chains'}",
    "verifier={name: 'test_jobs:right', timeout_s: 0}",
)  # fmt: skip
JUDGE = "readings.0.policy={name: 'vision_tiny:StepJudge'}"


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def commands(name):
    return quoted(ROWS[name][2])


@pytest.fixture(scope="module")
def words():
    """Names that the sources define or register."""
    sources = "\n".join(f.read_text() for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
    defined = re.findall(r"(?:\bdef |\bclass |[\"'])(\w+)", sources)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    return set(defined) | {name for rows in groups.values() for name in rows}


def found(name):
    """The object at a dotted path."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            at = import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            at = getattr(at, part)
        return at
    raise ModuleNotFoundError(name)


def test_rows_are_whole_and_in_order():
    assert len(ROWS) > 80 and all(len(cells) == 5 and all(cells) for cells in ROWS.values())
    assert list(ROWS) == sorted(ROWS, key=str.casefold)
    assert all("tests/" in test or "tools/" in test for *_, test in ROWS.values())


def test_a_row_runs_by_command_lines_or_is_documented_python():
    for name, (_, state, _, here, _) in ROWS.items():
        if state == "runs":
            assert commands(name) and all(c.startswith("mmrl ") for c in commands(name)), name
        else:
            assert state == "function" and not commands(name), name
            assert any(re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", q) for q in quoted(here)), name


def test_files_exist():
    """A bare file name lies beside the one named before it; `data/` is the reader's."""
    folder = Path()
    for path in re.findall(r"(?<![\w./])[\w./-]+\.(?:py|yaml|md)\b", PAGE):
        if path.startswith(("tests/", "tools/", "configs/")):
            folder = Path(path).parent
            assert (ROOT / path).is_file(), path
        else:
            page = any((ROOT / "docs").rglob(Path(path).name))
            assert page or (ROOT / folder / path).is_file(), path


def test_dotted_names_lead_somewhere():
    names = [q for q in quoted(PAGE) if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", q)]
    assert len(names) > 40
    for name in names:
        assert found(name) is not None


@pytest.mark.parametrize("name", ROWS)
def test_components_are_known(name, words):
    """Plain names beside the commands; what commands name is refused when they run."""
    plain = {q for q in quoted(ROWS[name][3]) if re.fullmatch(r"\w+", q)}
    assert plain <= words, sorted(plain - words)


def stand_ins(command):
    """Overrides with which an untrained model has something to do."""
    _, verb, recipe, *given = shlex.split(command)
    sections = {o.split("=")[0] for o in given}
    if verb == "annotate" and "active" in sections:
        return ("active.d_p=1.01",)
    if verb == "annotate" and {"refine", "method"} & sections:
        return SOLVER
    if verb == "search":
        return (f"verifier={DIGITS}",) if "task" not in sections else ()
    if verb != "train" or ("shapes" not in recipe and "clips" not in recipe):
        return ()
    tree = yaml.safe_load((ROOT / recipe).read_text())
    more = [JUDGE] if "readings=[{name: judge" in command else []
    more += [f"rewards=[{DIGITS}]"] if "rewards" in tree and not {"rewards", "task"} & sections else []
    if "step_rewards" in tree and "step_rewards" not in sections:
        more.append("step_rewards=[{name: 'vision_tiny:step_digits'}]")
    return tuple(more)


def longer_than_its_recipe(command):
    """A bare recipe runs in test_recipes."""
    return len(shlex.split(command)) > 3


@pytest.mark.parametrize("name", [n for n in ROWS if any(map(longer_than_its_recipe, commands(n)))])
def test_the_command_lines_of_a_method_run(name, sandbox):
    for command in filter(longer_than_its_recipe, commands(name)):
        told = sandbox.run(command, *stand_ins(command))
        assert told and told.get("policy/skipped_updates", 0) == 0, command

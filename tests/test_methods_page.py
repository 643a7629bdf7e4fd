"""docs/methods.md names only what is there: files, functions, components, in order."""

import re
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmrl", "vision", "diffusion", "video")
PAGE = (ROOT / "docs" / "methods.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "(20" in (cells := [c.strip() for c in line.strip("|").split(" | ")])[0]
}


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def words():
    """Names that the sources define or register."""
    sources = "\n".join(f.read_text() for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
    defined = re.findall(r"(?:\bdef |\bclass |[\"'])(\w+)", sources)
    groups = ("policies", "tasks", "rewards", "scorers")
    return set(defined) | {e.name for g in groups for e in entry_points(group=f"mmrl.{g}")}


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
    assert len(ROWS) > 80 and all(len(cells) == 4 and all(cells) for cells in ROWS.values())
    assert list(ROWS) == sorted(ROWS, key=str.casefold)
    assert all("tests/" in test or "tools/" in test for *_, test in ROWS.values())


def test_files_exist():
    """A bare file name lies beside the one named before it."""
    folder = Path()
    for path in re.findall(r"[\w./-]+\.(?:py|yaml|md)\b", PAGE):
        if path.startswith(("tests/", "tools/", "configs/")):
            folder = Path(path).parent
            assert (ROOT / path).is_file(), path
        else:
            assert (ROOT / "docs" / path).is_file() or (ROOT / folder / path).is_file(), path


def test_dotted_names_lead_somewhere():
    names = [q for q in quoted(PAGE) if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", q)]
    assert len(names) > 60
    for name in names:
        assert found(name) is not None


@pytest.mark.parametrize("name", ROWS)
def test_components_are_known(name, words):
    """Plain names in the third column, and the names in snippets of recipes."""
    here, recipe = ROWS[name][1:3]
    plain = {q for q in quoted(here) if re.fullmatch(r"\w+", q)}
    snippets = [q for q in quoted(here + recipe) if re.match(r"\w+: ", q)]
    told = {n for s in snippets for n in names_in(yaml.safe_load(s.replace("...", "null")))}
    assert plain | told <= words, sorted((plain | told) - words)


def names_in(tree):
    """Every `name:` of a piece of a recipe, and transforms given by name alone."""
    if isinstance(tree, dict):
        own = {tree["name"]} if "name" in tree else set()
        return own | {n for v in tree.values() for n in names_in(v)}
    if isinstance(tree, list):
        return {t for t in tree if isinstance(t, str)} | {n for t in tree for n in names_in(t)}
    return set()

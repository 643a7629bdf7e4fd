"""Every function and class of the packages is reached by users, not by tests alone (tools/unreached.py)."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("unreached", ROOT / "tools" / "unreached.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_out_of_reach(tool):
    assert [d.place for d in tool.unreached(ROOT)] == []


def test_exceptions_are_needed_and_explained(tool, monkeypatch):
    allowed = tool.ALLOWED
    monkeypatch.setattr(tool, "ALLOWED", {})
    assert set(allowed) <= {d.place for d in tool.unreached(ROOT)} and all(allowed.values())


def test_what_is_and_what_is_not_a_way(tool, tmp_path):
    """Each live function is reached in a way of its own."""
    for package in tool.PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "mmrl" / "a.py").write_text("""
import torch
BOOT = "import sys; from mmrl.a import by_boot; by_boot()"
CLASS = "mmrl.a:by_path"
def by_script(): return helper
def helper(): ...
def by_entry_point(): ...
def by_recipe(): ...
def by_page(): ...
def by_tool(): ...
def by_boot(): ...
def by_path(): ...
def __getattr__(name): ...
@register("rewards", "x")
def by_registry(): ...
@torch.no_grad()
def dead(): return dead_too()
def dead_too(): return dead()
""")
    (tmp_path / "pyproject.toml").write_text(
        '[project.scripts]\nm = "mmrl.a:by_script"\n[project.entry-points."mmrl.tasks"]\nt = "mmrl.a:by_entry_point"\n'
    )
    (tmp_path / "configs" / "r.yaml").write_text("rewards: [{name: 'mmrl.a:by_recipe'}]\n")
    (tmp_path / "README.md").write_text("by_nobody\n```python\nfrom mmrl.a import by_page\nby_page()\n```\ndead\n")
    (tmp_path / "tools" / "t.py").write_text("from mmrl.a import by_tool\nby_tool()\n")
    assert {d.place for d in tool.unreached(tmp_path)} == {"mmrl/a.py:dead", "mmrl/a.py:dead_too"}

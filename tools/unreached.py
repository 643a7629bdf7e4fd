#!/usr/bin/env python3
"""Functions and classes that no user can reach: from no command, recipe or row of the registry, no documented piece of
Python and no tool. Run from the repository's root; exits with 1 where something is unreached.

From the roots every name is followed that a reached body mentions. Names are compared without their modules, so a dead
definition that shares its name with a live one is missed, and nothing alive is called dead.
"""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("mmrl", "vision", "diffusion", "video")
# decorators that enter a name nowhere; any other one makes its definition a root
PLAIN_DECORATORS = re.compile(
    r"(dataclass|runtime_checkable|declares|property|(functools\.)?(lru_)?cache|contextmanager|torch\.)"
)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# what is reached by ways that names do not show, with the reason
ALLOWED: dict[str, str] = {}


class Definition(NamedTuple):
    """A function or class at the top of a module: where, its lines, the names its body mentions, whether a root."""

    place: str
    lines: int
    mentions: set[str]
    is_root: bool


def main() -> None:
    """Print what is not reached, the largest first."""
    missing = sorted(unreached(Path()), key=lambda d: -d.lines)
    for definition in missing:
        sys.stdout.write(f"{definition.place} ({definition.lines} lines)\n")
    sys.exit(bool(missing))


def unreached(root: Path) -> list[Definition]:
    """The definitions of the packages below `root` that no root leads to."""
    named: dict[str, list[Definition]] = defaultdict(list)
    queue = user_names(root)
    for package in PACKAGES:
        for file in (root / package).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    named[node.name].append(read(node, f"{file.relative_to(root)}:{node.name}"))
                elif not isinstance(node, ast.Import | ast.ImportFrom):
                    queue |= mentioned(node)
    queue |= {name for name, found in named.items() if any(d.is_root for d in found)}
    reached: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue |= {m for d in named.get(name, ()) for m in d.mentions}
    return [d for name in named.keys() - reached for d in named[name] if d.place not in ALLOWED]


def read(node: ast.FunctionDef | ast.ClassDef, place: str) -> Definition:
    """What a definition says about itself; what only the language calls (`__getattr__`) is a root."""
    registered = [d for d in map(ast.unparse, node.decorator_list) if not PLAIN_DECORATORS.match(d)]
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return Definition(place, lines, mentioned(node) - {node.name}, bool(registered) or node.name.startswith("__"))


def mentioned(node: ast.AST) -> set[str]:
    """Names, attributes, dotted paths in strings, and the names in strings that are code for another process."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            names |= set(names_in_text(part.value))
    return names


def names_in_text(text: str) -> Iterator[str]:
    """Of a dotted path `package.module:name` or a bare name, its parts; of a program of one line, what it imports."""
    if re.fullmatch(r"[\w.:]+", text):
        yield from re.split(r"[.:]", text)
    elif re.match(r"(import|from) [\w.]+", text):
        yield from re.findall(r"\w+", text)


def user_names(root: Path) -> set[str]:
    """Names that users meet: scripts, entry points, dotted paths in recipes, Python in the documentation, tools."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    targets = [
        *project["scripts"].values(),
        *(t for group in project["entry-points"].values() for t in group.values()),
    ]
    names = {part for target in targets for part in names_in_text(target)}
    for file in (root / "configs").rglob("*.yaml"):
        names |= set(re.findall(r"[:.](\w+)", file.read_text()))
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    programs = [block for page in pages for block in PYTHON_BLOCK.findall(page.read_text())]
    programs += [tool.read_text() for tool in (root / "tools").glob("*.py")]
    for program in programs:
        names |= mentioned(ast.parse(program))
    return names


if __name__ == "__main__":
    main()

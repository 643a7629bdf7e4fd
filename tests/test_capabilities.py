"""What a component can do is asked by protocols with names: no attribute is probed for."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmrl", "vision", "video", "diffusion", "tools")
# (file, function): why an object that is no component is asked there for an attribute that it may lack
ALLOWED = {
    ("mmrl/pictures.py", "check_frames"): "pictures of PIL: formats of one frame do not say so",
    ("mmrl/registry.py", "_origin"): "name of a function, a class or any other constant, for a message",
    ("mmrl/registry.py", "_declaration"): "what a decorator noted on a function or class",
    ("mmrl/rewards/isolation.py", "Isolated.__init__"): "name of a function or an object, for a message",
    ("mmrl/rewards/isolation.py", "as_values"): "an answer of foreign code, which may be an array of any library",
    ("mmrl/rewards/isolation.py", "as_number"): "a number of foreign code, which may be an array of any library",
    ("vision/foreign.py", "attribute"): "objects of transformers, PIL and vLLM, which differ by family and release",
}


def probes(tree: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(function, line) of every `hasattr` and every `getattr` with a default."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        call = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if call == "hasattr" or (call == "getattr" and len(node.args) == 3):
            yield ".".join(scope), node.lineno
        yield from probes(node, (*scope, node.name) if named else scope)


def test_probes_are_found():
    code = "class A:\n def f(self, x):\n  return getattr(x, 'y'), hasattr(x, 'z')\ngetattr(A, 'w', None)"
    assert list(probes(ast.parse(code))) == [("A.f", 3), ("", 4)]


def test_no_component_is_probed():
    used = set()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for function, line in probes(ast.parse(file.read_text())):
                assert (name, function) in ALLOWED, (
                    f"{name}:{line} probes for an attribute; ask for a protocol of mmrl.capabilities instead"
                )
                used.add((name, function))
    assert used == set(ALLOWED), "an exception that is no longer needed"

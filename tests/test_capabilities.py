"""What a component can do is asked by protocols with names: no attribute is probed for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.capabilities import CandidateSampler
from mmrl.capabilities import (
    Chooser,
    ContrastReward,
    Extender,
    OutputWriter,
    StepClassifier,
    StepWriter,
    build_with,
    follows,
    having,
    refuse_row,
    require,
)
from mmrl.registry import ComponentError, declares, find
from mmrl.rollout import OutcomeReward, Policy

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmrl", "vision", "video", "diffusion", "tools")
# (file, function): why an object that is no component is asked there for an attribute that it may lack
ALLOWED = {
    ("mmrl/reasoning/pictures.py", "check_frames"): "pictures of PIL: formats of one frame do not say so",
    ("mmrl/registry.py", "_origin"): "name of a function, a class or any other constant, for a message",
    ("mmrl/registry.py", "_declaration"): "what a decorator noted on a function or class",
    ("mmrl/rewards/isolation.py", "Isolated.__init__"): "name of a function or an object, for a message",
    ("mmrl/rewards/isolation.py", "as_values"): "an answer of foreign code, which may be an array of any library",
    ("mmrl/rewards/isolation.py", "as_number"): "a number of foreign code, which may be an array of any library",
    (
        "vision/inputs/foreign.py",
        "attribute",
    ): "objects of transformers, PIL and vLLM, which differ by family and release",
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


# ---- asking -----------------------------------------------------------------------------------------------------


class Goes:
    """A policy that goes on, and nothing else."""

    def extend(self, states, n, *, seed, steps=None, temperature=None):
        return []


class NeverMade(Goes):
    def __init__(self):
        raise AssertionError("refused before it is made")


def told() -> NeverMade:
    return NeverMade()


def untold():
    return Goes()


@declares(lacks=(Extender,))
def refusing() -> Goes:
    return Goes()


def stories(samples, controls=()):
    return [0.0 for _ in samples]


def row(name, kind="policies"):
    return find(kind, f"test_capabilities:{name}")


@pytest.mark.parametrize(
    "name, protocol, want",
    [
        ("Goes", Extender, True), ("NeverMade", Extender, True), ("told", Extender, True), ("untold", Extender, None),
        ("refusing", Extender, False), ("refusing", Chooser, False), ("Goes", Chooser, False),
        ("Goes", CandidateSampler, False),
    ],
)  # fmt: skip
def test_a_class_is_known_from_its_row(name, protocol, want):
    assert follows(row(name), protocol) is want


def test_a_function_is_the_reward_itself():
    assert follows(row("stories", "rewards"), OutcomeReward) is True
    assert follows(row("stories", "rewards"), ContrastReward) is False


def test_what_the_shipped_components_can():
    assert having("policies", Extender) == having("policies", StepWriter) == ["vision"]  # a film is no text
    assert having("policies", OutputWriter) == ["video", "vision"]
    assert having("policies", CandidateSampler) == ["diffusion"]
    assert having("policies", Policy) == ["diffusion", "video", "vision"]
    assert having("rewards", ContrastReward) == ["temporal_contrast"]
    assert having("tasks", StepClassifier) == ["shapes"]


def test_who_lacks_a_protocol_is_told_what_it_is_and_who_has_it():
    message = "beam needs the protocol Chooser of mmrl.capabilities .a policy that can also say .* asks it.; {}; those"
    with pytest.raises(ComponentError, match=message.format("policy 'test_capabilities:told' does not have it")):
        refuse_row("beam", Chooser, row("told"))
    refuse_row("beam", Chooser, row("untold"))  # not known before it is made
    with pytest.raises(ComponentError, match=message.format("Goes does not have it") + " that do: vision$"):
        build_with({"beam": Chooser}, "policies", "policy", "test_capabilities:untold", {})
    with pytest.raises(ComponentError, match="does not have it"):
        build_with({"beam": Chooser}, "policies", "policy", "test_capabilities:told", {})
    made = build_with({"beam": Extender}, "policies", "policy", "test_capabilities:untold", {})
    assert require("beam", Extender, made) is made

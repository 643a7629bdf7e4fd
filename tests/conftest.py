"""Shared fixtures: one thread, tiny random models, no download."""

import math
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Read by torch when a test imports it. It is not imported here: the process that only hands out tests needs none.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def t8():
    """The worked forest of one prompt, 8 steps, the last leaf unfinished."""
    from mmrl.tree import StepTree

    n = math.nan
    return StepTree(
        parent=[-1, -1, 0, 0, 3, 3, 1, 1],
        group=[0] * 8,
        status=[0, 0, 1, 0, 1, 1, 1, 2],
        outcome=[n, n, 1.0, n, 0.0, 1.0, 0.0, n],
        step_reward=[0.5, 0.2, 0.9, 0.4, 0.1, 0.8, 0.3, 0.6],
        state_key=[10, 10, 11, 11, 12, 12, 12, 12],
        edge_key=[1, 2, 3, 4, 5, 6, 6, 7],
        logp=[-0.5, -1.0, -0.7, -0.3, -1.2, -0.4, -0.9, -0.6],
        value=[0.6, 0.3, 0.9, 0.5, 0.1, 0.8, 0.2, 0.4],
        root_value=[0.5],
        tok_start=[0, 2, 5, 6, 8, 10, 11, 15],
        tok_end=[2, 5, 6, 8, 10, 11, 15, 17],
        ok=[True, True, True, True, False, True, False, True],
    )


@pytest.fixture
def c7():
    """The worked forest of three chains of one prompt."""
    from mmrl.tree import StepTree

    n = math.nan
    return StepTree(
        parent=[-1, 0, 1, -1, 3, -1, 5],
        group=[0] * 7,
        status=[0, 0, 1, 0, 1, 0, 1],
        outcome=[n, n, 1.0, n, 0.0, n, 1.0],
        step_reward=[0.5, 0.7, 0.9, 0.2, 0.3, 0.5, 0.6],
        state_key=[1, 2, 3, 1, 4, 1, 2],
        edge_key=[1, 2, 3, 1, 4, 1, 6],
        logp=[-0.5] * 7,
        value=[0.5, 0.52, 0.9, 0.3, 0.1, 0.5, 0.95],
        root_value=[0.5],
        tok_start=[0, 2, 3, 6, 8, 10, 11],
        tok_end=[2, 3, 6, 8, 10, 11, 15],
        ok=[True, True, True, True, False, True, True],
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random class-conditional DiT (4 x 4 pictures, 10 classes) with its scheduler."""
    from tiny import save_tiny_dit

    return save_tiny_dit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def sandbox_root(tmp_path_factory):
    """The folder of recipes that run in seconds, made once; take `sandbox`."""
    from sandbox import Sandbox

    return Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.fixture
def sandbox(sandbox_root, monkeypatch):
    """What runs recipes and command lines for one iteration, from a working folder of its own."""
    monkeypatch.chdir(sandbox_root.root)
    monkeypatch.setenv("MMRL_CACHE", str(sandbox_root.root / "cache"))
    return sandbox_root

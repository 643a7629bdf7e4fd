"""What `import vision` gives to other packages."""

import ast
import subprocess
import sys
from pathlib import Path

import vision


def test_type_checkers_and_programs_see_the_same_names():
    tree = ast.parse(Path(vision.__file__).read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("vision.")
    ]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert declared == vision._MODULE_OF
    for name in vision.__all__:
        assert getattr(vision, name) is not None
    assert not hasattr(vision, "Nonsense")


def test_importing_vision_loads_no_torch():
    code = "import sys, vision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The import arrows of the house, and that a bare import stays cheap."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_import_arrows():
    script = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([script, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_mmrl_loads_nothing_heavy():
    code = "import sys, mmrl, mmrl.cli; print([m for m in ('torch', 'diffusers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def children_cpu_s():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_instant():
    start = children_cpu_s()
    done = subprocess.run([sys.executable, "-m", "mmrl", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout and children_cpu_s() - start < 2

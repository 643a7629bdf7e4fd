"""A user of one modality installs the packages of that one; what is missing is told with the extra that has it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tiny import recipe, save_tiny_dit
from vision_tiny import vision_recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}


def packages(*extras):
    """Import names of what these extras install, those of extras that they include as well."""
    found = set()
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            if included := re.match(r"mmrl\[(.*)\]", line):
                found |= packages(*included[1].split(","))
            else:
                name = re.match(r"[\w.-]+", line)[0].lower()
                found.add(IMPORTED_AS.get(name, name.replace("-", "_")))
    return found


def run_without(missing, *arguments, cwd):
    """`mmrl ARGUMENTS` in a process that has no such packages."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(missing)})); sys.argv[1:] = {list(arguments)}\n"
    code += f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom mmrl.cli import main\nmain()"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_each_extra_is_what_its_package_imports():
    """Import statements of a package name the core's dependencies and those of its extra."""
    core = {re.match(r"[\w.-]+", line)[0].lower() for line in PROJECT["dependencies"]}
    # transformers brings the hub's own package
    core = {IMPORTED_AS.get(name, name) for name in core} | {"mmrl", "typing_extensions", "huggingface_hub"}
    # bitsandbytes is the extra `bnb`
    optional = {"pyarrow": "mmrl", "bitsandbytes": "mmrl", "vllm": "vision", "tokenizers": "vision"}
    extras = {"mmrl": ("vision",), "vision": ("vision",), "video": ("video",), "diffusion": ("diffusion",)}
    for package, chosen in extras.items():
        allowed = core | packages(*chosen) | {name for name, where in optional.items() if where == package}
        allowed |= {"vision", "video"} if package == "video" else {package}
        for file in (ROOT / package).rglob("*.py"):
            others = imported(file) - allowed - sys.stdlib_module_names
            assert not others, f"{file}: {others}"


def imported(file):
    """Top-level packages of a file's import statements."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_a_missing_package_is_told_with_its_extra(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "model", tmp_path / "run")))
    done = run_without(packages("all"), "train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'mmrl[diffusion]'"), done.stderr


def test_the_core_lists_what_is_there(tmp_path):
    done = run_without(packages("all"), "list", "estimators", cwd=tmp_path)
    assert done.returncode == 0 and "tree_rpo" in done.stdout, done.stderr
    done = run_without(packages("all"), "list", cwd=tmp_path)
    assert done.returncode == 0 and "step_rules" in done.stdout, done.stderr


@pytest.mark.slow
def test_diffusion_trains_with_its_own_extra(tmp_path):
    missing = packages("all") - packages("diffusion")
    assert {"decord", "av", "math_verify"} <= missing
    tree = recipe(save_tiny_dit(tmp_path / "model"), tmp_path / "run", run={"report": True})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    done = run_without(missing, "train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "report.html").exists(), done.stderr


@pytest.mark.slow
def test_vision_trains_with_its_own_extra(tmp_path):
    missing = packages("all") - packages("vision")
    assert {"decord", "av", "diffusers"} <= missing
    sys.path.insert(0, str(ROOT / "tests" / "vision"))
    from families import family_folder

    (tmp_path / "pictures").mkdir()
    tree = vision_recipe(family_folder("qwen2_5_vl"), tmp_path / "pictures", tmp_path / "run")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    done = run_without(missing, "train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "model").exists(), done.stderr

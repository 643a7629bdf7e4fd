"""The documentation: links lead somewhere, a guide begins with its first call, every command is one that would run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from verbs import run_verb

from mmrl.cli import app
from mmrl.config import load_config, load_section
from mmrl.reasoning.annotate.recipe import AnnotateConfig
from mmrl.registry import kinds
from mmrl.search.recipe import SearchConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = [*(ROOT / "docs" / "guides").glob("*.md"), ROOT / "docs" / "start" / "start.md", ROOT / "README.md"]
VERBS = typer.main.get_command(app).commands
# Words that stand for something of the reader's, such as RECIPE, DIR, N or NAME.
PLACEHOLDER = re.compile(r"[A-Z]+(_[A-Z]+)*|my_\w+\.yaml")


def fenced(page):
    """The code blocks of a page, as (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands of a page, in blocks and in sentences, as words; continued lines are joined, comments left out."""
    lines = []
    for language, text in fenced(page):
        if language in ("", "bash", "sh"):
            lines += text.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    for line in lines:
        if re.match(r"mmrl [a-z]|tools/\S+\.sh |python [\w./-]+", line):
            yield shlex.split(line.replace("...", ""), comments=True)


COMMANDS = [pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page in PAGES for words in commands(page)]


def test_commands_were_found():
    assert len(COMMANDS) > 70 and {words.values[0][0] for words in COMMANDS} == {"mmrl", "python", "tools/launch.sh"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_begins_with_a_call(page):
    head = "\n".join(page.read_text().splitlines()[:12])
    assert "\n```" in head, f"{page.name}: the first call belongs into its first lines"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_would_run(words, monkeypatch):
    """Verbs, options, files, and every key of the recipe that it names; what it names below runs/ is made by others."""
    monkeypatch.chdir(ROOT)
    program, *arguments = words
    if program == "python":
        assert Path(arguments[0]).is_file() or arguments[0] == "-m"
        return
    if program.startswith("tools/"):
        assert Path(program).is_file()
        arguments = arguments[1:]
    verb, *arguments = arguments
    for one in verb.split("|"):
        assert one in VERBS
    options = {name for parameter in VERBS[verb.split("|")[0]].params for name in parameter.opts}
    for word in arguments:
        assert not word.startswith("--") or word in options, word
    if not arguments or PLACEHOLDER.fullmatch(arguments[0]):
        return
    if verb == "list":
        assert arguments[0] in {kind.name for kind in kinds()} or arguments[0].startswith(("--", "["))
        return
    if arguments[0].endswith(".yaml"):
        overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
        check_recipe(verb, arguments[0], overrides)


def check_recipe(verb, recipe, overrides):
    """Reads the recipe with its overrides, which refuses unknown keys and options."""
    sections = {"annotate": AnnotateConfig, "search": SearchConfig}
    # What another recipe makes is looked for when the recipe is read.
    overrides = [o for o in overrides if "runs/" not in o]
    if verb in sections:
        load_section(recipe, sections[verb], overrides)
    else:
        config = load_config(recipe, overrides)
        assert config.trainer == yaml.safe_load(Path(recipe).read_text())["trainer"]


def test_the_first_recipe_runs(tmp_path, monkeypatch):
    """The files of the start page as they stand there, with a tiny model in place of the one that is named."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests" / "vision")])
    from families import family_folder, picture

    blocks = fenced(ROOT / "docs" / "start" / "start.md")
    row = next(json.loads(text) for language, text in blocks if not language and text.startswith("{"))
    (tmp_path / "my_rewards.py").write_text(next(text for language, text in blocks if language == "python"))
    (tmp_path / "my_recipe.yaml").write_text(next(text for language, text in blocks if language == "yaml"))
    (tmp_path / "pictures").mkdir()
    picture(0).save(tmp_path / "pictures" / row["images"][0])
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    small = [
        "policy.lora_rank=2",
        "policy.dtype=float32",
        "policy.max_new_tokens=8",
        "run.iterations=1",
        "run.cpu=true",
    ]
    model = f"policy.model={family_folder('qwen2_5_vl')}"
    run_verb("train", "my_recipe.yaml", model, *small, "run.prompts_per_iteration=1")
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()

"""Which estimator and which transform runs in which modality: one iteration of branch GRPO for every cell.

    python tools/credit_table.py                 prints the table
    python tools/credit_table.py --write         puts it into docs/reference/credit_modalities.md
    python tools/credit_table.py --only gae red  some rows

Models are tiny and untrained, recipes are what a user would write: rewards, step rewards, readings, credit. A cell
says `runs`, or why the method has no meaning there. A row that runs nowhere, or a cell that fails, is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from mmrl.config import parse_config
from mmrl.registry import Row, build, find, rows
from mmrl.rollout import Continuation, Policy, Prompt, Rollout, Sample, State
from mmrl.trainers.branch_grpo import BranchGrpo

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "credit_modalities.md"
MODALITIES = ("text", "picture", "conversation", "diffusion")

# Options that a row needs and that have no default.
REQUIRED: dict[str, dict[str, Any]] = {
    "clip": {"eta": 0.5},
    "overlong": {"limit": 8, "buffer": 4},
    "mix": {"dense": 0.5},
    "mixed_grained": {"page": 0.5},
    "attribution": {"weights": [1.0]},
    "unfinished_outcome": {"outcome": 0.0},
    "reward_machine": {"machine": {
        "events": ["odd", "even"], "start": "begin",
        "edges": [["begin", "odd", "begun"], ["begun", "even", "accept"]],
    }},
}  # fmt: skip

# Estimators that read what a transform writes; without an entry, by the field that it writes.
ESTIMATOR_OF = {"step_reward": "step_grpo", "outcome": "grpo"}


class Fill(NamedTuple):
    """How a recipe fills a field: the section it adds to, and the component."""

    section: str
    component: dict[str, Any]


# ---- what a user would bring ----------------------------------------------------------------------------------------


class Questions:
    """Six questions, with a small picture each where asked for; untrained models answer by chance."""

    rewards = ("credit_table:even_length",)

    def __init__(self, pictures: str = "") -> None:
        images = [] if not pictures else [pictures]
        reference = {"answer": "5", "steps": ["red 2", "blue 3"], "solution": "red 2\nblue 3\nanswer 5"}
        self.prompts = [Prompt(f"q{i}", {"question": "red and blue ?", "images": images}, reference) for i in range(6)]
        self.eval_prompts = self.prompts[:1]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Nothing: no training follows."""
        return {}


class Classes:
    """Ten classes of small pictures, rewarded for brightness."""

    rewards = ("credit_table:bright",)

    def __init__(self) -> None:
        self.prompts = [Prompt(f"class-{i}", {"label": i}) for i in range(10)]
        self.eval_prompts = self.prompts[:1]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Nothing: no training follows."""
        return {}


def even_length(samples: Sequence[Sample]) -> list[float]:
    """1 for texts of an even number of characters."""
    return [float(len(s.output) % 2 == 0) for s in samples]


def bright(samples: Sequence[Sample]) -> list[float]:
    """1 for pictures above the middle of their batch."""
    means = [float(s.output.mean()) for s in samples]
    middle = sorted(means)[len(means) // 2]
    return [float(m >= middle) for m in means]


def half_or_one(rollout: Rollout) -> torch.Tensor:
    """(N,) a step reward in [0, 1] for any modality: whether the step's own log-prob is above the median."""
    logp = rollout.tree.logp.nan_to_num(0.0)
    return 0.5 + 0.5 * (logp > logp.median()).double()


class Halves:
    """`half_or_one` with a score for the prompt alone."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """(N,) see `half_or_one`."""
        return half_or_one(rollout)

    def root_scores(self, rollout: Rollout) -> torch.Tensor:
        """(G,) one half."""
        return torch.full((len(rollout.prompts),), 0.5, dtype=torch.float64)


class Critic:
    """A judge that answers by rule: steps of an odd number of characters have a minor error."""

    def extend(
        self, states: Sequence[State], n: int, *, seed: int, steps: int | None = None, temperature: float | None = None
    ) -> list[list[Continuation]]:
        """n equal replies to each question."""
        replies = []
        for state in states:
            question = state.prompt.inputs["question"]
            written = re.findall(r"<paragraph_\d+>\n(.*?)\n</paragraph_\d+>", question, re.DOTALL)
            classes = ["minor" if len(step) % 2 else "none" for step in written]
            text = "\n".join(f"<analysis_{i}>\\boxed{{{c}}}</analysis_{i}>" for i, c in enumerate(classes))
            replies.append([Continuation((text,), ((0.0,),), True)] * n)
        return replies


# ---- tiny policies --------------------------------------------------------------------------------------------------


def learn_breaks(model: Any, words: int, mark: int, end: int) -> None:
    """Thirty updates after which every fourth token is `mark` and a text ends soon: untrained models never do."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        ids = torch.randint(words // 2, words, (8, 16), generator=generator)
        ids[:, 3::4] = mark
        ids[:, -1] = end
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def vision_model(folder: Path) -> Path:
    """A Qwen2.5-VL of the shapes task that writes short lines."""
    from vision import save_model
    from vision.tasks import shapes_model as shapes

    torch.manual_seed(0)
    model = shapes.new_model(width=64, layers=1)
    ids = {word: i for i, word in enumerate(shapes.VOCABULARY)}
    learn_breaks(model, len(ids), ids["\n"], ids["<|im_end|>"])
    save_model(model, shapes.new_processor(), folder)
    return folder


def video_model(folder: Path) -> Path:
    """A Qwen2.5-VL of the clips task that takes short turns."""
    from video.tasks import clips_model as clips
    from vision import save_model

    torch.manual_seed(0)
    model = clips.new_model(width=64, layers=1)
    ids = clips.WORDS.ids
    learn_breaks(model, len(ids), ids["<|im_end|>"], ids["<|im_end|>"])
    save_model(model, clips.new_processor(), folder)
    return folder


def diffusion_model(folder: Path) -> Path:
    """A DiT of the digits task."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffusion.digits_base import new_dit

    torch.manual_seed(0)
    new_dit(width=32, layers=1, heads=2).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    return folder


class Modality:
    """A policy, the recipe around it, and what fills each field there.

    fills: field -> how a recipe fills it. meaningless: field -> why it cannot be filled.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.fills, self.meaningless = FILLS | OWN_FILLS.get(name, {}), MEANINGLESS.get(name, {})
        self.base = _base(name, folder)
        section = dict(self.base["policy"])
        self.policy: Policy = build("policies", "policy", section.pop("name"), section)
        self.written = {*find("policies", self.base["policy"]["name"]).writes(), "outcome", "forks"}

    def recipe(self, credit: Mapping[str, Any], reads: Sequence[str]) -> dict[str, Any] | str:
        """The recipe that fills the fields, or why there is none."""
        tree = json.loads(json.dumps(self.base)) | {"credit": credit}
        tree["plan"] = {int(k): v for k, v in tree["plan"].items()}
        names = list(reads)
        for name in names:
            if name == "chains":
                tree["plan"] = {0: 4}
                continue
            if name in self.written:
                continue
            if name in self.meaningless:
                return self.meaningless[name]
            fill = self.fills[name]
            names += find(KINDS[fill.section], fill.component["name"]).reads()
            section = tree.setdefault(fill.section, [])
            if fill.component not in section:
                section.append(fill.component)
        return tree

    def run(self, tree: dict[str, Any]) -> None:
        """One iteration; raises what it raises."""
        config: Any = parse_config(tree)
        trainer = BranchGrpo(config, policy=self.policy)
        metrics = trainer.iterate(0)
        if metrics["policy/ratio_dev_max"] > 1e-3:
            raise RuntimeError(f"the ratio deviates by {metrics['policy/ratio_dev_max']} before the first update")


def _base(name: str, folder: Path) -> dict[str, Any]:
    run = {
        "output": str(folder / f"run-{name}"), "iterations": 1, "prompts_per_iteration": 2, "trackers": [],
        "report": False, "cpu": True, "resume": True, "checkpoint_every": 99, "eval_every": 99,
    }  # fmt: skip
    policy: dict[str, Any] = {"name": "vision", "steps": "line", "max_new_tokens": 16, "max_steps": 3}
    tree: dict[str, Any] = {"run": run, "plan": {"0": 2, "1": 2}, "policy": policy, "optim": {"lr": 1e-6}}
    if name == "diffusion":
        tree["policy"] = {"name": "diffusion", "model": str(diffusion_model(folder / "dit")), "steps": 4}
        tree["task"] = {"name": "credit_table:Classes"}
        return tree
    if name == "conversation":
        tree["policy"] = {
            "name": "video", "model": str(video_model(folder / "clips")), "coords": "norm1000", "hints": False,
            "views": {
                "frames": 16, "segment_frames": 4, "video_pixels": 256, "frame_pixels": 1024, "crop_pixels": 256,
            },
            "max_steps": 3, "max_new_tokens": 6, "max_context": 256, "max_prompt_tokens": 128,
        }  # fmt: skip
        tree["task"] = {"name": "clips", "train": 4, "held_out": 2}
        tree["rewards"] = [{"name": "credit_table:even_length", "timeout_s": 0}]
        return tree
    policy["model"] = str(vision_model(folder / "shapes"))
    tree["task"] = {"name": "credit_table:Questions"}
    tree["rewards"] = [{"name": "credit_table:even_length", "timeout_s": 0}]
    if name == "picture":
        from PIL import Image

        file = folder / "picture.png"
        Image.new("RGB", (32, 32), "red").save(file)
        tree["task"]["pictures"] = str(file)
    return tree


KINDS = {"readings": "readings", "step_rewards": "scorers"}  # of the registry, by section of a recipe

STEP = {"name": "credit_table:half_or_one"}
EVIDENCE = {"name": "evidence", "golds": "steps", "item": r"\w+"}
FILLS: dict[str, Fill] = {
    "step_reward": Fill("step_rewards", STEP),
    "value": Fill("readings", {"name": "tree_value"}),
    "root_value": Fill("readings", {"name": "tree_value"}),
    "ok": Fill("readings", {"name": "score", "scorer": STEP["name"], "into": "ok", "at_least": 0.75}),
    "tags.wrong": Fill("readings", {"name": "score", "scorer": STEP["name"], "into": "tags.wrong", "below": 0.75}),
    "tags.auxiliary": Fill("readings", {"name": "score", "scorer": STEP["name"], "into": "tags.auxiliary"}),
    "tags.contribution": Fill("readings", {"name": "score", "scorer": STEP["name"], "into": "tags.contribution"}),
    "tags.aspect": Fill("readings", {"name": "score", "scorer": STEP["name"], "into": "tags.aspect"}),
    "tags.implicit": Fill("readings", {"name": "implicit"}),
    "tags.baseline": Fill("readings", {"name": "baseline", "n": 2}),
    "tags.severity": Fill("readings", {"name": "judge", "ask": "severity", "policy": {"name": "credit_table:Critic"}}),
    "tags.events": Fill("readings", {"name": "events", "patterns": {"odd": "[a-g]", "even": "[h-z]"}}),
    "tags.similarity": Fill("readings", EVIDENCE),
    "tags.documents": Fill("readings", EVIDENCE),
    "tags.attribution": Fill(
        "readings", {"name": "attribution", "scorer": {"name": "credit_table:Halves"}, "by": ["difference"]}
    ),
}
OWN_FILLS: dict[str, dict[str, Fill]] = {}
MEANINGLESS: dict[str, dict[str, str]] = {
    "diffusion": {
        "state_key": "no two rollouts meet in a latent, so states have no keys to group by",
        "edge_key": "no two rollouts meet in a latent, so states have no keys to group by",
        "tags.events": "nothing happens between two latents that an event could name",
        "tags.similarity": "a denoising step shows no document that gold texts could be compared with",
        "tags.documents": "a denoising step shows no document that gold texts could be compared with",
        "tags.severity": "severity is a judge's word about a written step",
    },
}


# ---- the table ------------------------------------------------------------------------------------------------------


def cell(row: Row, modality: Modality) -> str:
    """`runs`, or why the row has no meaning in the modality."""
    spec = {"name": row.name, **REQUIRED.get(row.name, {})}
    transforms: list[Any] = []
    reads = list(row.reads(REQUIRED.get(row.name)))
    estimator: dict[str, Any] = spec
    if row.kind.name == "transforms":
        transforms = [spec]
        written = row.writes()[0]
        estimator = {"name": ESTIMATOR_OF.get(written, "tp_grpo")}
    tree = modality.recipe({"transforms": transforms, "estimators": [estimator]}, reads)
    if isinstance(tree, str):
        return tree
    modality.run(tree)
    return "runs"


def table(modalities: Sequence[Modality], only: Sequence[str] = ()) -> tuple[list[list[str]], list[str]]:
    """Rows (name, kind, a cell per modality), and the errors of cells that failed."""
    lines: list[list[str]] = []
    errors: list[str] = []
    every = [row for kind in ("estimators", "transforms") for row in rows(kind) if not only or row.name in only]
    for row in track(every, description="credit"):
        line = [row.name, row.kind.singular]
        for modality in modalities:
            try:
                line.append(cell(row, modality))
            except Exception as error:
                line.append("FAILS")
                errors.append(f"{row.name} on {modality.name}: {type(error).__name__}: {error}")
        if "runs" not in line:
            errors.append(f"{row.name} runs nowhere")
        lines.append(line)
    return lines, errors


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """docs/reference/credit_modalities.md."""
    reasons = sorted({c for line in lines for c in line[2:] if c not in ("runs", "FAILS")})
    out = [
        "# Credit by modality", "",
        "<!-- made by `python tools/credit_table.py --write`; edit that file, not this one -->", "",
        "Every estimator and transform, in one iteration of branch GRPO from a recipe on a tiny model of each kind: "
        "texts,",
        "pictures, conversations about films, denoising. A number says why a method has no meaning there.", "",
        "| name | kind | " + " | ".join(MODALITIES) + " |", "|---|---|" + "---|" * len(MODALITIES),
    ]  # fmt: skip
    for line in lines:
        cells = [c if c not in reasons else f"{reasons.index(c) + 1}" for c in line[2:]]
        out.append(f"| `{line[0]}` | {line[1]} | " + " | ".join(cells) + " |")
    out += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/reference/credit_modalities.md")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    parser.add_argument("--modalities", nargs="*", default=MODALITIES, choices=MODALITIES)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("MMRL_CACHE", folder)
        modalities = [Modality(name, Path(folder)) for name in arguments.modalities]
        lines, errors = table(modalities, arguments.only)
    text = markdown(lines)
    print(text)
    if arguments.write:
        PAGE.write_text(text)
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()

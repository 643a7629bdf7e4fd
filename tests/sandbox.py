"""A folder in which every recipe and command of the documentation runs in seconds.

The built-in models are there untrained, a model of another name becomes a tiny random one, the files that recipes name
are there, and what a recipe takes from another one (`runs/NAME/...`) is made by that one first. Runs are cut to one
iteration of few prompts; what a recipe is about stays as it is written.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from verbs import run_verb

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("vision", "video", "diffusion", "reasoning", "reasoning/bench")]

TRAIN = {
    "run.cpu": True, "run.iterations": 1, "run.prompts_per_iteration": 2, "run.trackers": [], "run.report": False,
    "run.eval_every": 1, "run.mixed_precision": "no",
}  # fmt: skip
# fewer prompts, by task
TASKS: dict[str, dict[str, Any]] = {
    "shapes": {"train": 8, "held_out": 2},
    "clips": {"train": 4, "held_out": 2},
    "digits_pairs": {"sets_per_class": 1, "set_size": 3, "eval_pairs_per_class": 1},
}


# Recipe -> the folder it names, and the tiny pipeline that stands in for it.
RECIPES_OF_FAMILIES = {
    "sd3_branch": ("stable-diffusion-3.5-medium", "sd3"), "flux_branch": ("FLUX.1-dev", "flux"),
    "qwen_image_branch": ("Qwen-Image", "qwen_image"), "wan_branch": ("Wan2.1-T2V-1.3B-Diffusers", "wan"),
    "z_image_branch": ("Z-Image-Turbo", "z_image"), "lpo_transformer": ("stable-diffusion-3.5-medium", "sd3"),
}  # fmt: skip


class Sandbox:
    """Runs command lines. `root` is their working folder: models and pictures in it are kept, see `conftest.sandbox`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        (root / "configs").symlink_to(ROOT / "configs")
        (root / "cache").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MMRL_CACHE", str(root / "cache"))
            self._models()
        self._data()

    def run(self, command: str, *overrides: str) -> dict[str, Any]:
        """The last row of metrics, or the report, of a command line that starts with `mmrl VERB RECIPE`.

        Raises:
            Exception: whatever the command raised.
        """
        _, verb, recipe, *given = shlex.split(command)
        if verb == "bench":
            return self._bench(recipe, given)
        arguments, output = self.shortened(command, *overrides)
        run_verb(*arguments, *(("--out", str(output)) if verb == "rollouts" else ()))
        if verb == "train":
            rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            return {k: v for row in rows for k, v in row.items()}
        return {} if verb == "rollouts" else json.loads((output / "report.json").read_text())

    def shortened(self, command: str, *overrides: str) -> tuple[list[str], Path]:
        """The arguments that `run` gives to mmrl for this command line, and the folder that it will write."""
        _, verb, recipe, *given = shlex.split(command)
        tree = yaml.safe_load((self.root / recipe).read_text())
        for key, value in (o.split("=", 1) for o in [*given, *overrides]):
            _put(tree, key, yaml.safe_load(value))
        self._make_what_is_named(tree)
        self.count += 1
        output = self.root / "out" / str(self.count)
        small = [f"{key}={json.dumps(value)}" for key, value in self._small(verb, tree, output).items()]
        return [verb, recipe, *given, *overrides, *small], output

    def _bench(self, name: str, options: list[str]) -> dict[str, Any]:
        """A benchmark's report by a scorer that says 1/2."""
        options[options.index("--scorer") + 1] = "test_jobs:constant"
        run_verb("bench", name, *options, "--out", str(self.root / "bench.json"))
        return json.loads((self.root / "bench.json").read_text())

    def _small(self, verb: str, tree: dict[str, Any], output: Path) -> dict[str, Any]:
        """Overrides that shorten a recipe and give it models that are there."""
        small: dict[str, Any] = {}
        if verb in ("train", "rollouts"):
            small |= TRAIN | {"run.output": str(output)}
        else:
            small |= {"cpu": True, "output": str(output), "prompts": 2}
        for key, value in TASKS.get(tree["task"]["name"], {}).items():
            small[f"task.{key}"] = value
        for section in ("policy", "scorer", "guide"):
            small |= self._tiny(section, tree.get(section))
        if isinstance(tree.get("policy"), dict) and tree["policy"]["name"] in ("vision", "video"):
            views = tree["policy"].get("views")
            small |= {"policy.views.frames": 4, "policy.views.segment_frames": 2} if views else {}
            small["policy.max_new_tokens"] = min(tree["policy"].get("max_new_tokens", 12), 12)
        for section in ("rewards", "step_rewards", "readings"):
            for i, row in enumerate(tree.get(section) or []):
                small |= self._tiny(f"{section}.{i}.policy", row.get("policy"))
                small |= self._tiny(f"{section}.{i}", row)
                if section == "rewards":
                    small[f"rewards.{i}.timeout_s"] = 0
        return small

    def _tiny(self, key: str, section: Any) -> dict[str, Any]:
        """Overrides of a section with a model that is neither built in nor a folder."""
        if isinstance(section, dict) and section.get("name") == "generative_prm":
            # the built-in model has no words for verdicts
            return {f"{key}.policy.model": str(self._family), f"{key}.policy.max_new_tokens": 12}
        model = section.get("model") if isinstance(section, dict) else None
        if model in self.built_in:
            return {f"{key}.model": str(self.built_in[model])}
        if model in (None, "digits") or (self.root / model).exists():
            return {}
        small: dict[str, Any] = {f"{key}.model": str(self._family)}
        small |= {f"{key}.dtype": "float32"} if "dtype" in section else {}
        small |= {f"{key}.lora_rank": 2} if section.get("lora_rank") else {}
        return small | ({f"{key}.engine": "transformers"} if "engine" in section else {})

    def _make_what_is_named(self, tree: Any) -> None:
        """Runs the recipes whose outputs are named below `runs/`, each once."""
        for path in _strings(tree):
            if (path.startswith("runs/") and path.split("/")[1] != "tree") or path == "runs/tree":
                self._make(Path(path))

    def _make(self, path: Path) -> None:
        folder = Path(*path.parts[:2])
        if len(path.parts) == 2 and path.name in TREES and not (self.root / path).exists():
            recipe, more = TREES[path.name]
            self.run(f"mmrl rollouts {recipe}", *more)
            shutil.move(self.root / "out" / str(self.count), self.root / path)
        if len(path.parts) < 3 or (self.root / path).exists():
            return
        recipe, verb, more = self._makers[str(folder)]
        self.run(f"mmrl {verb} {recipe}", *more)
        (self.root / folder).parent.mkdir(exist_ok=True)
        shutil.move(self.root / "out" / str(self.count), self.root / folder)

    @cached_property
    def _makers(self) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """Output folder -> the recipe that makes it and its verb."""
        makers = {}
        for file in sorted((ROOT / "configs").rglob("*.yaml")):
            tree = yaml.safe_load(file.read_text())
            recipe = str(file.relative_to(ROOT))
            if "run" in tree and "output" in tree["run"]:
                makers[tree["run"]["output"]] = (recipe, "train", ())
            elif "output" in tree:
                makers[tree["output"]] = (
                    recipe,
                    "annotate" if "annotate" in recipe or "exact" in recipe else "search",
                    (),
                )
        makers["runs/shapes_svpo"] = ("configs/vision/shapes_step_dpo.yaml", "train", ())
        makers["runs/shapes_prm_2"] = ("configs/vision/shapes_prm.yaml", "train", ("run.seed=1",))
        return makers

    # ---- what is there from the start -------------------------------------------------------------------------------

    @cached_property
    def _family(self) -> Path:
        from families import family_folder

        return family_folder("qwen2_5_vl")

    def _models(self) -> None:
        """The built-in models under the names that they have in the cache, untrained."""
        import torch

        from diffusion import digits_base
        from mmrl.cache import made_once
        from video.tasks import clips_base, clips_model
        from vision import save_model
        from vision.tasks import shapes_base, shapes_model

        cache = self.root / "cache"
        torch.manual_seed(0)
        shapes, clips = cache / shapes_base.Recipe().key, cache / clips_base.Recipe().key
        self.built_in = {"shapes": shapes, "clips": clips}

        def make_clips(work: Path) -> None:
            clips_model.new_model().save_pretrained(work)
            clips_model.new_processor().save_pretrained(work)

        made_once(shapes, partial(save_model, shapes_model.new_model(), shapes_model.new_processor()))
        made_once(clips, make_clips)
        short = digits_base.Recipe(steps=1, width=16, layers=1, heads=2, classifier_steps=1)
        digits_base.digits_base(short)
        (cache / short.key).rename(cache / digits_base.Recipe().key)

    def add_pipelines(self) -> None:
        """Stable Diffusion's folders as the recipes of LPO name them, and the latent rewards that judge."""
        from test_unet import save_pipeline

        from diffusion.latent.reward import LatentReward

        for name, kind in (("stable-diffusion-v1-5", "sd"), ("stable-diffusion-xl-base-1.0", "xl")):
            if (self.root / name).exists():
                continue
            folder = save_pipeline(self.root / name, kind)
            LatentReward.build(str(folder)).save(self.root / ("lrm_sdxl" if kind == "xl" else "lrm_sd15"))

    def add_family(self, recipe: str) -> list[str]:
        """The folder that a recipe of another family of pipelines names; overrides that make its outputs small."""
        from family_pipelines.builders import FAMILIES, save_family

        from diffusion.latent.reward import LatentReward

        model, family = RECIPES_OF_FAMILIES[recipe]
        if not (self.root / model).exists():
            save_family(family, self.root / model)
        keys = ("height", "width", "num_frames", "call")
        options = {k: v for k, v in FAMILIES[family].options.items() if k in keys}
        if recipe.startswith("lpo") and not (self.root / "lrm_sd3").exists():
            LatentReward.build(str(self.root / model), **options).save(self.root / "lrm_sd3")
        return [f"policy.{name}={value}" for name, value in options.items()]

    def _data(self) -> None:
        """The files that recipes name below `data/`."""
        from families import picture

        data = self.root / "data"
        shutil.copytree(TESTS / "data" / "prm", data)
        for file in data.glob("puzzlevqa_*.jsonl"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
        shutil.copy(data / "prm800k.jsonl", data / "prm800k_eval.jsonl")
        for name in ("prompts", "eval_prompts"):
            (data / f"{name}.jsonl").write_text('{"prompt": "a red square"}\n{"prompt": "a blue dot"}\n')
        rows = []
        for i in range(4):
            picture(i).save(data / "images" / f"{i}.png")
            row = {"question": f"{i} + 1?", "images": [f"{i}.png"], "answer": str(i + 1), "key_steps": [["add"]]}
            rows.append(json.dumps(row))
        for name in ("train", "eval"):
            (data / f"{name}.jsonl").write_text("\n".join(rows))
        (self.root / "my_rewards.py").write_text(
            "def score(samples):\n    return [float(s.output.mean()) for s in samples]\n"
        )
        row = json.loads((TESTS / "data" / "video" / "videocom.json").read_text())[1]
        for name in ("grpo", "eval"):
            (data / f"videocom_{name}.json").write_text(json.dumps([row | {"id": f"{name}-{i}"} for i in range(2)]))
        video = TESTS / "data" / "video"
        (data / "video_r1.json").write_text(json.dumps(json.loads((video / "video_r1.json").read_text())[:2]))
        charades = json.loads((video / "videochat_r1.json").read_text())
        (data / "videochat_r1.json").write_text(json.dumps({k: charades[k] for k in ("a", "c")}))
        (data / "ui_s1.jsonl").write_text((video / "ui_s1.jsonl").read_text().splitlines()[0])
        (data / "screens" / "pictures").mkdir(parents=True)
        picture(0).resize((40, 80)).save(data / "screens" / "pictures" / "screen.png")
        plan = {
            "question": "Clear the table.",
            "video": "a.mp4",
            "answer": "done",
            "plan": ["pick(cup)", "place(cup, tray)"],
        }
        (data / "plans.jsonl").write_text("".join(json.dumps(plan | {"id": i}) + "\n" for i in ("p", "q")))
        self._films(data / "videos")
        self._benchmarks(data)

    def _benchmarks(self, data: Path) -> None:
        """A few rows of each benchmark under its name."""
        from bench_tiny import write
        from test_bench_pairs import mp_files
        from test_bench_steps import h2v, pb_row

        from mmrl.reasoning.bench.pairs import SECTIONS

        subsets = [s for members in SECTIONS.values() for s in members]
        pairs = [{"id": 1, "prompt": "Q", "chosen": "good", "rejected": "bad", "subset": s} for s in subsets]
        mp_files(data / "mpbench")
        (data / "prmbench").mkdir()
        shutil.copy(data / "prmbench.jsonl", data / "prmbench")
        write(data / "processbench" / "math.jsonl", [pb_row("math-0", 2), pb_row("math-1", -1)])
        write(data / "hard2verify" / "rows.jsonl", [h2v("a", [1, 0, 1]), h2v("b", [1, 1])])
        write(data / "rewardbench" / "rows.jsonl", pairs)

    def _films(self, folder: Path) -> None:
        from make_clips import write_clip

        (folder / "clips").mkdir(parents=True)
        write_clip(folder / "a.mp4", frames=60)
        for name in ("b.mp4", "c.mp4", "clips/a.mp4", "clips/b.mp4"):
            shutil.copy(folder / "a.mp4", folder / name)


# trees that `mmrl rollouts` writes, in the words of the recipes that read them
TREES = {
    "tree": ("configs/diffusion/digits_branch.yaml", ()),
    "shapes_trees": ("configs/vision/shapes_step_dpo.yaml", ()),
    "shapes_trees_eval": ("configs/vision/shapes_step_dpo.yaml", ("task.seed=1",)),
}


def _put(tree: Any, key: str, value: Any) -> None:
    *above, last = [int(k) if k.isdigit() else k for k in key.split(".")]
    for k in above:
        tree = tree[k] if isinstance(k, int) else tree.setdefault(k, {})
    tree[last] = value


def _strings(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [s for v in tree.values() for s in _strings(v)]
    if isinstance(tree, list):
        return [s for v in tree for s in _strings(v)]
    return [tree] if isinstance(tree, str) else []

"""Task `clips`: find where and when something happens in a film, zoom in, and say what it was.

Real video files, made once by this module and decoded like any other. A chain is one manipulation a turn:
`FIND_SEGMENT(event) = 3`, `FIND_FRAME(event) = 11`, `SPATIAL_ZOOM(event) = [ 250, 0, 500, 250 ]`,
`FINAL_ANSWER: red`. Every call can be checked against what was drawn. Difficulty is the contrast of lamp and box.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmrl.cache import cache_root, made_once
from mmrl.registry import declares
from mmrl.rollout import Answer, Prompt, Sample
from mmrl.seeding import numpy_generator
from video.rewards import manipulation_f1
from video.rewards.calls import Reading
from video.tasks.clips_files import write_mp4
from video.tasks.clips_scene import ANSWER as ANSWER_WORD
from video.tasks.clips_scene import (
    FPS,
    FRAMES,
    PER_SEGMENT,
    QUESTIONS,
    SECONDS,
    SIZE,
    Clip,
    answer_of,
    cell_box,
    draw,
    sample_clip,
    solve,
)
from vision.tiny_models import progress

VERSION = 1  # raise when clips, drawing or prompts change
READING = Reading(syntax="videocom", coords="norm1000")


class ClipsTask:
    """`train` and `held_out` questions, each about a film of its own (H.264 in mp4, written once into the cache).

    contrast: opacity of lamp and box, uniform between the two, in (0, 1]. The base model learnt from 0.5 to 1.

    Raises:
        ValueError: contrasts that do not fit.
        RuntimeError: the cached films are damaged.
    """

    rewards = ("clip_answer",)
    # the reward per turn that fits, with coords: norm1000
    step_rewards = ("manipulations",)

    def __init__(
        self, train: int = 1000, held_out: int = 192, contrast: tuple[float, float] = (0.15, 0.3), seed: int = 0
    ) -> None:
        # one clip, so that contrasts that do not fit are refused before any film is written
        sample_clip(numpy_generator("check"), "train", contrast=contrast)
        settings = {
            "train": train,
            "held_out": held_out,
            "contrast": list(contrast),
            "seed": seed,
            "version": VERSION,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = made_once(cache_root() / f"clips-films-{key}", partial(_write_films, settings))
        self.prompts = _read_prompts(folder, "train")
        self.eval_prompts = _read_prompts(folder, "held_out")

    def answer(self, prompt: Prompt) -> Answer:
        """The last turn of a right conversation."""
        return Answer(f"{ANSWER_WORD} ", str(prompt.reference["answer"]))

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """accuracy: share of right answers. f1, precision, recall: of manipulations, against what was drawn."""
        right = ClipAnswer()(samples)
        return {"accuracy": sum(right) / max(len(right), 1), **manipulation_f1(samples, READING)}


@declares(reads=("texts",))
class ClipAnswer:
    """Outcome reward: 1 if the last turn is the right answer, else 0."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One number per sample; `output` is the conversation, a turn a line."""
        return [float(_last_answer(s.output) == s.prompt.reference["answer"]) for s in samples]


def _last_answer(output: str) -> str | None:
    last_turn = output.strip().split("\n")[-1]
    if not last_turn.startswith(ANSWER_WORD):
        return None
    return last_turn.removeprefix(ANSWER_WORD).strip()


def _write_films(settings: Mapping[str, Any], work: Path) -> None:
    """Write the films of both splits into the folder `work`, and a file of prompts each."""
    for split in ("train", "held_out"):
        rows = []
        for i in progress(range(settings[split]), f"writing films (clips, {split})"):
            rng = numpy_generator("film", settings["seed"], split, i)
            clip = sample_clip(rng, split, contrast=tuple(settings["contrast"]))
            # half of the questions are about a colour, which alone needs the zoom
            question = QUESTIONS[int(rng.choice(len(QUESTIONS), p=(0.25, 0.25, 0.5)))]
            write_mp4(work / f"{split}-{i:05d}.mp4", draw(clip, range(FRAMES)), FPS)
            rows.append(_row(split, i, clip, question))
        (work / f"{split}.json").write_text(json.dumps(rows))
    (work / "settings.json").write_text(json.dumps(dict(settings), indent=1) + "\n")


def _row(split: str, index: int, clip: Clip, question: str) -> dict[str, Any]:
    """One prompt as JSON, its film by file name. Times and frames are exact; only colours need the zoom."""
    start = clip.segment * PER_SEGMENT / float(FPS)
    reference = {
        "answer": answer_of(clip, question),
        "answer_type": "text",
        "steps": solve(clip, question),
        "segments": [[start, start + PER_SEGMENT / float(FPS)]],
        "segment_ids": [clip.segment + 1],
        "frames": [[clip.frame, clip.frame]],
        "frame_count": FRAMES,
        "duration": SECONDS,
        "size": [SIZE, SIZE],
    }
    if question == "colour":
        reference["boxes"] = [{"frame": clip.frame, "box": list(cell_box(clip.cell))}]
    return {
        "id": f"clips/{split}/{index}",
        "question": f"{question} ?",
        "film": f"{split}-{index:05d}.mp4",
        "reference": reference,
    }


def _read_prompts(folder: Path, split: str) -> list[Prompt]:
    try:
        rows = json.loads((folder / f"{split}.json").read_text())
        # caches are cleaned by hand at times; a film that is gone would only be found in the middle of a run
        missing = [row["film"] for row in rows if not (folder / row["film"]).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} films are missing, the first is {missing[0]}")
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"the cached films in {folder} are damaged ({error}); delete that folder and run again, it is made anew "
            "in less than a minute"
        ) from error
    prompts = []
    for row in rows:
        inputs = {"question": row["question"], "videos": [str(folder / row["film"])]}
        prompts.append(Prompt(row["id"], inputs, row["reference"]))
    return prompts

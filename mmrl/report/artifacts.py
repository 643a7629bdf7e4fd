"""Files of a run for people to look at: samples of every evaluation, and rollout trees with their pictures.

Outputs are pictures, (C, H, W) tensors in [0, 1] or PIL images, kept as PNG, films, (F, C, H, W), kept as PNG that
moves, or texts, kept as they are; a turn of an agent is a text with the picture of what it made the environment show.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrl.rollout import Prompt, Rollout, Sample
from mmrl.workdir import publish

# Size of the grid of samples: samples per row, and rows.
PER_ROW = 10
MAX_ROWS = 12
# Time of a frame of a film on the page; the film's own rate is not known here.
FRAME_MS = 125


def save_samples(samples: Sequence[Sample], rewards: Sequence[float], folder: Path) -> None:
    """The first samples of every kind of prompt (same inputs), with their rewards, into `folder`."""
    rows: dict[str, dict[str, Any]] = {}
    with publish(folder) as part:
        part.mkdir()
        for i, (sample, reward) in enumerate(zip(samples, rewards, strict=True)):
            key = json.dumps(dict(sample.prompt.inputs), sort_keys=True)
            if key not in rows:
                if len(rows) == MAX_ROWS:
                    continue
                shown = prompt_picture(sample.prompt, part, f"prompt_{i:04d}")
                rows[key] = {"title": prompt_title(sample.prompt), "prompt": shown, "cells": []}
            cells = rows[key]["cells"]
            if len(cells) < PER_ROW:
                cells.append({"output": save_output(sample.output, part, f"{i:04d}"), "reward": reward})
        (part / "samples.json").write_text(json.dumps(list(rows.values()), indent=1) + "\n")


def prompt_title(prompt: Prompt) -> str:
    """The question, or the inputs that are no media."""
    if "question" in prompt.inputs:
        return str(prompt.inputs["question"])
    return ", ".join(f"{name} {value}" for name, value in prompt.inputs.items() if name not in ("images", "videos"))


def prompt_picture(prompt: Prompt, folder: Path, name: str) -> str | None:
    """A small copy of the prompt's first image in `folder`; its file name, None when it has no image."""
    images = prompt.inputs.get("images") or []
    if not images:
        return None
    with Image.open(images[0]) as picture:
        small = picture.convert("RGB")
    small.thumbnail((256, 256))
    small.save(folder / f"{name}.png")
    return f"{name}.png"


def save_tree(rollout: Rollout, adv: Tensor, describe: Callable[[Rollout, Tensor], list[Any]], folder: Path) -> None:
    """Save the tree of the rollout's first prompt, with advantages and a picture or text of each fork and leaf.

    Args:
        adv: (N,) advantages of the rollout's steps. describe: (rollout, steps) -> an output per step.
    """
    keep = rollout.tree.group == 0
    first = rollout.select([0])
    first = first.with_tree(first.tree.replace(tags=first.tree.tags | {"adv": adv[keep]}))
    steps = shown_steps(first)
    outputs = describe(first, steps)
    with publish(folder) as part:
        first.save(part)
        prompt_picture(first.prompts[0], part, "prompt")
        files = {}
        for step, output in zip(steps.tolist(), outputs, strict=True):
            files[step] = save_output(output, part, f"step_{step:04d}")
        (part / "outputs.json").write_text(json.dumps(files, indent=1) + "\n")


def shown_steps(rollout: Rollout) -> Tensor:
    """(S,) steps that the page shows: all steps of texts; of pictures leaves, members of a fork, and first steps."""
    tree = rollout.tree
    if rollout.texts:
        return torch.arange(len(tree))
    num_siblings = torch.bincount(tree.sibling_set)[tree.sibling_set]
    return (tree.is_leaf | (num_siblings > 1) | (tree.parent < 0)).nonzero().flatten()


def save_output(output: Any, folder: Path, name: str) -> dict[str, str]:
    """Save an output in `folder`; returns {"picture": file}, {"text": ...}, or both for a (text, picture)."""
    if isinstance(output, tuple):
        text, picture = output
        entry = {"text": text}
        if picture is not None:
            entry |= save_output(picture, folder, name)
        return entry
    if isinstance(output, str):
        return {"text": output}
    if isinstance(output, Tensor) and output.ndim == 4:
        first, *others = [to_image(frame) for frame in output]
        first.save(folder / f"{name}.png", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    else:
        picture = output if isinstance(output, Image.Image) else to_image(output)
        picture.save(folder / f"{name}.png")
    return {"picture": f"{name}.png"}


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (C, H, W) in [0, 1], C 1 or 3, as a PIL image.

    Raises:
        ValueError: another shape.
    """
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"a picture must be (1 or 3, H, W), got {tuple(pixels.shape)}")
    array = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def data_uri(file: Path) -> str:
    """A PNG file as a data URI, for the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()

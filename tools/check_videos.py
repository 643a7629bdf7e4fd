"""Which video files can be read, and whether frames read at random are those that decoding in sequence shows.

    python tools/check_videos.py clips/ more.mp4
    python tools/check_videos.py clips/ --backend decord --json report.json

For each file a few random frames are read on their own and compared with the same frames counted from the start. The
table names the files that differ, cannot be read, or are damaged; the command fails if there are any. With `--backend
decord` it says which files decord alone would get wrong, and why: training code that uses decord as it is meets them.
Files are read in a process with a time limit; one that hangs or crashes a decoder is reported like any other.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from video.reading.reader import VideoDecodeError, VideoReader

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".mpeg", ".wmv", ".gif", ".3gp"}
_EQUAL = 1.0  # mean difference of a pixel, of 255


@dataclass
class Finding:
    """About one file. reason: of `VideoDecodeError`, `mismatch`, `damaged`, or `ok`. wrong: frames that differ."""

    path: str
    reason: str = "ok"
    detail: str = ""
    frames: int = 0
    backend: str = ""
    wrong: list[int] = field(default_factory=list)


def main() -> None:
    """Check the files, print the table, fail if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="files, or folders to search for video files")
    parser.add_argument("--probes", type=int, default=8, help="random frames of each file")
    parser.add_argument("--backend", default="auto", help="auto, decord, av, or package.module:function")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one file's table or one read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all findings to this file")
    args = parser.parse_args()
    paths = list(found_under(args.paths))
    if not paths:
        raise SystemExit("no video files there")
    logging.getLogger("video").setLevel(logging.ERROR)  # the table says it
    given = {"timeout_s": args.timeout, "cache_bytes": 0}
    with (
        VideoReader(backend=args.backend, **given) as reader,
        VideoReader(backend="video.reading.backends:read_sequence", **given) as sequence,
    ):
        draw = random.Random(args.seed)
        findings = [checked(path, reader, sequence, args.probes, draw) for path in shown_progress(paths)]
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    bad = [f for f in findings if f.reason != "ok"]
    show(bad)
    print(f"{len(findings)} files, {len(findings) - len(bad)} fine")
    if bad:
        raise SystemExit(1)


def found_under(paths: Iterable[Path]) -> Iterator[Path]:
    """The files given, and those with a video's suffix in the folders given."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path


def checked(path: Path, reader: VideoReader, sequence: VideoReader, probes: int, draw: random.Random) -> Finding:
    """Compare `probes` random frames, and the last one, of one file."""
    finding = Finding(str(path))
    try:
        info = reader.info(path)
        finding.frames, finding.backend = info.frames, info.backend
        index = sorted({*draw.sample(range(info.frames), min(probes, info.frames)), info.frames - 1})
        expected = sequence.read(path, index).pixels
        # one at a time: only then must the reader seek
        finding.wrong = [
            i for i, e in zip(index, expected, strict=True) if not alike(reader.read(path, [i]).pixels[0], e)
        ]
    except VideoDecodeError as error:
        finding.reason, finding.detail, finding.backend = error.reason, error.detail, error.backend
        return finding
    if finding.wrong:
        finding.reason = "mismatch"
        finding.detail = "another picture than in sequence at frames " + ", ".join(map(str, finding.wrong))
    elif info.lost:
        finding.reason, finding.detail = "damaged", info.lost
    return finding


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two pictures are one frame, up to the rounding of two decoders."""
    return a.shape == b.shape and float(np.abs(a.astype(np.int16) - b).mean()) <= _EQUAL


def shown_progress(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    yield from track(paths, description="checking", console=Console(stderr=True))


def show(findings: Sequence[Finding]) -> None:
    """A table of what was found, and how often."""
    if not findings:
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("file", overflow="fold"), "reason", "backend", "frames", "detail")
    for f in findings:
        table.add_row(escape(f.path), f.reason, f.backend, str(f.frames or ""), escape(f.detail))
    console: Any = Console()
    console.print(table)
    counts = Counter(f.reason for f in findings)
    console.print(", ".join(f"{reason} {n}" for reason, n in counts.most_common()))


if __name__ == "__main__":
    main()

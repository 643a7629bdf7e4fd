"""CPU time of scoring eight beams of six steps about one picture: packed, and as rows of an ordinary PRM script.

    python tools/bench_scoring.py                    # 44M parameters, a 576-token picture; about 14 minutes
    python tools/bench_scoring.py --quick            # tiny, seconds

rows_per_prefix     every prefix of every beam is a row of its own with its own picture, read at its last token.
rows_per_candidate  every beam is one row with its own picture, all its steps are read at once.
packed              what `score_solutions` does with a VisionPrm: each distinct step once, the picture once.
packed_each_step    the same, asked again after every step as a search does; the picture's features are kept.

Rows are plain calls of transformers on the same model and head, --batch at a time, sorted by length; one at a time is
what suits them best on a CPU. Ways take turns in one process with one thread; medians. Making pixels is not timed, and
for the rows neither is tokenisation. The command fails where scores differ, where packing encodes the picture more
than once, and below the promised ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAMS = 8
CASES = {  # distinct steps at each depth
    "beam search": (2, 4, 8, 8, 8, 8),  # eight beams descend from two first and four second steps
    "flat": (8, 8, 8, 8, 8, 8),  # eight samples share the prompt alone
}
WAYS = ("rows_per_prefix", "rows_per_candidate", "packed", "packed_each_step")
EQUAL = 1e-4  # largest difference of two scores of one step

Beam = Sequence[str]
Scores = list[list[float]]  # per beam, one per step


@dataclass(frozen=True)
class Size:
    """hidden, layers: of the model. side: of the picture in pixels, (side / 28)^2 tokens. words: fewest and most of a
    step; a line end follows. promised: least ratio of rows_per_prefix to packed."""

    hidden: int = 512
    layers: int = 8
    side: int = 672
    words: tuple[int, int] = (31, 47)
    promised: float = 5.0


QUICK = Size(hidden=128, layers=2, side=224, words=(7, 11), promised=1.5)


def main() -> None:
    """Measure, print the tables, and check what they claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="rows of one call")
    parser.add_argument("--quick", action="store_true", help="tiny model, picture and steps")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    found = {case: medians(runs) for case, runs in measure(size, args.repeats, args.batch).items()}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    for case, ways in found.items():
        print(table(case, ways))
    for case, ways in found.items():
        check(case, ways, size.promised)


def medians(runs: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per way its median seconds, ratio to rows_per_prefix, and largest difference to that way's scores; counts and
    scores are those of the first run."""
    base = runs[WAYS[0]][0]["scores"]
    slowest = statistics.median(r["seconds"] for r in runs[WAYS[0]])
    out = {}
    for way, own in runs.items():
        seconds = statistics.median(r["seconds"] for r in own)
        gap = max(difference(r["scores"], base) for r in own)
        out[way] = own[0] | {"seconds": seconds, "faster": slowest / seconds, "difference": gap}
    return out


def difference(a: Scores, b: Scores) -> float:
    """Largest absolute difference of two scores of one step; NaN, a step without score, is infinite."""
    gaps = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return max(g if g == g else float("inf") for g in gaps)


def table(case: str, ways: Mapping[str, dict[str, Any]]) -> str:
    """One line per way."""
    steps = CASES[case]
    flat = [s for beam in ways[WAYS[0]]["scores"] for s in beam]
    lines = [
        f"\n{case}: {BEAMS} beams, {BEAMS * len(steps)} prefixes, {sum(steps)} of them distinct; scores "
        f"{min(flat):.3f} to {max(flat):.3f}",
        f"{'way':20}{'seconds':>9}{'faster':>9}{'tokens':>8}{'pictures':>10}{'encoder calls':>15}{'score diff':>12}",
    ]
    for way, r in ways.items():
        lines.append(
            f"{way:20}{r['seconds']:9.2f}{r['faster']:8.1f}x{r['tokens']:8}{r['pictures']:10}{r['encoder_calls']:15}"
            f"{r['difference']:12.1e}"
        )
    return "\n".join(lines)


def check(case: str, ways: Mapping[str, dict[str, Any]], promised: float) -> None:
    """Raises SystemExit where the comparison is void or the promise is broken."""
    for way, r in ways.items():
        if not r["difference"] <= EQUAL:
            raise SystemExit(f"{case}: scores of {way} differ by {r['difference']:.1e}; the comparison is void")
    packed = ways["packed"]
    if packed["encoder_calls"] != 1 or packed["pictures"] != 1:
        raise SystemExit(f"{case}: packed encoded {packed['pictures']} pictures in {packed['encoder_calls']} calls")
    if packed["faster"] < promised:
        raise SystemExit(f"{case}: packed is {packed['faster']:.1f}x faster, {promised}x was promised")


# ---- one run ----------------------------------------------------------------------------------------------------


def measure(size: Size, repeats: int, batch: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All runs by case and way: CPU seconds, scores, and the counts of `watch`."""
    import torch
    from bench_packing import new_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hf = new_model(size.hidden, size.layers).requires_grad_(False)
    seen = watch(hf)
    with tempfile.TemporaryDirectory() as folder:
        processor, prompt = new_processor(size.side), new_prompt(Path(folder), size.side)
        cases = {case: new_beams(steps, size.words) for case, steps in CASES.items()}
        for way in WAYS:  # warm-up
            score(way, hf, processor, prompt, [beam[:2] for beam in cases["flat"][:2]], batch)
        found: dict[str, dict[str, list[dict[str, Any]]]] = {case: {way: [] for way in WAYS} for case in cases}
        for _ in range(repeats):
            for case, beams in cases.items():
                for way in WAYS:
                    seen.clear()
                    seconds, scores = score(way, hf, processor, prompt, beams, batch)
                    found[case][way].append({"seconds": seconds, "scores": scores, **seen})
    return found


def score(way: str, hf: Any, processor: Any, prompt: Any, beams: Sequence[Beam], batch: int) -> tuple[float, Scores]:
    """CPU seconds and the score of every step, by a scorer that has not seen the picture yet."""
    import torch

    from mmrl.reasoning.slots import StepFormat
    from vision.inputs.options import PolicyOptions
    from vision.prm import VisionPrm

    scorer = VisionPrm(hf, processor, StepFormat(), "linear", PolicyOptions(max_prompt_tokens=4096))
    scorer.admit([prompt])  # makes the pixels
    with torch.no_grad():
        if way == "packed":
            return by_packing(scorer, prompt, beams, [len(beams[0])])
        if way == "packed_each_step":
            return by_packing(scorer, prompt, beams, range(1, len(beams[0]) + 1))
        whole = way == "rows_per_candidate"
        return by_rows(hf, scorer.model.head, processor, prompt, beams, batch, whole=whole)


def by_packing(scorer: Any, prompt: Any, beams: Sequence[Beam], depths: Sequence[int]) -> tuple[float, Scores]:
    """Score the beams as they stand after each number of steps in `depths`, the last one all steps."""
    from mmrl.scorers.scoring import score_solutions

    start, scores = time.process_time(), []
    for depth in depths:
        [scores] = score_solutions(scorer, [prompt], [[beam[:depth] for beam in beams]])
    return time.process_time() - start, scores


def by_rows(
    hf: Any, head: Any, processor: Any, prompt: Any, beams: Sequence[Beam], batch: int, *, whole: bool
) -> tuple[float, Scores]:
    """Every row with its own picture: whole beams, read after each of their steps, or all prefixes, after the last."""
    from PIL import Image

    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.inputs["question"]}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    picture = Image.open(prompt.inputs["images"][0])
    rows = beams if whole else [beam[: t + 1] for beam in beams for t in range(len(beam))]
    found: dict[tuple[str, ...], float] = {}
    seconds, order = 0.0, sorted(rows, key=lambda row: sum(len(s.split()) for s in row))
    for part in (order[i : i + batch] for i in range(0, len(order), batch)):
        inputs = processor(
            text=[text + "".join(f"{step}\n" for step in row) for row in part], images=[[picture]] * len(part),
            padding=True, return_tensors="pt",
        )  # fmt: skip
        start = time.process_time()
        hidden = hf.model(**inputs, use_cache=False).last_hidden_state
        for b, row in enumerate(part):
            at = int(inputs["attention_mask"][b].sum()) - 1  # padding is on the right
            for t in reversed(range(len(row)) if whole else [len(row) - 1]):
                found[tuple(row[: t + 1])] = float(head(hidden[b, at]).sigmoid())
                at -= len(row[t].split()) + 1
        seconds += time.process_time() - start
    return seconds, [[found[tuple(beam[: t + 1])] for t in range(len(beam))] for beam in beams]


def watch(hf: Any) -> Counter[str]:
    """Counts from now on: `encoder_calls`, `pictures` in them, and `tokens` of the language model, padding too."""
    from vision.inputs.loading import vision_tower

    seen: Counter[str] = Counter()

    def tower(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(encoder_calls=1, pictures=len(kwargs["grid_thw"]))

    def decoder(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(tokens=kwargs["inputs_embeds"].shape[:2].numel())

    vision_tower(hf).register_forward_pre_hook(tower, with_kwargs=True)
    hf.get_decoder().register_forward_pre_hook(decoder, with_kwargs=True)
    return seen


# ---- what is scored ---------------------------------------------------------------------------------------------


def new_beams(steps: Sequence[int], words: tuple[int, int]) -> list[list[str]]:
    """Eight beams of random words: at depth t, steps[t] distinct steps with equally many beams below each."""
    import random

    rng = random.Random(0)

    def step() -> str:
        return " ".join(f"w{rng.randint(8, 4095)}" for _ in range(rng.randint(*words)))

    texts = [[step() for _ in range(k)] for k in steps]
    return [[own[b * len(own) // BEAMS] for own in texts] for b in range(BEAMS)]


def new_prompt(folder: Path, side: int) -> Any:
    """A question of 48 words about a square picture of noise."""
    import numpy as np
    from PIL import Image

    from mmrl.rollout import Prompt

    file = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
    return Prompt("q", {"question": " ".join(f"w{8 + i}" for i in range(48)), "images": [str(file)]})


def new_processor(side: int) -> Any:
    """A Qwen2.5-VL processor for the ids of `bench_packing.new_model`: a token per word, and the line end."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    from vision.inputs.loading import image_only

    special = ["<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|unk|>"]
    tokens = [*special, "\n", *(f"w{i}" for i in range(8, 4096))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<|unk|>"))
    split = pre_tokenizers.Split
    core.pre_tokenizer = pre_tokenizers.Sequence([split(" ", "removed"), split("\n", "isolated")])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '\\n' }}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<|unk|>", pad_token="<|pad|>", eos_token="<|end|>", padding_side="right",
        chat_template=template,
    )  # fmt: skip
    pixels = {"shortest_edge": side**2, "longest_edge": side**2}
    images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=template)


if __name__ == "__main__":
    main()

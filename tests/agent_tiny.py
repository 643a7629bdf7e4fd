"""Tiny video agents for tests, named by dotted path in recipes so that subprocesses find them too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrl.reference import bare
from mmrl.registry import declares
from mmrl.rollout import Prompt, Sample
from video.encoding import VideoEncoder, Views
from video.environment import Episode, VideoEnvironment
from video.reading.reader import VideoReader
from vision.forward.backbone import trainable_model
from vision.forward.lora import LoraOptions
from vision.inputs.loading import load_processor, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.step_rule import step_rule
from vision.policy import VisionPolicy

sys.path[:0] = [str(Path(__file__).parent / "vision"), str(Path(__file__).parent / "video")]

SCRIPT = (
    "FIND_SEGMENT(it) = [2]", "FIND_FRAME(it) = 7", "SPATIAL_ZOOM(it) = [0, 0, 500, 500]",
    "SPATIAL_ZOOM(a) = [0, 0, 400, 400] SPATIAL_ZOOM(b) = [300, 300, 900, 900]", "FIND_FRAME(it) = 900", "no call",
)  # fmt: skip


class Scripted(VideoEnvironment):
    """An untrained model writes noise; its length picks what it is taken to have said."""

    def said(self, text: str) -> str:
        return SCRIPT[len(text) % len(SCRIPT)]

    def step(self, state: Episode, text: str, used: int) -> Any:
        return super().step(state, self.said(text), used)

    def picture(self, state: Episode, text: str) -> Any:
        return super().picture(state, self.said(text))


@declares(options_of=PolicyOptions)
def agent(model: str, train_vision: bool = False, scripted: bool = True, **options: Any) -> VisionPolicy:
    told = {"max_new_tokens": 6, "max_steps": 4, "max_prompt_tokens": 2000, "temperature": 0.9} | options
    chosen = PolicyOptions(**told)
    processor = load_processor(model)
    hf = trainable_model(model, "float32", "sdpa", LoraOptions(), train_vision, False)
    views = Views(4, 4, 64 * 64, 64 * 64, 64 * 64, 16 * 16)
    encoder = VideoEncoder(hf, processor, chosen, VideoReader(), views)
    environment = (Scripted if scripted else VideoEnvironment)(
        encoder, syntax="videocom", coords="norm1000", turns=chosen.max_steps, max_context=4000, reserve=6, hints=True
    )
    rule = step_rule(tokenizer_of(processor), "line", bare(hf).config.get_text_config().vocab_size)
    policy = VisionPolicy(hf, processor, rule, chosen, None, environment, encoder)
    ends = [i for i in range(0, len(policy.tokenizer), 3) if i not in policy.sampling.banned]
    policy.sampling = replace(policy.sampling, eos=tuple(sorted({*policy.sampling.eos, *ends})))
    return policy


class Questions:
    """Eight questions; the first `films` of them about a clip. The reward is the share of digits in what is written."""

    rewards = ("agent_tiny:digits",)

    def __init__(self, folder: str, films: int = 8, broken: int = 0) -> None:
        from make_clips import write_clip

        self.prompts = []
        for i in range(8):
            file = Path(folder) / f"{i}.mp4"
            if not file.exists():
                write_clip(file, frames=250, size=(64, 96), gop=25)
            if i < broken:
                file.write_bytes(file.read_bytes()[:60])
            videos = [str(file)] if i < films else []
            self.prompts.append(Prompt(f"q{i}", {"question": "count " + "it " * i, "videos": videos}))
        self.eval_prompts = self.prompts[broken : broken + 2]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {"length": float(sum(len(s.output) for s in samples) / len(samples))}


def digits(samples: Sequence[Sample]) -> list[float | None]:
    return [sum(c.isdigit() for c in s.output) / max(len(s.output), 1) for s in samples]

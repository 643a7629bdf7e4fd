"""Every reader of what a model wrote takes linear time, whatever that is."""

import time
from contextlib import suppress
from functools import partial
from typing import get_args

import pytest

from mmrl.reasoning.annotate.judge import (
    parse_critique,
    parse_first_error,
    parse_grade,
    parse_severities,
    parse_verdict,
)
from mmrl.reasoning.annotate.spare import read_spare
from mmrl.reasoning.answer_text import choice_letter, compare, extract_answer, final_line, normalise, unwrapped
from mmrl.reasoning.canonical import canonical_answer
from mmrl.reasoning.generative import stated_verdict
from mmrl.reasoning.step_texts import Layout, parse
from mmrl.rollout import Prompt, Sample
from video.acting.syntax import parse_turn
from video.rewards.plans import parse_plan
from video.rewards.turns import last_answer, turns_of
from vision.rewards import is_boxed, is_chain_of_step, is_line_trace, is_valid_reasoning, parse_boxes, step_bodies

N = 16_000
PROMPT = Prompt("p", {"options": ["cat", "dog"]})

READERS = {
    "answer": extract_answer,
    "line": final_line,
    "normal form": normalise,
    "wrappers": unwrapped,
    "choice": partial(choice_letter, options=["A. cat", "dog"]),
    "comparison": partial(compare, reference="5 m"),
    "first error": parse_first_error,
    "verdict": parse_verdict,
    "severities": partial(parse_severities, num_steps=3),
    "grade": parse_grade,
    "critique": partial(parse_critique, num_steps=3, kinds=["perception", "reasoning", "reasoning"]),
    "spare": partial(read_spare, num_steps=3),
    "generative": stated_verdict,
    "vote": partial(canonical_answer, PROMPT),
    "videocom": partial(parse_turn, syntax="videocom"),
    "tool call": partial(parse_turn, syntax="tool_call"),
    "tags": lambda text: last_answer(turns_of(Sample(PROMPT, text, 0)), "tags"),
    "plan": parse_plan,
    "validity": is_valid_reasoning,
    "key steps": step_bodies,
    "chain": is_chain_of_step,
    "box": is_boxed,
    "trace": is_line_trace,
    "boxes": parse_boxes,
} | {layout: partial(parse, format=layout) for layout in get_args(Layout)}

TEXTS = {
    "answers": "answer " * N,
    "answers to": "answer to the " * N,
    "thoughts": "<think>" * N,
    "boxes": "\\boxed{" * N,
    "nested": "\\text{" * N + "}" * N,
    "blanks": "answer" + " " * N + "#",
    "line ends": "a" + "\n" * N + "b",
    "open tags": "<answer><step><analysis_1><conclusion>" * (N // 4),
    "numbered tags": "".join(f"<analysis_{i}><paragraph_{i}>" for i in range(N // 2)),
    "headers": "### Step 1: a ### The final answer is:" * (N // 4),
    "words": "a" * N,
    "digits": "1" * N + "x",
    "crops": "crop(1,2," * N,
    "calls": "<tool_call>FIND_FRAME(" * (N // 2),
    "marks": "<|reasoning_start|><|reasoning_step_start|><|reasoning_step_name_start|>" * (N // 8),
}


@pytest.mark.parametrize("reader", list(READERS))
def test_a_text_of_any_kind_is_read_in_linear_time(reader):
    for name, text in TEXTS.items():
        began = time.process_time()
        with suppress(ValueError):
            READERS[reader](text)
        assert time.process_time() - began < 1.2, name  # quadratic is 3 s and more

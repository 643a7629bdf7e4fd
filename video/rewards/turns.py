"""The texts of a policy, turn by turn: where a sample is cut into turns, its last answer, its calls.

turns = turns_of(sample, "videocom")    # ["FIND_FRAME(dog) = 57", "FINAL_ANSWER: B"]
last_answer(turns, "videocom")          # "B"
count_calls(turns, "videocom")          # 1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmrl.reasoning.answer_text import answer_in_tags, without_thinking
from mmrl.rollout import Sample
from video.acting.actions import Syntax, parse_turn
from video.environment import VideoEnvironment
from vision import VisionPolicy

AnswerSyntax = Literal["tags", "videocom", "tool_call"]


def turn_options(policy: object) -> dict[str, Any]:
    """The options of `video.rewards.calls.Reading` as a video agent has them; none of another policy."""
    environment = policy.environment if isinstance(policy, VisionPolicy) else None
    return environment.turn_options if isinstance(environment, VideoEnvironment) else {}


def turns_of(sample: Sample, syntax: AnswerSyntax = "tags") -> list[str]:
    """The policy's turns, at least one, without observations.

    An output that is a list or tuple holds one text per turn. A text holds them one after the other, and is cut where
    calls end: at line ends (`videocom`; a call must stand on one line), behind `</tool_call>` (`tool_call`), nowhere
    (`tags`). Cutting inside a turn does no harm to rewards that collect calls and find the answer, and lets all calls
    of a turn count, as where whole responses are scored. Step rewards read exact turns from the rollout.

    Raises:
        ValueError: the output is neither; the message names the prompt.
    """
    output = sample.output
    if isinstance(output, list | tuple) and all(isinstance(turn, str) for turn in output):
        return list(output) or [""]
    if not isinstance(output, str):
        raise ValueError(
            f"prompt {sample.prompt.id!r}: this reward reads what a policy wrote, a text or one text per turn; the "
            f"output is a {type(output).__name__}"
        )
    if syntax == "tags":
        return [output]
    # before the text is cut, since a thinking may go over several lines
    reply = without_thinking(output)
    if syntax == "videocom":
        parts = reply.splitlines()
    else:
        parts = re.split(r"(?<=</tool_call>)", reply)
    return [part for part in parts if part.strip()] or [""]


def last_answer(turns: Sequence[str], syntax: AnswerSyntax) -> str | None:
    """The last answer given in any turn, None without one; `tags` reads `<answer>..</answer>`."""
    # of several answers the last counts, as it does in the environment
    for turn in reversed(turns):
        answer = _answer(turn, syntax)
        if answer is not None:
            return answer
    return None


def _answer(turn: str, syntax: AnswerSyntax) -> str | None:
    if syntax != "tags":
        return parse_turn(turn, syntax).answer
    answer = answer_in_tags(without_thinking(turn))
    return None if answer is None else answer.strip()


def count_calls(turns: Sequence[str], syntax: Syntax) -> int:
    """The number of calls in all turns that can be read."""
    return sum(len(parse_turn(turn, syntax).actions) for turn in turns)

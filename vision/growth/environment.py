"""Environments that answer a policy between its steps, and a memory of their answers.

A tree visits a turn many times: while it grows, in every update and in every reading. `Replay` keeps the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mmrl.byte_cache import ByteCache
from mmrl.rollout import Prompt
from vision.inputs.prompts import size_in_bytes
from vision.inputs.tokens import PromptTokens

# Memory for observations of earlier iterations.
OBSERVED_BYTES = 2**29


class Environment(Protocol):
    """Answers steps ("turns") of a conversation. It must be deterministic: an update replays what a rollout saw.

    A state is a value: `step` returns a new one, so that branches of a tree never share one.
    """

    def start(self, prompt: Prompt) -> Any:
        """The state before the first turn."""

    def step(self, state: Any, text: str, used: int) -> TurnResult:
        """The result of a turn.

        used: tokens of the conversation so far, observations included.
        """

    def picture(self, state: Any, text: str) -> Image.Image | None:
        """A picture of what the turn makes the environment show; None where that is
        nothing."""


@dataclass(frozen=True)
class TurnResult:
    """The environment's answer to a turn.

    state: the new one. observation: tokens from behind the turn's end mark to where the next turn begins; None ends
    the conversation. ok: the turn was understood and carried out, or is the answer.
    """

    state: Any
    observation: PromptTokens | None
    ok: bool = True


@dataclass(frozen=True)
class TurnRecord:
    """A place in a conversation: the result of its last turn, and the tokens so far."""

    result: TurnResult
    used: int


class Replay:
    """An environment with a memory: the result of the same turns is not computed twice.

    An iteration's observations are kept until the next one begins, up to 8 times `OBSERVED_BYTES`; of earlier ones
    `OBSERVED_BYTES`, the newest. A result that was dropped is replayed from the prompt.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment, self._kept = environment, ByteCache(OBSERVED_BYTES, name="observations")

    def begin_iteration(self) -> None:
        """Give up the last iteration's observations; see `mmrl.capabilities.EncodingCache`."""
        self._kept.begin_iteration()

    def after(self, prompt: Prompt, start: int, turns: tuple[tuple[str, int], ...]) -> TurnRecord:
        """The state of the conversation after `turns`, each its text and its number of tokens.

        start: tokens of the prompt.
        """
        if not turns:
            return TurnRecord(TurnResult(self.environment.start(prompt), None), start)
        # By content besides the id: files of training and evaluation may use an id twice.
        key = (prompt.id, str(dict(prompt.inputs)), turns)
        record: TurnRecord | None = self._kept.get(key)
        if record is None:
            text, num_tokens = turns[-1]
            before = self.after(prompt, start, turns[:-1])
            used = before.used + num_tokens
            if before.result.observation is not None:
                used += len(before.result.observation.ids)
            record = TurnRecord(self.environment.step(before.result.state, text, used), used)
            observation = record.result.observation
            self._kept.put(key, record, 0 if observation is None else size_in_bytes(observation))
        return record

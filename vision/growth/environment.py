"""What answers a policy between its steps: an environment whose observations are a function of what was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mmrl.byte_cache import ByteCache
from mmrl.rollout import Prompt
from vision.inputs.prompts import size_in_bytes
from vision.inputs.tokens import PromptTokens

OBSERVED_BYTES = 2**29  # of observations of earlier iterations


class Environment(Protocol):
    """Answers steps ("turns") of a conversation. It must be deterministic: an update replays what a rollout saw.

    A state is a value: `step` returns a new one, so that branches of a tree never share one.
    """

    def start(self, prompt: Prompt) -> Any:
        """The state before the first turn."""

    def step(self, state: Any, text: str, used: int) -> TurnResult:
        """What follows a turn.

        used: tokens of the conversation so far, observations included.
        """

    def picture(self, state: Any, text: str) -> Image.Image | None:
        """What a person would look at to see what a turn shows from here, None where that is nothing."""


@dataclass(frozen=True)
class TurnResult:
    """state: the new one. observation: tokens from behind the turn's end mark to where the next turn begins; None ends
    the conversation. ok: the turn was understood and carried out, or is the answer."""

    state: Any
    observation: PromptTokens | None
    ok: bool = True


@dataclass(frozen=True)
class TurnRecord:
    """A place in a conversation: the result of its last turn, and the tokens so far."""

    result: TurnResult
    used: int


class Replay:
    """An environment with a memory: what was answered after the same turns is not worked out twice.

    An iteration's observations are kept until the next one begins, up to 8 times `OBSERVED_BYTES`; of earlier ones
    `OBSERVED_BYTES`, the newest. What is forgotten is replayed from the prompt.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment, self._kept = environment, ByteCache(OBSERVED_BYTES, name="observations")

    def begin_iteration(self) -> None:
        """Let go of the last iteration's observations; see `mmrl.capabilities.EncodingCache`."""
        self._kept.begin_iteration()

    def after(self, prompt: Prompt, start: int, turns: tuple[tuple[str, int], ...]) -> TurnRecord:
        """Where the conversation stands after `turns`, each the text and its number of tokens; `start` tokens were
        the prompt's."""
        if not turns:
            return TurnRecord(TurnResult(self.environment.start(prompt), None), start)
        key = (prompt.id, str(dict(prompt.inputs)), turns)
        known: TurnRecord | None = self._kept.get(key)
        if known is None:
            before = self.after(prompt, start, turns[:-1])
            seen = before.result.observation
            used = before.used + (0 if seen is None else len(seen.ids)) + turns[-1][1]
            known = TurnRecord(self.environment.step(before.result.state, turns[-1][0], used), used)
            self._kept.put(key, known, _size(known))
        return known


def _size(moment: TurnRecord) -> int:
    seen = moment.result.observation
    return 0 if seen is None else size_in_bytes(seen)

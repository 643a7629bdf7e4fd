"""What answers a policy between its steps: an environment whose observations are a function of what was written."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mmrl.rollout import Prompt
from vision.growth import PromptTokens
from vision.prompts import size_in_bytes


class Environment(Protocol):
    """Answers steps ("turns") of a conversation. It must be deterministic: an update replays what a rollout saw.

    A state is a value: `step` returns a new one, so that branches of a tree never share one.
    """

    def start(self, prompt: Prompt) -> Any:
        """The state before the first turn."""

    def step(self, state: Any, text: str, used: int) -> tuple[Any, PromptTokens | None]:
        """What follows a turn: the new state and the observation's tokens, from behind the turn's end mark to where
        the next turn begins; None ends the conversation.

        used: tokens of the conversation so far, observations included.
        """

    def picture(self, state: Any, text: str) -> Image.Image | None:
        """What a person would look at to see what a turn shows from here, None where that is nothing."""


@dataclass(frozen=True)
class Moment:
    """A place in a conversation: the environment's state, its last observation, and the tokens so far."""

    state: Any
    observation: PromptTokens | None
    used: int


class Replay:
    """An environment with a memory: what was answered after the same turns is not worked out twice.

    Kept up to `max_bytes` of observations, the newest. What is forgotten is replayed from the prompt.
    """

    def __init__(self, environment: Environment, max_bytes: int = 2**29) -> None:
        self.environment, self.max_bytes = environment, max_bytes
        self._kept: OrderedDict[tuple[Any, ...], Moment] = OrderedDict()
        self._bytes = 0

    def after(self, prompt: Prompt, start: int, turns: tuple[tuple[str, int], ...]) -> Moment:
        """Where the conversation stands after `turns`, each the text and its number of tokens; `start` tokens were
        the prompt's."""
        if not turns:
            return Moment(self.environment.start(prompt), None, start)
        key = (prompt.id, str(dict(prompt.inputs)), turns)
        if key not in self._kept:
            before = self.after(prompt, start, turns[:-1])
            text, tokens = turns[-1]
            seen = 0 if before.observation is None else len(before.observation.ids)
            used = before.used + seen + tokens
            state, observation = self.environment.step(before.state, text, used)
            self._keep(key, Moment(state, observation, used))
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: tuple[Any, ...], moment: Moment) -> None:
        self._kept[key] = moment
        self._bytes += _size(moment)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(moment: Moment) -> int:
    return 256 if moment.observation is None else 256 + size_in_bytes(moment.observation)

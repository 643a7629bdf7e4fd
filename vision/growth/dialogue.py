"""Two kinds of completions: one turn that is cut into steps, or the turns of a conversation with an environment.

`Dialogue` is the first kind, in which nothing answers; `MultiTurn` the second. A policy asks its dialogue for whatever
differs between the two: responders while it samples, observations while it lays trees out, texts of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrl.rollout import Prompt, Rollout
from vision.forward.packing import ancestors
from vision.growth.environment import Environment, Replay, TurnRecord
from vision.growth.requests import Node, Responder, SamplingOptions
from vision.inputs.step_rule import StepRule
from vision.inputs.tokens import PromptTokens

# The text of each turn and its number of tokens.
Turns = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Spelling:
    """The rules by which given texts become steps.

    write: text -> ids, placeholders spelt out. rule: where a step ends. end: id of the end mark. max_steps: most
    turns.
    """

    write: Callable[[str], Tensor]
    rule: StepRule
    end: int
    max_steps: int


class Dialogue:
    """A single turn that nothing answers: a completion is one text, its steps are parts of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def begin_iteration(self) -> None:
        """Give up the last iteration's observations; see `mmrl.capabilities.EncodingCache`."""

    def responders(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], before: Sequence[Turns] | None = None
    ) -> Sequence[Responder]:
        """Functions that answer the turns of each prompt; none where nothing answers.

        before: per prompt, turns that were taken before the sampled ones.
        """
        return ()

    def whole(self, sampling: SamplingOptions) -> SamplingOptions:
        """The options for completions whose steps nothing reads: a completion is one step."""
        return replace(sampling, max_steps=1)

    def annotated(self, rollout: Rollout, observed: Tensor) -> Rollout:
        """A sampled rollout with facts of the answers to its steps. observed: (N,) tokens shown after each."""
        return rollout

    def written(
        self, prompt: Prompt, tokens: PromptTokens, index: int, text: str, first: int, spelling: Spelling
    ) -> list[Node]:
        """Nodes of a given completion, numbered from `first`; their log-prob is 0, the end mark stands behind the
        last.

        index: of the prompt.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        # An empty text is one step that holds the end mark alone.
        steps = [ids[start:end] for start, end in spelling.rule.split_ids(ids)] or [[]]
        steps[-1] = [*steps[-1], spelling.end]
        nodes = []
        for depth, own in enumerate(steps):
            parent = first + depth - 1 if depth else -1
            nodes.append(Node(index, parent, depth, own, [0.0] * len(own), "eos"))
        return nodes

    def beyond_limits(self, text: str, limits: SamplingOptions) -> str:
        """The excess of a given completion over the limits of a recipe's `policy:`, in words; "" where it fits."""
        size, most = self._size(text), limits.max_new_tokens
        return "" if size <= most else f"{size} tokens (policy.max_new_tokens={most})"

    def _size(self, text: str) -> int:
        """Tokens of a text and its end mark, which is sampled too."""
        return 1 + len(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, rollout: Rollout, step: int, more: Sequence[Sequence[int]] = ()) -> str:
        """The completion up to a step of a rollout (-1: nothing) and `more` steps of ids, without special tokens.

        Decoded at once, since a character may have tokens in two steps.
        """
        ids = path_ids(rollout, step)
        for own in more:
            ids += own
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def turns(self, rollout: Rollout, step: int) -> Turns:
        """The turns of a conversation up to a step; none for -1."""
        return ()

    def observation(self, rollout: Rollout, step: int) -> PromptTokens | None:
        """The observation behind a step that another one follows; None where nothing answers."""
        return None

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """The steps as texts."""
        return [rollout.texts[step].strip() for step in steps.tolist()]

    def need_single_turn(self, otherwise: str) -> None:
        """Raises ValueError with this message for conversations."""


class MultiTurn(Dialogue):
    """A conversation: an environment answers the turns, which are sampled ids or the texts of a rollout."""

    def __init__(self, environment: Environment, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._replay = Replay(environment)

    def begin_iteration(self) -> None:
        """Give up the last iteration's observations; see `mmrl.capabilities.EncodingCache`."""
        self._replay.begin_iteration()

    def responders(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], before: Sequence[Turns] | None = None
    ) -> Sequence[Responder]:
        """Functions that ask the environment, one per prompt."""
        earlier = before or [()] * len(prompts)
        responders = []
        for prompt, encoded, turns in zip(prompts, tokens, earlier, strict=True):
            responders.append(self._responder(prompt, len(encoded.ids), turns))
        return responders

    def _responder(self, prompt: Prompt, prompt_tokens: int, before: Turns) -> Responder:
        def respond(turns: Sequence[Sequence[int]]) -> PromptTokens | None:
            all_turns = (*before, *(self._turn(ids) for ids in turns))
            return self._replay.after(prompt, prompt_tokens, all_turns).result.observation

        return respond

    def whole(self, sampling: SamplingOptions) -> SamplingOptions:
        """The same: the environment answers every turn."""
        return sampling

    def annotated(self, rollout: Rollout, observed: Tensor) -> Rollout:
        """With `observed`, and ok for the turns that the environment carried out and the answers."""
        records = [self._after(rollout, self._path(rollout, step), step) for step in range(len(rollout.tree))]
        ok = torch.tensor([record.result.ok for record in records])
        return rollout.with_tree(rollout.tree.replace(tags={**rollout.tree.tags, "observed": observed}, ok=ok))

    def written(
        self, prompt: Prompt, tokens: PromptTokens, index: int, text: str, first: int, spelling: Spelling
    ) -> list[Node]:
        """A node per line, a turn with its end mark; turns after the one that ends the conversation are left out."""
        lines = text.split("\n")[: spelling.max_steps]
        turns = [[*spelling.write(line).tolist(), spelling.end] for line in lines]
        return self._nodes_of_turns(prompt, tokens, index, turns, first)

    def beyond_limits(self, text: str, limits: SamplingOptions) -> str:
        """The excess of its number of turns, or of its longest one."""
        turns = text.split("\n")
        if len(turns) > limits.max_steps:
            return f"{len(turns)} turns (policy.max_steps={limits.max_steps})"
        excess = super().beyond_limits(max(turns, key=self._size), limits)
        return f"a turn of {excess}" if excess else ""

    def _nodes_of_turns(
        self, prompt: Prompt, tokens: PromptTokens, index: int, turns: Sequence[list[int]], first: int
    ) -> list[Node]:
        """Nodes of given turns (ids with their end mark), as far as the conversation goes."""
        nodes: list[Node] = []
        for depth, ids in enumerate(turns):
            so_far = tuple(self._turn(turn) for turn in turns[: depth + 1])
            observation = self._replay.after(prompt, len(tokens.ids), so_far).result.observation
            parent = first + depth - 1 if depth else -1
            logp = [0.0] * len(ids)
            # The observation behind the last turn is not part of the rollout: no turn follows it.
            if observation is None or depth + 1 == len(turns):
                nodes.append(Node(index, parent, depth, ids, logp, "eos"))
                break
            nodes.append(Node(index, parent, depth, ids, logp, "step", len(observation.ids)))
        return nodes

    def observation(self, rollout: Rollout, step: int) -> PromptTokens:
        """The observation behind a step, the same as when the rollout was sampled.

        Raises:
            ValueError: the environment answers otherwise now.
        """
        # An update on other observations than the policy saw would train on states that never were.
        expected = int(rollout.tree.tags["observed"][step])
        observation = self._after(rollout, self._path(rollout, step), step).result.observation
        if observation is None or len(observation.ids) != expected:
            now = "nothing" if observation is None else f"{len(observation.ids)} tokens"
            raise ValueError(
                f"prompt {rollout.prompts[int(rollout.tree.group[step])].id!r}: after {rollout.texts[step]!r} the "
                f"environment shows {now} and showed {expected} tokens when the rollout was made; use the files and "
                "settings of that run"
            )
        return observation

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """The turns as texts, each with a picture of what it made the environment show: (text, picture or None)."""
        return [(rollout.texts[step].strip(), self._picture(rollout, step)) for step in steps.tolist()]

    def _picture(self, rollout: Rollout, step: int) -> Image.Image | None:
        # The state in which the turn was taken, so without the turn itself.
        before = self._after(rollout, self._path(rollout, step)[:-1], step)
        return self._replay.environment.picture(before.result.state, rollout.texts[step])

    def text(self, rollout: Rollout, step: int, more: Sequence[Sequence[int]] = ()) -> str:
        """A line per turn."""
        lines = [text for text, _ in self.turns(rollout, step)]
        lines += [self._turn(ids)[0] for ids in more]
        return "\n".join(lines)

    def need_single_turn(self, otherwise: str) -> None:
        """Raises ValueError."""
        raise ValueError(otherwise)

    def turns(self, rollout: Rollout, step: int) -> Turns:
        """One turn per step."""
        return self._turns_of(rollout, self._path(rollout, step)) if step >= 0 else ()

    @staticmethod
    def _turns_of(rollout: Rollout, path: Sequence[int]) -> Turns:
        spans = rollout.tree.span
        return tuple((rollout.texts[step], int(spans[step])) for step in path)

    @staticmethod
    def _path(rollout: Rollout, step: int) -> list[int]:
        """The steps from the root to this one."""
        return ancestors(rollout.tree.parents, step)[::-1]

    def _after(self, rollout: Rollout, path: Sequence[int], step: int) -> TurnRecord:
        """The conversation that `step` belongs to, after the steps of `path`."""
        group = int(rollout.tree.group[step])
        prompt_tokens = int(rollout.prompt_payload["prompt_tokens"][group])
        return self._replay.after(rollout.prompts[group], prompt_tokens, self._turns_of(rollout, path))

    def _turn(self, ids: Sequence[int]) -> tuple[str, int]:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)), len(ids)


def path_ids(rollout: Rollout, step: int) -> list[int]:
    """Ids of all steps from the root to this one; none for -1."""
    if step < 0:
        return []
    tree, all_ids = rollout.tree, rollout.actions.payload["token"]
    ids: list[int] = []
    for above in reversed(ancestors(tree.parents, step)):
        ids += all_ids[int(tree.tok_start[above]) : int(tree.tok_end[above])].tolist()
    return ids

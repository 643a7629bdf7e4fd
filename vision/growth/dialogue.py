"""How completions run: as one turn that is cut into steps, or as the turns of a conversation with an environment."""

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
from vision.growth.requests import Answer, Node, SamplingOptions
from vision.inputs.step_rule import StepRule
from vision.inputs.tokens import PromptTokens

Turns = tuple[tuple[str, int], ...]  # of each its text and its number of tokens


@dataclass(frozen=True)
class Spelling:
    """How given texts become steps. write: text -> ids, placeholders spelt out. end: id of the end mark."""

    write: Callable[[str], Tensor]
    rule: StepRule
    end: int
    max_steps: int


class Dialogue:
    """A single turn that nothing answers: a completion is one text, its steps are parts of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def begin_iteration(self) -> None:
        """Let go of what the last iteration brought; see `mmrl.capabilities.EncodingCache`."""

    def answers(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], before: Sequence[Turns] | None = None
    ) -> Sequence[Answer]:
        """What answers the turns of each prompt; empty where nothing answers.

        before: per prompt, turns that were taken before the sampled ones.
        """
        return ()

    def whole(self, sampling: SamplingOptions) -> SamplingOptions:
        """The sampling of completions whose steps nobody looks at: they are one step."""
        return replace(sampling, max_steps=1)

    def annotated(self, rollout: Rollout, observed: Tensor) -> Rollout:
        """A sampled rollout with what was answered to its steps; observed: (N,) tokens shown after each."""
        return rollout

    def written(
        self, prompt: Prompt, tokens: PromptTokens, g: int, text: str, first: int, spelling: Spelling
    ) -> list[Node]:
        """Nodes of a given completion of prompt `g`, numbered from `first`; log-prob 0, the end mark behind it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        steps = [ids[a:b] for a, b in spelling.rule.split_ids(ids)] or [[]]
        steps[-1] = [*steps[-1], spelling.end]
        above = [-1, *range(first, first + len(steps) - 1)]
        return [Node(g, above[d], d, own, [0.0] * len(own), "eos") for d, own in enumerate(steps)]

    def beyond_limits(self, text: str, limits: SamplingOptions) -> str:
        """By what a given completion exceeds the limits of a recipe's `policy:`, "" where it does not."""
        size, most = self._size(text), limits.max_new_tokens
        return "" if size <= most else f"{size} tokens (policy.max_new_tokens={most})"

    def _size(self, text: str) -> int:
        """Tokens of a text and its end mark, which is sampled too."""
        return 1 + len(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, rollout: Rollout, v: int, more: Sequence[Sequence[int]] = ()) -> str:
        """The completion up to step `v` of a rollout (-1: nothing) and `more` steps of ids, without special tokens.

        Decoded at once, since a character may have tokens in two steps.
        """
        ids = [*path_ids(rollout, v), *(i for own in more for i in own)]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def turns(self, rollout: Rollout, v: int) -> Turns:
        """The turns of a conversation up to step `v`; none for -1."""
        return ()

    def observation(self, rollout: Rollout, v: int) -> PromptTokens | None:
        """What followed step `v` of a rollout where another one follows."""
        return None

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """What the steps say."""
        return [rollout.texts[s].strip() for s in steps.tolist()]

    def need_single_turn(self, otherwise: str) -> None:
        """Raises ValueError with this message for conversations."""


class MultiTurn(Dialogue):
    """A conversation: an environment, remembered, is asked with sampled ids or with the texts of a rollout."""

    def __init__(self, environment: Environment, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._replay = Replay(environment)

    def begin_iteration(self) -> None:
        """Let go of what the last iteration's conversations were answered; see `mmrl.capabilities.EncodingCache`."""
        self._replay.begin_iteration()

    def answers(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], before: Sequence[Turns] | None = None
    ) -> Sequence[Answer]:
        """The environment's, one per prompt."""
        earlier = before or [()] * len(prompts)
        return [self._answer(p, len(t.ids), e) for p, t, e in zip(prompts, tokens, earlier, strict=True)]

    def _answer(self, prompt: Prompt, size: int, before: Turns) -> Answer:
        def answer(turns: Sequence[Sequence[int]]) -> PromptTokens | None:
            taken = (*before, *(self._turn(ids) for ids in turns))
            return self._replay.after(prompt, size, taken).result.observation

        return answer

    def whole(self, sampling: SamplingOptions) -> SamplingOptions:
        """The same: the environment answers every turn."""
        return sampling

    def annotated(self, rollout: Rollout, observed: Tensor) -> Rollout:
        """With `observed`, and ok for the turns that the environment carried out and the answers."""
        steps = range(len(rollout.tree))
        ok = torch.tensor([self._after(rollout, self._path(rollout, v), v).result.ok for v in steps])
        return rollout.with_tree(rollout.tree.replace(tags={**rollout.tree.tags, "observed": observed}, ok=ok))

    def written(
        self, prompt: Prompt, tokens: PromptTokens, g: int, text: str, first: int, spelling: Spelling
    ) -> list[Node]:
        """A node per line, a turn with its end mark; turns after the one that ends the conversation are left out."""
        lines = text.split("\n")[: spelling.max_steps]
        return self.taken(prompt, tokens, g, [[*spelling.write(t).tolist(), spelling.end] for t in lines], first)

    def beyond_limits(self, text: str, limits: SamplingOptions) -> str:
        """By its number of turns, or its longest one."""
        turns = text.split("\n")
        if len(turns) > limits.max_steps:
            return f"{len(turns)} turns (policy.max_steps={limits.max_steps})"
        told = super().beyond_limits(max(turns, key=self._size), limits)
        return told and f"a turn of {told}"

    def taken(
        self, prompt: Prompt, tokens: PromptTokens, g: int, turns: Sequence[list[int]], first: int
    ) -> list[Node]:
        """Nodes of given turns (ids with their end mark), as far as the conversation goes."""
        nodes: list[Node] = []
        for depth, ids in enumerate(turns):
            done = tuple(self._turn(t) for t in turns[: depth + 1])
            seen = self._replay.after(prompt, len(tokens.ids), done).result.observation
            last = seen is None or depth + 1 == len(turns)
            above = first + depth - 1 if depth else -1
            shown = 0 if last or seen is None else len(seen.ids)
            nodes.append(Node(g, above, depth, ids, [0.0] * len(ids), "eos" if last else "step", shown))
            if last:
                break
        return nodes

    def observation(self, rollout: Rollout, v: int) -> PromptTokens:
        """As it was shown then.

        Raises:
            ValueError: the environment answers otherwise now.
        """
        due = int(rollout.tree.tags["observed"][v])
        seen = self._after(rollout, self._path(rollout, v), v).result.observation
        if seen is None or len(seen.ids) != due:
            now = "nothing" if seen is None else f"{len(seen.ids)} tokens"
            raise ValueError(
                f"prompt {rollout.prompts[int(rollout.tree.group[v])].id!r}: after {rollout.texts[v]!r} the "
                f"environment shows {now} and showed {due} tokens when the rollout was made; use the files and "
                "settings of that run"
            )
        return seen

    def describe(self, rollout: Rollout, steps: Tensor) -> list[Any]:
        """What the turns say, with what that made the environment show: (text, picture or None)."""
        return [(rollout.texts[s].strip(), self._picture(rollout, s)) for s in steps.tolist()]

    def _picture(self, rollout: Rollout, v: int) -> Image.Image | None:
        before = self._after(rollout, self._path(rollout, v)[:-1], v)
        return self._replay.environment.picture(before.result.state, rollout.texts[v])

    def text(self, rollout: Rollout, v: int, more: Sequence[Sequence[int]] = ()) -> str:
        """A line per turn."""
        taken = [text for text, _ in self.turns(rollout, v)]
        return "\n".join([*taken, *(text for text, _ in map(self._turn, more))])

    def need_single_turn(self, otherwise: str) -> None:
        """Raises ValueError."""
        raise ValueError(otherwise)

    def turns(self, rollout: Rollout, v: int) -> Turns:
        """One per step."""
        spans = rollout.tree.span
        return tuple((rollout.texts[u], int(spans[u])) for u in (self._path(rollout, v) if v >= 0 else []))

    def _path(self, rollout: Rollout, v: int) -> list[int]:
        return ancestors(rollout.tree.parents, v)[::-1]

    def _after(self, rollout: Rollout, path: Sequence[int], v: int) -> TurnRecord:
        """After the steps of `path`, in the conversation that step `v` belongs to."""
        tree, g = rollout.tree, int(rollout.tree.group[v])
        turns = tuple((rollout.texts[u], int(tree.tok_end[u] - tree.tok_start[u])) for u in path)
        return self._replay.after(rollout.prompts[g], int(rollout.prompt_payload["prompt_tokens"][g]), turns)

    def _turn(self, ids: Sequence[int]) -> tuple[str, int]:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)), len(ids)


def path_ids(rollout: Rollout, v: int) -> list[int]:
    """Ids of all steps up to `v`; none for -1."""
    tree, ids = rollout.tree, rollout.actions.payload["token"]
    path = reversed(ancestors(tree.parents, v)) if v >= 0 else []
    return [i for u in path for i in ids[int(tree.tok_start[u]) : int(tree.tok_end[u])].tolist()]

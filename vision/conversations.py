"""What a policy needs of conversations with an environment: answers while sampling, the same ones for the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrl.rollout import Prompt, Rollout
from vision.environment import Environment, Moment, Replay
from vision.growth import Answer, Node, PromptTokens
from vision.packing import ancestors


class Conversations:
    """An environment, remembered, that is asked with sampled ids or with the texts of a rollout."""

    def __init__(self, environment: Environment, tokenizer: Any) -> None:
        self._replay, self._tokenizer = Replay(environment), tokenizer

    def begin_iteration(self) -> None:
        """Let go of what the last iteration's conversations were answered; see `mmrl.capabilities.EncodingCache`."""
        self._replay.begin_iteration()

    def answers(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[PromptTokens],
        before: Sequence[tuple[tuple[str, int], ...]] | None = None,
    ) -> list[Answer]:
        """What answers the turns of each prompt.

        before: per prompt, turns that were taken before the sampled ones, each its text and its number of tokens.
        """
        earlier = before or [()] * len(prompts)
        return [self._answer(p, len(t.ids), e) for p, t, e in zip(prompts, tokens, earlier, strict=True)]

    def _answer(self, prompt: Prompt, size: int, before: tuple[tuple[str, int], ...]) -> Answer:
        def answer(turns: Sequence[Sequence[int]]) -> PromptTokens | None:
            taken = (*before, *(self._turn(ids) for ids in turns))
            return self._replay.after(prompt, size, taken).answered.observation

        return answer

    def ok(self, rollout: Rollout) -> Tensor:
        """(N,) bool, the turns that the environment carried out, and the answers."""
        steps = range(len(rollout.tree))
        return torch.tensor([self._after(rollout, self._path(rollout, v), v).answered.ok for v in steps])

    def written(
        self, prompt: Prompt, tokens: PromptTokens, g: int, turns: Sequence[list[int]], first: int
    ) -> list[Node]:
        """Nodes of given turns (ids with their end mark) of prompt `g`, numbered from `first`; log-prob 0.

        Turns after the one that ends the conversation are left out.
        """
        nodes: list[Node] = []
        for depth, ids in enumerate(turns):
            done = tuple(self._turn(t) for t in turns[: depth + 1])
            seen = self._replay.after(prompt, len(tokens.ids), done).answered.observation
            last = seen is None or depth + 1 == len(turns)
            above = first + depth - 1 if depth else -1
            shown = 0 if last or seen is None else len(seen.ids)
            nodes.append(Node(g, above, depth, ids, [0.0] * len(ids), "eos" if last else "step", shown))
            if last:
                break
        return nodes

    def observation(self, rollout: Rollout, v: int) -> PromptTokens:
        """What followed step `v` of a rollout.

        Raises:
            ValueError: the environment answers otherwise now.
        """
        due = int(rollout.tree.tags["observed"][v])
        seen = self._after(rollout, self._path(rollout, v), v).answered.observation
        if seen is None or len(seen.ids) != due:
            now = "nothing" if seen is None else f"{len(seen.ids)} tokens"
            raise ValueError(
                f"prompt {rollout.prompts[int(rollout.tree.group[v])].id!r}: after {rollout.texts[v]!r} the "
                f"environment shows {now} and showed {due} tokens when the rollout was made; use the files and "
                "settings of that run"
            )
        return seen

    def picture(self, rollout: Rollout, v: int) -> Image.Image | None:
        """What step `v` made the environment show, for people."""
        before = self._after(rollout, self._path(rollout, v)[:-1], v)
        return self._replay.environment.picture(before.answered.state, rollout.texts[v])

    def turns(self, rollout: Rollout, v: int) -> tuple[tuple[str, int], ...]:
        """The turns up to step `v` of a rollout, each its text and its number of tokens; none for -1."""
        spans = rollout.tree.span
        return tuple((rollout.texts[u], int(spans[u])) for u in (self._path(rollout, v) if v >= 0 else []))

    def _path(self, rollout: Rollout, v: int) -> list[int]:
        return ancestors(rollout.tree.parents, v)[::-1]

    def _after(self, rollout: Rollout, path: Sequence[int], v: int) -> Moment:
        """After the steps of `path`, in the conversation that step `v` belongs to."""
        tree, g = rollout.tree, int(rollout.tree.group[v])
        turns = tuple((rollout.texts[u], int(tree.tok_end[u] - tree.tok_start[u])) for u in path)
        return self._replay.after(rollout.prompts[g], int(rollout.prompt_payload["prompt_tokens"][g]), turns)

    def _turn(self, ids: Sequence[int]) -> tuple[str, int]:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)), len(ids)

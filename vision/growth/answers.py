"""Trees of tokens in which a right answer hangs behind every state of a rollout, to be read in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mmrl.rollout import Answer, Place, Rollout
from vision.forward.passes import TokenTree
from vision.growth.rollout_trees import RolloutTrees, open_places, place_batches


class AnswerTrees:
    """The answers of some places, laid out behind them.

    Args:
        trees: lays the rollout out. write: text -> ids. answers: one per place. limit: most tokens of a part.
    """

    def __init__(
        self, trees: RolloutTrees, write: Callable[[str], Tensor], answers: Sequence[Answer], limit: int
    ) -> None:
        self._trees, self._limit = trees, limit
        spelt = {answer: spell(answer, write) for answer in set(answers)}
        # Per place the ids of its answer with the lead, and where the answer's own begin.
        self._tails = [spelt[answer] for answer in answers]

    def parts(
        self, rollout: Rollout, places: Sequence[Place], *, blank: bool
    ) -> Iterator[tuple[list[TokenTree], list[Tensor], Tensor]]:
        """Trees that fit together, the packed indices of the answers' tokens in each, and the place of every one.

        Places that are ends are in none.
        """
        open_positions = open_places(rollout, places)
        longest = max((len(ids) for ids, _ in self._tails), default=0)
        chosen = [places[position] for position in open_positions]
        for part in place_batches(rollout, chosen, self._limit, extra=longest, most=max(len(places), 1)):
            by_prompt: dict[int, list[int]] = {}
            for index in part:
                position = open_positions[index]
                by_prompt.setdefault(places[position].prompt, []).append(position)

            trees: list[TokenTree] = []
            wanted: list[Tensor] = []
            owner: list[int] = []
            for group, positions in by_prompt.items():
                tails = [(places[position].step, self._tails[position][0]) for position in positions]
                prompt = self._trees.checked_prompt(rollout, group)
                steps = [step for step, _ in tails if step >= 0]
                laid_out = self._trees.lay_out(rollout, prompt, steps, blank=blank, open_ended=True, tails=tails)
                trees.append(laid_out.tree)
                spans = []
                for node, position in zip(laid_out.tails, positions, strict=True):
                    span = laid_out.tokens(node)[self._tails[position][1] :]
                    spans.append(span)
                    owner += [position] * len(span)
                wanted.append(torch.cat(spans))
            yield trees, wanted, torch.tensor(owner)


def spell(answer: Answer, write: Callable[[str], Tensor]) -> tuple[Tensor, int]:
    """Ids of an answer behind its lead, and the index of the answer's first one: a token that holds the end of the
    lead and the beginning of the answer is the answer's.

    Raises:
        ValueError: an answer without tokens.
    """
    ids, lead = write(answer.lead + answer.text), write(answer.lead)
    length = min(len(ids), len(lead))
    # the length of the common beginning
    first = int((ids[:length] == lead[:length]).long().cumprod(0).sum())
    if first == len(ids):
        raise ValueError(f"the answer {answer.text!r} behind {answer.lead!r} has no token of its own")
    return ids, first

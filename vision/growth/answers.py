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
        write: text -> ids. answers: one per place. limit: most tokens of a part.
    """

    def __init__(
        self, trees: RolloutTrees, write: Callable[[str], Tensor], answers: Sequence[Answer], limit: int
    ) -> None:
        self._trees, self._limit = trees, limit
        spelt = {answer: spell(answer, write) for answer in set(answers)}
        self._tails = [spelt[answer] for answer in answers]

    def parts(
        self, rollout: Rollout, places: Sequence[Place], *, blank: bool
    ) -> Iterator[tuple[list[TokenTree], list[Tensor], Tensor]]:
        """Trees that fit together, the packed indices of the answers' tokens in each, and the place of every one.

        Places that are ends are in none.
        """
        going = open_places(rollout, places)
        longest = max((len(ids) for ids, _ in self._tails), default=0)
        chosen = [places[i] for i in going]
        for part in place_batches(rollout, chosen, self._limit, extra=longest, most=max(len(places), 1)):
            trees: list[TokenTree] = []
            wanted: list[Tensor] = []
            owner: list[int] = []
            own = [going[j] for j in part]
            for g in dict.fromkeys(places[i].prompt for i in own):
                mine = [i for i in own if places[i].prompt == g]
                behind = [(places[i].step, self._tails[i][0]) for i in mine]
                laid = self._trees.lay_out(
                    rollout, self._trees.checked_prompt(rollout, g), [step for step, _ in behind if step >= 0],
                    blank=blank, open_ended=True, tails=behind,
                )  # fmt: skip
                spans = [laid.tokens(node)[self._tails[i][1] :] for node, i in zip(laid.tails, mine, strict=True)]
                trees.append(laid.tree)
                wanted.append(torch.cat(spans))
                owner += [i for i, span in zip(mine, spans, strict=True) for _ in span]
            yield trees, wanted, torch.tensor(owner)


def spell(answer: Answer, write: Callable[[str], Tensor]) -> tuple[Tensor, int]:
    """Ids of an answer behind its lead, and where the answer's own begin: a token that holds the end of the lead and
    the beginning of the answer is the answer's.

    Raises:
        ValueError: an answer without tokens.
    """
    ids, lead = write(answer.lead + answer.text), write(answer.lead)
    n = min(len(ids), len(lead))
    first = int((ids[:n] == lead[:n]).long().cumprod(0).sum())
    if first == len(ids):
        raise ValueError(f"the answer {answer.text!r} behind {answer.lead!r} has no token of its own")
    return ids, first

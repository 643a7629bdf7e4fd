"""Rules for the end of a sampled step, on token ids or on how sure the policy was; ids are never tokenised again.

rule = step_rule(tokenizer, "line")
rule.ends_step([12, 7])  # asked while sampling: has the step that began with token 12 ended?
rule.split_ids([12, 7, 31, 7])  # the spans of a whole response: [(0, 2), (2, 4)]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from mmrl.registry import Kind, add_kind, build_section, register

# Blank is ASCII white space: its bytes are never part of another character, so tables of single tokens are exact.
_BLANK = " \t\n\r\v\f"

# (tokenizer, width of the logits) -> StepRule
add_kind(Kind("step_rules", "step rule", arguments=2))


class StepRule:
    """Decides on sampled token ids where a step ends.

    A step ends after the token that holds the last character of the first separator which follows some content.
    Whatever else that token holds belongs to the ended step too: ids are never split. Content is anything but white
    space, separators, and the tokenizer's bos, eos and pad tokens. Separators before any content end nothing; they are
    the beginning of the next step. The end of a whole response (eos, length) is the caller's business.

    Each token is decoded once, behind another one (so that a leading space is kept), and the rule reads these texts
    alone. It needs no tokenizer while sampling.

    candidates: (V,) bool, tokens after which a step may end.
    """

    def __init__(self, tokenizer: Any, separator: str, last: str, vocab_size: int | None = None) -> None:
        """Make the tables for a transformers tokenizer.

        Args:
            separator: pattern that ends a step. last: its last character.
            vocab_size: V, the width of the model's logits, when larger than the tokenizer; the rest ends nothing.
        Raises:
            ValueError: `vocab_size` too small, or no token of the vocabulary that can complete the separator.
        """
        self._make(token_texts(tokenizer, vocab_size), separator, last)

    def _make(self, texts: list[str], separator: str, last: str) -> None:
        self._texts = texts
        # Possessive (`*+`): once leading separators are skipped, none of them may be taken for the end.
        leading = rf"(?:{separator}|[{_BLANK}])*+"
        self._blank = re.compile(leading)
        self._ended = re.compile(rf"{leading}(?s:.)*?{separator}")
        self.candidates = torch.tensor([last in text for text in texts])
        if not self.candidates.any():
            raise ValueError(f"no token holds {last!r}, so this rule would never end a step; choose another rule")
        self._may_end: list[bool] = self.candidates.tolist()

    def ends_step(self, ids: Sequence[int]) -> bool:
        """True where the last of `ids`, the tokens sampled for the current step so far, completes it.

        Ask after every token, or after those in `candidates`; most calls cost one look into a table.
        """
        if not ids or not self._may_end[ids[-1]]:
            return False
        return self._ended.match(self._text(ids)) is not None

    def _text(self, ids: Sequence[int]) -> str:
        return "".join([self._texts[token] for token in ids])

    def split_ids(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Half-open spans of the steps of a sampled response; they tile 0..len(ids).

        The same spans as asking `ends_step` after every token. The last one may be unfinished, or hold no content
        (`is_blank`), e.g. an eos after a finished step.
        """
        spans, start = [], 0
        for end, token in enumerate(ids, start=1):
            # The first check saves a copy of the step for every token.
            if self._may_end[token] and self.ends_step(ids[start:end]):
                spans.append((start, end))
                start = end
        if start < len(ids):
            spans.append((start, len(ids)))
        return spans

    def is_blank(self, ids: Sequence[int]) -> bool:
        """True where `ids` bring no content: white space, separators, bos, eos and pad alone."""
        return self._blank.fullmatch(self._text(ids)) is not None


class TokenRule(StepRule):
    """A step ends after a token of its own, whatever its text is."""

    def __init__(self, tokenizer: Any, token: str, vocab_size: int | None = None) -> None:
        """
        Raises:
            ValueError: `token` is none of this tokenizer.
        """
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(f"{token!r} is no token of this tokenizer; add it as a special token first")
        private = "\ue000"  # a character of no language stands for the token
        texts = [text.replace(private, "?") for text in token_texts(tokenizer, vocab_size)]
        texts[int(token_id)] = private
        self._make(texts, private, private)


class UnsureRule(StepRule):
    """A step begins with a token that the policy was unsure of; nothing in the text ends one.

    A tree forks before that token: every child draws its own first token from the distribution that was unsure. Both
    are measured on the distribution that is sampled, temperature and banned tokens included. A written text, which
    has neither, is one step.
    """

    def __init__(
        self, tokenizer: Any, measure: Literal["entropy", "confidence"], limit: float, vocab_size: int | None = None
    ) -> None:
        super().__init__(tokenizer, "\n", "\n", vocab_size)
        self.measure, self.limit = measure, limit
        self.candidates = torch.zeros_like(self.candidates)
        self._may_end = self.candidates.tolist()

    def unsure(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """(R,) bool from the log-probs of R drawn tokens and the entropies of their distributions, in nats."""
        if self.measure == "entropy":
            return entropy > self.limit
        return logp <= math.log(self.limit)


# ---- rules ----------------------------------------------------------------------------------------------------------


@register("step_rules", "line")
def line(tokenizer: Any, vocab_size: int | None) -> StepRule:
    """A step ends with its line."""
    return StepRule(tokenizer, "\n", "\n", vocab_size)


@register("step_rules", "blank_line")
def blank_line(tokenizer: Any, vocab_size: int | None) -> StepRule:
    """A step ends at a blank line."""
    return StepRule(tokenizer, "\n\n", "\n", vocab_size)


@register("step_rules", "numbered")
def numbered(tokenizer: Any, vocab_size: int | None) -> StepRule:
    """A step ends with the next one's header `Step k:` at a line's start, which is part of the span it ends."""
    return StepRule(tokenizer, r"(?:\A|\n)Step \d+:", ":", vocab_size)


@register("step_rules", "tag")
def tag(tokenizer: Any, vocab_size: int | None, *, tag: str = "step") -> StepRule:
    """A step ends with `</step>` or `</step_k>`, or another tag's."""
    return StepRule(tokenizer, rf"</{re.escape(tag)}(?:_\d+)?>", ">", vocab_size)


@register("step_rules", "special_token")
def special_token(tokenizer: Any, vocab_size: int | None, *, token: str) -> StepRule:
    """A step ends with a token of its own, such as `<|reasoning_step_end|>`."""
    return TokenRule(tokenizer, token, vocab_size)


@register("step_rules", "entropy", unsure=True, source="EDU-PRM (limit 1.0)")
def entropy(tokenizer: Any, vocab_size: int | None, *, limit: PositiveFloat) -> StepRule:
    """A step begins with a token drawn from a distribution of more than `limit` nats."""
    return UnsureRule(tokenizer, "entropy", limit, vocab_size)


@register("step_rules", "confidence", unsure=True, source="AdaptiveStep (limit: the 2 % quantile of many responses)")
def confidence(tokenizer: Any, vocab_size: int | None, *, limit: Annotated[float, Field(gt=0, lt=1)]) -> StepRule:
    """A step begins with a token drawn with a probability of at most `limit`."""
    return UnsureRule(tokenizer, "confidence", limit, vocab_size)


def step_rule(tokenizer: Any, steps: str | Mapping[str, Any], vocab_size: int | None = None) -> StepRule:
    """The rule of a recipe's `policy.steps`: a row of `step_rules`, as a name or with its options.

    Raises:
        ComponentError: an unknown rule or option.
    """
    rule: StepRule = build_section("step_rules", "policy.steps", steps)(tokenizer, vocab_size)
    return rule


def token_texts(tokenizer: Any, vocab_size: int | None = None) -> list[str]:
    """The text of every token as it appears behind another one; "" for bos, eos, pad and ids beyond the tokenizer."""
    size = len(tokenizer)
    if vocab_size is not None and vocab_size < size:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the tokenizer's {size}; give the width of the logits"
        )
    # Alone, a token would lose its leading space in some tokenizers.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    anchor_length = len(tokenizer.decode([anchor], **options))
    pairs = [[anchor, token] for token in range(size)]
    texts = [text[anchor_length:] for text in tokenizer.batch_decode(pairs, **options)]
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            texts[token] = ""
    beyond = (vocab_size or size) - size
    return texts + [""] * beyond

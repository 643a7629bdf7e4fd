"""Where a sampled step ends: a rule on token ids or on how sure the policy was, so that spans are those of what was
sampled."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# a blank is ASCII white space: its bytes never are part of another character, so tables of single tokens are exact
_BLANK = " \t\n\r\v\f"
RULES = ("line", "blank_line", "numbered", "tag", "special_token")
UNSURE = ("entropy", "confidence")


class StepRule:
    """Decides on sampled token ids where a step ends.

    A step ends after the token that holds the last character of the first separator which follows some content:
        line           "\\n"
        blank_line     "\\n\\n"
        numbered       the next step's header "\\nStep k:"; the header is part of the span it ends
        tag            `</step>` or `</step_k>`
        special_token  the token itself
    Whatever else that token holds belongs to the ended step too: ids are never split. Content is anything but white
    space, separators, and the tokenizer's bos, eos and pad tokens. Separators before any content end nothing; they are
    the beginning of the next step. What ends a whole response (eos, length) is the caller's to know.

    Each token is decoded once, behind another one (so that a leading space is kept), and the rule reads these texts
    alone. It needs no tokenizer while sampling.

    candidates: (V,) bool, tokens after which a step may end.
    """

    def __init__(
        self,
        tokenizer: Any,
        rule: str,
        *,
        token: str | None = None,
        tag: str = "step",
        vocab_size: int | None = None,
    ) -> None:
        """Make the tables for a transformers tokenizer.

        Args:
            token: the separator of `special_token`, e.g. "<|reasoning_step_end|>".
            tag: the name of the closing tag of `tag`.
            vocab_size: V, the width of the model's logits, when larger than the tokenizer; the rest ends nothing.
        Raises:
            ValueError: unknown rule, a `token` that is none or is missing, `vocab_size` too small, or no token of the
                vocabulary that can complete the separator.
        """
        if rule not in RULES:
            raise ValueError(f"unknown step rule {rule!r}; known: {', '.join((*RULES, *UNSURE))}")
        texts = token_texts(tokenizer, vocab_size)
        separator, last = _separator(rule, tag)
        if rule == "special_token":
            separator, last = "\ue000", "\ue000"  # a private character stands for the token, whatever its text is
            texts = [t.replace(last, "?") for t in texts]
            texts[_token_id(tokenizer, token)] = last
        self._texts = texts
        # possessive: once leading separators are skipped, none of them may be taken for the end
        leading = rf"(?:{separator}|[{_BLANK}])*+"
        self._blank = re.compile(leading)
        self._ended = re.compile(rf"{leading}(?s:.)*?{separator}")
        self.candidates = torch.tensor([last in t for t in texts])
        if not self.candidates.any():
            raise ValueError(
                f"no token holds {last!r}, so the rule {rule!r} would never end a step; choose another rule"
            )
        self._may_end: list[bool] = self.candidates.tolist()

    def ends_step(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids`, the tokens sampled for the current step so far, completes it.

        Ask after every token, or after those in `candidates`; most calls cost one look into a table.
        """
        if not ids or not self._may_end[ids[-1]]:
            return False
        return self._ended.match("".join([self._texts[i] for i in ids])) is not None

    def split_ids(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Half-open spans of the steps of a sampled response; they tile 0..len(ids).

        The same spans as asking `ends_step` after every token. The last one may be unfinished, or hold no content
        (`is_blank`), e.g. an eos after a finished step.
        """
        spans, start = [], 0
        for end, token in enumerate(ids, start=1):
            if self._may_end[token] and self.ends_step(ids[start:end]):  # without the first check, a copy per token
                spans.append((start, end))
                start = end
        return [*spans, (start, len(ids))] if start < len(ids) else spans

    def is_blank(self, ids: Sequence[int]) -> bool:
        """Whether `ids` bring no content: white space, separators, bos, eos and pad alone."""
        return self._blank.fullmatch("".join([self._texts[i] for i in ids])) is not None


class UnsureRule(StepRule):
    """A step begins with a token that the policy was unsure of; nothing in the text ends one.

        entropy:LIMIT      the distribution that the token was drawn from has more than LIMIT nats (EDU-PRM: 1.0)
        confidence:LIMIT   the token drawn has at most the probability LIMIT (AdaptiveStep, whose threshold is the
                           2 % quantile over many responses)

    A tree forks before that token: every child draws its own first token from the distribution that was unsure. Both
    are measured on the distribution that is sampled, temperature and banned tokens included. A written text, which
    has neither, is one step.
    """

    def __init__(self, tokenizer: Any, measure: str, limit: float, *, vocab_size: int | None = None) -> None:
        """measure: entropy or confidence.

        Raises:
            ValueError: a limit that is not positive, or a confidence of 1 and more.
        """
        super().__init__(tokenizer, "line", vocab_size=vocab_size)
        self.measure, self.limit = measure, limit
        if not 0 < limit < (1 if measure == "confidence" else math.inf):
            wanted = "a probability below 1" if measure == "confidence" else "nats"
            raise ValueError(f"policy.steps={measure}:{limit:g}: the limit is {wanted}, above 0")
        self.candidates = torch.zeros_like(self.candidates)
        self._may_end = self.candidates.tolist()

    def unsure(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """(R,) bool from the log-probs of the tokens drawn and the entropies of what they were drawn from, in nats."""
        return entropy > self.limit if self.measure == "entropy" else logp <= math.log(self.limit)


def step_rule(tokenizer: Any, steps: str, vocab_size: int | None = None) -> StepRule:
    """The rule of a recipe's `policy.steps`: a name, for some with a token or a number behind a colon.

    Raises:
        ValueError: an unknown rule, or a part behind the colon that it cannot take.
    """
    name, _, part = steps.partition(":")
    if name not in UNSURE:
        return StepRule(tokenizer, name, token=part or None, vocab_size=vocab_size)
    try:
        limit = float(part)
    except ValueError:
        raise ValueError(f"policy.steps={steps!r}: give a number behind the colon, such as {name}:0.5") from None
    return UnsureRule(tokenizer, name, limit, vocab_size=vocab_size)


def token_texts(tokenizer: Any, vocab_size: int | None = None) -> list[str]:
    """The text of every token as it appears behind another one; "" for bos, eos, pad and ids beyond the tokenizer."""
    size = len(tokenizer)
    if vocab_size is not None and vocab_size < size:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the tokenizer's {size}; give the width of the logits"
        )
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode([anchor], **options))
    texts = [t[before:] for t in tokenizer.batch_decode([[anchor, i] for i in range(size)], **options)]
    for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if i is not None:
            texts[i] = ""
    return texts + [""] * ((vocab_size or size) - size)


def _separator(rule: str, tag: str) -> tuple[str, str]:
    """(pattern, last character) of a rule that reads text."""
    if rule == "tag":
        return rf"</{re.escape(tag)}(?:_\d+)?>", ">"
    return {"line": ("\n", "\n"), "blank_line": ("\n\n", "\n"), "numbered": (r"(?:\A|\n)Step \d+:", ":")}.get(
        rule, ("", "")
    )


def _token_id(tokenizer: Any, token: str | None) -> int:
    if token is None:
        raise ValueError("the rule 'special_token' needs `token`, e.g. '<|reasoning_step_end|>'")
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(f"{token!r} is no token of this tokenizer; add it as a special token first")
    return int(found)

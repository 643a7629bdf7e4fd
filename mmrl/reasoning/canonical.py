"""The answer of a text in a form in which equal answers are equal strings, so that votes can count them."""

from __future__ import annotations

import re
from fractions import Fraction

from mmrl.reasoning.answer_text import choice_letter, extract_answer, final_line, normalise
from mmrl.registry import register
from mmrl.rollout import Prompt

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40}|/\d{1,40})?")


@register("answer_forms", "stated")
def canonical_answer(prompt: Prompt, text: str) -> str | None:
    """The answer that `text` states in a form in which equal answers are equal strings, None without one.

    For a prompt with options their letter; else the normal form, numbers by their value to 10 decimals, so that 1/2
    and 0.50 are one answer.
    """
    options = prompt.inputs.get("options")
    if options:
        return choice_letter(extract_answer(text) or final_line(text), options)
    stated = extract_answer(text)
    if stated is None:
        return None
    plain = normalise(stated)
    # Matched before Fraction reads it: an exponent written by a policy could ask for a number of a billion digits
    if not _NUMBER.fullmatch(plain) or re.search(r"/0+$", plain):
        return plain
    value = Fraction(plain)
    return str(value) if value.denominator == 1 else f"{float(value):.10f}".rstrip("0").rstrip(".")

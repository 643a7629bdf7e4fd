"""Final answers: finding them in a completion, comparing them, and rewards that check them.

Text is compared in normal form first, which settles most answers for free; what differs goes to math-verify in a
worker process, because computer algebra can loop for ever inside C code on an expression that a policy wrote.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mmrl.registry import find
from mmrl.rewards.isolation import Worker, WorkerError

if TYPE_CHECKING:
    from mmrl.rollout import Sample

log = logging.getLogger(__name__)

_CLOCK_PER_CPU = 20.0  # seconds on the clock that a verifier gets for each second of CPU time

_TAGS = (
    ("<answer>", "</answer>"),
    ("<correct_answer>", "</correct_answer>"),
    ("<|answer_start|>", "<|answer_end|>"),
)
_HEADER = "### The final answer is:"
_LINE = re.compile(r".*(?<![</|_])\banswer\b(?:\s+is)?\s*[:=]?\s*(.+)$", re.IGNORECASE)
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?")
_LETTER_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LETTER_FIRST = re.compile(r"\s*\(?([A-Z])[.):]\s+")
_LETTER_SAID = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*[:=]?\s*(?:option\s+)?\(?([A-Z])\b(?!')", re.IGNORECASE
)
_LETTER_MARKED = re.compile(r"\(([A-Za-z])\)|(?<!\S)([A-Z])[.):](?!\S)")
_SPACES = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "\\(", "\\)", "\\[", "\\]", "**")


# ---- finding --------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    r"""The final answer that a completion states, or None when it states none.

    The first of these forms that is there and not empty, each time its last occurrence:
    1. `<answer>..</answer>`, `<correct_answer>..</correct_answer>`, `<|answer_start|>..<|answer_end|>`
    2. what follows `### The final answer is:`, up to the next `###`
    3. `\boxed{..}` with balanced braces
    4. a last line with `answer: X`, `answer X`, `the answer is X`
    A box inside 1, 2 or 4 is opened.
    """
    for find_form in (_tagged, _after_header, boxed, _last_line):
        answer = find_form(text)
        if answer is not None and answer.strip():
            inner = boxed(answer)
            return (answer if inner is None else inner).strip()
    return None


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{..}` whose braces balance, None without one."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth, first = 0, start + len("\\boxed")
        for i in range(first, end):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[first + 1 : i]
        end = start
    return None


def _tagged(text: str) -> str | None:
    for opening, closing in _TAGS:
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        if start >= 0:
            return text[start + len(opening) : end]
    return None


def _after_header(text: str) -> str | None:
    _, header, rest = text.rpartition(_HEADER)
    return rest.partition("###")[0] if header else None


def _last_line(text: str) -> str | None:
    found = _LINE.match(_final_line(text).replace("*", ""))
    return found.group(1).strip().removesuffix(".") if found else None


def _final_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


# ---- comparing ------------------------------------------------------------------------------------------------------


def normalise(answer: str) -> str:
    r"""A form in which equal answers are usually equal strings; different answers stay different.

    Case, outer and repeated spaces, spaces around signs, `$`, LaTeX spacing, `\text{..}`, a final full stop, thousands
    commas of a plain number, zeros that say nothing (007, 5.0, .50), `\frac{1}{2}` with plain numbers (1/2).
    Units, percent signs and algebra are left alone.
    """
    text = answer.replace("−", "-").replace("\\%", "%").replace("\\$", "")
    for token in _SPACES:
        text = re.sub(re.escape(token) + r"(?![a-z])", " ", text) if token[-1].isalpha() else text.replace(token, " ")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = " ".join(text.split()).removesuffix(".").lower()
    text = re.sub(r" ?([^\w\s]) ?", r"\1", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    number = _NUMBER.fullmatch(text)
    return _plain_number(*number.groups("")) if number and any(number.groups("")[1:]) else text


def _plain_number(sign: str, whole: str, part: str) -> str:
    digits = (whole.lstrip("0") or "0") + ("." + part.rstrip("0") if part.rstrip("0") else "")
    return ("-" if sign == "-" and digits != "0" else "") + digits


def choice_letter(text: str, options: Sequence[str] | None = None) -> str | None:
    """The option that `text` chooses, as a capital letter; None when it chooses none or several.

    Looks, in this order, for: a lone letter or exactly an option, its text with or without its letter; a stated
    `answer is A`; `(A)`, `A.`, `A)`, `A:` anywhere; the text of an option inside. The first form that occurs decides.

    Args:
        options: their texts, with or without the letter in front; None allows every letter and looks for no text.
    """
    texts = None if options is None else [_option_text(o) for o in options]
    known = string.ascii_uppercase[: 26 if texts is None else len(texts)]
    for form in (_whole, _said, _marked, _contained):
        letters = {x for x in form(text, texts or []) if x in known}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _option_text(option: str) -> str:
    return normalise(_LETTER_FIRST.sub("", option, count=1) if _LETTER_FIRST.match(option) else option)


def _whole(text: str, texts: Sequence[str]) -> list[str]:
    alone, first = _LETTER_ALONE.fullmatch(text), _LETTER_FIRST.match(text)
    same = [string.ascii_uppercase[i] for i, t in enumerate(texts[:26]) if t == _option_text(text)]
    letters = [alone.group(1)] if alone else [first.group(1)] if first and same else []
    return same + [x.upper() for x in letters]


def _said(text: str, texts: Sequence[str]) -> list[str]:
    # only the words are free in case: "the answer is a cat" names no option
    return [x for x in _LETTER_SAID.findall(text.replace("*", "")) if x.isupper()]


def _marked(text: str, texts: Sequence[str]) -> list[str]:
    return [(a or b).upper() for a, b in _LETTER_MARKED.findall(text)]


def _contained(text: str, texts: Sequence[str]) -> list[str]:
    inside = normalise(text)
    hits = [i for i, t in enumerate(texts[:26]) if t and re.search(rf"(?<!\w){re.escape(t)}(?!\w)", inside)]
    # "cat" inside "black cat" is not a second choice
    longest = [i for i in hits if not any(texts[i] != texts[j] and texts[i] in texts[j] for j in hits)]
    return [string.ascii_uppercase[i] for i in longest]


# ---- rewards --------------------------------------------------------------------------------------------------------


class ExactAnswer:
    """1 when the completion's answer equals `reference["answer"]` in normal form, else 0; no answer is 0."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [float(_same(answer_of(s), reference_answer(s))) for s in samples]


class MultipleChoice:
    """1 when the completion chooses the option of `reference["answer"]` (a letter or an option's text), else 0.

    Options come from `reference["options"]`, else from the prompt's inputs. Without a stated answer the last line is
    read. No choice or several are 0; a reference that names no single option leaves the sample unscored.
    """

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference is unclear."""
        return [self._score(s) for s in samples]

    def _score(self, sample: Sample) -> float | None:
        reference, inputs = sample.prompt.reference, sample.prompt.inputs
        options = (reference.get("options") if isinstance(reference, Mapping) else None) or inputs.get("options")
        text, right = completion(sample), choice_letter(reference_answer(sample), options)
        if right is None:
            return None
        return float(choice_letter(extract_answer(text) or _final_line(text), options) == right)


class MathAnswer:
    """1 when the completion's answer is mathematically equal to `reference["answer"]`, else 0; no answer is 0.

    Equal normal forms settle it. Otherwise the verifier decides in a worker process that is killed when one pair
    takes longer than `verify_s`; that sample is None, as after a crash or an exception of the verifier. Equal pairs of
    a batch are verified once, so a batch takes at most `verify_s` (plus a restart) per different wrong-looking answer.

    Args:
        verify_s: seconds of CPU time > 0 for one pair, so that a verdict does not depend on what else the machine
            does. A verifier that waits is killed after twenty times as many seconds.
        verifier: dotted path of a function, list of (reference, answer) -> list of truth values. It is tried on
            ("1", "2") when the process starts.

    Attributes:
        failures: pairs without a verdict so far, by `timeout`, `crash` and `error`.
    """

    def __init__(self, verify_s: float = 5.0, verifier: str = "mmrl.rewards.answers:verify_pairs") -> None:
        if verify_s <= 0:
            raise ValueError(f"math_answer: verify_s={verify_s} must be above 0")
        self.verify_s = verify_s
        self.failures: Counter[str] = Counter()
        self.last_error: str | None = None
        self._worker = Worker(partial(_load_verifier, verifier))

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the verifier failed.

        Raises:
            ComponentError, WorkerStartError: the verifier cannot be loaded.
        """
        self.last_error = None
        verify = cache(self._verify)
        values: list[float | None] = []
        for s in samples:
            reference, answer = reference_answer(s), answer_of(s)
            if answer is None or _same(answer, reference):
                values.append(float(answer is not None))
            else:
                values.append(verify(reference, answer))
        return values

    def close(self) -> None:
        """End the worker process; it also ends by itself with this object and with the program."""
        self._worker.close()

    def _verify(self, reference: str, answer: str) -> float | None:
        try:
            (verdict,) = self._worker.call([(reference, answer)], _CLOCK_PER_CPU * self.verify_s, self.verify_s)
        except WorkerError as error:
            self.failures[error.kind] += 1
            self.last_error = str(error)
            log.warning("answer %r against %r has no verdict (%s): %s", answer[:80], reference, error.kind, error)
            return None
        return verdict


def _load_verifier(path: str) -> Any:
    verifier = find("rewards", path).target
    verifier([("1", "2")])  # imports and tables of grammars, which are not on the clock of the first answer
    return verifier


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """math-verify's verdict on (reference, answer) pairs, without its own time limits: run it in a `Worker`."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nothing limits its time; the worker does

    def read(text: str) -> list[Any]:
        plain = text.replace("\\$", "").replace("$", "")
        return parse(f"${plain}$", parsing_timeout=None) or parse(plain, parsing_timeout=None)

    return [bool(verify(read(r), read(a), timeout_seconds=None)) for r, a in pairs]


def completion(sample: Sample) -> str:
    """The text of a sample.

    Raises:
        ValueError: its output is no text.
    """
    if not isinstance(sample.output, str):
        raise ValueError(
            f"prompt {sample.prompt.id!r}: this reward reads texts, the output is a {type(sample.output).__name__}"
        )
    return sample.output


def answer_of(sample: Sample) -> str | None:
    """The answer that the completion states."""
    return extract_answer(completion(sample))


def reference_answer(sample: Sample) -> str:
    """`reference["answer"]`, or the reference itself when it is a text or a number.

    Raises:
        ValueError: there is none; the message names the prompt.
    """
    reference = sample.prompt.reference
    answer = reference.get("answer") if isinstance(reference, Mapping) else reference
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(
            f"prompt {sample.prompt.id!r}: the reference {reference!r} holds no answer; give a text or a number, or "
            '{"answer": ...}'
        )
    return str(answer)


def _same(answer: str | None, reference: str) -> bool:
    return answer is not None and normalise(answer) == normalise(reference)

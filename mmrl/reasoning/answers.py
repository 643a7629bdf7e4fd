"""Rewards that check the final answer of a completion.

Text is compared in normal form first, which settles most answers for free; what differs goes to math-verify in a
worker process, because computer algebra can loop for ever inside C code on an expression that a policy wrote.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmrl.reasoning.answer_text import choice_letter, compare, extract_answer, final_line, normalise
from mmrl.reasoning.rows import LIKE_ANSWERS
from mmrl.registry import declares, find
from mmrl.rewards.isolation import numbers_from
from mmrl.worker import Target, Worker, WorkerError

if TYPE_CHECKING:
    from mmrl.rollout import Prompt, Sample

log = logging.getLogger(__name__)

# ---- rewards --------------------------------------------------------------------------------------------------------


class NoAnswerError(ValueError):
    """A prompt whose reference holds no answer."""


class AnswerReward:
    """The base of the rewards of answers: a sample whose reference holds no answer is None and punishes no other.

    Attributes:
        last_error: about the last such sample of a call, None without one.
    """

    last_error: str | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where there is no verdict.

        Raises:
            ValueError: an output that is no text.
        """
        self.last_error = None
        values: list[float | None] = []
        for sample in samples:
            try:
                values.append(self.verdict(sample))
            except NoAnswerError as error:
                self.last_error = str(error)
                values.append(None)
        return values

    def refusal(self, prompt: Prompt) -> str | None:
        """Why no sample of this prompt can be scored: its reference holds no answer."""
        try:
            right_answer(prompt)
        except NoAnswerError as error:
            return str(error)
        return None

    def verdict(self, sample: Sample) -> float | None:
        """1 if the sample's answer is right, 0 if it is wrong, None if that is unknown."""
        raise NotImplementedError


@declares(reads=("texts",))
class ExactAnswer(AnswerReward):
    """1 when the completion's answer equals `reference["answer"]` in normal form, else 0; no answer is 0."""

    def verdict(self, sample: Sample) -> float:
        """See `AnswerReward`."""
        return float(_same(answer_of(sample), reference_answer(sample)))


@declares(reads=("texts",))
class MultipleChoice(AnswerReward):
    """1 when the completion chooses the option of `reference["answer"]` (a letter or an option's text), else 0.

    Options come from `reference["options"]`, else from the prompt's inputs. Without a stated answer the last line is
    read. No choice or several are 0; a reference that names no single option leaves the sample unscored.
    """

    def verdict(self, sample: Sample) -> float | None:
        """See `AnswerReward`."""
        reference, inputs = sample.prompt.reference, sample.prompt.inputs
        options = (reference.get("options") if isinstance(reference, Mapping) else None) or inputs.get("options")
        text, right = completion(sample), choice_letter(reference_answer(sample), options)
        if right is None:
            return None
        return float(choice_letter(extract_answer(text) or final_line(text), options) == right)


@declares(reads=("texts",))
class MathAnswer(AnswerReward):
    """1 when the completion's answer is mathematically equal to `reference["answer"]`, else 0; no answer is 0.

    Equal normal forms settle it. Otherwise the verifier decides in a worker process that is killed when one pair
    takes longer than `verify_s`; that sample is None, as after a crash or an exception of the verifier. Equal pairs of
    a batch are verified once, so a batch takes at most `verify_s` (plus a restart) per different wrong-looking answer.

    Args:
        verify_s: seconds > 0 for one pair, waits for a free processor aside, so that a verdict does not depend on
            what else the machine does; see `Worker.call`.
        verifier: dotted path of a function, list of (reference, answer) -> list of truth values. It is tried on
            ("1", "2") when the process starts.

    Attributes:
        failures: pairs without a verdict so far, by `timeout`, `crash` and `error`.
    """

    def __init__(self, verify_s: float = 5.0, verifier: str = "mmrl.reasoning.answers:verify_pairs") -> None:
        if verify_s <= 0:
            raise ValueError(f"math_answer: verify_s={verify_s} must be above 0")
        self.verify_s = verify_s
        self.failures: Counter[str] = Counter()
        # Of the present batch, by reference and answer.
        self._verdicts: dict[tuple[str, str], float | None] = {}
        self._worker = Worker(partial(_load_verifier, verifier))

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the verifier failed.

        Raises:
            ComponentError, WorkerStartError: the verifier cannot be loaded.
        """
        self._verdicts.clear()
        return super().__call__(samples)

    def verdict(self, sample: Sample) -> float | None:
        """See `AnswerReward`."""
        answer, reference = answer_of(sample), reference_answer(sample)
        equal = False if answer is None else compare(answer, reference)
        if equal is not None or answer is None:
            return float(bool(equal))
        pair = reference, answer
        if pair not in self._verdicts:
            self._verdicts[pair] = self._verify(reference, answer)
        return self._verdicts[pair]

    def close(self) -> None:
        """End the worker process; it also ends by itself with this object and with the program."""
        self._worker.close()

    def _verify(self, reference: str, answer: str) -> float | None:
        try:
            (verdict,), _ = self._worker.call([(reference, answer)], self.verify_s)
        except WorkerError as error:
            self.failures[error.kind] += 1
            self.last_error = str(error)
            log.warning("answer %r against %r has no verdict (%s): %s", answer[:80], reference, error.kind, error)
            return None
        return verdict


def _load_verifier(path: str) -> Target:
    verifier = find("rewards", path).target
    # Its imports and grammars are loaded here, not in the time of the first answer.
    verifier([("1", "2")])
    return numbers_from(verifier)


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """math-verify's verdict on (reference, answer) pairs, without its own time limits: run it in a `Worker`."""
    from math_verify import parse, verify

    # It warns that nothing limits its time; the worker does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> list[Any]:
        plain = text.replace("\\$", "").replace("$", "")
        return parse(f"${plain}$", parsing_timeout=None) or parse(plain, parsing_timeout=None)

    return [bool(verify(read(reference), read(answer), timeout_seconds=None)) for reference, answer in pairs]


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
    """The right answer of a sample's prompt; see `right_answer`."""
    return right_answer(sample.prompt)


def right_answer(prompt: Prompt) -> str:
    """`reference["answer"]`, or the reference itself when it is a text that is not blank or a finite number.

    Raises:
        NoAnswerError: there is none; the message names the prompt.
    """
    reference = prompt.reference
    answer = reference.get("answer") if isinstance(reference, Mapping) else reference
    blank = isinstance(answer, str) and not answer.strip()
    endless = isinstance(answer, float) and not math.isfinite(answer)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or blank or endless:
        remedy = 'give a text or a number as "answer"'
        if isinstance(reference, Mapping):
            columns = [name for name in LIKE_ANSWERS if reference.get(name) is not None]
            if columns:
                remedy = f"name its column, such as task.answer: {columns[0]}"
        raise NoAnswerError(f"prompt {prompt.id!r}: the reference {_short(reference)} holds no answer; {remedy}")
    return str(answer)


def _short(reference: Any) -> str:
    text = repr(reference)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _same(answer: str | None, reference: str) -> bool:
    return answer is not None and normalise(answer) == normalise(reference)

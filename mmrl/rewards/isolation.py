"""Rewards in a process that can be killed: one that hangs or dies costs its sample, not the run."""

from __future__ import annotations

import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from mmrl.registry import ComponentError, build, find
from mmrl.worker import Target, Worker, WorkerError, WorkerStartError

if TYPE_CHECKING:
    from mmrl.rollout import OutcomeReward, Sample

log = logging.getLogger(__name__)


def samples_by_prompt(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Prompt id -> indices of its samples, prompts in the order of their first sample."""
    by_prompt: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt.id, []).append(i)
    return by_prompt


class NotNumbersError(TypeError):
    """The result of a reward is no sequence of values."""


class Isolated:
    """An outcome reward that runs in a worker process.

    A batch has `timeout_s` seconds. When it takes longer, crashes its process or raises, its samples are tried one by
    one, each with the same limit: one bad sample costs two failed tries, each further one costs one more. A sample
    that fails alone is None, the others keep their scores. With many bad samples, a call starts no further try once
    it has spent 2 (ceil(log2 n) + 1) limits, where building the function anew counts as one; samples without a score
    by then are None as well.

    The limit does not count the time in which the worker waits for a free processor, see `Worker.call`. Work that a
    reward leaves to processes of its own is waited for on the clock.

    A reward that compares the samples of a prompt (`GroupReward`) gets them together; they are tried prompt by prompt.

    Tensors arrive as CPU copies. A reward with a model on a GPU holds its own CUDA context here: to share the
    trainer's, run it in process.

    Args:
        reward: registered name or dotted path, built from `options` in the worker; or a picklable reward.
        timeout_s: seconds > 0 for one batch. Building the reward is not counted.
        section: where the recipe names it, for messages.

    Attributes:
        failures: samples left without a score so far, by `timeout`, `crash`, `error` and `skipped` (not tried).
        last_error: message of the newest failed try of the last call, None when all went well.

    Raises:
        ComponentError, WorkerStartError: the reward cannot be made.
    """

    def __init__(
        self,
        reward: str | OutcomeReward,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        *,
        section: str = "rewards",
    ) -> None:
        from mmrl.capabilities import GroupReward, PromptChecker

        if timeout_s <= 0:
            raise ValueError(f"{section}: timeout_s={timeout_s} must be above 0")
        self.name = reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)
        self.timeout_s = timeout_s
        self.failures: Counter[str] = Counter()
        self.last_error: str | None = None
        self._worker = Worker(partial(_make_reward, reward, dict(options or {}), section))
        try:
            self._worker.start()
        except WorkerStartError as error:
            if isinstance(error.__cause__, WorkerError) and error.__cause__.type == "ComponentError":
                raise ComponentError(str(error.__cause__).partition(": ")[2]) from None
            raise
        target = find("rewards", reward).target if isinstance(reward, str) else reward
        self._compares = isinstance(target, GroupReward)
        # A function can be asked before sampling which prompts it will never score. A class would have to be built in
        # this process for that, so it is not asked.
        if isinstance(target, PromptChecker) and not isinstance(target, type):
            self.refusal = target.refusal

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reward failed.

        Raises:
            RewardError: the reward returned no list of values, or another number of them than it got samples.
            WorkerStartError: the process cannot be started again.
        """
        self.last_error = None
        values: list[float | None] = [None] * len(samples)
        failed: dict[int, str] = {}
        # A stack of parts to try, each a list of units that could still be tried apart; first the whole batch.
        parts = [self._units(samples)] if samples else []
        limits_left: float = 2 * (1 + math.ceil(math.log2(max(len(samples), 1))))
        while parts:
            units = parts.pop()
            part = list(chain.from_iterable(units))
            if limits_left <= 0:
                failed |= dict.fromkeys(part, "skipped")
                continue
            builds = self._worker.builds
            self._worker.start()
            limits_left -= self._worker.builds - builds
            try:
                scores = self._scores([samples[i] for i in part])
            except WorkerError as error:
                limits_left -= 1 if error.kind == "timeout" else self._worker.seconds / self.timeout_s
                self._note(error, len(part))
                if len(units) == 1:
                    failed |= dict.fromkeys(part, error.kind)
                else:
                    parts += [[unit] for unit in reversed(units)]
                continue
            limits_left -= self._worker.seconds / self.timeout_s
            for i, score in zip(part, scores, strict=True):
                values[i] = score
        self._report(samples, failed)
        return values

    def close(self) -> None:
        """End the process; it also ends by itself with this object and with the program."""
        self._worker.close()

    def _units(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Indices of samples, in units that are never tried apart: single samples, or all samples of a prompt."""
        if not self._compares:
            return [[i] for i in range(len(samples))]
        return list(samples_by_prompt(samples).values())

    def _scores(self, samples: Sequence[Sample]) -> list[Any]:
        from mmrl.rewards.scoring import RewardError, wrong_count

        try:
            values, _ = self._worker.call(samples, self.timeout_s)
        except WorkerError as error:
            if error.type == NotNumbersError.__name__:
                raise RewardError(f"reward {self.name!r}: {str(error).partition(': ')[2]}") from None
            raise
        if len(values) != len(samples):
            raise RewardError(wrong_count(self.name, len(values), len(samples)))
        return values

    def _note(self, error: WorkerError, size: int) -> None:
        if error.trace and self.last_error is None:
            log.error("reward %r raised on %d samples:\n%s", self.name, size, error.trace)
        self.last_error = str(error)

    def _report(self, samples: Sequence[Sample], failed: Mapping[int, str]) -> None:
        if not failed:
            return
        self.failures.update(failed.values())
        examples = [f"{samples[i].prompt.id!r} ({kind})" for i, kind in list(failed.items())[:5]]
        if len(failed) > 5:
            examples.append("...")
        log.warning(
            "reward %r left %d of %d samples unscored: %s; last failure: %s",
            self.name,
            len(failed),
            len(samples),
            ", ".join(examples),
            self.last_error,
        )


# ---- in the worker process ------------------------------------------------------------------------------------------


def numbers_from(function: Callable[[Any], Any]) -> Target:
    """A worker's function: a batch -> one entry per value, a float, None, or a description of what is no number."""

    def numbers(batch: Any) -> tuple[list[float | str | None], list[Any]]:
        return [_number(value) for value in as_values(function(batch))], []

    return numbers


def as_values(answer: Any) -> list[Any]:
    """The values of a reward's result, which is a list, a tuple, or an array or tensor of one axis.

    Raises:
        NotNumbersError: anything else; a dict would be read by its keys, a text by its characters.
    """
    is_array = hasattr(answer, "__array__")
    if is_array and getattr(answer, "requires_grad", False):
        answer = answer.detach()
    if isinstance(answer, (list, tuple, array)) or (is_array and answer.ndim == 1):
        return list(answer)
    kind = f"{type(answer).__name__} of shape {tuple(answer.shape)}" if is_array else type(answer).__name__
    raise NotNumbersError(
        f"it returned a {kind}, {short(answer)}; return a list, tuple, array or tensor with one value per sample"
    )


def as_number(value: Any) -> float | None:
    """A value as a float.

    Raises:
        TypeError: it is a text, an array with axes, or nothing that float() takes.
    """
    if value is None:
        return None
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 0) > 0:
        raise TypeError(short(value))
    try:
        return float(value)
    except Exception as error:
        raise TypeError(short(value)) from error


def short(value: Any) -> str:
    """The first characters of a value; some have no text of their own, such as numbers of 5,000 digits."""
    try:
        return str(value)[:80]
    except Exception:
        return f"a {type(value).__name__}"


def _number(value: Any) -> float | str | None:
    """The value as a float or None; a text describes what is no number, and the caller names its sample."""
    try:
        return as_number(value)
    except TypeError as error:
        return str(error)


def _make_reward(reward: Any, options: Mapping[str, Any], section: str) -> Target:
    """The worker's function for a reward, which is built here when it is given by name."""
    if isinstance(reward, str):
        reward = build("rewards", section, reward, options)
    return numbers_from(reward)

"""Reward functions with the signature of TRL and ms-swift, used without change.

def reward(completions, answer, **kwargs): ...      # the columns of the data as lists, one entry per sample
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmrl.sample import Prompt, Sample

# Parameters that are filled from samples rather than from columns of the data.
_GIVEN = ("completions", "prompts")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def as_reward(function: Any) -> Any:
    """A function that takes `completions` as a reward of samples; anything else as it is.

    `completions` and `prompts` are lists of messages, as TRL makes them of conversations:
    `completions[i][0]["content"]` is the text of sample i (its picture or film, where it is none). A parameter without
    default is a column: a key of the prompt's reference or inputs. One with a default is a column where the data have
    it, and an option of the recipe.
    """
    if not inspect.isfunction(function):
        return function
    parameters = inspect.signature(function).parameters
    if "completions" not in parameters:
        return function
    columns: list[str] = []
    options: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if parameter.kind not in _NAMED or name in _GIVEN:
            continue
        if parameter.default is parameter.empty:
            columns.append(name)
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def reward(samples: Sequence[Sample], **chosen: Any) -> Any:
        """The function's result for the samples. chosen: options of the recipe, which go before columns."""
        for sample in samples:
            reason = refusal(sample.prompt)
            if reason is not None:
                raise KeyError(reason)
        rows = [_columns(sample.prompt) for sample in samples]
        arguments: dict[str, Any] = {}
        # A column that some prompts lack is None for their samples.
        for row in rows:
            for name in row:
                if name not in arguments and (takes_all or name in parameters):
                    arguments[name] = [other.get(name) for other in rows]
        arguments |= chosen
        arguments["completions"] = [[{"role": "assistant", "content": sample.output}] for sample in samples]
        if takes_all or "prompts" in parameters:
            arguments["prompts"] = [_messages(sample.prompt) for sample in samples]
        result = function(**arguments)
        # TRL also takes asynchronous reward functions.
        if inspect.iscoroutine(result):
            return asyncio.run(result)
        return result

    def refusal(prompt: Prompt) -> str | None:
        """The reason why no sample of this prompt can be scored, if any; see `mmrl.capabilities.PromptChecker`."""
        row = _columns(prompt)
        missing = [name for name in columns if name not in row]
        if not missing:
            return None
        present = ", ".join(row) or "none"
        return (
            f"prompt {prompt.id!r} has no column {missing[0]!r}, which {function.__name__}() takes; it has {present}"
        )

    samples = inspect.Parameter("samples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return _named_as(function, reward, inspect.Signature([samples, *options]), refusal)


def _named_as(
    function: Callable[..., Any], reward: Any, signature: inspect.Signature, refusal: Callable[[Prompt], str | None]
) -> Any:
    """The wrapper with the name, the documentation, the options and their types of the wrapped function."""
    reward.__name__, reward.__qualname__ = function.__name__, function.__qualname__
    reward.__module__, reward.__doc__ = function.__module__, function.__doc__
    reward.__signature__ = signature
    reward.__annotations__ = {
        name: annotation for name, annotation in function.__annotations__.items() if name in signature.parameters
    }
    reward.refusal = refusal
    return reward


def _columns(prompt: Prompt) -> dict[str, Any]:
    """The data of a prompt: its inputs and its reference by name; a reference that is no mapping is `answer`."""
    reference = prompt.reference if isinstance(prompt.reference, Mapping) else {"answer": prompt.reference}
    row = dict(prompt.inputs) | dict(reference)
    return {name: value for name, value in row.items() if name not in _GIVEN}


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt as one message of the user."""
    return [{"role": "user", "content": prompt.inputs.get("question", prompt.inputs.get("prompt", ""))}]

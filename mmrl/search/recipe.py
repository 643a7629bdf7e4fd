"""The recipe of `mmrl search`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from mmrl.recipe import JobConfig
from mmrl.registry import of_kind


class SearchConfig(JobConfig):
    """A recipe of `mmrl search`.

    method.name is one of `mmrl list searches` or a dotted path, or best_of_k for policies whose steps are no texts
    (denoising).
    """

    split: Literal["train", "eval"] = "eval"
    # A registered name, a saved scorer's folder, or a section with `name` and options; null scores nothing.
    scorer: str | dict[str, Any] | None = None
    aggregates: list[Annotated[str, of_kind("aggregates")]] = Field(
        default_factory=lambda: ["min", "product", "last", "mean"], min_length=1
    )
    # The form in which votes and revisions compare answers: a row of `mmrl list answer_forms`, or module:function.
    answers: Annotated[str, of_kind("answer_forms")] = "stated"
    # Limit of generated tokens per prompt, for policies that write.
    max_tokens: PositiveInt | None = None

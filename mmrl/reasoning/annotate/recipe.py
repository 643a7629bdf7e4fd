"""The recipe of `mmrl annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from mmrl.config import Component, Section
from mmrl.reasoning.annotate.select import ActiveConfig
from mmrl.reasoning.records import Kind
from mmrl.recipe import JobConfig
from mmrl.registry import of_kind


class LabelConfig(Component):
    """The way from counts to labels: a rule of `mmrl.reasoning.annotate.targets` with its numbers."""

    name: str = "hard_gt"
    after: Literal["mask", "zero", "keep"] = "mask"  # what becomes of the steps after the first error


class InjectConfig(Section):
    """Planted errors (URSA's misinterpretation insertion): their labels cost nothing and are exact."""

    copies: PositiveInt = 1  # per right solution, each with one value changed
    kinds: list[Kind] | None = None  # steps that may be changed, null = all
    values: tuple[Literal["number", "colour", "relation"], ...] = ("number",)


class AnnotateConfig(JobConfig):
    """A recipe of `mmrl annotate`.

    method.name: monte_carlo, omega (completions of prefixes); scorer (a step reward or saved scorer), judge (a policy
    that reads solutions), outcome (FreePRM's pseudo-labels).
    """

    records: Path | None = None  # solutions to label; null = the policy writes `method.solutions` per question
    format: Annotated[str | dict[str, Any], of_kind("formats")] = "records"  # of `records`
    active: ActiveConfig | None = None  # of `records`, only those that several scorers are not sure of
    label: LabelConfig = LabelConfig()  # for monte_carlo and omega
    refine: Component | None = None  # scan, consensus with a scorer or judge, balanced_information
    inject: InjectConfig | None = None  # add copies of right solutions with one planted error

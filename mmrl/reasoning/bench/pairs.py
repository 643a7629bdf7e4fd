"""Pairwise benchmarks: VL-RewardBench and RewardBench, where the better of two responses must score higher.

A response is scored as steps (its paragraphs) and an aggregate. Equal scores count one half, stated in the result: a
scorer that cannot tell two responses apart is right half of the time, not never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, mean, of_groups, response_steps, total
from mmrl.reasoning.records import SolutionRecord
from mmrl.reasoning.rows import images, row_id, text, without_image_marks
from mmrl.registry import register

VL_GROUPS = {
    "general": ("vlfeedback", "wildvision"),
    "hallucination": ("povid", "rlhf-v", "rlaif-v"),
    "reasoning": ("mathverse", "mmmu"),
}
SECTIONS = {
    "chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "chat_hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
# So that mathematics (447 pairs) weighs as much as six programming languages of 164 pairs.
WEIGHTS = {"math-prm": 984} | {name: 164 for name in SECTIONS["reasoning"] if name.startswith("hep-")}


def pair(record_id: str, question: str, pictures: tuple[str, ...], chosen: Any, rejected: Any, group: str) -> Item:
    """An item of the better and the worse response; RowError if one is empty."""
    records = []
    for role, response in (("chosen", chosen), ("rejected", rejected)):
        steps = response_steps(response, role)
        records.append(SolutionRecord(f"{record_id}/{role}", question, steps, images=pictures))
    return Item(tuple(records), group)


def agreement(scored: Scored, aggregate: str) -> float:
    """1 if the better response scores higher, 0 if lower, one half if equal."""
    better, worse = (total(scores, aggregate) for scores in scored.scores)
    return 0.5 if better == worse else float(better > worse)


# ---- VL-RewardBench ---------------------------------------------------------------------------------------------


def read_vl(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """`query, response [two], human_ranking [rank of each, 0 = better], image, query_source, id`."""
    responses, ranking = row.get("response"), row.get("human_ranking")
    if not isinstance(responses, list) or len(responses) != 2 or sorted(ranking or []) != [0, 1]:
        raise RowError(f"no pair: expected two responses and a ranking of 0 and 1, found {ranking!r}")
    assert isinstance(ranking, list)
    chosen, rejected = (responses[ranking.index(rank)] for rank in (0, 1))
    record_id = row_id(row, name)
    source = str(row.get("query_source") or record_id)
    question = without_image_marks(text(row, "query"))
    return [pair(record_id, question, images(row, "image"), chosen, rejected, vl_group(source))]


def vl_group(source: str) -> str:
    """general, hallucination or reasoning, from the name of the source."""
    plain = source.lower().replace("_", "-")
    for group, sources in VL_GROUPS.items():
        if any(name in plain for name in sources):
            return group
    raise RowError(f"unknown source: {source!r} is of none of the groups {VL_GROUPS}")


def measure_vl(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """overall = accuracy over all pairs, macro = mean of the three groups."""
    groups = _accuracies(scored, aggregate)
    overall = mean([agreement(entry, aggregate) for entry in scored])
    macro = mean([groups[name]["accuracy"] if name in groups else math.nan for name in VL_GROUPS])
    return Result({"overall": overall, "macro": macro}, groups)


def _accuracies(scored: Sequence[Scored], aggregate: str) -> dict[str, dict[str, float]]:
    """Accuracy and number of the pairs of each group."""
    groups = {}
    for name, part in of_groups(scored).items():
        hits = [agreement(entry, aggregate) for entry in part]
        groups[name] = {"accuracy": mean(hits), "items": len(hits)}
    return groups


# ---- RewardBench ------------------------------------------------------------------------------------------------


def read_rb(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """`prompt, chosen, rejected, subset, id`."""
    subset = text(row, "subset")
    if not any(subset in members for members in SECTIONS.values()):
        raise RowError(f"unknown source: subset {subset!r} is of none of the sections {', '.join(SECTIONS)}")
    record_id = f"{subset}/{row_id(row, name)}"
    return [pair(record_id, text(row, "prompt"), (), row.get("chosen"), row.get("rejected"), subset)]


def measure_rb(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """Accuracy per subset, sections weighted by `section`, score = mean of the four sections."""
    subsets = _accuracies(scored, aggregate)
    sections = {}
    for name, members in SECTIONS.items():
        sections[name] = section({member: subsets[member] for member in members if member in subsets})
    return Result({"score": mean(list(sections.values())), **sections}, subsets)


def section(subsets: Mapping[str, Mapping[str, float]]) -> float:
    """Mean accuracy of subsets weighted by their pairs, the reasoning subsets by `WEIGHTS`; NaN without any."""
    weights = {name: WEIGHTS.get(name, measures["items"]) for name, measures in subsets.items()}
    if not weights:
        return math.nan
    weighted = [weights[name] * measures["accuracy"] for name, measures in subsets.items()]
    return math.fsum(weighted) / math.fsum(weights.values())


_TIES = {"ties": "count one half"}
VL_REWARDBENCH = register("benchmarks", "vl_rewardbench")(
    Benchmark(read_vl, measure_vl, "macro", False, False, settings=_TIES)
)
REWARDBENCH = register("benchmarks", "rewardbench")(
    Benchmark(read_rb, measure_rb, "score", False, False, settings=_TIES)
)

"""From `policy.model` to an adapter: which one serves a folder or hub name, and which keys of a recipe it takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.adapters.base import Adapter
from diffusion.adapters.pipeline import DENOISERS, modular_class, pipeline_index
from mmrl.registry import find, names


def load_adapter(model: str, adapter: str | None, options: Mapping[str, Any]) -> Adapter:
    """The adapter of a model, on the CPU.

    Args:
        model: "digits", a folder, or a hub name.
        adapter: a row of `adapters` or a dotted path; None goes by what the folder's index says.
        options: keys of the recipe's policy; those that are None are the adapter's own.
    Raises:
        ValueError: no adapter serves the model, or one that does not take an option that is set.
    """
    if model == "digits":
        from diffusion.digits_base import digits_base

        model = str(digits_base().folder)
    row = find("adapters", adapter or adapter_of(model))
    given = {name: value for name, value in options.items() if value is not None}
    taken = _keywords(row.target)
    for name in given:
        if name not in taken:
            raise ValueError(
                f"policy.{name}={given[name]!r}: adapter {row.name!r} does not take it; it takes "
                f"{', '.join(sorted(taken & set(options))) or 'no such key'}"
            )
    loaded: Adapter = row.target.from_pretrained(model, **given)
    return loaded


def adapter_of(model: str) -> str:
    """Name of the adapter for a model: the row named as the class of its denoiser, else `blocks` where diffusers has
    blocks for its pipeline.

    Raises:
        ValueError: there is neither.
    """
    index = pipeline_index(model)
    denoiser = _denoiser(Path(model), index)
    if denoiser in names("adapters"):
        return str(denoiser)
    pipeline = str(index.get("_class_name") or index.get("_blocks_class_name"))
    if index and modular_class(index) is not None:
        return "blocks"
    if not index and denoiser is None:
        raise ValueError(
            f"policy.model={model!r}: no model_index.json there and no transformer/config.json or unet/config.json; "
            "give the folder of a saved diffusers pipeline, or its hub name"
        )
    told = pipeline if index else f"a {denoiser} without model_index.json"
    rows = ", ".join(name for name in names("adapters") if name != "blocks")
    raise ValueError(
        f"policy.model={model!r} is {told}, for which there is no adapter: rows named by a denoiser ({rows}), nor "
        'blocks in diffusers. Write one and name it, as policy.adapter: "my_package:MyAdapter" '
        "(docs/guides/diffusion_families.md)"
    )


def _denoiser(folder: Path, index: Mapping[str, Any]) -> str | None:
    """The class of the network that denoises: as the index says, else as its own configuration does."""
    for name in DENOISERS:
        part = index.get(name)
        if isinstance(part, list | tuple) and part[1] is not None:
            return str(part[1])
        config = folder / name / "config.json"
        if config.exists():
            return str(json.loads(config.read_text()).get("_class_name"))
    return None


def _keywords(adapter: Any) -> set[str]:
    """Names of what `from_pretrained` takes, and the class where it passes the rest on."""
    parameters = dict(inspect.signature(adapter.from_pretrained).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters |= inspect.signature(adapter).parameters
    return set(parameters) - {"folder"}

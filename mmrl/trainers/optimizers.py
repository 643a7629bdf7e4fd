"""Optimizers and learning-rate schedules by name: those of torch, transformers and bitsandbytes.

A row of `optimizers` takes the parameters and, of `lr`, `betas`, `eps` and `weight_decay`, those that it has; further
keyword arguments are `optim.options` of a recipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mmrl.config import ConfigError
from mmrl.extras import how_to_install
from mmrl.recipe import OptimConfig
from mmrl.registry import MissingPackage, find, register
from mmrl.sharding import sharding_asked

Parameters = Iterable[nn.Parameter]
Betas = tuple[float, float]
_SHARED = ("betas", "eps", "weight_decay")  # settings of a recipe that not every optimizer has


@register("optimizers", "adamw", source="torch.optim.AdamW")
def adamw(
    parameters: Parameters, *, lr: float, betas: Betas, eps: float, weight_decay: float, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW. fused: one kernel for all of it, faster on a GPU and rounded otherwise."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True if fused else None
    )


@register("optimizers", "sgd", source="torch.optim.SGD")
def sgd(
    parameters: Parameters, *, lr: float, weight_decay: float, momentum: float = 0.9, nesterov: bool = False
) -> torch.optim.Optimizer:
    """Gradient descent with momentum; one number of state per weight, none with momentum 0."""
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)


@register("optimizers", "adafactor", source="transformers.Adafactor")
def adafactor(
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float,
    beta1: float | None = None,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    scale_parameter: bool = False,
) -> torch.optim.Optimizer:
    """Second moments by row and column: for a matrix of n by m weights n + m numbers. The rate is `optim.lr`.

    scale_parameter: the rate of a matrix is multiplied by the root mean square of its weights.
    """
    from transformers import Adafactor

    return Adafactor(
        parameters, lr=lr, weight_decay=weight_decay, beta1=beta1, clip_threshold=clip_threshold,
        decay_rate=decay_rate, scale_parameter=scale_parameter, relative_step=False,
    )  # fmt: skip


@register("optimizers", "adamw_8bit", source="bitsandbytes.optim.AdamW8bit", package="bitsandbytes")
def adamw_8bit(
    parameters: Parameters, *, lr: float, betas: Betas, eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, a quarter of their memory."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@register("optimizers", "paged_adamw", source="bitsandbytes.optim.PagedAdamW", package="bitsandbytes")
def paged_adamw(
    parameters: Parameters, *, lr: float, betas: Betas, eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW whose moments leave the GPU for the CPU when memory is short."""
    from bitsandbytes.optim import PagedAdamW

    return PagedAdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@register("optimizers", "paged_adamw_8bit", source="bitsandbytes.optim.PagedAdamW8bit", package="bitsandbytes")
def paged_adamw_8bit(
    parameters: Parameters, *, lr: float, betas: Betas, eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`paged_adamw` with moments in 8 bits."""
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def check_optim(config: OptimConfig, iterations: int) -> None:
    """Refuse optimizers and schedules that could not be made; called before a model is loaded.

    Raises:
        ComponentError: no such optimizer, an option that it does not have, or its package is not installed.
        ConfigError: a setting that it does not have, a schedule without an option it needs, or weights in parts.
    """
    row = find("optimizers", config.name)
    row.check(config.options, "optim.options")
    taken = inspect.signature(row.target).parameters
    for name in _SHARED:
        if name not in taken and getattr(config, name) != OptimConfig.model_fields[name].default:
            raise ConfigError(f"optim.{name}={getattr(config, name)}: {config.name} has no such setting; take it out")
    package = row.facts.get("package")
    if package and find_spec(package) is None:
        error = ImportError(f"optim.name={config.name}: {package} is not installed", name=package)
        raise MissingPackage(f"{error}{how_to_install(error)}")
    if sharding_asked() and config.name != "adamw":
        raise ConfigError(f"optim.name={config.name} does not know weights in parts (FSDP); take adamw")
    lr_schedule(config, iterations)


def build_optimizer(config: OptimConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer of a recipe."""
    given = {"lr": config.lr} | {name: getattr(config, name) for name in _SHARED}
    optimizer: torch.optim.Optimizer = find("optimizers", config.name).build(config.options, "optim.options", **given)(
        parameters
    )
    return optimizer


def lr_schedule(config: OptimConfig, iterations: int) -> Callable[[int], float]:
    """iteration -> factor on the learning rate, a pure function so that resuming needs no state.

    The warm-up is linear and its first iteration learns; what follows is transformers' schedule of that name.

    Raises:
        ConfigError: the schedule lacks an option, or has no such option.
    """
    warmup = config.warmup_iterations(iterations)
    options = tuple(sorted(config.schedule_options.items()))
    try:
        later = _library_schedule(config.schedule, config.lr, warmup, iterations, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.schedule={config.schedule} with schedule_options={dict(options)}: {error}"
        ) from error
    return lambda iteration: (iteration + 1) / warmup if iteration < warmup else later(iteration)


@cache
def _library_schedule(
    name: str, lr: float, warmup: int, iterations: int, options: tuple[tuple[str, Any], ...]
) -> Callable[[int], float]:
    """transformers' factor by iteration. It asks for an optimizer, and changes nothing but that one's rate."""
    from transformers import get_scheduler

    if name == "constant":
        if options:
            raise ValueError("it has no options")
        return lambda iteration: 1.0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler: Any = get_scheduler(name, optimizer, warmup, iterations, dict(options))
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor

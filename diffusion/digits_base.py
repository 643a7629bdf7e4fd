"""The models of the digits task before alignment: a small generator, a reward classifier and an independent judge.

Made once by a fixed recipe from scikit-learn's handwritten digits (no download) and kept in the user's cache folder.
The generator and the judge see one half of the data, the reward classifier the other half.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrl.cache import cache_root, made_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Numbers measured on two cores: 1100 steps give p(prompted class) of about .97 by the other half's classifier."""

    steps: int = 1100
    batch: int = 128
    width: int = 96
    layers: int = 4
    heads: int = 4
    lr: float = 1e-3
    ema: float = 0.995
    classifier_steps: int = 400
    seed: int = 0
    version: int = 1  # raise when the code below changes what it makes

    @property
    def key(self) -> str:
        """Folder name in the cache: a hash of everything that decides the weights."""
        return "digits-" + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class DigitsBase:
    """The folder of the generator in diffusers' layout, and the two classifiers, frozen."""

    folder: Path
    classifier: nn.Module
    judge: nn.Module


def digits_base(recipe: Recipe | None = None) -> DigitsBase:
    """Load the base from the cache, making it first if it is not there. One process makes it, others wait.

    Raises:
        RuntimeError: the cached files are damaged.
    """
    recipe = recipe or Recipe()
    folder = cache_root() / recipe.key
    made_once(folder, partial(_make, recipe))
    try:
        classifiers = [_load_classifier(folder / f"{name}.safetensors") for name in ("classifier", "judge")]
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    except Exception as error:
        raise RuntimeError(
            f"the cached digits model in {folder} is damaged ({error}); delete that folder and run again, "
            "it is made anew in about 4 minutes"
        ) from error
    return DigitsBase(folder, *classifiers)


def digits_halves() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((x, y), (x, y)): 900 digits for the generator, 897 for the reward. x (N, 1, 8, 8) in [-1, 1], y (N,) int."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:900], y[:900]), (x[900:], y[900:])


def classifier_net() -> nn.Module:
    """(N, 1, 8, 8) in [-1, 1] -> (N, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10),
    )  # fmt: skip


def _make(recipe: Recipe, work: Path) -> None:
    """Train all three."""
    log.info("pre-training the digits generator (about 3 minutes on one core, once); cache: %s", work.parent)
    generator_half, reward_half = digits_halves()
    with torch.random.fork_rng():
        for name, half in (("classifier", reward_half), ("judge", generator_half)):
            save_file(_train_classifier(half, recipe, name).state_dict(), work / f"{name}.safetensors")
        _train_generator(generator_half, recipe).save_pretrained(work / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(work / "scheduler")
    (work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")


def _train_classifier(data: tuple[Tensor, Tensor], recipe: Recipe, name: str) -> nn.Module:
    """Cross-entropy with shifts by one pixel and noise, so that its probabilities are smooth around real digits."""
    x, y = data
    torch.manual_seed(recipe.seed)
    net = classifier_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for step in _progress(range(recipe.classifier_steps), f"{name} (digits)"):
        _set_lr(optimizer, 2e-3 * _cosine(step / recipe.classifier_steps))
        i = torch.randint(len(y), (128,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        batch = torch.roll(F.pad(x[i], (1, 1, 1, 1), value=-1.0), shift, (2, 3))[:, :, 1:-1, 1:-1]
        loss = F.cross_entropy(net(batch + 0.1 * torch.randn_like(batch)), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def _train_generator(data: tuple[Tensor, Tensor], recipe: Recipe) -> DiTTransformer2DModel:
    """Flow matching with logit-normal noise levels; returns the EMA weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    x, y = data
    torch.manual_seed(recipe.seed)
    model = new_dit(recipe.width, recipe.layers, recipe.heads)
    # warm-up of the average: an early start would remember the random initialisation
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
    for step in _progress(range(recipe.steps), "generator (digits)"):
        _set_lr(optimizer, recipe.lr * min(1.0, (step + 1) / 50) * _cosine(step / recipe.steps))
        i = torch.randint(len(y), (recipe.batch,))
        sigma = torch.sigmoid(torch.randn(recipe.batch))
        noise, s = torch.randn(recipe.batch, 1, 8, 8), sigma[:, None, None, None]
        velocity = model((1 - s) * x[i] + s * noise, timestep=sigma * 1000, class_labels=y[i]).sample
        loss = F.mse_loss(velocity, noise - x[i])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 50:
            average.update_parameters(model)
    trained: DiTTransformer2DModel = average.module
    return trained


def new_dit(width: int = 96, layers: int = 4, heads: int = 4, **changes: Any) -> DiTTransformer2DModel:
    """An untrained class-conditional DiT for 8 x 8 grey pictures, in eval mode (no label dropout)."""
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": layers,
        "num_attention_heads": heads, "attention_head_dim": width // heads, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    return DiTTransformer2DModel(**config | changes).eval()


def _load_classifier(path: Path) -> nn.Module:
    net = classifier_net()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _cosine(done: float) -> float:
    return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


def _progress(items: range, title: str) -> Iterator[int]:
    from rich.progress import track

    tracker: Callable[..., Iterator[int]] = track  # type: ignore[assignment]
    return tracker(items, description=title)

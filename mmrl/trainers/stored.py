"""Rollouts on disk: writing them, which of them an iteration reads, and whether the recipe could have made them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from mmrl.rollout import BranchPlan, Policy, Prompt, Rollout
from mmrl.rollout_folder import RECIPE, RolloutFolder
from mmrl.seeding import named_generator
from mmrl.tree import StepTree
from mmrl.workdir import WorkDir

if TYPE_CHECKING:
    from mmrl.trainers.run import Run

log = logging.getLogger(__name__)

_RANKED = re.compile(r"\d{6}-\d{2}")  # iteration and rank


class StoredRollouts:
    """Rollouts on disk as a source of batches: what iteration i gets is a pure function of i.

    A batch never mixes rollouts, since each has its own course (`about`); what several processes wrote in one
    iteration is one rollout, with the prompts in the order of one process. Those of an epoch come in a fresh order.

    Args:
        folder: a rollout of `Rollout.save`, or a folder of such folders.
        size: prompts per batch over all processes. What a rollout has left below `size` is a batch of its own when
            every process gets a prompt of it, else it is left out; `left_out` counts these prompts.

    Raises:
        ValueError: no rollout there, one that cannot be read or whose other ranks are missing, or none with a prompt
            for every process.
    """

    def __init__(self, folder: str | Path, size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.folder = folder = Path(folder)
        self.recipe = _recipe(folder)
        self._parts = _parts(_folders(folder), self.recipe.get("processes", 1))
        self._seed, self._rank, self._world = seed, rank, world
        self._known: Mapping[str, Prompt] | None = None
        self._made: Rollout | None = None  # what the policy at hand makes
        counts = [sum(len(_record(f)["prompts"]) for f in part) for part in self._parts]
        chunks = [(f, list(range(a, min(a + size, n)))) for f, n in enumerate(counts) for a in range(0, n, size)]
        self._chunks = [c for c in chunks if len(c[1]) >= world]
        self.left_out = sum(counts) - sum(len(own) for _, own in self._chunks)
        if not self._chunks:
            raise ValueError(f"{folder}: no rollout has a prompt for each of {world} processes")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._chunks)

    def batch(self, iteration: int) -> Rollout:
        """This rank's share of the iteration's batch."""
        epoch, k = divmod(iteration, len(self))
        order = torch.randperm(len(self), generator=named_generator(self._seed, "stored", epoch))
        part, prompts = self._chunks[int(order[k])]
        return self._read(part).select(prompts[self._rank :: self._world])

    def _read(self, part: int) -> Rollout:
        """One rollout with the task's prompts, if `check` has been told them."""
        folders = self._parts[part]
        rollout = _interleaved([Rollout.load(f) for f in folders])
        if self._made is not None:
            _need_payload(rollout, self._made, folders[0])
        if self._known is not None:
            rollout = replace(rollout, prompts=[self._known[p.id] for p in rollout.prompts])
        return rollout

    # ---- would this recipe have made them? --------------------------------------------------------------------

    def check(self, policy: Policy, prompts: Sequence[Prompt], plan: BranchPlan | None = None) -> None:
        """Refuses rollouts of other prompts, or of another kind of policy or sampling; batches then have `prompts`.

        Every way of sampling that occurs (`about`) is compared with a fresh rollout of one prompt. What a search or an
        annotation grew (`about` has `grown_by`) forks where it chose to, so no plan is compared with it.

        Args:
            plan: the one they must have been sampled by, None = any.
        Raises:
            ValueError: a prompt that `prompts` lack or know with another reference, a payload that `policy` needs and
                the rollouts lack or have in another shape, another plan or settings that differ. The message names
                them.
        """
        self._known = self._same_prompts(prompts)
        seen: set[str] = set()
        for part, folders in enumerate(self._parts):
            told = json.dumps(_how(_record(folders[0])["about"]), sort_keys=True)
            if told not in seen:
                seen.add(told)
                self._compare(part, policy, plan)

    def _same_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Prompt]:
        known = {p.id: p for p in prompts}
        stored = [Prompt(**p) for part in self._parts for f in part for p in _record(f)["prompts"]]
        strange = [p.id for p in stored if p.id not in known]
        if strange:
            raise ValueError(
                f"{self.folder}: {len(strange)} of {len(stored)} stored prompts are none of the task's {len(known)} "
                f"training prompts, the first: {strange[0]!r}; name the task (and its options) that they were "
                f"sampled for{self._hint('task')}"
            )
        other = [p.id for p in stored if _json(p.reference) != _json(known[p.id].reference)]
        if other:
            raise ValueError(
                f"{self.folder}: {len(other)} of {len(stored)} stored prompts have another reference than the task's "
                f"prompts of these names, the first: {other[0]!r}; name the task's options as they were"
                f"{self._hint('task')}"
            )
        return known

    def _compare(self, part: int, policy: Policy, plan: BranchPlan | None) -> None:
        folder, rollout = self._parts[part][0], self._read(part)
        one, about = rollout.select([0]), rollout.about
        if "grown_by" in about:
            plan = None
        chosen = plan or self._plan(rollout.tree)
        seed, iteration = about.get("seed", 0), about.get("iteration", 0)
        made = policy.rollout(one.prompts, chosen, seed=seed, iteration=iteration)
        _need_payload(rollout, made, folder)
        if plan is not None:
            _same_forks(rollout.tree, made.tree, plan, folder)
        found = _differences(_how(about), _how(made.about))
        if found:
            raise ValueError(
                f"{folder}: these rollouts were not sampled as this recipe's policy samples: {'; '.join(found)}. "
                f"Set `policy` as it was{self._hint('policy')}, or store rollouts anew"
            )
        self._made = made
        if part == 0:
            gap = _gap(one, policy)
            log.info("%s: log-probs of the first tree and of this recipe's policy differ by %s", folder, gap)

    def _plan(self, tree: StepTree) -> BranchPlan:
        """The plan that sampled; when that is not recorded, one that forks where `tree` does."""
        if "plan" in self.recipe:
            return BranchPlan({int(d): k for d, k in self.recipe["plan"].items()})
        if "grown_by" in self.recipe:
            return BranchPlan({0: 1})
        forked = tree.depth[_family(tree) > 1].unique().tolist()
        return BranchPlan({0: 1} | dict.fromkeys(forked, 2))

    def _hint(self, section: str) -> str:
        return f": {_short(self.recipe[section], 200)}" if section in self.recipe else ""


def fields_given(plan: Mapping[int, int], folder: Path | None) -> list[str]:
    """Fields that rollouts have before a recipe writes any: those on disk where it names a folder, `forks`, `chains`.

    Raises:
        ValueError: no rollouts in the folder.
    """
    if folder is not None:
        stored = Rollout.load(_folders(folder)[0])
        return ["forks", *(["chains"] if stored.tree.is_chains else []), *stored.fields()]
    sampled = BranchPlan(plan)
    shape = ["forks"] if sampled.leaves > 1 else []
    return shape + (["chains"] if set(sampled.splits) <= {0} else [])


# ---- files ----------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    """The rollouts at a folder or one level below it.

    Raises:
        ValueError: none there.
    """
    files = [folder / "rollout.json", *sorted(folder.glob("[!.]*/rollout.json"))]
    found = [f.parent for f in files if f.exists()]
    if not found:
        raise ValueError(
            f"{folder} holds no rollouts (no rollout.json there or one level below); write some first: "
            "mmrl rollouts RECIPE --out FOLDER"
        )
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE
    return json.loads(file.read_text()) if file.exists() else {}


def _record(folder: Path) -> dict[str, Any]:
    """rollout.json, without the tensors."""
    try:
        return json.loads((folder / "rollout.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{folder}: rollout.json cannot be read ({error}); delete the folder and store it anew"
        ) from error


def _parts(folders: Sequence[Path], processes: int) -> list[list[Path]]:
    """Folders that belong together: those of one iteration's ranks."""
    parts: dict[str, list[Path]] = {}
    for f in folders:
        parts.setdefault(f.name.partition("-")[0] if _RANKED.fullmatch(f.name) else str(f), []).append(f)
    for own in parts.values():
        if processes > 1 and len(own) != processes:
            raise ValueError(
                f"{own[0]}: {processes} processes wrote these rollouts and {len(own)} of them this one; run the same "
                "`mmrl rollouts` again to complete it"
            )
    return list(parts.values())


def _interleaved(rollouts: Sequence[Rollout]) -> Rollout:
    """The rollouts of several ranks as one process would have written them: rank r has the prompts r, r + world ..."""
    if len(rollouts) == 1:
        return rollouts[0]
    most = max(len(r.prompts) for r in rollouts)
    return Rollout.concatenate([r.select([j]) for j in range(most) for r in rollouts if j < len(r.prompts)])


# ---- comparing ------------------------------------------------------------------------------------------------------


def _how(about: Mapping[str, Any]) -> Any:
    """What `about` says besides which random numbers were drawn and who chose where to go on."""
    other = ("seed", "iteration", "grown_by", "written")
    return {k: v for k, v in json.loads(json.dumps(dict(about))).items() if k not in other}


def _family(tree: StepTree) -> Tensor:
    """(N,) int, how many siblings each step belongs to."""
    return torch.bincount(tree.sibling_set)[tree.sibling_set]


def _same_forks(stored: StepTree, made: StepTree, plan: BranchPlan, folder: Path) -> None:
    """Refuses a tree that forks otherwise than a fresh one does; depths that only one reached do not count."""
    for depth in sorted(set(stored.depth.tolist()) & set(made.depth.tolist())):
        sizes, wanted = (sorted(_family(t)[t.depth == depth].unique().tolist()) for t in (stored, made))
        if sizes != wanted:
            raise ValueError(
                f"{folder}: at depth {depth} the stored trees have {' or '.join(map(str, sizes))} siblings, those of "
                f"this recipe's plan {dict(plan.factors)} {' or '.join(map(str, wanted))}; write the plan they were "
                "sampled by"
            )


def _need_payload(rollout: Rollout, made: Rollout, folder: Path) -> None:
    """Refuses a rollout that lacks what the policy replays, or has it in another shape."""
    pairs = (("action", rollout.actions.payload, made.actions.payload),
             ("prompt", rollout.prompt_payload, made.prompt_payload))  # fmt: skip
    for kind, has, needs in pairs:
        missing = sorted(set(needs) - set(has))
        if missing:
            raise ValueError(
                f"{folder}: the stored rollout has no {kind} payload {', '.join(missing)} (it has "
                f"{', '.join(sorted(has)) or 'none'}), which this recipe's policy needs; it is of another kind of "
                "policy, or was saved without it"
            )
    for name, x in made.actions.payload.items():
        shape, wanted = tuple(rollout.actions.payload[name].shape[1:]), tuple(x.shape[1:])
        if shape != wanted:
            raise ValueError(
                f"{folder}: the stored {name} of an action has shape {shape}, this recipe's policy has {wanted}; name "
                "the model that sampled them"
            )


def _differences(stored: Any, here: Any, path: str = "") -> list[str]:
    """Where two trees of JSON values differ."""
    if not (isinstance(stored, Mapping) and isinstance(here, Mapping)):
        return [] if stored == here else [f"{path}: {_short(stored)} stored, {_short(here)} here"]
    found: list[str] = []
    for k in sorted(stored.keys() | here.keys()):
        below = f"{path}.{k}" if path else k
        if k not in stored or k not in here:
            found.append(f"{below}: {'only stored' if k in stored else 'only here'}")
        else:
            found += _differences(stored[k], here[k], below)
    return found


def _gap(one: Rollout, policy: Policy) -> str:
    """How far stored log-probs lie from the policy's own: 0 (up to rounding) if it is the one that sampled."""
    owner = one.tree.step_of_action(one.actions.logp.numel())
    steps = torch.unique(owner[one.actions.trainable & (owner >= 0)])
    with torch.no_grad():
        new = policy.log_probs(one, policy.micro_batches(one, steps)[0])
    gap = (new.logp.cpu() - one.actions.logp[new.index.cpu()]).abs()
    return f"{float(gap.mean()):.1e} on average, {float(gap.max()):.1e} at most"


def _json(x: Any) -> str:
    return json.dumps(x, sort_keys=True)


def _short(x: Any, most: int = 60) -> str:
    text = json.dumps(x)
    return text if len(text) <= most else f"{text[:most]}..."


# ---- writing --------------------------------------------------------------------------------------------------------


def store_rollouts(run: Run, folder: str | Path, iterations: int, *, model: str = "") -> list[Path]:
    """Sample and reward `iterations` batches of prompts and save each below `folder`, one folder per rank and batch.

    They hold everything that GRPO, step rewards and preferences need. Those that are there already are kept, so that
    a call that was cut short can be repeated; `recipe.json` beside them says what made them.

    Args:
        model: which weights sample, where the recipe's `policy.model` does not say it all.
    Returns:
        this rank's folders.
    Raises:
        ConfigError: the folder has rollouts of another recipe or of an unknown one, or another process writes into it.
    """
    loop = run.loop
    with loop.owning(WorkDir(Path(folder))):
        store = RolloutFolder(folder, _recipe_record(run) | {"model": model}, write=loop.is_main)
        loop.accelerator.wait_for_everyone()
        made, rank = [], loop.accelerator.process_index
        for i in track(range(iterations), description="rollouts", disable=not loop.is_main):
            made.append(store.place(i, rank))
            complete = (made[-1] / "rollout.json").exists()
            if loop.all_max(float(not complete))[0]:  # engines sample on all ranks or on none
                run.begin()
                store.save(run.rollout(i), i, rank)
        loop.accelerator.wait_for_everyone()
    return made


def _recipe_record(run: Run) -> dict[str, Any]:
    """What decides the contents of stored rollouts, as JSON values."""
    config = run.config
    record = {
        "task": config.task.model_dump(mode="json"),
        "policy": config.policy.model_dump(mode="json"),
        "plan": {str(depth): children for depth, children in sorted(run.plan.factors.items())},
        "rewards": run.rewarder.names(),
        "step_rewards": [r.model_dump(mode="json") for r in config.step_rewards],
        "seed": config.run.seed,
        "prompts_per_iteration": config.run.prompts_per_iteration,
        "processes": run.loop.count,
    }
    return dict(json.loads(json.dumps(record)))

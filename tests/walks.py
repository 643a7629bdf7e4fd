"""A modality from outside: walks on a line. `tests/test_foreign_modality.py` installs it and trains it.

A state is a position, a step is a move by -1, 0 or +1, and a prompt is a goal. Nothing of mmrl knows of it.
"""

import torch
from torch import nn

from mmrl.credit import Credit
from mmrl.registry import declares
from mmrl.report.panels import curves
from mmrl.rollout import ActionLogProbs, Actions, Prompt, Rollout, Sample
from mmrl.seeding import named_generator
from mmrl.trainers.callback import Callback
from mmrl.tree import FINISHED, INTERNAL, StepTree

MOVES = 4
REACH = 2 * MOVES + 1


class WalkPolicy:
    """A table of logits per (goal, position).

    Args:
        spread: standard deviation of the first logits.
    """

    def __init__(self, spread: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Embedding(REACH * REACH, 3)
        nn.init.normal_(self.model.weight, std=spread)

    def forecast(self, plan):
        return plan.forecast(MOVES)

    def admit(self, prompts):
        return list(prompts)

    def _log_probs(self, state):
        return self.model(state.to(next(self.model.parameters()).device)).float().log_softmax(-1)

    @torch.no_grad()
    def rollout(self, prompts, plan, *, seed, iteration=0):
        plan.check(MOVES)
        parent, group, states, moves, positions = [], [], [], [], []
        for g, prompt in enumerate(prompts):
            generator = named_generator(seed, iteration, prompt.id)
            live = [(-1, 0)]
            for depth in range(MOVES):
                after = []
                for node, position in live:
                    state = _state(prompt, position)
                    weights = self._log_probs(torch.tensor(state)).exp().cpu()
                    for move in torch.multinomial(weights, plan.factor(depth), True, generator=generator).tolist():
                        after.append((len(parent), position + move - 1))
                        parent.append(node)
                        group.append(g)
                        states.append(state)
                        moves.append(move)
                        positions.append(position + move - 1)
                live = after
        state, move = torch.tensor(states), torch.tensor(moves)
        logp = self._log_probs(state).cpu().gather(1, move[:, None]).squeeze(1)
        inner = torch.zeros(len(parent), dtype=torch.bool)
        inner[[p for p in parent if p >= 0]] = True
        status = torch.where(inner, INTERNAL, FINISHED)
        tree = StepTree(
            parent, group, status, torch.where(inner, torch.nan, 0.0), logp=logp, tags={"position": positions}
        )
        leaves = int((~inner).sum())
        counts = {"calls": len(parent), "leaves": leaves}
        actions = Actions(logp, torch.ones(len(parent), dtype=torch.bool), {"state": state, "move": move})
        return Rollout(list(prompts), tree, actions, counts=counts)

    def micro_batches(self, rollout, steps, *, whole_prompts=False):
        return [steps]

    def log_probs(self, rollout, steps, *, reference=False):
        index = rollout.tree.actions_of(steps)
        move = rollout.actions.payload["move"][index]
        logp = self._log_probs(rollout.actions.payload["state"][index])
        return ActionLogProbs(index, logp.gather(1, move[:, None].to(logp.device)).squeeze(1))

    def samples(self, rollout):
        leaves = rollout.tree.is_leaf.nonzero().flatten().tolist()
        position = rollout.tree.tags["position"].tolist()
        return [Sample(rollout.prompts[int(rollout.tree.group[v])], str(position[v]), v) for v in leaves]

    def generate(self, prompts, *, seed):
        samples = []
        for prompt in prompts:
            position = 0
            for _ in range(MOVES):
                position += int(self._log_probs(torch.tensor(_state(prompt, position))).argmax()) - 1
            samples.append(Sample(prompt, str(position), 0))
        return samples

    def describe(self, rollout, steps):
        return [str(position) for position in rollout.tree.tags["position"][steps].tolist()]

    def freeze_reference(self):
        pass

    def save(self, folder, state_dict=None):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict or self.model.state_dict(), folder / "walk.pt")


def _state(prompt, position):
    return (prompt.inputs["goal"] + MOVES) * REACH + position + MOVES


class WalkTask:
    """One prompt per goal."""

    rewards = ("near_goal",)

    def __init__(self) -> None:
        goals = range(-MOVES, MOVES + 1)
        self.prompts = [Prompt(f"goal {goal}", {"goal": goal}) for goal in goals]
        self.eval_prompts = [Prompt(f"goal {goal}, held out", {"goal": goal}) for goal in goals]

    def judges(self, samples):
        return {"accuracy": sum(int(s.output) == s.prompt.inputs["goal"] for s in samples) / len(samples)}


def near_goal(samples):
    """A reward: 1 at the goal, less with the distance."""
    return [1 - abs(int(s.output) - s.prompt.inputs["goal"]) / (2 * MOVES) for s in samples]


@declares(reads=("tags.position",), writes=("tags.distance",))
def distance(rollout, context):
    """A reading: how far each step's position is from its goal."""
    goal = torch.tensor([p.inputs["goal"] for p in rollout.prompts])[rollout.tree.group]
    return {"tags.distance": (rollout.tree.tags["position"] - goal).abs().double()}


@declares(reads=("outcome", "tags.distance"))
def nearer(tree):
    """An estimator: how much nearer each step is to its goal than the steps of its prompt are on average."""
    gained = -tree.tags["distance"]
    total = torch.zeros(tree.num_groups, dtype=torch.float64).index_add(0, tree.group, gained)
    mean = total / torch.bincount(tree.group)
    return Credit(torch.where(tree.valid, gained - mean[tree.group], 0.0))


class Longest(Callback):
    """Logs how far the rollout of an iteration came, of its first prompts."""

    def __init__(self, among: int = 1) -> None:
        self.among, self.distance = among, 0.0

    def on_rollout(self, trainer, rollout, mark):
        first = rollout.tree.group < self.among
        self.distance = float(rollout.tree.tags["position"][first].abs().max())

    def on_iteration(self, trainer, metrics):
        metrics["walks/longest"] = self.distance


distances = declares(place=15)(curves("Distance from the goal", "reading/distance/tags.distance"))

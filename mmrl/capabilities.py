"""Capabilities: what a component can do beyond the least of its kind, as protocols with names.

`Policy`, `OutcomeReward` and `StepReward` of `mmrl.rollout` and `Task` of `mmrl.task` are what every trainer
needs. What only some recipes need is a protocol here. A component has a capability by defining its members; nothing is
registered. Whoever needs one asks for it by name: `refuse_row` before anything is loaded, where the class is known
from the registry, `require` once the component is there. Both errors name the components that have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints, runtime_checkable

from pydantic import AfterValidator
from torch import Tensor, nn

from mmrl.registry import ComponentError, Row, find, names
from mmrl.rollout import (
    Answer,
    Continuation,
    OutcomeReward,
    Place,
    Prompt,
    Rollout,
    Sample,
    Sight,
    State,
    StepReward,
)

# ---- asking ---------------------------------------------------------------------------------------------------------


def require(who: str, protocol: Any, component: Any, kind: str = "") -> Any:
    """The component, which has to follow a protocol.

    Args:
        who: the component that needs it, for the message.
        kind: of the rows among which the message names those that follow the protocol.
    Raises:
        ComponentError: it does not.
    """
    if not isinstance(component, protocol):
        raise ComponentError(_refusal(who, protocol, type(component).__name__, kind))
    return component


def refuse_row(who: str, protocol: type, row: Row) -> None:
    """Raises ComponentError when the component that a row makes is known not to follow a protocol.

    A class is known from its row, a factory's product from its return annotation; for others `require` decides once
    they are made, as it does for members that are no methods: instances bring those.
    """
    if follows(row, protocol) is False:
        raise ComponentError(_refusal(who, protocol, f"{row.kind.singular} {row.name!r}", row.kind.name))


def follows(row: Row, protocol: type) -> bool | None:
    """True when the component that a row makes has the methods of a protocol; None where its class is not known.

    By its fact `lacks` a row declares protocols that its component refuses although its class has the methods.
    """
    product = row.target
    if inspect.isfunction(product) and row.kind.arguments is not None:
        # The function itself is the component.
        product = type(product)
    elif not inspect.isclass(product):
        product = get_type_hints(product).get("return")
    if not inspect.isclass(product):
        return None
    if any(issubclass(protocol, lacking) for lacking in row.facts.get("lacks", ())):
        return False
    return methods(protocol) <= set(dir(product))


def methods(protocol: type) -> set[str]:
    """Names of the methods of a protocol, inherited ones included."""
    names_of_methods: set[str] = set()
    for base in protocol.__mro__:
        if base in (object, Protocol):
            continue
        for name, member in vars(base).items():
            is_public = name == "__call__" or not name.startswith("_")
            if is_public and inspect.isfunction(member):
                names_of_methods.add(name)
    return names_of_methods


def having(kind: str, protocol: type) -> list[str]:
    """Names of the rows of a kind whose components are known to follow a protocol."""
    return [name for name in names(kind) if follows(find(kind, name), protocol)]


def _refusal(who: str, protocol: type, component: str, kind: str) -> str:
    meaning = (inspect.getdoc(protocol) or "").split("\n")[0].rstrip(".")
    able = f"; those that do: {', '.join(having(kind, protocol)) or 'none'}" if kind else ""
    return (
        f"{who} needs the protocol {protocol.__name__} of {protocol.__module__} "
        f"({meaning[0].lower()}{meaning[1:]}); {component} does not have it{able}"
    )


# The option or component that needs something, as a message names it -> the protocol that it needs.
Needs = Mapping[str, type]


def build_with(needs: Needs, kind: str, section: str, name: str, options: Mapping[str, Any]) -> Any:
    """Make a row, as `mmrl.registry.build`, that has to follow the protocols of `needs`.

    Raises:
        ComponentError: the component lacks one; raised before it is made where its class is known.
    """
    row = find(kind, name)
    for who, protocol in needs.items():
        refuse_row(who, protocol, row)
    component = row.build(options, section)
    for who, protocol in needs.items():
        require(who, protocol, component, kind)
    return component


def build_policy(section: str, tree: Mapping[str, Any], protocol: type) -> Any:
    """The policy of a section like the recipe's `policy`, which has to follow a protocol; see `build_with`."""
    options = dict(tree)
    return build_with({section: protocol}, "policies", section, options.pop("name"), options)


def policy_section(protocol: type) -> AfterValidator:
    """For the type of an option that is a section like the recipe's `policy`; what it names has to follow a protocol.

    `Annotated[Mapping[str, Any], of_kind("policies"), policy_section(Extender)]`
    """

    def check(section: Any) -> Any:
        refuse_row("the policy here", protocol, find("policies", section["name"]))
        return section

    return AfterValidator(check)


# ---- asking for what a row declares ---------------------------------------------------------------------------------

# The facts `policy` and `task` of a row: a protocol, or a function from the row's options to one.
Declared = type | Callable[[Mapping[str, Any]], type | None] | None


def refuse_needs(where: str, row: Row, options: Mapping[str, Any], policy: Row, task: Row) -> None:
    """Refuse a row whose policy or task cannot do what it needs, before either is made.

    Args:
        where: its place in the recipe. policy, task: the rows that the recipe names.
    Raises:
        ComponentError: naming the protocol, and the registered components that follow it.
    """
    for role, component in (("policy", policy), ("task", task)):
        protocol = _need(row, role, options)
        if protocol is not None:
            refuse_row(_asker(where, row), protocol, component)


def require_needs(where: str, row: Row, options: Mapping[str, Any], policy: object, task: object) -> None:
    """As `refuse_needs`, once policy and task are made: also where no annotation names their class."""
    for role, kind, component in (("policy", "policies", policy), ("task", "tasks", task)):
        protocol = _need(row, role, options)
        if protocol is not None:
            require(_asker(where, row), protocol, component, kind)


def _asker(where: str, row: Row) -> str:
    return f"{where}: {row.kind.singular} {row.name!r}"


def _need(row: Row, role: str, options: Mapping[str, Any]) -> type | None:
    """The protocol that a row with these options needs of its policy or task (`role`), if any."""
    need: Declared = row.facts.get(role)
    if need is None or isinstance(need, type):
        return need
    defaults = {name: option.default for name, option in row.options.items()}
    return need(defaults | dict(options))


# ---- of any component -----------------------------------------------------------------------------------------------


@runtime_checkable
class HasModel(Protocol):
    """A component with a network of its own, which moves to the device of the run."""

    model: Any  # None while it has none


def model_of(component: object) -> nn.Module | None:
    """The network of a component, None of one without."""
    model = component.model if isinstance(component, HasModel) else None
    return model if isinstance(model, nn.Module) else None


@runtime_checkable
class Admitter(Protocol):
    """A policy or scorer that cannot take every prompt."""

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those it can take; the others (broken image, too long) are logged with their reason and left out."""


def admitted(component: object, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that a component can take: all, unless it is an `Admitter`."""
    return component.admit(prompts) if isinstance(component, Admitter) else list(prompts)


@runtime_checkable
class EncodingCache(Protocol):
    """A policy, scorer or reading that keeps what it makes of prompts: pictures as pixels or features, decoded films,
    embedded texts."""

    def begin_iteration(self) -> None:
        """What was encoded before may be forgotten; what is encoded or used from now on stays until the next call."""


def begin_iteration(*components: object) -> None:
    """Begin an iteration of every component that is an `EncodingCache`; others keep nothing."""
    for component in components:
        if isinstance(component, EncodingCache):
            component.begin_iteration()


# ---- of policies ----------------------------------------------------------------------------------------------------


@runtime_checkable
class Extender(Protocol):
    """A policy that can go on from any state; annotation and search need nothing else."""

    def extend(
        self,
        states: Sequence[State],
        n: int,
        *,
        seed: int,
        steps: int | None = None,
        temperature: float | None = None,
    ) -> list[list[Continuation]]:
        """n continuations of each state (none of them done), to the end or of at most `steps` steps.

        What a state draws depends on (seed, prompt id, its text) alone. temperature: the policy's own by default, 0
        is greedy.
        """


@runtime_checkable
class StepWriter(Protocol):
    """A policy that can make given steps its own actions; stored searches are trained on through it."""

    def write_steps(self, written: Rollout) -> Rollout:
        """The same forest with everything that this policy's `log_probs` needs.

        Steps with actions keep their tokens and log-probs; those with a text alone get the tokens that spell it, as if
        sampled with log-prob 0.
        """


@runtime_checkable
class Completer(Protocol):
    """A policy that can go on from any state of a rollout of its own kind, from the very actions that led there."""

    def complete(
        self, rollout: Rollout, places: Sequence[Place], n: int, *, seeds: Sequence[int], temperature: float | None
    ) -> list[list[Sample]]:
        """Finished samples from each place, as many as `n`; one where nothing is drawn, none where it has ended.

        What a place draws depends on its own seed alone. temperature: None = as in rollouts, 0 = nothing is drawn
        (greedy tokens, the ODE).
        """


@runtime_checkable
class AnswerReader(Protocol):
    """A policy that can tell how likely it would give an answer right after any state of a rollout."""

    def answer_logps(
        self, rollout: Rollout, places: Sequence[Place], answers: Sequence[Answer], *, sight: Sight = "given"
    ) -> Tensor:
        """(S,) float64, mean log-prob per action of each place's answer behind its lead, by the present weights.

        NaN where the state is an end. Steps that places share are run once.
        """


@runtime_checkable
class SightReader(Protocol):
    """A policy that can take the steps of a rollout again without seeing what it saw."""

    def divergence(self, rollout: Rollout, steps: Tensor, sight: Sight) -> Tensor:
        """(S,) float64, how far each step's distributions lie from those under `sight`; 0 where they are the same."""


@runtime_checkable
class Instructable(Protocol):
    """A policy that can take the steps of a rollout again under a further instruction."""

    def instructed_logps(self, rollout: Rollout, steps: Tensor, instruction: str) -> tuple[Tensor, Tensor]:
        """Actions (A,) of `steps`, and their log-probs (A,) under the reference when the prompt says so too."""


@runtime_checkable
class InitialSampler(Protocol):
    """A policy that can sample with its initial weights, which `freeze_reference` has kept."""

    def initial_samples(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[list[Sample]]:
        """n independent samples of each prompt as in training; they depend on (seed, prompt id) alone."""


@runtime_checkable
class AdapterMerger(Protocol):
    """A policy or scorer whose LoRA can become part of its weights; `mmrl export --merge` needs it."""

    def merge_adapter(self) -> None:
        """Add the adapter to the weights of its base; what is saved then is a whole model."""


@runtime_checkable
class OutputWriter(Protocol):
    """A policy that can make a given output its own actions; imitation needs it."""

    def write(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Rollout:
        """A rollout of given outputs, one per prompt, as if sampled with log-prob 0."""


@runtime_checkable
class ReferenceMover(Protocol):
    """A policy whose reference, the initial weights, can follow the trained ones; `loss.reference_every` needs it."""

    def move_reference(self, share: float) -> None:
        """reference = (1 - share) reference + share policy; 1 makes them equal."""

    def reference_tensors(self) -> Mapping[str, Tensor]:
        """Weights of the reference by name, for checkpoints, which are read back in place.

        Raises:
            ValueError: the reference has no weights of its own, as with LoRA.
        """


@runtime_checkable
class LimitedWriter(Protocol):
    """A policy that knows which outputs its sampling would cut short."""

    def beyond_limits(self, texts: Sequence[str]) -> list[str]:
        """Per text, why it would be cut, such as "60 tokens (policy.max_new_tokens=48)"; "" = it fits."""


@runtime_checkable
class Chooser(Extender, Admitter, Protocol):
    """A policy that can also say how likely given texts are to come next; a generative reward model asks it."""

    def choice_logps(self, states: Sequence[State], choices: Sequence[str]) -> Tensor:
        """(S, C) float32 log-prob of the first token of each choice directly after each state."""

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write its model in its ecosystem's own format."""


@runtime_checkable
class PromptEncoder(Protocol):
    """A policy whose prompts are tokens; the cost of a search is told in them."""

    def encode(self, prompt: Prompt) -> Any:
        """The prompt as the model reads it; `ids` (T,) are its tokens."""


# ---- of tasks -------------------------------------------------------------------------------------------------------


@runtime_checkable
class AnswerGiver(Protocol):
    """A task whose prompts have one right answer."""

    def answer(self, prompt: Prompt) -> Answer:
        """The right answer, and what a policy is expected to write right before it."""


@runtime_checkable
class RewardNamer(Protocol):
    """A task that names the rewards that fit it, for recipes that list none."""

    rewards: Sequence[str]


@runtime_checkable
class SampleJudge(Protocol):
    """A task that measures samples in ways that no reward uses, so that a hacked reward shows."""

    def judges(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        """Numbers by name, such as an independent judge's share of good samples, and their diversity."""


@runtime_checkable
class StepClassifier(Protocol):
    """A task that can tell the kind of a step from its text."""

    def step_kind(self, text: str) -> str:
        """One of `mmrl.reasoning.records.Kind`."""


# ---- of rewards and readings ----------------------------------------------------------------------------------------


@runtime_checkable
class PolicyFollower(Protocol):
    """A reward, step reward or reading with options that have to equal the policy's, such as the syntax of calls."""

    def following(self, policy: object) -> Any:
        """The same component with these options as the policy has them; itself where the policy has none of them."""


# ---- of rewards on outcomes -----------------------------------------------------------------------------------------


@runtime_checkable
class PromptChecker(Protocol):
    """A reward that can tell before anything is sampled which prompts it will never score."""

    def refusal(self, prompt: Prompt) -> str | None:
        """Why no sample of this prompt can be scored, None where they can."""


@runtime_checkable
class GroupReward(OutcomeReward, Protocol):
    """An outcome reward that compares the samples of a prompt with one another: it is never asked about one alone."""

    compares_samples: bool


@runtime_checkable
class ContrastReward(Protocol):
    """An outcome reward that compares the answers to a prompt with answers to other prompts.

    In training these are sampled beside, half as many leaves each, and it is called as `reward(samples,
    controls=their samples)`; no other reward sees them, and nothing is trained on them. It runs in the process of
    the trainer.
    """

    def controls(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The other prompts, with ids of their own."""

    def __call__(self, samples: Sequence[Sample], controls: Sequence[Sample] = ()) -> Sequence[float | None]:
        """One number per sample, None where it cannot be scored. controls: samples of the other prompts."""


@runtime_checkable
class DifferentiableReward(Protocol):
    """An outcome reward with a gradient in the outputs of its samples."""

    def values(self, samples: Sequence[Sample]) -> Tensor:
        """(L,) one number per sample, differentiable in their outputs."""


@runtime_checkable
class ErrorKeeper(Protocol):
    """An outcome reward that leaves samples unscored by itself and keeps the reason."""

    last_error: str | None  # of the last call, None when all went well


# ---- of step rewards ------------------------------------------------------------------------------------------------


@runtime_checkable
class RootScorer(Protocol):
    """A step reward that can also tell what the prompt alone is worth, before any step."""

    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) one number per prompt, on the scale of its step scores."""


@runtime_checkable
class Attributor(Protocol):
    """A step reward that can say how much each step moves its judgement of the whole solution."""

    def attributions(self, rollout: Rollout) -> Tensor:
        """(N,) signed numbers on chains: the part of each step in the logit of its solution's last step."""


@runtime_checkable
class Increments(Protocol):
    """A step reward whose numbers may add up along a path, so that nothing is left to difference or to clip."""

    increments: bool


@runtime_checkable
class Illustrator(Protocol):
    """A scorer that can show a solution as its model reads it, to look at before training."""

    def illustrate(self, prompt: Prompt, steps: Sequence[str], labels: Sequence[float | None]) -> str:
        """The text with its slots and labels (None = unlabelled), one line per step."""


# ---- of readings ----------------------------------------------------------------------------------------------------


@runtime_checkable
class ScorerReading(Protocol):
    """A reading with a scorer inside, which `online:` can train along with the policy."""

    scorer: StepReward | None

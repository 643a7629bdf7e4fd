"""The completions of an annotation as trees: each one below the state that it goes on from, with its verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mmrl.growth import ROOT, GrowingTree
from mmrl.reasoning.annotate.monte_carlo import Solution
from mmrl.reasoning.annotate.store import Completion, CompletionStore, prefix_key
from mmrl.reasoning.records import Counts, SolutionRecord
from mmrl.rollout import Continuation, State


def attach(tree: GrowingTree, node: int, completions: Sequence[Completion]) -> list[list[int]]:
    """Grow completions below a node, each as a chain whose end has the verdict as outcome; the nodes of the chains."""
    chains = []
    for completion in completions:
        chains.append(tree.grow(node, completion.written))
        end(tree, chains[-1][-1], completion.correct)
    return chains


def end(tree: GrowingTree, node: int, correct: bool | None) -> None:
    """Note the verdict on a solution that ends at `node`, None = there is none; it is the value there as well."""
    if correct is not None:
        tree.numbers["outcome"][node] = tree.numbers["value"][node] = float(correct)


def note_counts(tree: GrowingTree, counts: Mapping[str, Counts]) -> None:
    """Write Monte-Carlo counts, by what has been written, to every node there: value, visits and q_sum."""
    for node in range(len(tree.parent)):
        of_text = counts.get(tree.text(node))
        # A finished solution keeps its outcome as its value.
        if of_text is not None and of_text.total and node not in tree.numbers["outcome"]:
            tree.numbers["visits"][node] = of_text.total
            tree.numbers["q_sum"][node] = of_text.correct
            tree.numbers["value"][node] = of_text.correct / of_text.total


def sampled_tree(store: CompletionStore, states: Iterable[State]) -> GrowingTree:
    """Everything stored for the states of one question.

    Args:
        states: at least one, shorter ones first. The first steps that say the same get the completions; a state that
            no completion leads to (of a solution from elsewhere) becomes a path of its own.
    """
    states = list(states)
    tree = GrowingTree(states[0].prompt)
    counts: dict[str, Counts] = {}
    for state in states:
        tally = store.get(state)
        if state.text in counts or not tally.drawn:
            continue
        counts[state.text] = tally.counts
        attach(tree, place(tree, state), store.completions(state))
    note_counts(tree, counts)
    return tree


def solution_trees(store: CompletionStore, solutions: Sequence[Solution]) -> list[GrowingTree]:
    """A tree per question: its solutions, and what is stored for the question and below each of their prefixes.

    The labels of a record, where it has any, are the rewards of its steps.
    """
    questions: dict[str, list[Solution]] = {}
    for record, state in solutions:
        questions.setdefault(prefix_key(State(state.prompt)), []).append((record, state))
    trees = []
    for of_question in questions.values():
        prompt = of_question[0][1].prompt
        prefixes = []
        for _, state in of_question:
            prefixes += [replace(state.upto(t), prompt=prompt) for t in range(len(state.steps))]
        prefixes.sort(key=lambda prefix: len(prefix.text))
        tree = sampled_tree(store, [State(prompt), *prefixes])
        for record, state in of_question:
            _place_solution(tree, record, state)
        if len(tree):
            trees.append(tree)
    return trees


def _place_solution(tree: GrowingTree, record: SolutionRecord, state: State) -> None:
    """Add a solution to its tree: the labels as rewards of its steps, its outcome at its end."""
    if not state.steps:
        return
    for t, label in enumerate(record.labels or ()):
        if label is not None:
            tree.numbers["step_reward"].setdefault(place(tree, state.upto(t + 1)), label)
    node = place(tree, state)
    if not tree.ended[node]:
        tree.ended[node] = True
        end(tree, node, record.final_correct)


def place(tree: GrowingTree, state: State) -> int:
    """The first node with the text of a state; steps that the tree lacks are added."""
    node = ROOT
    for text in state.steps:
        child = tree.first(tree.text(node) + text)
        if child is None:
            child = tree.grow(node, Continuation((text,), (), False))[-1]
        node = child
    return node

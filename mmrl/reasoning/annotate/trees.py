"""What an annotation has paid for as trees: every completion below the state that it goes on from, and its verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mmrl.growth import ROOT, GrowingTree
from mmrl.reasoning.annotate.monte_carlo import Solution
from mmrl.reasoning.annotate.store import Completion, CompletionStore, prefix_key
from mmrl.reasoning.records import Counts, SolutionRecord
from mmrl.rollout import Continuation, State


def attach(tree: GrowingTree, node: int, completions: Sequence[Completion]) -> list[list[int]]:
    """Completions below a node, each as a chain of its own whose end has the verdict as its outcome; their nodes."""
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
        found = counts.get(tree.text(node))
        if found is not None and found.total and node not in tree.numbers["outcome"]:
            tree.numbers["visits"][node] = found.total
            tree.numbers["q_sum"][node] = found.correct
            tree.numbers["value"][node] = found.correct / found.total


def sampled_tree(store: CompletionStore, states: Iterable[State]) -> GrowingTree:
    """Everything stored for the states of one question.

    Args:
        states: at least one, shorter ones first. The first steps that say the same get the completions; a state that
            no completion leads to (of a solution from elsewhere) becomes a path of its own.
    """
    every = list(states)
    tree = GrowingTree(every[0].prompt)
    counts: dict[str, Counts] = {}
    for state in every:
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
    for own in questions.values():
        prompt = own[0][1].prompt
        prefixes = [replace(s.upto(t), prompt=prompt) for _, s in own for t in range(len(s.steps))]
        known = [State(prompt), *sorted(prefixes, key=lambda s: len(s.text))]
        tree = sampled_tree(store, known)
        for record, state in own:
            _place_solution(tree, record, state)
        trees.append(tree)
    return [t for t in trees if len(t)]


def _place_solution(tree: GrowingTree, record: SolutionRecord, state: State) -> None:
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
    """The first node that says what a state says; the steps that are missing are written."""
    node = ROOT
    for text in state.steps:
        found = tree.first(tree.text(node) + text)
        node = tree.grow(node, Continuation((text,), (), False))[-1] if found is None else found
    return node

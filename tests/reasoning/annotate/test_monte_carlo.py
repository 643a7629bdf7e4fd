import random
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_extender import ToyExtender, chain, first_wrong, planted, verify

from mmrl.reasoning.annotate.consensus import consensus
from mmrl.reasoning.annotate.labels import label_mc, mc_first_error
from mmrl.reasoning.annotate.monte_carlo import (
    MonteCarlo,
    as_state,
    estimate_steps,
    sample_solutions,
    step_text,
    whole_steps,
)
from mmrl.reasoning.annotate.store import CompletionStore, Estimator
from mmrl.reasoning.annotate.targets import mc_values
from mmrl.reasoning.records import Counts, SolutionRecord, Step, record_of
from mmrl.rollout import Prompt, State

QUESTION = chain("q", 6)  # seven steps


@contextmanager
def asking(folder, policy, **options):
    with CompletionStore(folder / "store.sqlite") as store:
        yield Estimator(policy, verify, store, **options)


def found(estimator, records, k=4, **options):
    labelled = estimate_steps(estimator, [(r, as_state(r)) for r in records], k, **options)
    return [mc_first_error(mc_values(r.mc)) for r in labelled], labelled


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_perfect_completer_finds_the_first_error_exactly(tmp_path, early_stop):
    planned = [*range(7), None]
    with asking(tmp_path, ToyExtender()) as estimator:
        errors, records = found(estimator, [planted(QUESTION, t) for t in planned], early_stop=early_stop)
    assert errors == [*range(7), -1]
    assert [r.final_correct for r in records] == [False] * 7 + [True]
    whole, half = records[-1].mc, records[2].mc
    assert whole == (*[Counts(4, 4)] * 6, Counts(1, 1))
    rest = [Counts(0, 0)] * 4 if early_stop else [*[Counts(0, 4)] * 3, Counts(0, 1)]
    assert half == (Counts(4, 4), Counts(4, 4), Counts(0, 4), *rest)


def test_early_stop_saves_completions_and_an_error_at_the_last_step_costs_none(tmp_path):
    linear, early = ToyExtender(), ToyExtender()
    records = [planted(chain(f"q{i}", 6), i % 7) for i in range(14)]
    for policy, folder in ((linear, tmp_path / "a"), (early, tmp_path / "b")):
        with asking(folder, policy) as estimator:
            found(estimator, records, early_stop=policy is early)
    assert linear.completions == 14 * 6 * 4
    assert early.completions == 2 * (1 + 2 + 3 + 4 + 5 + 6 + 6) * 4
    assert not any("answer" in text for text in linear.seen)


def test_shared_prefixes_are_paid_once_and_levels_share_a_call(tmp_path):
    policy = ToyExtender()
    with asking(tmp_path, policy) as estimator:
        found(estimator, [planted(QUESTION, t, f"solution {t}") for t in (3, 4, 5)])
        # 3 shared prefixes, then 2 after step 3, then each its own
        assert policy.completions == 4 * (3 + 2 + 3 + 3) and policy.calls == 6
        assert estimator.cost["reused"] == 3 * 6 * 4 - policy.completions


def test_an_error_repairing_completer_finds_errors_too_late_a_weak_one_too_early_and_a_judge_helps(tmp_path):
    records = [planted(chain(f"q{i}", 8), 2) for i in range(30)]
    mean, judges = {}, random.Random(0)
    for name, policy in {"repairs": ToyExtender(repairs=0.3), "weak": ToyExtender(fails=0.8)}.items():
        with asking(tmp_path / name, policy) as estimator:
            errors, _ = found(estimator, records, early_stop=True)
        mean[name] = sum(errors) / len(errors)
        assert min(errors) >= 2 if name == "repairs" else max(errors) <= 2
        judged = [2 if judges.random() < 0.8 else judges.randrange(9) for _ in errors]
        kept = [e for e, j in zip(errors, judged, strict=True) if consensus(e, j, 9) is not None]
        assert kept and abs(sum(kept) / len(kept) - 2) < abs(mean[name] - 2) / 2
    assert mean["repairs"] > 3.5 and mean["weak"] < 1.8


def test_worked_labels():
    steps = tuple(Step(t) for t in "abcd")
    record = SolutionRecord("r", "?", steps, mc=(Counts(4, 4), Counts(2, 4), Counts(0, 4), Counts(1, 4)))
    labelled = label_mc(record)
    assert labelled.first_error == 2 and labelled.labels == (1, 1, 0, None)


def test_a_prefix_without_a_verdict_is_unknown_and_does_not_stop_early(tmp_path):
    def shy(samples):
        return [
            None if s.step == 6 and "\n" in s.output and calls[0] == 1 else v
            for s, v in zip(samples, verify(samples), strict=True)
        ]

    calls = [0]

    class Counting(ToyExtender):
        def extend(self, *args, **options):
            calls[0] += 1
            return super().extend(*args, **options)

    with CompletionStore(tmp_path / "store.sqlite") as store:
        (record,) = estimate_steps(
            Estimator(Counting(), shy, store),
            [(planted(QUESTION, 2), as_state(planted(QUESTION, 2)))],
            4,
            early_stop=True,
        )
    assert record.mc[:3] == (Counts(0, 0), Counts(4, 4), Counts(0, 4)) and record.mc[3:] == (Counts(0, 0),) * 4
    assert mc_first_error(mc_values(record.mc)) is None


def test_a_given_outcome_is_believed_and_an_unknown_one_has_no_count(tmp_path):
    record = planted(QUESTION, None)
    unclear = SolutionRecord("u", record.question, record.steps)
    told = SolutionRecord("t", record.question, record.steps, final_correct=False)
    with asking(tmp_path, ToyExtender()) as estimator:
        _, (a, b) = found(estimator, [unclear, told])
    assert a.final_correct is None and a.mc[-1] == Counts(0, 0)
    assert b.final_correct is False and b.mc[-1] == Counts(0, 1)


def test_a_solution_of_one_step_needs_no_policy(tmp_path):
    with asking(tmp_path, ToyExtender(die_at=0)) as estimator:
        _, (record,) = found(estimator, [SolutionRecord("r", "5", (Step("answer: 5"),), answer="5")])
    assert record.mc == (Counts(1, 1),)


def test_solutions_are_sampled_once_each_and_counted(tmp_path):
    policy = ToyExtender(slips=0.5)
    prompt = Prompt("q", QUESTION.inputs, QUESTION.reference | {"difficulty": 3})
    with asking(tmp_path, policy) as estimator:
        (solutions,) = sample_solutions(estimator, [prompt], 8)
        assert sum(r.meta["draws"] for r, _ in solutions) == 8
        assert len({s.steps for _, s in solutions}) == len(solutions)
        right = [r for r, s in solutions if first_wrong(QUESTION, s.steps) == -1]
        assert [r.meta["draws"] for r in right] == [4] and right[0].id == "q/4"
        record = right[0]
        assert record.final_correct and record.texts[-1] == f"answer: {QUESTION.reference['answer']}"
        about = {"difficulty": 3, "solution": QUESTION.reference["solution"]}  # what else the prompt's reference holds
        about |= {"question_id": "q", "draws": 4, "truncated": False, "root": [4, 8]}
        assert record.meta == about and record.answer == QUESTION.reference["answer"]
        records = estimate_steps(estimator, solutions, 4)
        for (_, s), r in zip(solutions, records, strict=True):
            assert mc_first_error(mc_values(r.mc)) == first_wrong(QUESTION, s.steps)
        assert sample_solutions(estimator, [prompt], 4) != [solutions]
    assert not any("answer" in text for text in policy.seen)


def whole(written):
    """The whole steps of pieces; ids and nodes of a step are those of all its pieces, and of the last one."""
    places = tuple(range(1, len(written) + 1))
    state = whole_steps(State(QUESTION, written, ids=tuple((i,) for i in places), path=places))
    assert [max(own) for own in state.ids] == list(state.path)
    assert [i for own in state.ids for i in own] == list(places[: len(written) if state.steps else 0])
    return state.steps


def test_the_policy_goes_on_from_exactly_what_it_wrote(tmp_path):
    written = ("\n", "one\n\n", " \n", "two\n", "\n", "three", "\n")
    steps = whole(written)
    assert steps == ("\none\n\n \n", "two\n\n", "three\n")
    assert [step_text(s) for s in steps] == ["one", "two", "three"]
    assert step_text(" <s>four <s>\n", "<s>") == "four" and whole(("\n", " ")) == ()


@given(st.lists(st.sampled_from(["a\n", "b", "\n", " ", "\n\n", "c c\n"])))
def test_whole_steps_keep_the_text_and_say_something(written):
    written = tuple(written)
    steps = whole(written)
    assert "".join(steps) == ("".join(written) if steps else "")
    assert all(step_text(s) for s in steps)


def test_given_records_get_the_separator_between_their_steps():
    solution = as_state(SolutionRecord("r", "?", (Step("a"), Step("b"), Step("c"))), " ки\n")
    assert solution.steps == ("a ки\n", "b ки\n", "c")
    assert solution.upto(2) == State(solution.prompt, ("a ки\n", "b ки\n"))


def test_prompts_become_records():
    inputs = {"question": "Which?", "images": ["p.png"], "options": ["x", "y"]}
    record = record_of(Prompt("a", inputs, {"answer": 7, "level": 2}), ["s"])
    assert record == SolutionRecord(
        "a", "Which?", (Step("s"),), images=("p.png",), options=("x", "y"), answer="7", meta={"level": 2}
    )
    assert record_of(Prompt("a", {"question": "?"}, "B"), []).answer == "B"
    with pytest.raises(ValueError, match="prompt 'a' has no text `question`"):
        record_of(Prompt("a", {"label": 3}), [])


@pytest.mark.parametrize("options", [{"k": 0}, {"solutions": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="at least 1"):
        MonteCarlo(**options)

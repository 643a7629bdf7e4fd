from dataclasses import replace

import pytest

from mmrl.reasoning.annotate.inject import inject_error, places
from mmrl.reasoning.records import Counts, SolutionRecord, Step

STEPS = (
    Step("There are 6 red circles to the left of a blue square.", "perception"),
    Step("Step 2: The larger circle has the number 14.", "perception"),
    Step("Nothing to see here.", "reasoning"),
    Step("So the answer is 20.", "answer"),
)
RIGHT = SolutionRecord("r1", "q", STEPS, first_error=-1, final_correct=True, labels=(1, 1, 1, 1), meta={"a": 1},
                       mc=(Counts(1, 1),) * 4, judge=({"first_error": -1},))  # fmt: skip


@pytest.mark.parametrize("text, want", [
    ("6 and 3.5, then 0", ["6", "3.5", "0"]),
    ("1. First\n(2) Second 7.", ["7"]),
    ("Step 3 gives x_2 = 4th of B12 at 10:05", ["10"]),
    ("1,200 cars, v1.2, 007", []),
    ("50% of -3", ["50", "3"]),
])  # fmt: skip
def test_numbers(text, want):
    assert [p.old for p in places(text, ["number"])] == want


@pytest.mark.parametrize("text, want", [
    ("The Red, reddish and grey ones", ["Red", "grey"]),
    ("right answer, to the right of it", ["to the right"]),
    ("anti-clockwise", []),
    ("greater than or counterclockwise", ["greater than", "counterclockwise"]),
])  # fmt: skip
def test_words(text, want):
    assert [p.old for p in places(text, ["colour", "relation"])] == want


def test_places_are_where_they_say():
    for step in STEPS:
        for p in places(step.text):
            assert step.text[p.start : p.start + len(p.old)] == p.old


@pytest.mark.parametrize("seed", range(30))
def test_exactly_one_value_of_one_step_changes(seed):
    r = inject_error(RIGHT, seed=seed)
    edit = r.meta["edit"]
    t, old = edit["step"], STEPS[edit["step"]].text
    end = edit["start"] + len(edit["old"])
    assert [i for i in range(4) if r.steps[i] != STEPS[i]] == [t]
    assert r.steps[t].text == old[: edit["start"]] + edit["new"] + old[end:]
    assert edit["new"] != edit["old"] == old[edit["start"] : end]
    assert (r.first_error, r.scope, r.steps[t].kind) == (t, "prefix", STEPS[t].kind)
    assert r.labels == tuple(1 if i < t else 0 if i == t else None for i in range(4))
    assert (r.mc, r.judge, r.final_correct) == (None, (), None if t == 3 else True)
    assert r.meta["a"] == 1 and r.meta["original_id"] == "r1" and r.id == f"r1#error{seed}"
    assert r == inject_error(RIGHT, seed=seed)


def test_all_eligible_steps_are_reached_about_evenly():
    steps = [inject_error(RIGHT, seed=seed).first_error for seed in range(600)]
    assert set(steps) == {0, 1, 3}
    assert min(steps.count(t) for t in (0, 1, 3)) > 150


def test_new_values_by_kind():
    for seed in range(40):
        number = inject_error(RIGHT, seed=seed, values=["number"]).meta["edit"]
        assert 1 <= abs(int(number["new"]) - int(number["old"])) <= 3
        colour = inject_error(RIGHT, seed=seed, values=["colour"]).meta["edit"]
        assert colour["new"] not in ("red", "blue")  # not one that the step names
        relation = inject_error(RIGHT, seed=seed, values=["relation"]).meta["edit"]
        assert (relation["old"], relation["new"]) in (("to the left", "to the right"), ("larger", "smaller"))


def test_capitals_and_decimals_stay():
    r = SolutionRecord("x", "q", (Step("Red"),), first_error=-1)
    assert inject_error(r, seed=1).steps[0].text.istitle()
    zero = replace(r, steps=(Step("0.25"),))
    assert {inject_error(zero, seed=s).steps[0].text for s in range(30)} == {"1.25", "2.25", "3.25"}


def test_only_perception_steps():
    kinds = {inject_error(RIGHT, seed=s, step_kinds=("perception",)).first_error for s in range(30)}
    assert kinds == {0, 1}
    with pytest.raises(ValueError, match=r"r1.*reflection"):
        inject_error(RIGHT, seed=0, step_kinds=("reflection",))


def test_nothing_to_change():
    with pytest.raises(ValueError, match="to change; skip it"):
        inject_error(replace(RIGHT, steps=(Step("Nothing."),), labels=(1,)), seed=0)


@pytest.mark.parametrize("change", [{"first_error": 1, "labels": (1, 0, None, None)},
                                    {"first_error": None, "labels": None},
                                    {"first_error": None, "labels": (1, 1, None, 1)}])  # fmt: skip
def test_only_into_right_solutions(change):
    with pytest.raises(ValueError, match="not known to be right"):
        inject_error(replace(RIGHT, **change), seed=0)


def test_labels_of_one_vouch_without_a_first_error():
    assert inject_error(replace(RIGHT, first_error=None), seed=0).first_error >= 0

import random

import pytest

from mmrl.reasoning.annotate.consensus import consensus, consensus_report, filter_records, vote
from mmrl.reasoning.annotate.labels import local_first_error, mc_first_error
from mmrl.reasoning.annotate.targets import mc_values
from mmrl.reasoning.records import Counts, SolutionRecord, Step


def test_worked_examples():
    assert consensus(2, 2, 4) == (1, 1, 0, None)
    assert consensus(2, 3, 4) is None
    assert consensus(-1, -1, 3) == (1, 1, 1)


@pytest.mark.parametrize("rule, mc, judge, want", [
    ("within_1", 2, 3, (1, 1, None, 0)),
    ("within_1", 3, 2, (1, 1, None, 0)),
    ("within_1", 1, 3, None),
    ("within_1", -1, 0, None),  # one index apart, but none against the first step
    ("step", 1, 3, (1, None, None, 0)),
    ("step", 2, -1, (1, 1, None, None)),
    ("step", 0, -1, None),  # nothing is left
    ("agree_on_correct", -1, -1, (1, 1, 1, 1)),
    ("agree_on_correct", 2, -1, None),
    ("agree_on_correct", None, -1, None),
    ("agree_on_correct", -1, 1, (1, 0, None, None)),
    ("agree_on_correct", 3, 1, (1, 0, None, None)),
    ("agree_on_correct", None, 1, (1, 0, None, None)),
    ("agree_on_correct", 2, None, None),
    ("exact", None, 2, None),
    ("exact", 2, None, None),
])  # fmt: skip
def test_rules(rule, mc, judge, want):
    assert consensus(mc, judge, 4, rule) == want


def test_refusals():
    with pytest.raises(ValueError, match="none of exact"):
        consensus(1, 1, 3, "both")
    with pytest.raises(ValueError, match="outside"):
        consensus(1, 3, 3)
    with pytest.raises(ValueError, match="outside"):
        consensus(-2, -1, 3, "step")


def test_votes_of_spark():
    labels = vote([(1, 1, 0), (1, 0, 0), (1, 1, 1)])
    assert labels == (1, 1, 0)
    assert local_first_error(labels) == 2
    assert vote([(1, 0), (0, 0)]) == (0, 0)  # a tie is wrong
    assert vote([(1, None, None), (0, None, 1), (1, 1, None)]) == (1, 1, 1)
    assert vote([(1, None), (1, None)]) == (1, None)
    for bad in ([], [(1, 0), (1,)]):
        with pytest.raises(ValueError, match="one length"):
            vote(bad)


def record(name, mc):
    return SolutionRecord(name, "q", tuple(Step(f"s{t}") for t in range(len(mc))), mc=tuple(Counts(c, 4) for c in mc))


def test_filter_and_report():
    records = [record("a", [4, 2, 0]), record("b", [4, 4]), record("c", [4, 0, 0, 0]), record("d", [4, 1])]
    kept, report = filter_records(records, [2, -1, 2, None])
    assert [(r.id, r.labels, r.first_error, r.scope) for r in kept] == [
        ("a", (1, 1, 0), 2, "prefix"), ("b", (1, 1), -1, "prefix"),
    ]  # fmt: skip
    assert (report.total, report.kept, report.unparsed) == (4, 2, 1)
    assert (report.kept_frac, report.agreement) == (0.5, pytest.approx(2 / 3))
    assert (report.right_frac, report.mean_steps) == (0.8, 2.5)
    assert report.confusion == {(2, 2): 1, (-1, -1): 1, (1, 2): 1, (-1, None): 1}


def test_first_error_is_unknown_where_the_two_differ():
    kept, _ = filter_records([record("c", [4, 0, 0, 0])], [2], "within_1")
    assert (kept[0].labels, kept[0].first_error) == ((1, None, 0, None), None)
    kept, _ = filter_records([record("c", [4, 0, 0, 0])], [2], "agree_on_correct")
    assert kept[0].first_error == 2


def test_report_of_nothing():
    report = consensus_report([], [], [])
    assert (report.kept_frac, report.agreement, report.right_frac, report.mean_steps) == (None,) * 4
    with pytest.raises(ValueError, match="Monte-Carlo count"):
        filter_records([SolutionRecord("x", "q", (Step("s"),))], [0])


def test_consensus_reduces_the_late_bias():
    """A completer that repairs errors finds them late; a judge that is right 7 times in 10 removes most of that."""
    rng, steps, k = random.Random(3), 8, 8
    late, kept = [], []
    for _ in range(1500):
        error = rng.randrange(steps)
        counts = [Counts(k if t < error else sum(rng.random() < 0.15 for _ in range(k)), k) for t in range(steps)]
        found = mc_first_error(mc_values(counts))
        judge = error if rng.random() < 0.7 else rng.randrange(-1, steps)
        gap = (steps if found < 0 else found) - error
        late.append(gap)
        if consensus(found, judge, steps) is not None:
            kept.append(gap)
    mean = sum(late) / len(late)
    assert mean > 0.8
    assert len(kept) > 200
    assert abs(sum(kept)) / len(kept) < 0.25 * mean

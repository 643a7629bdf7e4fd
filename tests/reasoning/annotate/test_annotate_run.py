import json
import math
from pathlib import Path

import pytest
from toy_extender import Killed, ToyExtender, chain, first_wrong, planted, verify
from verbs import stored_rollouts

from mmrl import workdir
from mmrl.config import ConfigError
from mmrl.reasoning.annotate.monte_carlo import MonteCarlo
from mmrl.reasoning.annotate.omega import Omega
from mmrl.reasoning.annotate.run import LabelRule, annotate
from mmrl.reasoning.annotate.store import CompletionStore
from mmrl.reasoning.records import Counts, SolutionRecord, Step
from mmrl.reasoning.records_io import record_from_json
from mmrl.registry import names
from mmrl.rollout import Prompt
from mmrl.rollout_folder import RolloutFolder
from mmrl.trainers.stored import StoredRollouts

PROMPTS = [chain(f"q{i}", 5) for i in range(7)]
DATA = Path(__file__).parents[2] / "data" / "annotate"  # of two and four of PROMPTS, by version 0.1
METHODS = {"mc": MonteCarlo(k=4, solutions=3), "early": MonteCarlo(4, 3, True), "omega": Omega(k=4, min_words=3)}


def run(folder, policy=None, items=PROMPTS, method=METHODS["mc"], **options):
    options = {"batch": 3, "progress": False} | options
    return annotate(policy or ToyExtender(slips=0.5), verify, items, method, folder, **options)


def records(folder: Path, name="records.jsonl"):
    return [record_from_json(json.loads(line)) for line in (folder / name).read_text().splitlines()]


def test_questions_become_labelled_solutions(tmp_path):
    report = run(tmp_path)
    rows = records(tmp_path)
    assert len(rows) == report["records"] > len(PROMPTS)
    by_id = {p.id: p for p in PROMPTS}
    for r in rows:
        assert r.first_error == first_wrong(by_id[r.meta["question_id"]], r.texts)
        assert r.final_correct == (r.first_error == -1) and r.scope == "prefix" and r.label_kind == "hard"
        t = r.first_error if r.first_error >= 0 else len(r.steps)
        assert r.labels == (*[1] * t, *[0] * (t < len(r.steps)), *[None] * (len(r.steps) - t - 1))
    assert report == json.loads((tmp_path / "report.json").read_text())
    labels = [y for r in rows for y in r.labels]
    want = {"positive": labels.count(1), "negative": labels.count(0), "unlabelled": labels.count(None)}
    assert report["labels"] == want | {"mean": want["positive"] / (want["positive"] + want["negative"])}
    assert report["steps"] == len(labels) and report["items"] == 7 and report["quarantined"] == []
    assert sum(report["first_error"].values()) == len(rows)
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")} == {
        "store.sqlite", "store.jsonl", "records.jsonl", "report.json"
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_any_call_and_started_again_equals_uninterrupted(tmp_path, name):
    whole = ToyExtender(slips=0.5)
    want = run(tmp_path / "whole", whole, method=METHODS[name])
    for call in sorted({*range(0, whole.calls, 4), whole.calls - 1}):
        folder = tmp_path / str(call)
        first, second = ToyExtender(slips=0.5, die_at=call), ToyExtender(slips=0.5)
        with pytest.raises(Killed):
            run(folder, first, method=METHODS[name])
        assert not (folder / "records.jsonl").exists()
        got = run(folder, second, method=METHODS[name])
        assert (folder / "records.jsonl").read_bytes() == (tmp_path / "whole/records.jsonl").read_bytes()
        assert first.completions + second.completions == whole.completions
        assert got["cost"]["paid"] == want["cost"]["paid"] and got["labels"] == want["labels"]
        assert first.calls - 1 + second.calls == whole.calls


@pytest.mark.parametrize("cut, paid", [(0, 0), (20, 4)])
def test_a_store_of_an_earlier_version_goes_on_and_a_line_that_a_kill_cut_is_paid_again(tmp_path, cut, paid):
    run(tmp_path / "new", items=PROMPTS[:2])
    (tmp_path / "old").mkdir()
    written = (DATA / "store.jsonl").read_bytes()
    (tmp_path / "old" / "store.jsonl").write_bytes(written[: len(written) - cut])
    policy = ToyExtender(slips=0.5)
    run(tmp_path / "old", policy, items=PROMPTS[:2])
    assert policy.completions == paid
    for file in ("records.jsonl", "store.jsonl"):
        assert (tmp_path / "old" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


def test_what_is_exported_is_all_that_is_known(tmp_path):
    """Without the database an annotation goes on from the lines that it wrote from it."""
    run(tmp_path)
    want = {file: (tmp_path / file).read_bytes() for file in ("records.jsonl", "store.jsonl")}
    (tmp_path / "store.sqlite").unlink()
    policy = ToyExtender(slips=0.5)
    run(tmp_path, policy)
    assert policy.completions == 0 and {file: (tmp_path / file).read_bytes() for file in want} == want


def test_another_batch_size_gives_the_same_records(tmp_path):
    for batch in (1, 64):
        run(tmp_path / str(batch), batch=batch)
    assert (tmp_path / "1/records.jsonl").read_bytes() == (tmp_path / "64/records.jsonl").read_bytes()


def test_other_sampling_settings_are_other_prefixes(tmp_path):
    run(tmp_path)
    policy = ToyExtender(slips=0.5)
    again = run(tmp_path, policy, fingerprint="hotter")
    assert policy.completions > 0 and again["cost"]["run"]["completions"] == policy.completions


def test_solutions_are_labelled_and_keep_what_they_had(tmp_path):
    given = [planted(PROMPTS[0], t) for t in (2, 5, None)]
    report = run(tmp_path, ToyExtender(), given, MonteCarlo(k=4, early_stop=True))
    rows = records(tmp_path)
    assert [r.first_error for r in rows] == [2, 5, -1] and [r.id for r in rows] == [r.id for r in given]
    assert rows[0].labels == (1, 1, 0, None, None, None) and rows[0].mc[3:] == (Counts(0, 0),) * 3
    # prefixes of the right chain 0..4, and step 2 of the wrong one
    assert report["cost"]["paid"]["completions"] == 4 * (5 + 1)


@pytest.mark.parametrize(
    "rule, want",
    [
        (LabelRule("soft"), (1, 0.5, 0, None)),
        (LabelRule("hard_gt"), (1, 1, 0, None)),
        (LabelRule("hard_gt", options={"threshold": 0.5}), (1, 0, None, None)),
        (LabelRule("hard_gt", "zero"), (1, 1, 0, 0)),
        (LabelRule("hard_ge", "keep", {"tau": 0.25}), (1, 1, 0, 1)),
        (LabelRule("log_boost"), (1, 0.7472219, 0, None)),
        (LabelRule("relative_progress"), (1, 0, 0, None)),
    ],
)
def test_rules_by_hand(rule, want):
    steps = tuple(Step(t) for t in "abcd")
    mc = (Counts(4, 4), Counts(2, 4), Counts(0, 4), Counts(1, 4))
    record = rule(SolutionRecord("r", "?", steps, mc=mc, meta={"root": [4, 4]}))
    assert record.labels == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", names("label_rules"))
def test_every_rule_runs_on_given_solutions(tmp_path, name):
    rule = LabelRule(name, options={"hard_ge": {"tau": 0.5}, "rel_effective": {"gamma": 0.8}}.get(name, {}))
    report = run(tmp_path, ToyExtender(), [planted(PROMPTS[0], 2)], rule=rule)
    assert records(tmp_path)[0].labels[:3] == (1, 1, 0)
    assert report["cost"]["paid"]["prefixes"] == 5 + rule.needs_start


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="unknown label rule 'hard' .did you mean hard_g.*known: hard_ge, hard_gt"):
        LabelRule("hard")
    with pytest.raises(ValueError, match="label.tau is missing"):
        LabelRule("hard_ge")
    with pytest.raises(ValueError, match="unknown key label.b=1; label rule 'log_boost' takes a"):
        LabelRule("log_boost", options={"b": 1})


def test_omega_writes_trees_and_rows(tmp_path):
    report = run(tmp_path, method=METHODS["omega"], rule=LabelRule("soft"), keep=False)
    trees = [json.loads(line) for line in (tmp_path / "trees.jsonl").read_text().splitlines()]
    assert [t["id"] for t in trees] == [p.id for p in PROMPTS]
    assert all(t["log"] and t["children"] for t in trees)
    rows = records(tmp_path)
    assert sum(r.mc[-1].correct == 0 for r in rows) >= len(rows) / 2
    for r in rows:
        assert r.labels == tuple(c.correct / c.total for c in r.mc) and (r.labels[-1] == 0) == (r.first_error >= 0)
    assert report["settings"]["method"] == "Omega" and report["cost"]["paid"]["completions"] == sum(
        t["rollouts"] for t in trees
    )


def test_items_are_set_aside_with_their_reason(tmp_path):
    unclear = Prompt("unclear", PROMPTS[0].inputs | {"images": ["other.png"]}, {"answer": None})
    items = [*PROMPTS, Prompt("q0", {"question": "again?"}), Prompt("empty", {"label": 3}), unclear]
    with pytest.raises(ValueError, match=r"2 of 10 items cannot be annotated .*q0: its id occurs before"):
        run(tmp_path, items=items)
    report = run(tmp_path, items=items, max_bad=0.3)
    reasons = {(b["id"], b["reason"].partition(":")[0][:40]) for b in report["quarantined"]}
    assert ("q0", "its id occurs before") in reasons and any(i == "empty" and "question" in r for i, r in reasons)
    unscored = [b for b in report["quarantined"] if b["id"].startswith("unclear/")]
    assert unscored and all("could score neither" in b["reason"] for b in unscored)
    assert report["cost"]["run"]["unscored"] > 0 and report["records"] == len(records(tmp_path))


def test_bad_records_are_set_aside(tmp_path):
    items = [planted(PROMPTS[0], 2), SolutionRecord("r", "?", ())]
    report = run(tmp_path, ToyExtender(), items, max_bad=0.5)
    assert report["records"] == 1 and report["quarantined"][0]["reason"].startswith("no step")


def test_ranks_share_the_work_by_question_and_merge(tmp_path):
    given = [planted(p, t) for t in (1, 3, None) for p in PROMPTS]
    given.append(SolutionRecord(given[0].id, "another question", (Step("s"), Step("t"))))  # set aside, on one rank
    alone, policies = ToyExtender(), [ToyExtender(), ToyExtender()]
    want = run(tmp_path / "alone", alone, given)
    for rank in range(2):
        run(tmp_path / "two", policies[rank], given, rank=rank, world=2)
    assert not list((tmp_path / "two").glob("*.json*"))
    afterwards = ToyExtender()
    got = run(tmp_path / "two", afterwards, given)
    assert afterwards.completions == 0  # nothing is left to pay
    assert all(p.completions for p in policies)
    assert sum(p.completions for p in policies) == alone.completions  # no prefix on two ranks
    for key in ("items", "records", "labels", "first_error", "settings", "quarantined"):
        assert got[key] == want[key]
    assert got["cost"]["paid"] == want["cost"]["paid"]
    for file in ("records.jsonl", "store.jsonl"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_on_a_network_disk_ranks_write_files_of_their_own(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workdir, "filesystem", lambda folder: "nfs4")
    alone = ToyExtender(slips=0.5)
    run(tmp_path / "alone", alone)
    for rank in range(2):
        run(tmp_path / "two", rank=rank, world=2)
    assert (tmp_path / "two" / "store-1.sqlite").exists() and "store-1.sqlite is on a network disk" in caplog.text
    with CompletionStore(tmp_path / "two" / "store-1.sqlite"):  # rank 1 has not ended
        CompletionStore(tmp_path / "two" / "store.sqlite").close()
        assert "store-1.sqlite is left for later: database is locked" in caplog.text
    afterwards = ToyExtender(slips=0.5)
    run(tmp_path / "two", afterwards)
    assert afterwards.completions == 0 and not (tmp_path / "two" / "store-1.sqlite").exists()
    for file in ("records.jsonl", "store.jsonl"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    with CompletionStore(tmp_path / "two" / "store.sqlite"), pytest.raises(ConfigError, match="locked"):
        run(tmp_path / "two")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"items": []}, "no items"),
        ({"rank": 2, "world": 2}, "rank 2 is outside 0..1"),
        ({"items": [planted(PROMPTS[0], 1)], "method": Omega()}, "is a solution; omega grows trees"),
    ],
)
def test_misuse_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)


def test_the_bar_tells_what_was_spent(tmp_path, capsys):
    run(tmp_path, progress=True)
    assert "7/7" in capsys.readouterr().out


# ---- the trees it keeps ---------------------------------------------------------------------------------------------


def numbers_of(rollouts):
    """(prompt, text so far) -> value, visits, q_sum and outcome of every step that says so, in order."""
    out = {}
    for r in rollouts:
        whole = []
        for v, p in enumerate(r.tree.parent.tolist()):
            whole.append((whole[p] if p >= 0 else "") + r.texts[v])
            row = tuple(
                float(x[v]) for x in (r.tree.value, r.tree.tags["visits"], r.tree.tags["q_sum"], r.tree.outcome)
            )
            key = (r.prompts[int(r.tree.group[v])].id, whole[v])
            out.setdefault(key, []).append(tuple(None if math.isnan(x) else x for x in row))
    return out


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_was_paid_for_is_in_the_trees(tmp_path, name):
    """Each completion is a finished leaf; the counts of the records are the values of the steps."""
    policy = ToyExtender(slips=0.5)
    run(tmp_path / "a", policy, method=METHODS[name], rollouts=RolloutFolder(tmp_path / "trees", {}))
    rollouts = stored_rollouts(tmp_path / "trees")
    assert sum(int(r.tree.is_finished.sum()) for r in rollouts) == policy.completions
    found = numbers_of(rollouts)
    roots = {p.id: v for r in rollouts for p, v in zip(r.prompts, r.tree.root_value.tolist(), strict=True)}
    for record in records(tmp_path / "a"):
        prompt = record.meta["question_id"]
        assert roots[prompt] == pytest.approx(record.meta["root"][0] / record.meta["root"][1])
        for t, counts in enumerate(record.mc):
            text = "".join(s.text.replace("\n\n", "\n") + "\n" for s in record.steps[: t + 1])
            rows = found.get((prompt, text)) or found[prompt, text.removesuffix("\n")]  # an answer ends the text
            if counts.total:
                want = (counts.correct / counts.total, counts.total, counts.correct)
                assert {row[:3] for row in rows} == {want}
    again = ToyExtender(slips=0.5)
    run(tmp_path / "a", again, method=METHODS[name], rollouts=RolloutFolder(tmp_path / "other", {}))
    assert again.completions == 0  # the trees of an annotation that is done cost nothing
    assert numbers_of(stored_rollouts(tmp_path / "other")) == found


def test_trees_of_a_killed_annotation_are_those_of_a_whole_one(tmp_path):
    whole = RolloutFolder(tmp_path / "whole", {})
    policy = ToyExtender(slips=0.5)
    run(tmp_path / "a", policy, batch=2, rollouts=whole)
    folder = RolloutFolder(tmp_path / "cut", {})
    with pytest.raises(Killed):
        run(tmp_path / "b", ToyExtender(slips=0.5, die_at=policy.calls // 2), batch=2, rollouts=folder)
    assert 0 < len(folder.batches) < len(whole.batches)
    run(tmp_path / "b", batch=3, rollouts=folder)  # other batches: those of the first run are not left behind
    assert numbers_of(stored_rollouts(tmp_path / "cut")) == numbers_of(stored_rollouts(tmp_path / "whole"))
    assert len(folder.batches) == 3


def test_given_solutions_of_one_question_are_one_tree(tmp_path):
    given = [planted(PROMPTS[0], t) for t in (2, None)]
    run(tmp_path, ToyExtender(), given, MonteCarlo(k=4), rollouts=RolloutFolder(tmp_path / "trees", {}))
    (rollout,) = stored_rollouts(tmp_path / "trees")
    assert [p.id for p in rollout.prompts] == [given[0].id]
    found = numbers_of([rollout])
    right = "".join(s.text + "\n" for s in given[1].steps[:2])
    assert found[given[0].id, right][0][:2] == (1.0, 4)
    assert found[given[0].id, right + given[0].steps[2].text + "\n"][0][:2] == (0.0, 4)
    ends = [row[3] for (_, text), rows in found.items() for row in rows if "answer" in text]
    assert ends.count(1.0) + ends.count(0.0) == len(ends) > 4 * 5


def test_trees_of_several_ranks_are_those_of_one(tmp_path):
    folder = tmp_path / "trees"
    rollouts = RolloutFolder(folder, {"processes": 1})
    for rank in range(2):
        run(tmp_path / "a", batch=2, rank=rank, world=2, rollouts=rollouts)
    assert not rollouts.batches
    afterwards = ToyExtender(slips=0.5)
    run(tmp_path / "a", afterwards, batch=2, rollouts=rollouts)
    assert afterwards.completions == 0
    run(tmp_path / "b", rollouts=RolloutFolder(tmp_path / "alone", {}))
    of_both = StoredRollouts(folder, len(PROMPTS))
    assert of_both.left_out == 0
    batches = [of_both.batch(i) for i in range(len(of_both))]
    assert numbers_of(batches) == numbers_of(stored_rollouts(tmp_path / "alone"))

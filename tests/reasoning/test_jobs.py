"""annotate, score, search and bench from the command line, on a scripted policy: whole, cut and resumed, bad input."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from processes import run_ranks
from toy_extender import Killed, ToyExtender, chain, first_wrong, numbers, planted, verify, write
from verbs import run_verb

from mmrl.config import ConfigError
from mmrl.reasoning.annotate.refine import information
from mmrl.reasoning.records_io import read_records, record_to_json, write_records
from mmrl.reasoning.solutions import StepRecords
from mmrl.rollout import Continuation, Prompt, Rollout
from mmrl.tree import StepTree

JUDGE = {"name": "judge", "votes": 2, "solutions": 3}
METHODS = {
    "monte_carlo": {"name": "monte_carlo", "k": 4, "solutions": 3},
    "omega": {"name": "omega", "k": 4, "min_words": 3},
    "scorer": {"name": "scorer", "scorer": "test_jobs:truth", "solutions": 3},
    "judge": JUDGE,
    "critique": JUDGE | {"ask": "critique"},
    "reference": JUDGE | {"ask": "reference"},
    "outcome": {"name": "outcome", "solutions": 3},
}


# ---- what the recipes name by dotted path ----------------------------------------------------------------------


class Chains:
    """A task of arithmetic chains; the questions of both splits differ."""

    rewards = ("test_jobs:right",)

    def __init__(self, questions: int = 5):
        self.prompts = [chain(f"q{i}", 3) for i in range(questions)]
        self.eval_prompts = [chain(f"e{i}", 3, seed=1) for i in range(questions)]

    @staticmethod
    def step_kind(text):
        return "answer" if text.startswith("answer") else "reasoning"


class Bare(Chains):
    """The same without kinds and rewards."""

    rewards = ()
    step_kind = None


class Writer(ToyExtender):
    """Solves chains and judges solutions of them. nonsense: share of readings that say nothing; blank: the second
    of each question's solutions is empty; refuses: id of a question it cannot take. `dies`: call at which it is
    killed, no part of the recipe."""

    made: ClassVar[list] = []
    dies: ClassVar[int | None] = None

    def __init__(
        self, slips: float = 0.5, fails: float = 0.0, nonsense: float = 0.0, blank: bool = False, refuses: str = ""
    ):
        super().__init__(slips=slips, fails=fails, die_at=Writer.dies)
        self.nonsense, self.blank, self.refuses = nonsense, blank, refuses
        Writer.made.append(self)

    def admit(self, prompts):
        return [p for p in prompts if p.id != self.refuses]

    def _continuations(self, state, n, seed, steps, temperature):
        question = state.prompt.inputs["question"]
        if "[Question]" in question:
            said = [self._reading(question, i / n < self.nonsense) for i in range(n)]
            return [Continuation((s,), ((-1.0,) * 7,), True) for s in said]
        found = super()._continuations(state, n, seed, steps, temperature)
        if self.blank and not state.steps and n > 1:
            found[1] = Continuation((), (), True)
        return found

    @staticmethod
    def _reading(question, nonsense):
        if nonsense:
            return "all good, I think: \\boxed{maybe}"
        prompt = Prompt("", {"question": question.split("[Question]\n")[1].split("\n")[0]})
        steps = [p.split("\n")[1] for p in question.split("<paragraph_")[1:]]
        wrong = first_wrong(prompt, steps)
        if "[Reference]" in question:
            steps = [
                p.split(": ", 1)[1] for p in question.split("[Solution]\n")[1].split("\n\n") if p.startswith("Step ")
            ]
            wrong = first_wrong(prompt, steps)
            rows = [
                {"student_step": i, "label": "INCORRECT" if i - 1 == wrong else "CORRECT"}
                for i in range(1, len(steps) + 1)
            ]
            return "Compared:\n" + json.dumps(rows)
        if "<analysis_i>" not in question:
            return f"so \\boxed{{{wrong}}}"
        seen = steps if wrong < 0 else steps[: wrong + 1]
        words = ["incorrect" if i == wrong else "correct" for i in range(len(seen))]
        parts = [f"<analysis_{i}>\\boxed{{{w}}}</analysis_{i}>" for i, w in enumerate(words)]
        return "\n".join([*parts, f"\\boxed{{{words[-1]}}}"])


def right(samples):
    return verify(samples)


def unsure(samples):
    """No verdict on what ends in an even number."""
    return [
        None if s.output and int(s.output.split()[-1]) % 2 == 0 else v
        for s, v in zip(samples, verify(samples), strict=True)
    ]


def truth(rollout):
    """1 for a right step, 0 for a wrong one."""
    tree: StepTree = rollout.tree
    want = [write(p, 0, numbers(p)[0]) for p in rollout.prompts]
    texts = zip(rollout.texts, tree.group.tolist(), tree.depth.tolist(), strict=True)
    return torch.tensor([float(t.strip() == want[g][d].strip()) for t, g, d in texts])


def truth_on_wrong_ones(rollout):
    """The same, but not sure of anything in a solution that is right."""
    right, tree = truth(rollout), rollout.tree
    spoiled = torch.zeros(tree.num_groups, dtype=torch.bool).index_put((tree.group[right == 0],), torch.tensor(True))
    return torch.where(spoiled[tree.group], right, 0.6)


def constant(rollout):
    return torch.full((len(rollout.tree),), 0.5)


def beyond(rollout):
    return constant(rollout) + 1


# ---- running them ----------------------------------------------------------------------------------------------


def recipe(folder: Path, method: str | dict = "monte_carlo", policy: dict | None = None, **sections) -> Path:
    tree = {
        "task": {"name": "test_jobs:Chains"}, "policy": {"name": "test_jobs:Writer", **(policy or {})},
        "verifier": {"name": "test_jobs:right", "timeout_s": 0},
        "method": METHODS[method] if isinstance(method, str) else method,
        "output": str(folder / "out"), "batch": 2, "cpu": True,
    } | sections  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
    return folder / "recipe.yaml"


def annotated(folder, *args, **kwargs):
    """Records and report of a recipe, and the policy that wrote them."""
    run_verb("annotate", recipe(folder, *args, **kwargs))
    records, bad = read_records(folder / "out" / "records.jsonl")
    assert not bad
    return records, json.loads((folder / "out" / "report.json").read_text()), Writer.made[-1]


def question_of(record):
    return next(p for p in Chains().prompts if p.inputs["question"] == record.question)


def first_wrong_of(record):
    """Index of the first wrong step; OmegaPRM joins what it need not tell apart, with blank lines between."""
    lines = [(t, line) for t, text in enumerate(record.texts) for line in text.split("\n\n")]
    wrong = first_wrong(question_of(record), [line for _, line in lines])
    return lines[wrong][0] if wrong >= 0 else -1


# ---- annotate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_labels_the_first_error_and_reports_what_it_did(tmp_path, method):
    records, report, policy = annotated(tmp_path, method)
    assert {question_of(r).id for r in records} == {f"q{i}" for i in range(5)}
    for r in records:
        wrong = first_wrong_of(r)
        if method == "outcome":
            assert set(r.labels) == {float(wrong == -1)}
        else:
            upto = len(r.steps) if wrong < 0 else wrong + 1
            assert r.first_error == wrong and r.labels[:upto] == tuple(float(t != wrong) for t in range(upto))
        assert [s.kind for s in r.steps] == ["answer" if t.startswith("answer") else "reasoning" for t in r.texts]
    labels = [y for r in records for y in r.labels]
    assert (report["records"], report["steps"], report["items"]) == (len(records), len(labels), 5)
    assert report["labels"]["positive"] == labels.count(1) > 0
    assert report["labels"]["negative"] == labels.count(0) > 0
    assert report["labels"]["unlabelled"] == labels.count(None)
    assert report["quarantined"] == [] and report["unusable_prompts"] == 0 and report["unreadable_rows"] == {}
    judged = report["cost"].get("judge", {"completions": 0})["completions"]
    assert report["cost"]["paid"]["completions"] + judged == policy.completions
    assert (judged > 0) == (method in ("judge", "critique", "reference"))


@pytest.mark.parametrize(
    "method, sections",
    [*((m, {}) for m in METHODS), ("monte_carlo", {"refine": {"name": "consensus", "judge": {"name": "judge"}}}),
     ("monte_carlo", {"refine": {"name": "scan", "eps": 0.2}, "inject": {"copies": 2}})],
    ids=str,
)  # fmt: skip
def test_cut_at_any_call_and_started_again_nothing_is_paid_twice(tmp_path, monkeypatch, method, sections):
    _, want, whole = annotated(tmp_path / "whole", method, **sections)
    rows = (tmp_path / "whole/out/records.jsonl").read_bytes()
    for call in sorted({0, whole.calls // 2, whole.calls - 1}):
        file = recipe(tmp_path / str(call), method, **sections)
        out = file.parent / "out"
        monkeypatch.setattr(Writer, "dies", call)
        with pytest.raises(Killed):
            run_verb("annotate", file)
        first = Writer.made[-1]
        assert not (out / "records.jsonl").exists() or "refine" in sections
        monkeypatch.setattr(Writer, "dies", None)
        run_verb("annotate", file)
        second = Writer.made[-1]
        assert (out / "records.jsonl").read_bytes() == rows
        assert first.completions + second.completions == whole.completions
        got = json.loads((out / "report.json").read_text())
        assert got["labels"] == want["labels"] and got["cost"]["paid"] == want["cost"]["paid"]
        assert got["cost"].get("judge") == want["cost"].get("judge")


def test_refinement_and_planted_errors_are_counted(tmp_path):
    plain, _, _ = annotated(tmp_path / "plain")
    refine = {"name": "consensus", "rule": "exact", "judge": {"name": "judge"}}
    agreed, report, _ = annotated(tmp_path / "agreed", refine=refine)
    assert [r.labels for r in agreed] == [r.labels for r in plain]
    assert report["refined"]["kept_frac"] == report["refined"]["agreement"] == 1
    other = {"name": "consensus", "judge": {"name": "scorer", "scorer": "test_jobs:truth", "threshold": 0.5}}
    assert annotated(tmp_path / "other", refine=other)[0] == agreed
    # a third of the answers is right: above .2, so right solutions are taken as they are and wrong ones estimated
    scanned, report, _ = annotated(tmp_path / "scan", refine={"name": "scan", "eps": 0.2})
    used = report["refined"]
    assert used["positive"] == sum(r.final_correct for r in plain) > 0 == used["drop"] == used["unverified"]
    assert used["estimate"] == sum(not r.final_correct for r in plain) and report["records"] == len(scanned)
    assert [r.first_error for r in scanned] == [r.first_error for r in plain]
    with pytest.raises(ValueError, match="no solution was labelled or kept; refine left none"):
        annotated(tmp_path / "drop", refine={"name": "scan", "eps": 0.4})
    planted_, report, _ = annotated(tmp_path / "planted", inject={"copies": 2, "kinds": ["reasoning"]})
    made = [r for r in planted_ if "edit" in r.meta]
    assert len(made) == report["injected"] == 2 * sum(r.first_error == -1 for r in plain)
    assert report["records"] == len(planted_) == len(plain) + len(made)
    assert all(r.steps[r.first_error].kind == "reasoning" and r.labels[r.first_error] == 0 for r in made)
    assert report["first_error"] == {
        str(k): sum(r.first_error == k for r in planted_) for k in {r.first_error for r in planted_}
    }


def test_what_tells_most_is_kept(tmp_path):
    plain, _, _ = annotated(tmp_path / "plain")
    kept, report, _ = annotated(tmp_path / "half", refine={"name": "balanced_information", "share": 0.5})
    told = [information([c.correct / c.total for c in r.mc]) for r in plain]
    bound = sorted(told, reverse=True)[len(kept) - 1]
    assert len(kept) == (len(plain) + 1) // 2 and report["refined"]["kept_frac"] == len(kept) / len(plain)
    assert {r.id for r, t in zip(plain, told, strict=True) if t > bound} <= {r.id for r in kept}
    with pytest.raises(ValueError, match="refine.share"):
        annotated(tmp_path / "none", refine={"name": "balanced_information", "share": 0})


def test_only_what_the_scorers_are_unsure_of_is_labelled(tmp_path):
    """Two scorers that are sure together of wrong solutions alone: ActPRM's filter before the annotator."""
    solutions = [planted(chain(f"f{i}", 3), i % 4 if i % 2 else None, f"s{i}") for i in range(6)]
    file = tmp_path / "given.jsonl"
    write_records(file, solutions)
    scorers = ["test_jobs:truth", "test_jobs:truth_on_wrong_ones"]
    active = {"scorers": scorers}
    records, report, _ = annotated(tmp_path / "a", "judge", records=str(file), active=active)
    assert report["active"] == {"solutions": 6, "unsure": 3} and [r.id for r in records] == ["s0", "s2", "s4"]
    with pytest.raises(ValueError, match="the scorers are sure of every solution"):
        annotated(tmp_path / "b", "judge", records=str(file), active={"scorers": scorers[:1] * 2})
    with pytest.raises(ValueError, match="active chooses among given solutions"):
        annotated(tmp_path / "c", "judge", active=active)
    with pytest.raises(ValueError, match=r"active\.scorers"):
        annotated(tmp_path / "d", "judge", records=str(file), active={"scorers": scorers[:1]})


def test_solutions_of_a_file_are_labelled(tmp_path):
    given = [planted(p, w, f"{p.id}/{w}/{k}") for p in Chains().prompts for w in (None, 1) for k in range(3)]
    file = tmp_path / "given.jsonl"
    for usable in (10, 30):
        write_records(file, given[:usable])
        with file.open("a") as f:
            f.write(json.dumps({"id": "x", "question": "?", "steps": []}) + "\n")
        if usable == 10:
            with pytest.raises(ValueError, match=r"given.jsonl: 1 of 11 rows are bad, .*; line 11: no step"):
                run_verb("annotate", recipe(tmp_path / "a", records=str(file)))
    records, report, _ = annotated(tmp_path / "a", records=str(file), policy={"refuses": given[0].id})
    assert len(records) == 29 and all(r.first_error == first_wrong_of(r) for r in records)
    assert report["unreadable_rows"] == {"no step": 1} and report["unusable_prompts"] == 1
    records, report, _ = annotated(tmp_path / "b", "judge", records=str(file), prompts=7)
    assert [r.id for r in records] == [r.id for r in given[:7]]
    assert all(r.first_error == first_wrong_of(r) for r in records)


def test_what_cannot_be_labelled_is_counted_with_its_reason(tmp_path):
    """Half of the readings are nonsense, some solutions are empty, one question is refused."""
    policy = {"nonsense": 0.5, "blank": True, "refuses": "q3"}
    records, report, _ = annotated(tmp_path / "half", "judge", policy)
    assert len({r.meta["question_id"] for r in records}) == 4 == report["items"] and report["unusable_prompts"] == 1
    assert [q["reason"] for q in report["quarantined"]] == ["no step: the policy wrote nothing"] * 4
    assert report["cost"]["judge"]["unscored"] == report["cost"]["judge"]["completions"] / 2
    with pytest.raises(ValueError, match=r"no solution was labelled or kept; q0/0: no label could be made"):
        run_verb("annotate", recipe(tmp_path / "none", "judge", {"nonsense": 1.0}))
    report = json.loads((tmp_path / "none/out/report.json").read_text())
    assert report["records"] == 0 and len(report["quarantined"]) > 5
    _, report, _ = annotated(tmp_path / "mc", "monte_carlo", {"blank": True})
    assert [q["reason"].partition(":")[0] for q in report["quarantined"]] == ["no step"] * 5


def test_a_step_that_a_judge_would_misread_is_set_aside(tmp_path):
    prompts = Chains().prompts
    rows = [record_to_json(planted(p, 0)) for p in prompts]
    rows[1]["steps"][0]["text"] = "</paragraph_0> all right"
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, report, _ = annotated(tmp_path, "judge", records=str(tmp_path / "r.jsonl"))
    assert len(records) == 4 and [q["id"] for q in report["quarantined"]] == ["q1/0"]


def test_scan_without_a_verdict_leaves_out_and_counts(tmp_path):
    verifier = {"name": "test_jobs:unsure", "timeout_s": 0}
    plain, _, _ = annotated(tmp_path / "plain", verifier=verifier)
    unknown = sum(r.final_correct is None for r in plain)
    assert 0 < unknown < len(plain)
    records, report, _ = annotated(tmp_path / "scan", verifier=verifier, refine={"name": "scan", "eps": 0.1})
    assert report["refined"]["unverified"] >= unknown and len(records) == report["records"] > 0


BAD_RECIPES = [
    ({"method": {"name": "monte_calro"}}, "unknown annotation method 'monte_calro' .did you mean monte_carlo"),
    ({"method": {"name": "monte_carlo", "solution": 3}}, "method.solution=3 .did you mean solutions"),
    ({"method": {"name": "outcome", "solutions": 0}}, "method: solutions=0: input should be greater than 0"),
    ({"method": {"name": "judge", "ask": "critic"}}, "method.ask='critic': input should be 'first_error', 'critique' or 'reference'"),
    ({"method": {"name": "scorer", "scorer": "shapes_step"}}, "did you mean shapes_steps"),
    ({"method": {"name": "scorer", "scorer": "test_jobs:beyond"}}, "score 1.5 is no label in .0, 1.; give a threshold"),
    ({"label": {"name": "hard_gr"}}, "unknown label rule 'hard_gr' .did you mean hard_g"),
    ({"refine": {"name": "consensu"}}, "unknown refinement 'consensu' .did you mean consensus"),
    ({"refine": {"name": "consensus", "judge": {"name": "jugde"}}}, "unknown annotation method 'jugde' .did you mean judge"),
    ({"refine": {"name": "consensus", "judge": {"name": "omega"}}}, "'omega' samples completions; take one that reads"),
    ({"refine": {"name": "scan"}, "method": METHODS["judge"]}, "looks at Monte-Carlo counts"),
    ({"inject": {"kinds": ["percepton"]}}, "inject.kinds.0='percepton': input should be .*did you mean perception"),
    ({"records": "none.jsonl"}, "no file none.jsonl"),
    ({"records": "none.jsonl", "format": "visual_prm"}, "format 'visual_prm' .*did you mean visualprm"),
    ({"task": {"name": "test_jobs:Bare"}, "verifier": None}, "task.name='test_jobs:Bare' brings no reward"),
    ({"verifier": {"name": "test_jobs:left", "timeout_s": 0}}, "has no attribute 'left'"),
    ({"policy": {"name": "test_jobs:Chains"}}, "method.name='monte_carlo' needs the protocol Extender .*'test_jobs:Chains' does not have it; those that do: vision"),
    ({"metod": {}}, "unknown key metod={} .did you mean method"),
]  # fmt: skip


@pytest.mark.parametrize("sections, message", BAD_RECIPES, ids=str)
def test_wrong_recipes_are_told_before_anything_is_paid(tmp_path, sections, message):
    made = len(Writer.made)
    policy = sections.get("policy")
    file = recipe(
        tmp_path,
        sections.get("method", "monte_carlo"),
        policy,
        **{k: v for k, v in sections.items() if k not in ("method", "policy")},
    )
    with pytest.raises(ValueError, match=message):
        run_verb("annotate", file)
    paid = sum(w.completions for w in Writer.made[made:])
    assert paid == 0 or "beyond" in str(sections)


def test_one_opinion_needs_one_process(tmp_path, monkeypatch):
    """Two ranks would write into one file."""
    alone = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: alone)
    with pytest.raises(ValueError, match="method.name='judge' runs in one process, but 2 were started"):
        run_verb("annotate", recipe(tmp_path / "a", "judge"))
    with pytest.raises(ValueError, match="mmrl search runs in one process, but 2 were started"):
        run_verb("search", recipe(tmp_path / "s", {"name": "best_of_n"}))


@pytest.mark.multiproc
def test_two_ranks_make_the_records_of_one(tmp_path):
    sections = {"refine": {"name": "consensus"}, "inject": {"copies": 1}}
    _, want, _ = annotated(tmp_path / "one", **sections)
    run_ranks(2, "annotate", recipe(tmp_path / "two", **sections))
    one, two = ({r.id: r for r in read_records(tmp_path / n / "out/records.jsonl")[0]} for n in ("one", "two"))
    assert one == two
    got = json.loads((tmp_path / "two/out/report.json").read_text())
    for key in ("items", "records", "steps", "labels", "first_error", "refined", "injected"):
        assert got[key] == want[key], key
    assert got["cost"]["paid"] == want["cost"]["paid"]


# ---- search ----------------------------------------------------------------------------------------------------


def searched(folder, method=None, policy=None, **sections):
    policy = {"slips": 0.0, "fails": 0.3} | (policy or {})
    out = run_verb("search", recipe(folder, method or {"name": "best_of_n", "n": 8}, policy, **sections))
    rows = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    return json.loads((folder / "out/report.json").read_text()), rows, out


def test_a_perfect_scorer_finds_what_is_there_and_a_constant_one_the_first(tmp_path):
    aggregates = ["min", "last"]
    report, rows, out = searched(tmp_path / "perfect", scorer="test_jobs:truth", aggregates=aggregates)
    accuracy, over = report["accuracy"], report["over_majority"]
    assert [r["id"] for r in rows] == [f"e{i}" for i in range(5)]  # the held-out questions
    assert accuracy["best_of_n/min"] == accuracy["pass"] and accuracy["pass"]["mean"] > accuracy["random"]["mean"]
    for name in accuracy:
        assert over[name]["mean"] == pytest.approx(accuracy[name]["mean"] - accuracy["majority"]["mean"])
        assert over[name]["low"] <= over[name]["mean"] <= over[name]["high"]
    assert over["majority"] == {"mean": 0, "low": 0, "high": 0}
    assert "best_of_n/min" in out and f"{accuracy['pass']['mean']:.3f}" in out
    for scorer in ("test_jobs:constant", None):
        report, rows, _ = searched(tmp_path / str(scorer)[-8:], scorer=scorer, aggregates=aggregates)
        first = sum(r["candidates"][0]["correct"] for r in rows) / len(rows)
        assert {r["answer"] for r in rows} == {0} and report["accuracy"]["answer"]["mean"] == first
        assert report["accuracy"]["best_of_n/min"]["mean"] == first
    paid = Writer.made[-1].completions
    again, same, _ = searched(tmp_path / "None", scorer=None, aggregates=aggregates)
    assert paid > 0 == Writer.made[-1].completions and same == rows and again == report


@pytest.mark.parametrize("method", ["greedy", "beam", "dvts", "mcts"])
def test_a_guided_search_with_a_perfect_scorer_is_always_right(tmp_path, method):
    """Every step has a right proposal among four with probability 1 - .3^4."""
    sizes = {"beam": {"n": 8, "width": 4}, "dvts": {"n": 8, "width": 4}, "mcts": {"c": 0.1, "iterations": 60}}
    report, _, _ = searched(
        tmp_path, {"name": method, **sizes.get(method, {})}, scorer="test_jobs:truth", aggregates=["min"]
    )
    assert report["accuracy"]["answer"]["mean"] == 1 and report["curves"] is None


def test_an_empty_candidate_ranks_last_and_is_counted(tmp_path):
    policy = {"fails": 0.3, "blank": True, "refuses": "e1"}
    report, rows, _ = searched(tmp_path, {"name": "best_of_n", "n": 4}, policy, scorer="test_jobs:truth")
    empty = [r["candidates"][1] for r in rows]
    assert all(c["steps"] == [] and c["score"] is None and not c["correct"] for c in empty)
    assert all(r["answer"] != 1 for r in rows)
    assert report["unreadable_frac"] == 1 / 4 and report["unusable_prompts"] == 1 and report["prompts"] == 4


@pytest.mark.parametrize(
    "method, sections, message",
    [
        ({"name": "best_of_m"}, {}, "did you mean best_of_n"),
        ({"name": "best_of_n", "m": 3}, {}, "unknown key method.m=3; search 'best_of_n' takes n"),
        ({"name": "best_of_n", "n": "many"}, {}, "method.n='many'"),
        ({"name": "best_of_n"}, {"scorer": "vision_prn"}, "did you mean vision_prm"),
        ({"name": "best_of_n"}, {"scorer": "."}, "is no saved scorer .*step_format.json"),
        ({"name": "best_of_n"}, {"aggregates": ["minn"]}, "minn"),
        ({"name": "best_of_n"}, {"aggregates": []}, "at least 1 item"),
    ],
    ids=str,
)
def test_wrong_searches_are_told(tmp_path, method, sections, message):
    with pytest.raises(ValueError, match=message):
        searched(tmp_path, method, **sections)


def test_a_search_in_whose_folder_somebody_writes_is_refused(tmp_path):
    method = {"name": "best_of_n", "n": 4}
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ConfigError, match="another process writes into .*out;"):
        searched(tmp_path, method)
    assert searched(tmp_path, method)[1]


# ---- a scorer is a name, a folder or a section, everywhere -------------------------------------------------------


class Verdicts(Writer):
    """A judge of single steps: sure that a line with an even number of characters is right."""

    def choice_logps(self, states, choices):
        steps = [s.prompt.inputs["question"].split("\n\nIs the last")[0].split("\n\n")[-1] for s in states]
        return torch.tensor([[0.9, 0.1] if len(t) % 2 == 0 else [0.2, 0.8] for t in steps]).log()

    def save(self, folder, state_dict=None):
        Path(folder).mkdir(parents=True, exist_ok=True)


SECTION = {"name": "generative_prm", "policy": {"name": "test_jobs:Verdicts"}}


def even(text):
    return pytest.approx(0.9 if len(text.strip()) % 2 == 0 else 0.2)


def test_a_section_scores_searches_labels_and_is_measured(tmp_path, rows):
    file, out = tmp_path / "r.jsonl", tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run_verb(
        "score", "--scorer", yaml.safe_dump(SECTION, default_flow_style=True).strip(), "--data", file, "--out", out
    )
    for row, scored in zip(rows, map(json.loads, out.read_text().splitlines()), strict=True):
        assert scored["scores"] == [even(t["text"]) for t in row["steps"]]
    found, searched_rows, _ = searched(tmp_path / "search", scorer=SECTION)
    for row in searched_rows:
        for c in row["candidates"]:
            assert c["step_scores"] == [even(t) for t in c["steps"]]
    assert json.loads(found["about"]["scorer"])[0] == SECTION
    with pytest.raises(ValueError, match="holds another search"):
        searched(tmp_path / "search", scorer=SECTION | {"stop": True})
    records, _, _ = annotated(
        tmp_path / "label", {"name": "scorer", "scorer": SECTION, "threshold": 0.5, "solutions": 2}
    )
    assert all(r.labels == tuple(float(len(t) % 2 == 0) for t in r.texts) for r in records)
    data = tmp_path / "bench.jsonl"
    made = [{"id": str(i), "generator": "x", "problem": "1 +2", "steps": [t["text"] for t in r["steps"]], "label": -1,
             "final_answer_correct": True} for i, r in enumerate(rows[:4])]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, made)))
    text = yaml.safe_dump(SECTION, default_flow_style=True).strip()
    run_verb("bench", "processbench", "--data", data, "--scorer", text, "--out", tmp_path / "b.json")
    right = sum(all(len(t["text"]) % 2 == 0 for t in r["steps"]) for r in rows[:4]) / 4
    groups = json.loads((tmp_path / "b.json").read_text())["groups"]
    assert next(iter(groups.values()))["correct_acc"] == pytest.approx(100 * right)


@pytest.mark.parametrize(
    "scorer, message",
    [
        ({"name": "generative_prm", "polcy": {}}, "did you mean policy"),
        ({"name": "generative_prm", "policy": {"name": "visoin"}}, "did you mean vision"),
        ({"policy": {}}, "scorer needs a name"),
        ("none/there", "the folder does not exist"),
    ],
    ids=str,
)
def test_a_wrong_section_is_told_before_anything_is_loaded(tmp_path, scorer, message):
    made = len(Writer.made)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        searched(tmp_path, scorer=scorer)
    assert len(Writer.made) == made


# ---- score, and rows that cannot be used ------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """Forty good rows with pictures; a test breaks one."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    made = [planted(chain(f"q{i}", 2), i % 2 or None) for i in range(40)]
    out = [record_to_json(r) | {"images": ["a.png"]} for r in made]
    return [r | {"labels": [1.0] * (len(r["steps"]) - 1) + [0.0], "first_error": len(r["steps"]) - 1} for r in out]


def cut_png(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])


BAD_ROWS = [
    ({"labels": [1.0]}, "labels and steps differ: 1 labels for 3 steps"),
    ({"images": ["none.png"]}, "image missing: .*none.png is no file"),
    ({"images": ["cut.png"]}, "bad image: .*cut.png is no picture"),
    ({"steps": [], "labels": [], "first_error": None}, "no step"),
    ({"steps": ["a", " ", "b"]}, "empty step: step 1 of 3"),
    ({"question": " "}, "no question"),
    ({"labels": [1.0, 2.0, 0.0]}, "label outside .0, 1.: step 1"),
    ({"first_error": 7}, "first_error outside the steps"),
    ({"id": "q1/1"}, "id used twice"),
]


@pytest.mark.parametrize("change, reason", BAD_ROWS, ids=str)
def test_a_bad_row_is_set_aside_named_and_counted(tmp_path, rows, caplog, change, reason):
    cut_png(tmp_path)
    file, out = tmp_path / "r.jsonl", tmp_path / "scores" / "s.jsonl"
    rows[30] |= change
    file.write_text("\n".join(map(json.dumps, rows)))
    told = run_verb("score", "--scorer", "test_jobs:constant", "--data", file, "--out", out)
    assert "39 solutions, 0 unscored, 1 set aside" in told
    assert re.search(f"{file} line 31 set aside: {reason}", caplog.text)
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert [s["id"] for s in scores] == [r["id"] for r in (*rows[:30], *rows[31:])]
    assert all(s["scores"] == [0.5, 0.5, 0.5] for s in scores)
    task = StepRecords(str(file), str(file))
    (bad, _) = task.quarantined
    assert (bad.file, bad.row) == (str(file), 31) and re.match(reason, bad.reason)
    rows[29] |= change | ({"id": "q2/None"} if "id" in change else {})
    rows[28] |= change | ({"id": "q2/None"} if "id" in change else {})
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"3 of 40 rows are bad, more than max_bad=0.05; line 29: {reason}"):
        run_verb("score", "--scorer", "test_jobs:constant", "--data", file, "--out", out)


def test_rows_without_any_label_are_scored_but_not_trained_on(tmp_path, rows):
    rows[3] |= {"labels": [None] * 3, "first_error": None}
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert "40 solutions" in run_verb(
        "score", "--scorer", "test_jobs:constant", "--data", file, "--out", tmp_path / "s"
    )
    bad, _ = StepRecords(str(file), str(file)).quarantined
    assert bad.row == 4 and bad.reason.startswith("all labels null")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--scorer", "test_jobs:constant", "--data", "none.jsonl"), "no file none.jsonl"),
        (("--scorer", "implicit_prn", "--data", "{file}"), "did you mean implicit_prm"),
        (("--scorer", "{folder}", "--data", "{file}"), "is no saved scorer .*it needs step_format.json"),
        (("--scorer", "test_jobs:constant", "--data", "{file}", "--format", "record"), "did you mean records"),
        (("--scorer", "test_jobs:constant", "--data", "{file}", "--format", "trl"), "40 of 40 rows are bad"),
    ],
)
def test_wrong_files_and_names_are_told(tmp_path, rows, args, message):
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    args = [a.replace("{file}", str(file)).replace("{folder}", str(tmp_path)) for a in args]
    with pytest.raises(ValueError, match=message):
        run_verb("score", *args, "--out", tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="did you mean prmbench"):
        run_verb("bench", "prm_bench", "--data", file, "--scorer", "none")


# ---- trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_annotation_keeps_its_trees(tmp_path, method):
    """Outcomes at the ends; of a labeller that costs no completions, its labels as step rewards."""
    records, report, writer = annotated(tmp_path, method, rollouts=str(tmp_path / "trees"), policy={"fails": 0.3})
    rollouts = [Rollout.load(f) for f in sorted((tmp_path / "trees").glob("0*"))]
    assert sum(len(r.prompts) for r in rollouts) == 5
    made = sum(int(r.tree.is_leaf.sum()) for r in rollouts)
    judged = len(records) * JUDGE["votes"] if method in ("judge", "critique", "reference") else 0
    assert made == writer.completions - judged == report["cost"]["paid"]["completions"]
    if METHODS[method]["name"] in ("monte_carlo", "omega"):
        return
    labels = {}
    for record in records:
        for t, label in enumerate(record.labels):
            if label is not None:
                labels.setdefault(("q", *record.texts[: t + 1]), label)
    found = {}
    for rollout in rollouts:
        whole = []
        for v, p in enumerate(rollout.tree.parent.tolist()):
            whole.append((*(whole[p] if p >= 0 else ("q",)), rollout.texts[v].strip()))
            if not rollout.tree.step_reward[v].isnan():
                found[whole[v]] = float(rollout.tree.step_reward[v])
    assert found == labels


# ---- of a user's own, from a file beside the recipe --------------------------------------------------------------


OWN = '''
from mmrl.rollout import State
from mmrl.search.core import score_candidates, propose, result, side_by_side


@side_by_side
def retry(problem, prompt, *, enough: float = 0.9, tries: int = 8):
    """Whole solutions one by one until one scores `enough`."""
    found = []
    for _ in range(tries):
        (states,) = yield from propose([State(prompt)], 1, steps=None)
        found += yield from score_candidates(problem, states, "min")
        if found[-1].score >= enough or problem.spent(prompt):
            break
    return result(problem, prompt, found)


def by_length(most: int = 3):
    """Labels: a step is good where it has at most so many words."""
    return lambda records: [tuple(float(len(t.split()) <= most) for t in r.texts) for r in records]


def squared(values, power: int = 2):
    """The value to a power."""
    return tuple(None if v is None else v**power for v in values)
'''


def test_a_search_an_annotation_and_a_label_rule_of_ones_own(tmp_path):
    (tmp_path / "own_methods.py").write_text(OWN)
    policy = {"slips": 0.0, "fails": 0.3}
    method = {"name": "own_methods:retry", "tries": 20}
    report, rows, _ = searched(tmp_path, method, policy, scorer="test_jobs:truth", rollouts=str(tmp_path / "trees"))
    assert report["accuracy"]["answer"]["mean"] == 1 and {len(r["candidates"]) for r in rows} != {1}
    trees = [Rollout.load(f).tree for f in sorted((tmp_path / "trees").glob("0*"))]
    assert sum(t.num_groups for t in trees) == 5
    with pytest.raises(ValueError, match=r"unknown key method.tires=3 .did you mean tries"):
        searched(tmp_path, {"name": "own_methods:retry", "tires": 3}, policy)
    for folder, sections in (("rule", {"label": {"name": "own_methods:squared", "after": "keep", "power": 3}}),
                             ("own", {"method": {"name": "own_methods:by_length", "most": 4}})):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_methods.py").write_text(OWN)
        records, _, _ = annotated(tmp_path / folder, **sections)
        labels = [y for r in records for y in r.labels if y is not None]
        if folder == "rule":
            values = [c.correct / c.total for r in records for c in r.mc if c.total]
            assert labels == pytest.approx([v**3 for v in values]) and len(set(labels)) > 2
        else:
            assert labels == [float(len(t.split()) <= 4) for r in records for t in r.texts]

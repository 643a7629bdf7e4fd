import json
import math
from functools import partial

import pytest
import torch
from known_tree import KnownTree, complete_tree, is_best
from verbs import stored_rollouts

from mmrl.config import ConfigError, parse_config
from mmrl.credit import compose
from mmrl.reasoning.answers import ExactAnswer
from mmrl.reasoning.canonical import canonical_answer
from mmrl.registry import find, names
from mmrl.rewards.scoring import RewardError
from mmrl.rollout import Prompt
from mmrl.rollout_folder import RolloutFolder
from mmrl.search.budget import Budget
from mmrl.search.measures import measure
from mmrl.search.recipe import SearchConfig
from mmrl.search.run import search
from mmrl.tree_ops import backup

TREES = {str(i): complete_tree(3, 3, i) for i in range(6)}
PROMPTS = [Prompt(k, {"question": k}, {"answer": str(i % 4)}) for i, k in enumerate(TREES)]


def run(folder, prompts=PROMPTS, policy=None, verifier=None, **options):
    policy = policy or KnownTree(TREES, random=True)
    options = {"settings": {"n": 8}, "progress": False, "canonical": canonical_answer} | options
    return search(
        prompts, policy, options.pop("scorer", policy.score), verifier or ExactAnswer(), folder=folder, **options
    )


def without_time(rows):
    for row in rows:
        row["cost"] = {k: v for k, v in row["cost"].items() if not k.endswith("_s")}
    return rows


def lines(folder):
    return without_time([json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()])


def test_a_search_leaves_rows_and_a_report(tmp_path):
    report = run(tmp_path, prompt_tokens=lambda p: 7, budget=Budget(policy_params=5, prm_params=4))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    rows = lines(tmp_path)
    assert [r["id"] for r in rows] == [p.id for p in PROMPTS]
    first = rows[0]["candidates"][0]
    assert len(first["steps"]) == len(first["step_scores"]) == 3 and first["done"]
    assert first["correct"] == (first["answer"] == "0")
    correct = [[c["correct"] for c in r["candidates"]] for r in rows]
    accuracy = report["accuracy"]
    assert accuracy["random"]["mean"] == pytest.approx(sum(map(sum, correct)) / 48)
    assert accuracy["pass"]["mean"] == pytest.approx(sum(map(any, correct)) / 6)
    assert accuracy["answer"] == accuracy["best_of_n/min"]  # best-of-n's own aggregate
    assert all(a["low"] <= a["mean"] <= a["high"] for a in accuracy.values())
    assert accuracy["random"]["mean"] <= accuracy["pass"]["mean"]
    curves = report["curves"]
    assert curves["k"] == [1, 2, 4, 8] and curves["how"]["majority"] == "exact"
    for name in ("pass", "best_of_n/min", "best_of_n/last"):
        assert curves["values"][name][-1]["mean"] == pytest.approx(accuracy[name]["mean"])
    assert curves["values"]["weighted/min"][0]["mean"] == pytest.approx(accuracy["random"]["mean"], abs=0.1)
    cost = report["cost"]
    assert cost["generated_tokens"] == 6 * 8 * 30 and cost["prompt_tokens_cached"] == 42 and cost["prm_calls"] == 48
    assert cost["flops_cached"] == 2 * (5 * (cost["generated_tokens"] + 42) + 4 * cost["prm_tokens_cached"])


@pytest.mark.parametrize("method", names("searches"))
def test_every_method_runs(tmp_path, method):
    settings = {"pats": {"widths": [4, 2, 1], "temperatures": [1.0, None, None]}, "mcts": {"form": "uct"}}
    report = run(tmp_path, method=method, settings=settings.get(method, {}), prompts=PROMPTS[:2])
    assert (report["curves"] is None) == (method != "best_of_n")
    assert report["prompts"] == 2 and 0 <= report["accuracy"]["answer"]["mean"] <= report["accuracy"]["pass"]["mean"]


def test_a_search_that_was_cut_goes_on_with_the_same_numbers(tmp_path):
    whole = run(tmp_path / "whole", prompts_per_batch=2)
    cut = tmp_path / "cut"
    policy = KnownTree(TREES, random=True)

    def dies(states):
        if any(s.prompt.id == "4" for s in states):
            raise KeyboardInterrupt
        return policy.score(states)

    with pytest.raises(KeyboardInterrupt):
        run(cut, policy=policy, scorer=dies, prompts_per_batch=2)
    assert len(lines(cut)) == 4
    results = cut / "results.jsonl"
    results.write_text(results.read_text()[:-40])  # a kill inside the last line
    policy.calls.clear()
    resumed = run(cut, policy=policy, prompts_per_batch=3)
    assert policy.calls == [(3, 8)]
    assert lines(cut) == lines(tmp_path / "whole")
    assert resumed["accuracy"] == whole["accuracy"] and resumed["curves"] == whole["curves"]
    policy.calls.clear()
    run(cut, policy=policy)
    assert not policy.calls


def test_the_order_of_prompts_changes_nothing(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", prompts=PROMPTS[::-1], prompts_per_batch=4)
    for name, value in a["accuracy"].items():
        assert value == pytest.approx(b["accuracy"][name])
    assert lines(tmp_path / "a") == lines(tmp_path / "b")[::-1]


def test_perfect_and_constant_scorers(tmp_path):
    truth = {p.id: f"\\boxed{{{p.reference['answer']}}}" for p in PROMPTS}

    def perfect(states):
        return [[float(s.text.endswith(truth[s.prompt.id]))] * len(s.steps) for s in states]

    got = run(tmp_path / "perfect", scorer=perfect)["accuracy"]
    assert got["best_of_n/min"] == got["weighted/mean"] == got["pass"] == got["answer"]
    report = run(tmp_path / "constant", scorer=lambda states: [[0.5] * len(s.steps) for s in states])
    rows = lines(tmp_path / "constant")
    first = sum(r["candidates"][0]["correct"] for r in rows) / 6
    assert report["accuracy"]["best_of_n/last"]["mean"] == report["accuracy"]["answer"]["mean"] == pytest.approx(first)
    assert report["accuracy"]["weighted/min"] == report["accuracy"]["majority"]
    assert {r["answer"] for r in rows} == {0}


def test_negative_scores_leave_one_vote_out_and_say_so(tmp_path):
    report = run(tmp_path, aggregations=("min", "sum_logit"))
    assert report["left_out"] == ["wrf/sum_logit"]
    assert "wrf/min" in report["accuracy"] and "weighted/sum_logit" in report["accuracy"]


def test_verdicts_that_are_missing(tmp_path):
    def verifier(samples):
        return [None if s.prompt.id == "1" else 1.0 for s in samples]

    report = run(tmp_path / "few", verifier=verifier, max_unscored=0.2)
    assert report["unscored_frac"] == pytest.approx(1 / 6) and report["accuracy"]["pass"]["mean"] == pytest.approx(
        5 / 6
    )
    with pytest.raises(RewardError, match="17%.*limit 10%"):
        run(tmp_path / "many", verifier=verifier, max_unscored=0.1)
    assert not (tmp_path / "many" / "results.jsonl").exists()


def test_unfinished_candidates_rank_last_and_do_not_vote():
    def candidate(score, answer, correct, done):
        return {"steps": ["x"], "done": done, "step_scores": [score], "answer": answer, "correct": correct}

    row = {
        "id": "p",
        "answer": 1,
        "candidates": [candidate(0.9, None, False, False), candidate(0.1, "1", True, True)],
        "cost": {"generated_tokens": 3, "flops": None},
    }
    got = measure([row], aggregations=["last"], pool=False)
    assert got["accuracy"]["best_of_n/last"]["mean"] == got["accuracy"]["weighted/last"]["mean"] == 1
    assert got["unfinished_frac"] == got["unreadable_frac"] == 0.5 and got["cost"]["flops"] is None
    with pytest.raises(ValueError, match="no rows"):
        measure([], aggregations=["last"], pool=False)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"method": "baem"}, "did you mean beam"),
        ({"settings": {"with": 3}}, "unknown key method.with=3"),
        ({"method": "beam", "settings": {"widht": 3}}, "did you mean width"),
        ({"settings": {"n": "many"}}, "method.n='many'"),
        ({"method": "mcts", "settings": {"answer": "best"}}, "method.answer='best'"),
        ({"method": "greedy", "settings": {"rounds": 0}}, "at least 1 round"),
        ({"method": "mcts", "settings": {"iterations": 0}}, "iterations=0"),
        ({"aggregations": ["mni"]}, "did you mean min"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [PROMPTS[0]] * 2}, "occurs twice"),
    ],
)
def test_requests_that_cannot_run(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, **options)


def test_a_folder_holds_one_search(tmp_path):
    run(tmp_path, prompts=PROMPTS[:1])
    with pytest.raises(ValueError, match="holds another search: seed: 0 -> 1"):
        run(tmp_path, prompts=PROMPTS[:1], seed=1)
    with pytest.raises(ValueError, match="another question"):
        run(tmp_path, prompts=[Prompt(PROMPTS[0].id, {"question": "new"}, {"answer": "1"})])
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n" + results.read_text())
    with pytest.raises(ValueError, match="line 1"):
        run(tmp_path, prompts=PROMPTS[:1])


def test_paths_without_steps_never_win(tmp_path):
    """A policy that ends at once leaves a path without steps: score -inf, written as null."""
    report = run(tmp_path, policy=KnownTree({"0": {}}), prompts=PROMPTS[:1])
    (row,) = lines(tmp_path)
    assert row["candidates"][0]["score"] is None and report["accuracy"]["answer"]["mean"] == 0
    assert not math.isnan(report["accuracy"]["weighted/min"]["mean"])


# ---- the trees it keeps ---------------------------------------------------------------------------------------------


def flat(rollouts):
    """prompt -> (path of texts, outcome, value, visits) of its steps."""
    out = {}
    for r in rollouts:
        whole = []
        for v, p in enumerate(r.tree.parent.tolist()):
            whole.append((whole[p] if p >= 0 else ()) + (r.texts[v],))
            numbers = (r.tree.outcome[v], r.tree.value[v], r.tree.tags["visits"][v])
            row = (whole[v], *(None if math.isnan(x) else float(x) for x in numbers))
            out.setdefault(r.prompts[int(r.tree.group[v])].id, []).append(row)
    return out


@pytest.mark.parametrize("method", names("searches"))
def test_every_method_leaves_its_tree(tmp_path, method):
    """All candidates with their verdicts and scores, every prefix as often as it was proposed."""
    settings = {"n": 4} | ({"widths": [4, 2, 1]} if method == "pats" else {})
    settings = {k: v for k, v in settings.items() if k in {"pats": ("widths",), "step_co": ()}.get(method, ("n",))}
    run(tmp_path, method=method, settings=settings, rollouts=RolloutFolder(tmp_path / "trees", {"a": 1}))
    found = flat(stored_rollouts(tmp_path / "trees"))
    for row in lines(tmp_path):
        tree = {path: (outcome, value) for path, outcome, value, _ in found[row["id"]]}
        for c in row["candidates"]:
            outcome, value = tree[tuple(c["steps"])]
            assert outcome == (None if not c["done"] else float(c["correct"]))
            if method != "mcts":
                assert value == pytest.approx(c["score"])
        first = [visits for path, _, _, visits in found[row["id"]] if len(path) == 1]
        if method == "best_of_n":
            assert first == [1] * 4


def test_a_tree_search_by_hand_in_its_rollout(tmp_path):
    """The search of test_tree_search_by_hand: two visits of a, one of its end a1, one of b; unvisited steps keep the
    scorer's value and are compared with nothing."""
    tree = {"a ": (0.9, {"a1": (0.2, {}), "a2": (0.1, {})}), "b ": (0.5, {"b1": (0.6, {}), "b2": (0.4, {})})}
    folder = RolloutFolder(tmp_path / "trees", {})
    settings = {"c": 1.0, "n": 2, "iterations": 4}
    run(tmp_path, [Prompt("p", {"question": "?"}, {"answer": "1"})], KnownTree(tree), is_best(tree), method="mcts",
        settings=settings, rollouts=folder)  # fmt: skip
    (rollout,) = stored_rollouts(tmp_path / "trees")
    rows = {path[-1]: rest for path, *rest in flat([rollout])["p"]}
    assert rows == {
        "a ": [None, pytest.approx(0.55), 2], "a1": [0, pytest.approx(0.2), 1], "a2": [0, pytest.approx(0.1), 0],
        "b ": [None, pytest.approx(0.5), 1], "b1": [1, pytest.approx(0.6), 0], "b2": [0, pytest.approx(0.4), 0],
    }  # fmt: skip
    # the prompt: .7 when it was opened, then a .9, a1 .2, b .5
    assert rollout.tree.root_value.tolist() == pytest.approx([(0.7 + 0.9 + 0.2 + 0.5) / 4])
    advantage = dict(zip(rollout.texts, compose(rollout.tree, [{"name": "propa"}]).adv.tolist(), strict=True))
    assert advantage["a "] == pytest.approx(-advantage["b "]) and advantage["a "] > 0
    assert advantage["a1"] == advantage["a "]  # alone among its siblings, it inherits
    assert advantage["a2"] == advantage["b1"] == advantage["b2"] == 0


def test_without_a_scorer_a_tree_tells_outcomes(tmp_path):
    run(tmp_path, scorer=None, rollouts=RolloutFolder(tmp_path / "trees", {}))
    for rollout in stored_rollouts(tmp_path / "trees"):
        tree = rollout.tree
        assert bool(tree.value.isnan().all() and tree.step_reward.isnan().all())
        torch.testing.assert_close(tree.tags["q_sum"] / tree.tags["visits"], backup(tree))


def test_a_search_that_was_cut_keeps_the_same_trees(tmp_path):
    def go(name, **options):
        folder = RolloutFolder(tmp_path / name / "trees", {"seed": 0})
        return run(tmp_path / name, method="mcts", settings={"iterations": 9}, rollouts=folder, **options)

    go("whole", prompts_per_batch=2)
    policy = KnownTree(TREES, random=True)
    with pytest.raises(KeyboardInterrupt):
        go("cut", policy=policy, prompts_per_batch=2, scorer=Dies(policy, "4"))
    results = tmp_path / "cut" / "results.jsonl"
    results.write_text(results.read_text()[:-40])  # prompt 3 has a tree and no row any more
    go("cut", prompts_per_batch=3)
    assert flat(stored_rollouts(tmp_path / "cut/trees")) == flat(stored_rollouts(tmp_path / "whole/trees"))
    with pytest.raises(ValueError, match="holds rollouts of another recipe: seed: 0 -> 1"):
        RolloutFolder(tmp_path / "cut/trees", {"seed": 1})
    with pytest.raises(ValueError, match="6 prompts whose trees are not in .*other, the first: '0'"):
        run(
            tmp_path / "cut", method="mcts", settings={"iterations": 9}, rollouts=RolloutFolder(tmp_path / "other", {})
        )


class Dies:
    """A scorer that is interrupted at one prompt."""

    def __init__(self, policy, at):
        self.policy, self.at = policy, at

    def __call__(self, states):
        if any(s.prompt.id == self.at for s in states):
            raise KeyboardInterrupt
        return self.policy.score(states)


def first_letter(prompt, text):
    return text[:1]


def test_a_recipe_names_the_form_in_which_answers_are_equal():
    sections = {
        "policy": {"name": "vision"},
        "task": {"name": "shapes"},
        "method": {"name": "best_of_n"},
        "output": "o",
    }

    def form(name):
        config = parse_config(sections | {"answers": name}, model=SearchConfig)
        return partial(find("answer_forms", config.answers).target, PROMPTS[0])

    one, other = "\\boxed{0.50}", "so \\boxed{1/2}"
    assert form("stated")(one) == form("stated")(other) == "0.5"
    assert form("whole_text")(one) != form("whole_text")(other)
    assert form("test_search_run:first_letter")(other) == "s"
    with pytest.raises(ConfigError, match="did you mean stated"):
        form("sttated")

import json
import shutil
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import Command
from toy_extender import ToyExtender, chain, verify

from mmrl.config import ConfigError
from mmrl.reasoning.annotate.store import Completion, CompletionStore, Estimator, Tally, prefix_key
from mmrl.rewards.scoring import RewardError
from mmrl.rollout import Continuation, Prompt, State

DATA = Path(__file__).parents[2] / "data" / "annotate"  # of version 0.1
QUESTION = chain("q", 4)
RIGHT, WRONG, UNKNOWN = (
    Completion(Continuation((f"{c} \u2713\n", "end"), (), True), c, 3) for c in (True, False, None)
)


def test_tallies_add_up_and_unscored_completions_are_in_no_total(tmp_path):
    with CompletionStore(tmp_path / "store.sqlite") as store:
        store.add(State(QUESTION), [RIGHT, WRONG, UNKNOWN])
        store.add(State(QUESTION), [RIGHT])
        assert store.get(State(QUESTION)) == Tally(correct=2, total=3, drawn=4, tokens=12)
        assert store.get(State(QUESTION)).value == pytest.approx(2 / 3)
        assert store.completions(State(QUESTION)) == [RIGHT, WRONG, UNKNOWN, RIGHT]
        assert store.get(State(QUESTION, ("other\n",))) == Tally() and Tally().value is None
        assert store.spent == {"prefixes": 1, "completions": 4, "unscored": 1, "tokens": 12}


@pytest.mark.parametrize("correct, total, value", [(6, 8, 0.75), (5, 16, 0.3125), (0, 16, 0.0), (16, 16, 1.0)])
def test_worked_values(correct, total, value):
    assert Tally(correct, total, total).value == value


def test_a_store_read_again_knows_everything(tmp_path):
    file = tmp_path / "store.sqlite"
    with CompletionStore(file) as store:
        store.add(State(QUESTION), [RIGHT, WRONG])
    with CompletionStore(file) as store:
        assert store.get(State(QUESTION)).drawn == 2
        store.add(State(QUESTION), [UNKNOWN])
    with CompletionStore(file) as store:
        assert store.completions(State(QUESTION)) == [RIGHT, WRONG, UNKNOWN]


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[3])))
from test_store import QUESTION, RIGHT, UNKNOWN, WRONG
from mmrl.reasoning.annotate.store import CompletionStore
from mmrl.rollout import State
folder, name = Path(sys.argv[1]), sys.argv[2]
with CompletionStore(folder / "store.sqlite") as store:
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.01)
    for i in range(300):
        store.add(State(QUESTION, (f"shared {i}\\n",)), [RIGHT, WRONG], 0)
        store.add(State(QUESTION, (f"{name} {i}\\n",)), [UNKNOWN] * 3, 0)
    (folder / f"{name}.done").touch()
    if name == "dies":
        time.sleep(300)
"""


@pytest.mark.multiproc
def test_two_processes_write_one_store_and_one_is_killed(tmp_path):
    """Draws that both made count once, what either had added is there."""
    (tmp_path / "writer.py").write_text(WRITER)
    lives, dies = (
        Command(tmp_path / "writer.py", tmp_path, name, Path(__file__).parent) for name in ("lives", "dies")
    )
    while not (tmp_path / "dies.done").exists():
        assert dies.is_running(), dies.stderr
        time.sleep(0.01)
    dies.send_signal(signal.SIGKILL)
    assert lives.wait() == 0, lives.stderr
    dies.wait()
    with CompletionStore(tmp_path / "store.sqlite") as store:
        for i in range(300):
            assert store.completions(State(QUESTION, (f"shared {i}\n",))) == [RIGHT, WRONG]
            for name in ("lives", "dies"):
                assert store.get(State(QUESTION, (f"{name} {i}\n",))) == Tally(0, 0, 3, 9)
        assert store.spent == {"prefixes": 900, "completions": 2400, "unscored": 1800, "tokens": 300 * (2 * 3 + 2 * 9)}


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "store.jsonl").write_text('{"key": 1\n{}\n')
    with pytest.raises(ValueError, match=r"store.jsonl line 1 is broken"):
        CompletionStore(tmp_path / "store.sqlite")
    (tmp_path / "store.jsonl").unlink()
    CompletionStore(tmp_path / "store.sqlite").close()


@pytest.mark.parametrize(
    "content, message", [(b"no database" * 100, "not a database"), (None, "a later version of mmrl wrote it")]
)
def test_a_file_that_cannot_be_used_is_told(tmp_path, content, message):
    file = tmp_path / "store.sqlite"
    if content is None:
        CompletionStore(file).close()
        sqlite3.connect(file).execute("PRAGMA user_version = 2").connection.close()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"store.sqlite cannot be used: .*{message}"):
        CompletionStore(file)


def test_stores_of_the_ranks_of_an_earlier_version_are_taken_in(tmp_path):
    """Solutions with their texts, other prefixes without; half a line of one of them; the draws of both count once."""
    rows = []
    for rank in range(2):
        content = (DATA / f"store-{rank}.jsonl").read_bytes()
        (tmp_path / f"store-{rank}.jsonl").write_bytes(content + content[:50])
        rows += [json.loads(line) for line in content.splitlines()]
    shutil.copy(DATA / "store-1.jsonl", tmp_path / "store-2.jsonl")
    with CompletionStore(tmp_path / "store.sqlite") as store:
        assert store.spent["prefixes"] == len({row["key"] for row in rows})
        for number in ("completions", "tokens"):
            name = "drawn" if number == "completions" else number
            assert store.spent[number] == sum(row[name] for row in rows)
        for prompt in (chain(f"q{i}", 5) for i in range(4)):
            (row,) = [r for r in rows if r["key"] == prefix_key(State(prompt))]
            assert store.get(State(prompt)) == Tally(row["correct"], row["total"], row["drawn"], row["tokens"])
            kept = store.completions(State(prompt))
            assert [list(c.written.steps) for c in kept] == [entry[0] for entry in row["completions"]]
            state = State(prompt).then(kept[0].written).upto(1)
            assert store.get(state).drawn == 4
            with pytest.raises(ValueError, match="were not kept"):
                store.completions(state)


def test_draws_that_follow_on_none_are_left_out(tmp_path):
    row = json.loads((DATA / "store.jsonl").read_text().splitlines()[0])
    (tmp_path / "store-1.jsonl").write_text(json.dumps(row | {"start": 2}) + "\n")
    with CompletionStore(tmp_path / "store.sqlite") as store:
        assert store.get(State(chain("q0", 5))) == Tally()


def test_texts_are_kept_for_solutions_only_when_asked_so(tmp_path):
    with CompletionStore(tmp_path / "store.jsonl", keep=False) as store:
        store.add(State(QUESTION), [RIGHT])
        store.add(State(QUESTION, ("a\n",)), [RIGHT])
        assert store.completions(State(QUESTION)) == [RIGHT]
        with pytest.raises(ValueError, match="after 1 steps were not kept.*keep=True"):
            store.completions(State(QUESTION, ("a\n",)))


def test_the_key_is_the_content():
    state = State(QUESTION, ("a\n", "b\n"))
    same = State(Prompt("other id", QUESTION.inputs, QUESTION.reference | {"draws": 3}), ("a\nb\n",))
    assert prefix_key(state) == prefix_key(same)
    others = [
        replace(state, steps=("a\n",)),
        replace(state, prompt=Prompt("q", QUESTION.inputs, {"answer": "no"})),
        replace(state, prompt=Prompt("q", QUESTION.inputs | {"images": ["x.png"]}, QUESTION.reference)),
    ]
    assert len({prefix_key(state, "hot"), *(prefix_key(s) for s in (state, *others))}) == 5


def estimator(store, policy=None, **options):
    return Estimator(policy or ToyExtender(slips=0.5), verify, store, **options)


def test_no_completion_is_paid_twice(tmp_path):
    policy = ToyExtender(slips=0.5)
    states = [State(QUESTION), State(replace(QUESTION, id="twin")), State(chain("other", 3))]
    with CompletionStore(tmp_path / "store.sqlite") as store:
        asking = estimator(store, policy)
        first = asking.estimate(states, 4)
        assert [t.drawn for t in first] == [4, 4, 4] and first[0] == first[1] and policy.completions == 8
        assert asking.cost == {
            "calls": 1,
            "completions": 8,
            "unscored": 0,
            "tokens": store.spent["tokens"],
            "reused": 4,
        }
        assert asking.estimate(states[:1], 6)[0].drawn == 6 and policy.completions == 10
        assert asking.estimate(states, 4)[0].drawn == 6 and policy.completions == 10
    with CompletionStore(tmp_path / "store.sqlite") as store:
        again = estimator(store, policy)
        assert again.estimate(states, 4) == [Tally(3, 6, 6, first[0].tokens // 4 * 6)] * 2 + [first[2]]
        assert policy.completions == 10 and again.cost["calls"] == 0


def test_a_refill_draws_from_another_stream(tmp_path):
    seeds = []

    class Watching(ToyExtender):
        def extend(self, states, n, *, seed, **options):
            seeds.append((n, seed))
            return super().extend(states, n, seed=seed, **options)

    with CompletionStore(tmp_path / "store.sqlite") as store:
        asking = estimator(store, Watching(slips=0.5), seed=5)
        for k in (2, 4, 6):
            asking.estimate([State(QUESTION)], k)
    assert [n for n, _ in seeds] == [2, 2, 2] and len({s for _, s in seeds}) == 3


@pytest.mark.parametrize("batch, calls", [(1, 5), (2, 3), (5, 1), (64, 1)])
def test_prefixes_share_calls(tmp_path, batch, calls):
    policy = ToyExtender(slips=0.5)
    with CompletionStore(tmp_path / "store.sqlite") as store:
        tallies = estimator(store, policy, batch=batch).estimate([State(chain(f"q{i}", 3)) for i in range(5)], 2)
    assert policy.calls == calls and [t.correct for t in tallies] == [1] * 5


def test_unscored_completions_are_counted_and_stop_a_run_when_they_are_many(tmp_path):
    unclear = Prompt("unclear", QUESTION.inputs, {"answer": None})
    with CompletionStore(tmp_path / "store.sqlite") as store:
        asking = estimator(store)
        assert asking.estimate([State(unclear)], 8) == [Tally(0, 0, 8, store.spent["tokens"])]
        assert asking.cost["unscored"] == 8
        with pytest.raises(RewardError, match=r"100% of 300 completions .* prompt 'unclear'"):
            asking.estimate([State(unclear)], 300)
        assert store.get(State(unclear)).drawn == 8


@pytest.mark.parametrize(
    "values, want", [([0.5, 0.49, None], [True, False, None]), ([1, 0, float("nan")], [True, False, None])]
)
def test_half_is_correct_and_nan_is_no_verdict(tmp_path, values, want):
    with CompletionStore(tmp_path / "store.sqlite") as store:
        asking = Estimator(ToyExtender(), lambda samples: values, store)
        assert asking.verify([None] * 3) == want
        with pytest.raises(RewardError, match="returned 3 values for 2 samples"):
            asking.verify([None] * 2)


def test_misuse_is_refused(tmp_path):
    class Short(ToyExtender):
        def extend(self, states, n, **options):
            return super().extend(states, n - 1, **options)

    with CompletionStore(tmp_path / "store.sqlite") as store:
        with pytest.raises(ValueError, match="'q': a solution that has ended"):
            estimator(store).estimate([State(QUESTION, ("answer: 1",), done=True)], 2)
        with pytest.raises(ValueError, match="k=0"):
            estimator(store).estimate([State(QUESTION)], 0)
        with pytest.raises(ValueError, match="batch=0"):
            estimator(store, batch=0)
        with pytest.raises(ValueError, match=r"returned \[1\] continuations for 1 states; 2 were asked"):
            estimator(store, Short()).estimate([State(QUESTION)], 2)


def test_rows_can_be_read_by_people(tmp_path):
    with CompletionStore(tmp_path / "store.sqlite") as store:
        store.add(State(QUESTION, ("a\n",)), [RIGHT])
        store.export(tmp_path / "store.jsonl")
    row = json.loads((tmp_path / "store.jsonl").read_text())
    assert (
        row["prompt"] == "q"
        and row["after"] == 1
        and row["completions"] == [[["True \u2713\n", "end"], True, 3, False]]
    )


def test_sampled_tokens_and_log_probs_are_kept_to_the_last_bit(tmp_path):
    logps = tuple(tuple(torch.rand(n).log().tolist()) for n in (2, 1))
    written = Continuation(("a\n", "b"), logps, True, True, ((5, 7), (1,)))
    with CompletionStore(tmp_path / "store.sqlite") as store:
        store.add(State(QUESTION), [Completion(written, True, 3), RIGHT])
        (back, other) = store.completions(State(QUESTION))
    assert back.written.ids == written.ids and back.written.truncated and other == RIGHT
    for got, want in zip(back.written.logps, logps, strict=True):
        assert torch.equal(torch.tensor(got), torch.tensor(want))

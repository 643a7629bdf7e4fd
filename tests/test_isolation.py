import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import foreign_rewards
import numpy as np
import pytest
import torch
from tiny import recipe

from mmrl.config import ConfigError, parse_config
from mmrl.registry import ComponentError
from mmrl.rewards import Isolated, RewardError, score
from mmrl.rewards.isolation import _make_reward
from mmrl.rollout import Prompt, Sample
from mmrl.task import build_rewards
from mmrl.worker import Worker, WorkerError, WorkerStartError, dumps

TESTS = Path(__file__).parent


def samples(*outputs):
    return [Sample(Prompt(f"p{i}", {}), output, i) for i, output in enumerate(outputs)]


def isolated(name, timeout_s=60.0, **options):
    return Isolated(f"foreign_rewards:{name}", options, timeout_s, section="rewards.0")


@pytest.fixture(scope="module")
def by_output():
    reward = isolated("by_output", timeout_s=0.5)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def by_first_output():
    reward = isolated("by_first_output")
    yield reward
    reward.close()


def is_running(pid):
    """False for a process that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ---- failures -------------------------------------------------------------------------------------------------------


def test_the_process_persists_and_scores(by_output):
    assert by_output(samples("a", "bb", "print")) == [1.0, 2.0, 5.0]
    starts = by_output._worker.starts
    assert by_output(samples()) == [] and by_output(samples("ccc")) == [3.0]
    assert by_output._worker.starts == starts


@pytest.mark.parametrize(
    "bad, kind, message",
    [
        ("loop", "timeout", "no answer within 0.5 s"),
        ("loop in C", "timeout", "no answer within 0.5 s"),
        ("os._exit", "crash", "ended with exit status 3"),
        ("segfault", "crash", "was ended by SIGSEGV"),
        ("sys.exit", "error", "SystemExit: 4"),
        ("raise", "error", "KeyError: 'answer'"),
    ],
)
def test_only_the_bad_sample_goes_unscored(by_output, caplog, bad, kind, message):
    before, starts = by_output.failures[kind], by_output._worker.starts
    assert by_output(samples("a", bad, "ccc")) == [1.0, None, 3.0]
    assert by_output.failures[kind] == before + 1
    assert message in by_output.last_error
    assert f"left 1 of 3 samples unscored: 'p1' ({kind})" in caplog.text
    # the batch fails and so does the bad sample alone
    assert by_output(samples("a")) == [1.0] and by_output.last_error is None
    assert by_output._worker.starts == starts + (0 if kind == "error" else 2)
    assert by_output._worker.builds == 1


def test_a_crash_among_many_costs_two_workers_and_no_start_of_python(by_output):
    before = by_output._worker.starts
    outputs = ["x"] * 16
    outputs[11] = "os._exit"
    values = by_output(samples(*outputs))
    assert values == [None if i == 11 else 1.0 for i in range(16)]
    assert by_output(samples("x")) == [1.0]
    assert by_output._worker.starts - before == 2  # batches of 16 and 1 died
    assert by_output._worker.builds == 1


def test_many_bad_samples_end_after_a_bounded_number_of_limits():
    reward = isolated("by_output", timeout_s=0.05)
    assert reward(samples(*["loop"] * 8)) == [None] * 8
    # 2 (3 + 1) limits: the batch of 8 and seven samples fail, one is left
    assert reward.failures == {"timeout": 7, "skipped": 1} and reward._worker.starts == 8


def test_a_value_that_is_no_number_is_named_as_in_process(by_output):
    with pytest.raises(RewardError, match="sample 1 got .*object object at.*, which is no number"):
        score(samples("a", "object"), {"r": (by_output, 1.0)})


@pytest.mark.parametrize(
    "first, message",
    [
        ("one value", "reward 'foreign_rewards:by_first_output' returned 1 values for 2 samples"),
        ("no sequence", "reward 'foreign_rewards:by_first_output': it returned a float, 1.0"),
        ("unpicklable", "sample 0 got .*<function by_first_output"),
    ],
)
def test_broken_contracts_stop_as_in_process(by_first_output, first, message):
    with pytest.raises(RewardError, match=message):
        score(samples(first, "bb"), {"r": (by_first_output, 1.0)})


def test_a_failure_that_no_sample_is_to_blame_for_loses_nothing(by_first_output):
    assert by_first_output(samples(*"abcdefg")) == [1.0] * 7


def test_system_exit_in_process_leaves_samples_unscored():
    scored = score(samples("sys.exit"), {"r": (foreign_rewards.by_output, 1.0)}, max_unscored=1.0)
    assert scored.unscored == {"r": 1}


# ---- making ---------------------------------------------------------------------------------------------------------


def test_options_and_the_time_to_load():
    reward = isolated("Scaled", timeout_s=0.4, factor=2.0, wait_s=0.5)  # loading is not on the clock of a batch
    assert reward(samples("abc")) == [6.0]


def test_torch_is_imported_for_tensors_alone_and_not_on_the_clock():
    texts = isolated("by_output")
    assert texts(samples("torch")) == [0.0]
    # importing takes longer than this limit; one thread, and each sample arrives without its neighbours
    reward = Isolated(foreign_rewards.Torchlike(3.0), timeout_s=1.0)
    batch = torch.zeros(1000, 100)
    assert reward(samples(batch[0], batch[1])) == [3.0 * 100, 3.0 * 100]  # elements that arrived, times 3
    reward.close()


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("Scaled", {"factr": 2}, ComponentError, r"rewards.0.factr=2 \(did you mean factor\?\)"),
        ("nothing", {}, ComponentError, "has no attribute 'nothing'"),
        ("Broken", {}, WorkerStartError, "did not start: RuntimeError: no weights here"),
    ],
)
def test_a_reward_that_cannot_be_made_is_an_error_at_once(name, options, error, message):
    with pytest.raises(error, match=message):
        isolated(name, **options)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="timeout_s=0 must be above 0"):
        Isolated("foreign_rewards:by_output", timeout_s=0)
    with pytest.raises(ValueError, match="cannot be sent to a worker process"):
        Isolated(lambda s: [0.0 for _ in s])


@pytest.mark.parametrize(
    "entry, isolated, timeout_s",
    [
        ({"name": "foreign_rewards:by_output"}, True, 60.0),
        ({"name": "foreign_rewards:by_output", "timeout_s": 5}, True, 5.0),
        ({"name": "foreign_rewards:by_output", "timeout_s": 0}, False, None),
        ({"name": "legible_symmetric", "timeout_s": 0}, False, None),
    ],
)
def test_recipes_choose_the_process(entry, isolated, timeout_s, monkeypatch):
    if entry["name"] == "legible_symmetric":
        monkeypatch.setattr("mmrl.task.build", lambda *a: foreign_rewards.by_output)
    rewards = build_rewards(parse_config(recipe(Path("model"), Path("run"), rewards=[entry])), None)
    reward, weight = rewards[entry["name"]]
    assert weight == 1.0 and isinstance(reward, Isolated) == isolated
    if isolated:
        assert reward.timeout_s == timeout_s
        reward.close()


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match="rewards.0.timeout_s=-1"):
        parse_config(recipe(Path("model"), Path("run"), rewards=[{"name": "tiny:constant", "timeout_s": -1}]))


# ---- the process ----------------------------------------------------------------------------------------------------


def test_another_process_that_closes_and_comes_back(by_first_output):
    pid = by_first_output._worker.pid
    assert by_first_output(samples("pid")) == [pid] and pid != os.getpid()
    by_first_output.close()
    assert not is_running(pid) and by_first_output._worker.pid is None
    (again,) = by_first_output(samples("pid"))
    assert again not in (pid, os.getpid()) and by_first_output(samples("pid")) == [again]


def test_an_idle_worker_that_died_is_replaced():
    reward = isolated("by_output")
    os.kill(reward._worker.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(reward._worker.pid))
    assert reward(samples("a")) == [1.0] and not reward.failures


def test_dropped_without_close():
    reward = isolated("by_output")
    pid = reward._worker.pid
    del reward
    assert not is_running(pid)


def test_tensors_travel_alone():
    """A slice of a batch of 1000 must not take the other 999 along."""
    batch = torch.zeros(1000, 100, requires_grad=True)
    views = samples(batch[0], batch[1])
    assert len(dumps(views)) < 4000
    assert len(pickle.dumps(samples(batch.detach()[0]))) > 400_000


def test_what_a_reward_started_dies_with_it(tmp_path):
    file = tmp_path / "pid"
    assert isolated("with_child", timeout_s=1.0)(samples(str(file))) == [None]
    assert wait_until(lambda: not is_running(int(file.read_text())))


@pytest.mark.parametrize("ending", ["hang", "exit", "return"])
@pytest.mark.parametrize("threaded", [False, True], ids=["forked", "unforkable"])
def test_daemons_that_a_reward_started_die_with_it(tmp_path, ending, threaded):
    """In sessions of their own, one of them an orphan that holds the worker's socket."""
    name, options = ("Threaded", {"of": "with_daemons"}) if threaded else ("with_daemons", {})
    reward = isolated(name, timeout_s=1.5, **options)
    file = tmp_path / "pids"
    values = reward(samples((file, ending)))
    assert values == [1.0 if ending == "return" else None]
    assert reward.failures == {"hang": {"timeout": 1}, "exit": {"crash": 1}, "return": {}}[ending]
    pids = [int(pid) for pid in file.read_text().split()]
    assert len(pids) == 2
    if ending == "return":
        assert all(map(is_running, pids))
        reward.close()
    assert not any(map(is_running, pids))
    reward.close()


def test_what_cannot_be_forked_is_built_anew():
    reward = isolated("Threaded")
    assert reward(samples("a", "os._exit", "ccc")) == [1.0, None, 3.0]
    assert reward._worker.builds == reward._worker.starts == 3
    reward.close()


def test_a_module_that_a_lost_worker_imported_is_there_at_the_next_start():
    """Only the fork that died imported numpy, for the array in its batch."""
    reward = isolated("by_output")
    assert reward(samples(np.ones(3), "os._exit", "numpy")) == [3.0, None, 1.0]
    reward.close()


def test_without_memory_the_worker_is_ended_before_the_program():
    reward = isolated("by_output")
    assert Path(f"/proc/{reward._worker.pid}/oom_score_adj").read_text() == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"
    reward.close()


def test_a_worker_that_leaks_is_replaced(caplog):
    worker = Worker(partial(_make_reward, "foreign_rewards:Leaks", {}, "rewards.0"), max_growth=50 * 2**20)
    calls = [worker.call(samples(20), 60.0)[0] for _ in range(6)]
    # at the fourth it has grown by 60 MiB since the first
    assert calls == [[1.0], [2.0], [3.0], [4.0], [1.0], [2.0]]
    assert worker.starts == 2 and worker.builds == 1 and "is replaced" in caplog.text
    worker.close()


def test_a_keeper_that_is_killed_takes_the_worker_along_and_is_replaced():
    reward = isolated("by_output")
    pid = reward._worker.pid
    reward._worker._keeper.kill()
    assert wait_until(lambda: not is_running(pid))
    assert reward(samples("a")) == [1.0] and not reward.failures
    reward.close()


def test_busy_neighbours_decide_nothing():
    """Four processes share one processor, so .4 s of it take 1.6 s on the clock; the limit is .8 s."""
    reward = isolated("computes", timeout_s=0.8)
    spin = (
        "import os, signal; signal.alarm(120); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print('spins', flush=True)\n"
        "while True: pass"
    )
    # In sessions of their own: Linux shares a processor among sessions first.
    neighbours = [
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(3)
    ]
    try:
        for neighbour in neighbours:
            neighbour.stdout.readline()
        began = time.monotonic()
        assert reward(samples(0.2, 0.2)) == [1.0, 1.0] and not reward.failures
        assert time.monotonic() - began > 0.8
        assert reward(samples(60.0)) == [None] and reward.failures == {"timeout": 1}
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
        reward.close()


def test_samples_that_are_compared_are_tried_together():
    reward = isolated("Ranks")
    batch = [Sample(Prompt(f"p{i % 4}", {}), "bad" if i == 6 else "x", i) for i in range(12)]
    assert reward(batch) == [None if i % 4 == 2 else float(i) for i in range(12)]
    assert reward.failures == {"crash": 3} and reward._worker.starts == 3
    reward.close()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans(ending, tmp_path):
    """The parent is stopped while its worker is in an endless loop. Its script has no main guard, on purpose."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys; sys.path[:0] = sys.argv[1:]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background\n"
        "from functools import partial\n"
        "from types import SimpleNamespace\n"
        "from mmrl.rewards.isolation import _make_reward\n"
        "from mmrl.worker import Worker\n"
        "worker = Worker(partial(_make_reward, 'foreign_rewards:by_output', {}, 'rewards.0'))\n"
        "worker.start()\n"
        "print(worker.pid, flush=True)\n"
        "worker.call([SimpleNamespace(output='loop')], 60.0)\n"
    )
    paths = [str(TESTS), str(TESTS.parent)]
    parent = subprocess.Popen(
        [sys.executable, script, *paths], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(pid)
    parent.send_signal(ending)
    parent.wait(10)
    parent.stdout.close()
    assert wait_until(lambda: not is_running(pid), 5)


def test_a_worker_takes_any_function():
    worker = Worker(foreign_rewards.doubler)
    assert worker.call([1, 2], 5.0) == ([2, 4], [])
    with pytest.raises(WorkerError, match="TypeError") as caught:
        worker.call([None], 5.0)
    assert caught.value.kind == "error" and "Traceback" in caught.value.trace
    worker.close()

"""Rewards that misbehave, for worker processes; the output of a sample says how. Starts fast: no torch up here."""

import ctypes
import os
import subprocess
import sys
import threading
import time


def by_output(samples):
    return [_one(s.output) for s in samples]


def _one(output):
    if not isinstance(output, str):
        return len(output)
    if output == "loop":
        while True:
            pass
    if output == "loop in C":
        return 9**9**9
    if output == "os._exit":
        os._exit(3)
    if output == "segfault":
        ctypes.string_at(0)
    if output == "sys.exit":
        sys.exit(4)
    if output == "raise":
        raise KeyError("answer")
    if output == "print":
        sys.stdout.write("to nobody\n")
    if output in ("torch", "numpy"):
        return output in sys.modules
    return object() if output == "object" else len(output)


def by_first_output(samples):
    """Breaks the contract for the whole batch, as the first sample says."""
    if samples[0].output == "one value":
        return [0.0]
    if samples[0].output == "no sequence":
        return 1.0
    if samples[0].output == "unpicklable":
        return [lambda: 0.0 for _ in samples]
    if samples[0].output == "pid":
        return [os.getpid()] * len(samples)
    if len(samples) > 2:
        raise MemoryError("batch too large")
    return [1.0] * len(samples)


def stated(samples):
    """The answer that the first sample holds."""
    return samples[0].output


def with_daemons(samples):
    """Leaves two processes in sessions of their own behind, writes their pids, then ends as the output says."""
    path, ending = samples[0].output
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    source, sink = os.pipe()
    if not os.fork():
        os.setsid()
        daemon = os.fork()
        if daemon:
            os.write(sink, str(daemon).encode())
            os._exit(0)
        time.sleep(60)
    with open(path, "w") as f:
        f.write(f"{child.pid} {os.read(source, 99).decode()}")
    if ending == "hang":
        time.sleep(60)
    if ending == "exit":
        os._exit(3)
    return [1.0] * len(samples)


def computes(samples):
    """Takes as many seconds of CPU 0 as each output says."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for sample in samples:
        end = time.process_time() + sample.output
        while time.process_time() < end:
            pass
    return [1.0] * len(samples)


class Leaks:
    """Keeps as many MiB at every call as the first output says; returns the number of calls."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def __call__(self, samples):
        self.kept.append(os.urandom(samples[0].output << 20))
        return [float(len(self.kept))] * len(samples)


class Threaded:
    """Has a thread from the beginning, so its process cannot be forked; otherwise the reward of that name here."""

    def __init__(self, of: str = "by_output") -> None:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        self.reward = globals()[of]

    def __call__(self, samples):
        return self.reward(samples)


class Ranks:
    """The place of each sample in its prompt's group, which must be whole; exits on the output "bad"."""

    compares_samples = True

    def __call__(self, samples):
        for prompt in {s.prompt.id for s in samples}:
            assert sum(s.prompt.id == prompt for s in samples) == 3
        if any(s.output == "bad" for s in samples):
            os._exit(3)
        return [float(s.step) for s in samples]


def with_child(samples):
    """Leaves a child of its own behind and hangs; its pid goes into the file that the output names."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(samples[0].output, "w") as f:
        f.write(str(child.pid))
    time.sleep(60)


def exits_on_q0(samples):
    """Takes its process with it for one prompt."""
    if any(s.prompt.id == "q0" for s in samples):
        os._exit(3)
    return [len(s.output) for s in samples]


class Scaled:
    def __init__(self, factor: float = 1.0, wait_s: float = 0.0) -> None:
        time.sleep(wait_s)
        self.factor = factor

    def __call__(self, samples):
        return [self.factor * len(s.output) for s in samples]


class Torchlike:
    """Elements in the storage of each tensor, times a factor and times the number of threads."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, samples):
        import torch

        return [self.factor * torch.get_num_threads() * s.output.untyped_storage().nbytes() / 4 for s in samples]


class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no weights here")


def looping_verifier(pairs):
    out = []
    for reference, answer in pairs:
        while "loop" in answer:
            pass
        if "crash" in answer:
            os._exit(1)
        if "raise" in answer:
            raise ValueError("cannot parse")
        out.append(float(reference) == float(answer))
    return out


def doubler():
    return _double


def _double(batch):
    return [2 * x for x in batch], []

"""vLLM as the engine that grows trees: in the trainer's process, or a `vllm serve` process reached over HTTP.

A path of the tree is one request: the prompt's ids with one placeholder per picture, then the sampled ids. vLLM
expands the placeholders, finds the shared prefix in its block cache and encodes each picture once. Below the last fork
a path is one request to its end; above it every step is a request that stops at the tokens which may end a step, so
no token is sampled in vain and none is ever decoded and tokenised again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrl.rollout import BranchPlan
from mmrl.seeding import named_generator
from vision.growth import Decoding, Node, PromptTokens
from vision.prompts import tokenise
from vision.step_rule import StepRule
from vision.vllm_backends import Backend, Call, InProcess, Reply, Server

_NEVER = -1e9  # added to a banned logit: its probability is exactly 0 in float32, and JSON can carry it


@dataclass
class _Bud:
    """A node that is being written. path: ids before it, after the prompt. slot: its first leaf's number."""

    node: int
    path: list[int]
    slot: int
    fresh: int  # children to sample at this place: the fork's factor, or 1 for a node that goes on


class VllmEngine:
    """Grows trees with vLLM, with weights that follow the trainer's.

    counts: what the last `grow` took: requests, sampled tokens, prompt tokens and how many of them were cached.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.counts: Counter[str] = Counter()

    @classmethod
    def in_process(
        cls,
        folder: str | Path,
        *,
        max_model_len: int,
        gpu_memory_utilization: float = 0.4,
        enable_sleep: bool = True,
        lora_rank: int = 0,
        dtype: str = "bfloat16",
        seed: int = 0,
        films: bool = False,
    ) -> VllmEngine:
        """An engine on this process' own device, from a model folder; it starts when it is first used.

        Under a launcher with several ranks every rank has its own, and the process group must exist by the first use.

        Args:
            max_model_len: longest prompt plus completion, tokens.
            gpu_memory_utilization: (0, 1), share of the device that vLLM may use (on the CPU: of the memory, for its
                cache alone). The trainer needs the rest, unless the engine sleeps while it works.
            enable_sleep: make `sleep` possible (GPU; on a CPU vLLM accepts and ignores it).
            lora_rank: above 0, weights follow by `sync_lora`; adapters up to this rank.
            dtype: float32, bfloat16 or float16, whatever the folder says.
            films: keep room for a film as long as `max_model_len` allows; without, for the largest picture.

        Raises:
            ImportError: vLLM is not installed.
        """
        share = gpu_memory_utilization
        return cls(InProcess(folder, max_model_len, share, enable_sleep, lora_rank, dtype, seed, films))

    @classmethod
    def server(
        cls, url: str, *, folder: str | Path, exchange: str | Path | None = None, timeout_s: float = 600.0
    ) -> VllmEngine:
        """A running `vllm serve` (docs/vllm.md has the command line).

        Args:
            url: e.g. http://127.0.0.1:8000.
            folder: the served model; its tokenizer is read here.
            exchange: a folder that both sides see; `sync` writes the weights below it.
            timeout_s: of one HTTP call.

        Raises:
            ConnectionError: no server answers there. RuntimeError: it was started without what training needs.
        """
        return cls(Server(url, folder, exchange, timeout_s))

    def grow(
        self,
        prompts: Sequence[PromptTokens],
        plan: BranchPlan,
        decoding: Decoding,
        rule: StepRule,
        seeds: Sequence[int],
    ) -> list[Node]:
        """Sample the tree of every prompt; the same nodes and ends as vision.decode.grow makes, other random numbers.

        `logp` are those of the sampling distribution (temperature applied, banned ids removed); nothing is truncated,
        top-p and top-k stay off. A path's tokens depend on its prompt's seed alone, up to floating-point differences
        between batches.

        Raises:
            ValueError: a prompt that leaves no room for `max_new_tokens`, a fork at temperature 0, a temperature vLLM
                would change silently, or a prompt that vLLM expands to other tokens than our processor.
            RuntimeError: a log-prob that is not finite.
        """
        self.begin(prompts, plan, decoding)
        return _Growth(self, prompts, plan, decoding, rule, seeds).run()

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights: (name, tensor) as in the transformers model's `state_dict().items()`.

        Every cache that depends on weights is emptied. What is left out keeps its value, so a frozen image encoder
        need not be sent; leave out whole layers only, vLLM fuses the matrices inside of one. With several ranks and
        one server, one rank calls this while the others wait.

        Raises:
            ValueError: a name the model does not have. RuntimeError: the engine was made for adapters (`lora_rank`).
        """
        self.backend.load(weights)

    def sync_lora(self, folder: str | Path) -> None:
        """Use the PEFT adapter in `folder` (as `save_pretrained` wrote it) from now on, in place of the last one."""
        self.backend.load_adapter(Path(folder))

    def sleep(self) -> None:
        """Give the device's memory back: weights to the host, cache dropped. Wake before `grow` and `sync`.

        Nothing happens where there is nothing to give back: not started yet, asleep, a server without sleep mode.
        """
        self.backend.sleep()

    def wake(self) -> None:
        """Undo `sleep`; awake, nothing happens."""
        self.backend.wake()

    def close(self) -> None:
        """Stop an engine of this process; a server runs on."""
        self.backend.close()

    def begin(self, prompts: Sequence[PromptTokens], plan: BranchPlan, d: Decoding) -> None:
        """Refuse what vLLM would change silently, and begin `counts` anew."""
        for i, prompt in enumerate(prompts):
            self.check_room(f"prompt {i}", len(prompt.ids), d.max_new_tokens)
        if d.temperature == 0 and plan.splits:
            raise ValueError("temperature 0 makes all children of a fork equal; sample with one above 0")
        if 0 < d.temperature < 0.01 or d.temperature > 2:
            raise ValueError(f"temperature={d.temperature}: vLLM samples at 0 or between 0.01 and 2")
        self.counts = Counter()

    def check_room(self, what: str, length: int, new: int) -> None:
        """Raise ValueError unless `new` tokens fit behind `length` ones: vLLM would sample fewer."""
        if length + new > self.backend.max_model_len:
            raise ValueError(
                f"{what} has {length} tokens; with {new} new ones it exceeds the engine's "
                f"max_model_len={self.backend.max_model_len}. Raise that, or show less"
            )

    def account(self, prompt: int, want: Sequence[int], reply: Reply) -> None:
        """Compare what vLLM saw with the tokens we train on, and count."""
        if reply.prompt != want:
            at = next((i for i, (a, b) in enumerate(zip(reply.prompt, want, strict=False)) if a != b), "the end")
            raise ValueError(
                f"prompt {prompt}: vLLM sees {len(reply.prompt)} tokens, our processor made {len(want)}; they "
                f"differ from position {at}. Serve the same folder (tokenizer, processor, pixel limits) as is trained"
            )
        if not all(ids for ids, _ in reply.samples):
            raise RuntimeError(f"prompt {prompt}: vLLM returned a sample without tokens, so it was aborted")
        if not all(math.isfinite(lp) and lp > -9999 for _, logp in reply.samples for lp in logp):
            raise RuntimeError("vLLM returned a log-prob that is not finite: its weights or logits overflow")
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(want)
        self.counts["cached_tokens"] += reply.cached
        self.counts["sampled_tokens"] += sum(len(ids) for ids, _ in reply.samples)


def sampling(d: Decoding, stop: Sequence[int], seed: int, *, n: int, max_tokens: int) -> dict[str, Any]:
    """SamplingParams by name: `n` samples of the untruncated distribution, each to its first id of `stop`."""
    told: dict[str, Any] = {
        "n": n, "temperature": d.temperature, "max_tokens": max_tokens, "logprobs": 0,
        "stop_token_ids": list(stop), "ignore_eos": True, "detokenize": False,  # ends are ours: `stop` names them all
    }  # fmt: skip
    if d.banned:
        told["logit_bias"] = dict.fromkeys(d.banned, _NEVER)
    if d.temperature > 0:  # sample i of n draws from seed + i
        told["seed"] = seed
    return told


class _Growth:
    """One call of `grow`: rounds of requests until no node is open."""

    def __init__(
        self, engine: VllmEngine, prompts: Sequence[PromptTokens], plan: BranchPlan,
        decoding: Decoding, rule: StepRule, seeds: Sequence[int],
    ) -> None:  # fmt: skip
        self.engine, self.prompts, self.plan = engine, prompts, plan
        self.decoding, self.rule, self.seeds = decoding, rule, seeds
        self.nodes: list[Node] = []
        self.step_ids = rule.candidates.nonzero().flatten().tolist()
        self.may_end = frozenset(self.step_ids)
        self.eos = frozenset(decoding.eos)
        self.last_fork = max((d for d in plan.splits if d < decoding.max_steps), default=0)
        tokenizer = engine.backend.tokenizer
        self.short = [tokenise(tokenizer, p.text).tolist() if p.images else p.ids.tolist() for p in prompts]

    def run(self) -> list[Node]:
        buds = [self._bud(g, -1, 0, [], 0) for g in range(len(self.prompts))]
        while buds:
            replies = self.engine.backend.generate([self._call(b) for b in buds])
            grown = []
            for bud, reply in zip(buds, replies, strict=True):
                node = self.nodes[bud.node]
                self.engine.account(node.prompt, self.prompts[node.prompt].ids.tolist() + bud.path + node.ids, reply)
                grown += self._attach(bud, reply)
            buds = grown
        return self.nodes

    def _bud(self, prompt: int, parent: int, depth: int, path: list[int], slot: int) -> _Bud:
        """The place where the children of `parent` start; its first child is made at once."""
        self.nodes.append(Node(prompt, parent, depth))
        return _Bud(len(self.nodes) - 1, path, slot, self.plan.factor(depth))

    def _call(self, bud: _Bud) -> Call:
        node, d = self.nodes[bud.node], self.decoding
        path = bud.path + node.ids
        uncut = node.depth + 1 >= d.max_steps or (node.depth >= self.last_fork and d.stop_after is None)
        stop = d.eos if uncut else [*d.eos, *self.step_ids]
        seed = named_generator(self.seeds[node.prompt], bud.slot, len(path)).initial_seed()
        told = sampling(d, stop, seed, n=bud.fresh, max_tokens=d.max_new_tokens - len(path))
        return Call(self.short[node.prompt] + path, self.prompts[node.prompt].images, told)

    def _attach(self, bud: _Bud, reply: Reply) -> list[_Bud]:
        """Write the samples of one reply into the tree; returns the places where it grows on."""
        first = self.nodes[bud.node]
        stride = self.plan.leaves // self.plan.width(first.depth + 1)
        grown: list[_Bud] = []
        for i, (ids, logp) in enumerate(reply.samples):
            at = bud.node
            if i:
                self.nodes.append(Node(first.prompt, first.parent, first.depth))
                at = len(self.nodes) - 1
            grown += self._write(at, bud.path, bud.slot + i * stride, ids, logp)
        return grown

    def _write(self, at: int, path: list[int], slot: int, ids: list[int], logp: list[float]) -> list[_Bud]:
        """Cut one sample into nodes, as vision.decode does token by token."""
        d, node, path = self.decoding, self.nodes[at], list(path)
        length = len(path) + len(node.ids)
        for k, (token, lp) in enumerate(zip(ids, logp, strict=True), start=1):
            node.ids.append(token)
            node.logp.append(lp)
            length += 1
            if token in self.eos:
                node.end = "eos"
            elif length == d.max_new_tokens:
                node.end = "length"
            elif node.depth + 1 < d.max_steps and token in self.may_end and self.rule.ends_step(node.ids):
                node.end = "step"
                if node.depth + 1 == d.stop_after:
                    return []
                path += node.ids
                bud = self._bud(node.prompt, at, node.depth + 1, path, slot)
                if k == len(ids):
                    return [bud]
                path, at, node = list(path), bud.node, self.nodes[bud.node]
        return [_Bud(at, path, slot, 1)] if node.end == "open" else []

"""vLLM as the engine that grows trees: in the trainer's process, or a `vllm serve` process reached over HTTP.

A path of the tree is one request: the prompt's ids with one placeholder per picture, then the sampled ids. vLLM
expands the placeholders, finds the shared prefix in its block cache and encodes each picture once. Below the last fork
a path is one request to its end; above it every step is a request that stops at the tokens which may end a step, so
no token is sampled in vain and none is ever decoded and tokenised again. A turn of a conversation is a request, its
whole history verbatim (ids as sampled and shown, pixels as our encoder made them) is the prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrl.finite import NotFiniteError
from mmrl.seeding import named_generator
from vision.growth.requests import GrowthRequest, SampleRequest, SamplingOptions, TokenSample
from vision.growth.vllm_backends import Backend, Call, InProcess, Reply, Server
from vision.growth.vllm_media import Medium, media_of
from vision.inputs.prompts import tokenise
from vision.inputs.step_rule import UnsureRule
from vision.inputs.tokens import PromptTokens

# Added to a banned logit: its probability is then exactly 0 in float32, and JSON can carry the number.
_NEVER = -1e9


class VllmEngine:
    """Grows trees with vLLM, with weights that follow the trainer's.

    counts: of the last request for trees: requests, sampled tokens, prompt tokens, and how many of these were cached.
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
        """A running `vllm serve` (docs/guides/vllm.md has the command line).

        Args:
            url: e.g. http://127.0.0.1:8000.
            folder: the served model; its tokenizer is read here.
            exchange: a folder that both sides see; `sync` writes the weights below it.
            timeout_s: of one HTTP call.

        Raises:
            ConnectionError: no server answers there. RuntimeError: it was started without what training needs.
        """
        return cls(Server(url, folder, exchange, timeout_s))

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
        """Give the device's memory back: weights to the host, cache dropped. Wake before sampling and `sync`.

        Nothing happens where there is nothing to give back: not started yet, asleep, a server without sleep mode.
        """
        self.backend.sleep()

    def wake(self) -> None:
        """Undo `sleep`; awake, nothing happens."""
        self.backend.wake()

    def close(self) -> None:
        """Stop an engine of this process; a server runs on."""
        self.backend.close()

    def open(self, request: GrowthRequest) -> Requests:
        """Begin work on trees; see `vision.growth.requests.Engine`. Nothing is truncated, top-p and top-k stay off.

        A path's tokens depend on its prompt's seed alone, up to floating-point differences between batches.

        Raises:
            ValueError: a fork at temperature 0, a temperature that vLLM would change silently, steps that begin where
                the policy is unsure, conversations about pictures of a model that is no Qwen-VL.
        """
        temperature = request.sampling.temperature
        if isinstance(request.rule, UnsureRule):
            raise ValueError("vLLM does not tell entropies while it samples; take another rule of steps")
        if temperature == 0 and request.plan.splits:
            raise ValueError("temperature 0 makes all children of a fork equal; sample with one above 0")
        if 0 < temperature < 0.01 or temperature > 2:
            raise ValueError(f"temperature={temperature}: vLLM samples at 0 or between 0.01 and 2")
        self.counts = Counter()
        return Requests(self, request)

    def check_room(self, what: str, length: int, new: int) -> None:
        """Raise ValueError unless `new` tokens fit behind `length` ones: vLLM would sample fewer."""
        if length + new > self.backend.max_model_len:
            raise ValueError(
                f"{what} has {length} tokens; with {new} new ones it exceeds the engine's "
                f"max_model_len={self.backend.max_model_len}. Raise that, or show less"
            )

    def account(self, prompt: int, expected: Sequence[int], reply: Reply) -> None:
        """Compare the tokens that vLLM read with those that are trained on, and count.

        Raises:
            ValueError: vLLM read other tokens. RuntimeError: a sample without tokens.
            NotFiniteError: a log-prob that is not finite.
        """
        if reply.prompt != expected:
            place: int | str = "the end"
            for index, (token, ours) in enumerate(zip(reply.prompt, expected, strict=False)):
                if token != ours:
                    place = index
                    break
            raise ValueError(
                f"prompt {prompt}: vLLM sees {len(reply.prompt)} tokens, our processor made {len(expected)}; they "
                f"differ from position {place}. Serve the same folder (tokenizer, processor, pixel limits) as is "
                "trained"
            )
        for ids, logp in reply.samples:
            if not ids:
                raise RuntimeError(f"prompt {prompt}: vLLM returned a sample without tokens, so it was aborted")
            # vLLM writes -9999 where it has no number.
            if not all(math.isfinite(value) and value > -9999 for value in logp):
                raise NotFiniteError("vLLM returned a log-prob that is not finite: its weights or logits overflow")
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(expected)
        self.counts["cached_tokens"] += reply.cached
        self.counts["sampled_tokens"] += sum(len(ids) for ids, _ in reply.samples)


def sampling_params(
    sampling: SamplingOptions, stop: Sequence[int], seed: int, *, n: int, max_tokens: int
) -> dict[str, Any]:
    """vLLM's SamplingParams by name: `n` samples of the untruncated distribution, each to its first id of `stop`."""
    params: dict[str, Any] = {
        "n": n,
        "temperature": sampling.temperature,
        "max_tokens": max_tokens,
        "logprobs": 0,
        # `stop` names all ends, so the model's own must not end a sample besides.
        "stop_token_ids": list(stop),
        "ignore_eos": True,
        "detokenize": False,
    }
    if sampling.banned:
        params["logit_bias"] = dict.fromkeys(sampling.banned, _NEVER)
    if sampling.temperature > 0:
        # vLLM draws sample i of n from seed + i.
        params["seed"] = seed
    return params


@dataclass(frozen=True)
class History:
    """A path with its prompt: ids as the model sees them, and in conversations the pictures and films among them."""

    ids: list[int]
    media: list[Medium] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: PromptTokens) -> History:
        """A conversation before its first turn."""
        return cls(prompt.ids.tolist(), media_of(prompt))

    def wrote(self, ids: Sequence[int]) -> History:
        """The history with sampled tokens behind it."""
        return History([*self.ids, *ids], self.media)

    def shown(self, observation: PromptTokens) -> History:
        """The history with an observation behind it."""
        media = [medium.at(len(self.ids)) for medium in media_of(observation)]
        return History(self.ids + observation.ids.tolist(), self.media + media)


def _short(tokenizer: Any, prompt: PromptTokens) -> list[int]:
    """Ids of a prompt with one placeholder for each picture."""
    if not prompt.images:
        return prompt.ids.tolist()
    # vLLM expands the placeholders of the rendered text. Tokens behind it are given as sampled: tokenising their text
    # again could give others.
    written = prompt.ids[len(prompt.ids) - prompt.written :].tolist()
    return [*tokenise(tokenizer, prompt.text).tolist(), *written]


class Requests:
    """An engine at work: the requests of one round are one batch. The state of a sample is its history."""

    whole_steps = True

    def __init__(self, engine: VllmEngine, request: GrowthRequest) -> None:
        self._engine, self._prompts, self._seeds = engine, request.prompts, request.seeds
        self._sampling, self._turns = request.sampling, bool(request.responders)
        self._step_ids = request.rule.candidates.nonzero().flatten().tolist()
        if self._turns:
            self._begun = [History.of(prompt) for prompt in request.prompts]
        else:
            self._begun = [History(prompt.ids.tolist()) for prompt in request.prompts]
            tokenizer = engine.backend.tokenizer
            self._short = [_short(tokenizer, prompt) for prompt in request.prompts]

    def generate(self, requests: Sequence[SampleRequest], *, again: bool = False) -> list[list[TokenSample]]:
        """See `vision.growth.requests.Session`; nothing is drawn again.

        Raises:
            ValueError: a path that leaves no room, or a prompt that vLLM expands to other tokens than our processor.
            RuntimeError: a log-prob that is not finite, or a sample that vLLM broke off.
        """
        assert not again
        histories = [self._history(request) for request in requests]
        calls = [self._call(request, history) for request, history in zip(requests, histories, strict=True)]
        replies = self._engine.backend.generate(calls)
        samples = []
        for request, history, call, reply in zip(requests, histories, calls, replies, strict=True):
            samples.append(self._samples(request, history, call, reply))
        return samples

    def keep(self, state: History) -> History:
        """The same: histories hold."""
        return state

    def _history(self, request: SampleRequest) -> History:
        """The path behind which a request samples."""
        history: History = self._begun[request.prompt] if request.state is None else request.state
        return history if request.observation is None else history.shown(request.observation)

    def _call(self, request: SampleRequest, history: History) -> Call:
        """The request to vLLM: conversations by expanded ids with their media, others by short ids and pictures."""
        index = request.prompt
        name = f"prompt {index}: the conversation" if self._turns else f"prompt {index}"
        self._engine.check_room(name, len(history.ids), request.room)
        stop = list(self._sampling.eos)
        if request.step_by_step:
            stop += self._step_ids
        seed = named_generator(self._seeds[index], request.slots[0], request.sampled).initial_seed()
        params = sampling_params(self._sampling, stop, seed, n=len(request.slots), max_tokens=request.room)
        if self._turns:
            return Call(history.ids, (), params, history.media)
        path = history.ids[len(self._prompts[index].ids) :]
        return Call(self._short[index] + path, self._prompts[index].images, params)

    def _samples(self, request: SampleRequest, history: History, call: Call, reply: Reply) -> list[TokenSample]:
        self._engine.account(request.prompt, history.ids, reply)
        for ids, _ in reply.samples:
            if len(ids) < request.room and ids[-1] not in call.sampling_params["stop_token_ids"]:
                unit = "turn" if self._turns else "step"
                raise RuntimeError(f"prompt {request.prompt}: vLLM broke a {unit} off after {len(ids)} tokens")
        return [TokenSample(ids, logp, history.wrote(ids)) for ids, logp in reply.samples]

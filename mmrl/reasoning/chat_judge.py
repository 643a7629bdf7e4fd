"""An outcome reward that asks a judge or reward model behind an OpenAI-compatible chat endpoint, such as vLLM's."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from PIL import Image
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from mmrl.registry import declares
from mmrl.report.artifacts import to_image
from mmrl.sample import Sample

log = logging.getLogger(__name__)

PROMPT = """Question: {question}

Answer of a model: {output}

Right answer, where it is known: {reference}

How good is the answer of the model? End with a line "Score: N", from 0 (useless or wrong) to 10 (right and clear)."""
_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT)  # and all errors of a server
_MIB = 1 << 20


@declares(reads=("texts",), timeout_s=600.0, source="LLM as a judge (MT-Bench)")
class ChatJudge:
    """The number that a judge gives a sample, from 0 at `low` to 1 at `high`.

    The judge sees the prompt's pictures, and an output that is a picture. A sample is None, so it counts as unscored,
    when its request fails after all tries, or when the reply holds no number in the range.

    Args:
        url: of the endpoint, such as http://127.0.0.1:8000/v1; requests go to URL/chat/completions.
        model: as the endpoint names it.
        prompt: what the judge is asked; {question}, {output}, {reference} and other columns of the data are filled in.
        system: goes before it.
        pattern: regular expression whose first group is the number; the last match in the reply counts.
        low, high: ends of the judge's scale.
        pictures: show the pictures of the prompt.
        api_key_env: environment variable with the key; none is sent where it is empty.
        request_s: seconds for one request. retries: further tries when the server is busy, fails or cannot be reached.
        concurrency: requests at once. max_tokens: of the reply. temperature: of the judge.
        extra: further fields of the request, such as {chat_template_kwargs: {enable_thinking: false}}.

    Attributes:
        failures: samples without a number so far, by `request` and `reply`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = PROMPT,
        system: str = "",
        pattern: str = r"[Ss]core[^\w-]*(-?\d+(?:\.\d+)?)",
        low: float = 0.0,
        high: float = 10.0,
        pictures: bool = True,
        api_key_env: str = "OPENAI_API_KEY",
        request_s: PositiveFloat = 60.0,
        retries: NonNegativeInt = 2,
        concurrency: PositiveInt = 8,
        max_tokens: PositiveInt = 512,
        temperature: float = 0.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"chat_judge: url={url!r} must begin with http:// or https://")
        if low >= high:
            raise ValueError(f"chat_judge: low={low} must lie below high={high}")
        if re.compile(pattern).groups < 1:
            raise ValueError(f"chat_judge: pattern={pattern!r} needs a group around the number, such as Score: (\\d+)")
        self._url, self._prompt, self._system = url.rstrip("/") + "/chat/completions", prompt, system
        self._pattern, self._low, self._high = re.compile(pattern), low, high
        self._pictures, self._key = pictures, os.environ.get(api_key_env, "")
        self._request_s, self._retries, self._concurrency = request_s, retries, concurrency
        self._body = {"model": model, "max_tokens": max_tokens, "temperature": temperature, **(extra or {})}
        self.failures: Counter[str] = Counter()

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number in [0, 1] per sample, None where the judge gave none; equal questions are asked once."""
        bodies = [json.dumps(self._body | {"messages": self._messages(sample)}).encode() for sample in samples]
        distinct = list(dict.fromkeys(bodies))
        with ThreadPoolExecutor(self._concurrency) as pool:
            answers = dict(zip(distinct, pool.map(self._ask, distinct), strict=True))
        faults = [fault for _, fault in answers.values() if fault]
        if faults:
            log.warning("chat_judge: %d of %d questions got no score: %s", len(faults), len(answers), faults[0])
        for body in bodies:
            if (fault := answers[body][1]) is not None:
                self.failures["reply" if fault.startswith("the reply") else "request"] += 1
        return [answers[body][0] for body in bodies]

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        """The question as the endpoint takes it: text alone, or parts with pictures."""
        is_text = isinstance(sample.output, str)
        fields = _columns(sample) | {"output": sample.output if is_text else "the last picture"}
        # not str.format: data and prompts have braces of their own
        text = re.sub(r"\{(\w+)\}", lambda m: str(fields[m[1]]) if m[1] in fields else m[0], self._prompt)
        pictures = [_from_file(Path(p)) for p in _paths(sample)] if self._pictures else []
        if not is_text:
            pictures.append(_as_png(sample.output))
        parts = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        content: Any = [*parts, {"type": "text", "text": text}] if parts else text
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, {"role": "user", "content": content}]

    def _ask(self, body: bytes) -> tuple[float | None, str | None]:
        """The number, or why there is none."""
        fault = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 10.0))
            try:
                return self._read(self._post(body))
            except HTTPError as error:
                fault = f"{self._url} answers {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in _AGAIN and error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    break
            except (URLError, OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                fault = f"{self._url}: {type(error).__name__}: {error}"
        return None, fault

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with urlopen(Request(self._url, body, headers), timeout=self._request_s) as answer:
            return str(json.loads(answer.read(16 * _MIB))["choices"][0]["message"]["content"])

    def _read(self, reply: str) -> tuple[float | None, str | None]:
        found = [match[1] for match in self._pattern.finditer(reply)]
        try:
            number = float(found[-1])
        except (IndexError, ValueError):
            return None, f"the reply has no number where pattern={self._pattern.pattern!r} looks: {reply[-200:]!r}"
        if not self._low <= number <= self._high:
            return None, f"the reply says {number:g}, outside {self._low:g}..{self._high:g}"
        return (number - self._low) / (self._high - self._low), None


def _columns(sample: Sample) -> dict[str, Any]:
    """What a prompt may name: inputs, then columns of the reference, and the whole reference under that name."""
    reference, inputs = sample.prompt.reference, sample.prompt.inputs
    columns = dict(reference) if isinstance(reference, Mapping) else {}
    known = columns.get("answer", reference)
    return {"question": inputs.get("prompt", ""), **columns, **inputs, "reference": "" if known is None else known}


def _paths(sample: Sample) -> Sequence[str]:
    images = sample.prompt.inputs.get("images") or ()
    return [images] if isinstance(images, str) else list(images)


def _from_file(file: Path) -> str:
    kind = "jpeg" if file.suffix.lower() in (".jpg", ".jpeg") else file.suffix.lower().lstrip(".") or "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _as_png(output: Any) -> str:
    buffer = io.BytesIO()
    picture = output if isinstance(output, Image.Image) else to_image(output)
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

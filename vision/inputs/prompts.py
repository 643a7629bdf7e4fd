"""Prompts become tokens: chat template, images by the model's own processor, placeholders expanded and counted."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrl.byte_cache import ByteCache
from mmrl.jsonl import broken_text
from mmrl.reasoning.pictures import Limits
from mmrl.reasoning.rows import IMAGE_MARK
from mmrl.reference import bare
from mmrl.rollout import Prompt
from vision.inputs.foreign import attribute
from vision.inputs.images import image_key, load_image
from vision.inputs.loading import banned_ids, eos_ids, image_token_id, is_vision, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.tokens import Pixels, PromptTokens

_CUT = "\ue001"  # a private character that no template touches
_TEXT_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


ENCODED_BYTES = 2**30  # of prompts of earlier iterations; one with a picture of a megapixel takes 25 MB


class PromptError(ValueError):
    """A prompt that the model cannot take; the message says why and what would mend it."""


@dataclass(frozen=True)
class Turn:
    """One turn of a prompt. parts: texts, and None where a picture is shown."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def texts(self) -> list[str]:
        """The parts without pictures."""
        return [part for part in self.parts if part is not None]

    @property
    def is_plain(self) -> bool:
        """Whether all pictures stand in front."""
        return None not in self.parts[len(self.parts) - len(self.texts) :]

    def then(self, text: str) -> Turn:
        """The turn with more text at its end."""
        if not text:
            return self
        *before, last = self.parts
        return Turn(self.role, (*self.parts, text) if last is None else (*before, last + text))


class PromptEncoder:
    """Encodes prompts, each once an iteration: what an iteration uses is kept until the next one begins, and up to
    `ENCODED_BYTES` of what came before.

    Args:
        hf: the model; read for its configuration and its rotary rule.
        processor: from `vision.inputs.loading.load_processor`.
        options: instruction, system text, and the longest prompt, images included; longer ones are refused, not cut.
        keep_images: keep the pictures beside the pixels, for engines that do their own processing.
        opening: leave the user's turn open after the question and this text; by default the model's turn begins.
    """

    def __init__(
        self, hf: Any, processor: Any, options: PolicyOptions, *, limits: Limits | None = None,
        keep_images: bool = False, opening: str | None = None,
    ) -> None:  # fmt: skip
        self._model, self.processor, self.options = bare(hf), processor, options
        self.tokenizer = tokenizer_of(processor)
        self.limits, self.keep_images, self.opening = limits, keep_images, opening
        self.image_token = image_token_id(self._model.config)
        self.video_token = attribute(self._model.config, "video_token_id")
        self._reserved = self._reserved_texts()
        self._kept = ByteCache(ENCODED_BYTES, name="encoded prompts")

    def __call__(self, prompt: Prompt) -> PromptTokens:
        """The prompt's tokens.

        Raises:
            PromptError: a broken or missing image, placeholders in the text, images unlike placeholders, too long.
        """
        key = self.key(prompt)  # by content: training and evaluation files may use an id twice
        known: PromptTokens | None = self._kept.get(key)
        if known is None:
            known = self._encode(prompt)
            self._kept.put(key, known, size_in_bytes(known))
        return known

    def begin_iteration(self) -> None:
        """Let go of the last iteration's prompts; those encoded or asked for from now on stay until the next call."""
        self._kept.begin_iteration()

    def key(self, prompt: Prompt) -> tuple[str, ...]:
        """What decides a prompt's tokens."""
        inputs = prompt.inputs
        shown = (inputs.get("images") or [], inputs.get("videos") or [], inputs.get("history") or [])
        return (str(inputs.get("question", "")), *(str(part) for part in shown))

    def shuffled(self, prompt: Prompt) -> Prompt:
        """The prompt with its frames in another order.

        Raises:
            PromptError: it has none.
        """
        raise PromptError(f"prompt {prompt.id!r} has no frames to shuffle; only clips of a video agent have")

    def blank(self) -> Pixels | None:
        """A grey picture's pixels, None for a text model."""
        if self.image_token is None:
            return None
        return self._tokens([Image.new("RGB", (64, 64), (127, 127, 127))], [Turn("user", (None, "?"))], "blank").pixels

    def rope(self, ids: Tensor, types: Tensor, shown: Sequence[Pixels]) -> Tensor:
        """(3, L) rotary positions of one row by the model's own rule; films are spaced by their seconds.

        What follows a film goes on behind its largest position, as in the models' release and in vLLM; transformers
        from 5.3 on lets text overlap a film's later rows in time.
        """
        grids = {k: [p.tensors["image_grid_thw"] for p in shown if p.kind == k] for k in ("image", "video")}
        given = {f"{k}_grid_thw": torch.cat(v) for k, v in grids.items() if v}
        if grids["video"]:
            given["second_per_grid_ts"] = torch.tensor([p.seconds for p in shown if p.kind == "video"])
        found, _ = self._model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], **given)
        positions: Tensor = found[:, 0]
        film = types == 2
        for end in (film[:-1] & ~film[1:]).nonzero().flatten().tolist():
            gap = int(positions[:, : end + 1].max()) + 1 - int(positions[:, end + 1].min())
            positions[:, end + 1 :] += max(gap, 0)
        return positions

    def tokens(self, text: str, pixels: Pixels | None = None, pictures: Sequence[Image.Image] = ()) -> PromptTokens:
        """Tokens of a text whose placeholders are spelt out, one per feature; for observations and films.

        Raises:
            PromptError: as many placeholders as `pixels` has features are not there.
        """
        ids = tokenise(self.tokenizer, text)
        types = torch.zeros_like(ids)
        for value, token in enumerate((self.image_token, self.video_token), 1):
            types[ids == token] = value
        due = 0
        if pixels is not None:
            merge = self._model.config.vision_config.spatial_merge_size
            due = int(pixels.tensors["image_grid_thw"].prod(-1).sum()) // merge**2
        if int((types > 0).sum()) != due:
            raise PromptError(f"{int((types > 0).sum())} placeholders for {due} features in {text[:80]!r}")
        return self._placed(ids, types, pixels, text, pictures)

    def _encode(self, prompt: Prompt) -> PromptTokens:
        question = self._question(prompt)
        paths = prompt.inputs.get("images") or []
        films = prompt.inputs.get("videos") or []
        if films:
            raise PromptError(
                f"prompt {prompt.id!r} shows {len(films)} films, which nobody here reads and which would be left out "
                "unseen; take policy: {name: video}, or rows without `videos`"
            )
        if paths and self.image_token is None:
            raise PromptError(f"prompt {prompt.id!r} has {len(paths)} images but the model reads text only")
        try:
            pictures = [load_image(p, self.limits) if self.limits else load_image(p) for p in paths]
        except ValueError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error
        try:
            turns = turns_of(prompt, question, len(pictures))
            if not all(turn.is_plain for turn in turns) or len(turns) > 1:
                self._check_places(turns)
        except PromptError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error
        return self._tokens(pictures, turns, prompt.id)

    def _question(self, prompt: Prompt) -> str:
        question = str(prompt.inputs.get("question", ""))
        said = [question, *(str(turn["content"]) for turn in prompt.inputs.get("history") or [])]
        whole = "\n".join(said)
        fault = broken_text(whole)
        if fault:
            raise PromptError(f"prompt {prompt.id!r}: its text {fault}")
        if prompt.inputs.get("images"):
            whole = whole.replace(IMAGE_MARK, "")
        for text in self._reserved:
            if text in whole:
                raise PromptError(
                    f"prompt {prompt.id!r}: its text contains the model's placeholder {text!r}; remove it, media are "
                    "given apart from the question and placed before it"
                )
        return question

    def _tokens(self, pictures: Sequence[Image.Image], turns: Sequence[Turn], name: str) -> PromptTokens:
        text = self._render(turns, name)
        made: Any = {}
        if pictures:
            # the text has its special tokens, so the processor's tokenizer must not add them once more
            made = self.processor(text=[text], images=[list(pictures)], return_tensors="pt", add_special_tokens=False)
        ids = made["input_ids"][0] if pictures else tokenise(self.tokenizer, text)
        types = (ids == self.image_token).long() if self.image_token is not None else torch.zeros_like(ids)
        self._check_length(name, types, f"{len(pictures)} images")
        pixels = self._pixels(made, pictures) if pictures else None
        return self._placed(ids, types, pixels, text, pictures)

    def _check_length(self, name: str, types: Tensor, media: str) -> None:
        if len(types) > self.options.max_prompt_tokens:
            raise PromptError(
                f"prompt {name!r} has {len(types)} tokens, {int((types > 0).sum())} of them from {media}; the limit "
                f"is policy.max_prompt_tokens={self.options.max_prompt_tokens}. Raise it or use smaller pictures; "
                "prompts are never cut"
            )

    def _placed(
        self, ids: Tensor, types: Tensor, pixels: Pixels | None, text: str, pictures: Sequence[Image.Image]
    ) -> PromptTokens:
        positions = torch.arange(len(ids))
        if attribute(attribute(self._model, "model"), "get_rope_index") is not None:
            positions = self.rope(ids, types, [pixels] if pixels else [])
        kept = tuple(pictures) if self.keep_images else ()
        return PromptTokens(ids, types, positions, int(positions.max()) + 1, text, kept, pixels)

    def _pixels(self, made: Any, pictures: Sequence[Image.Image]) -> Pixels:
        takes = inspect.signature(self._model.model.get_image_features).parameters
        tensors = {k: v for k, v in made.items() if k not in _TEXT_OUTPUTS and k in takes}
        return Pixels("/".join(image_key(p) for p in pictures), tensors)

    def turns(self) -> tuple[str, str]:
        """What the chat template writes between a user's turn and the model's answer, and between that answer and the
        next user's turn.

        Raises:
            PromptError: the processor has no chat template.
        """
        turns = [Turn(role, (_CUT,)) for role in ("user", "assistant", "user")]
        _, closing, between, _ = self._template(turns, False).split(_CUT)
        return closing, between

    def _message(self, turn: Turn) -> dict[str, Any]:
        """The turn as chat templates take it: a text for text models, parts for others."""
        if not is_vision(self._model.config):
            return {"role": turn.role, "content": "".join(turn.texts)}
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            parts.append({"type": "image"} if part is None else {"type": "text", "text": part})
        return {"role": turn.role, "content": parts}

    def _template(self, turns: Sequence[Turn], answer: bool) -> str:
        return self._filled([self._message(turn) for turn in turns], answer)

    def _filled(self, messages: Sequence[dict[str, Any]], answer: bool) -> str:
        owner = self.processor if attribute(self.processor, "chat_template") else self.tokenizer
        if not attribute(owner, "chat_template"):
            raise PromptError("the processor has no chat template; save one with it")
        try:
            return str(owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except Exception as error:  # templates raise what they like
            plain = [_plain(m) for m in messages]
            if None not in plain and plain != list(messages):
                return self._filled([m for m in plain if m is not None], answer)
            roles = ", ".join(str(m["role"]) for m in messages)
            pictures = None in plain
            ways = ["give the model's folder another chat_template.jinja"]
            if self.options.system:
                ways.insert(0, "leave policy.system out")
            if pictures:
                ways.insert(0, "take a template that places pictures (content as a list of parts)")
            raise PromptError(
                f"the chat template refuses turns of {roles} ({type(error).__name__}: {error}); " + ", or ".join(ways)
            ) from error

    def _render(self, turns: Sequence[Turn], name: str) -> str:
        """The whole prompt as text, special tokens included: what `tokenise` makes ids of.

        Raises:
            PromptError: the chat template refuses prompt `name`.
        """
        try:
            return self._opened(self._rendered(turns))
        except PromptError as error:
            raise PromptError(f"prompt {name!r}: {error}") from error

    def _opened(self, text: str) -> str:
        """The text behind the mark that begins a document, where the tokenizer has one: exactly one."""
        mark = self.tokenizer.bos_token
        if not mark or text.startswith(mark) or self.tokenizer("a")["input_ids"][0] != self.tokenizer.bos_token_id:
            return text
        return str(mark) + text

    def _rendered(self, turns: Sequence[Turn]) -> str:
        """The turns behind the system text, by the chat template; a row's own system turn replaces the option's."""
        *before, last = turns
        after = f"\n{self.options.instruction}" if self.options.instruction else ""
        last = last.then(after + (self.opening or ""))
        system = self.options.system
        if before and before[0].role == "system":
            system, before = "".join(before[0].texts), before[1:]
        if not self.tokenizer.chat_template and not attribute(self.processor, "chat_template"):
            if before or None in last.parts:
                what = "earlier turns cannot be shown" if before else "images cannot be placed"
                raise PromptError(f"the processor has no chat template, so {what}; save one with it")
            text, end = "".join(last.texts), "\n" if self.opening is None else ""
            return f"{system}\n{text}{end}" if system else f"{text}{end}"
        head = [Turn("system", (system,))] if system else []
        if self.opening is None:
            return self._template([*head, *before, last], True)
        return self._template([*head, *before, last.then(_CUT)], False).split(_CUT)[0]

    def _check_places(self, turns: Sequence[Turn]) -> None:
        """Look whether the chat template puts pictures where the turns have them.

        Raises:
            PromptError: it does not.
        """
        # (gaps between texts with pictures shown, without) as the template fills them, and pictures that belong there
        shown, plain, due = self._gaps(turns, True), self._gaps(turns, False), [0]
        for part in (part for turn in turns for part in turn.parts):
            if part is None:
                due[-1] += 1
            else:
                due.append(0)
        if [a != b for a, b in zip(shown, plain, strict=True)] != [n > 0 for n in due]:
            raise PromptError(
                "the chat template puts pictures elsewhere than where the row has them, between words; take another "
                "template, or rows with pictures in front"
            )

    def _gaps(self, turns: Sequence[Turn], pictures: bool) -> list[str]:
        """What the template writes around the texts of the turns, with their pictures or without them."""
        marked = []
        for turn in turns:
            parts = tuple(None if part is None else _CUT for part in turn.parts if pictures or part is not None)
            marked.append(Turn(turn.role, parts))
        return self._template(marked, True).split(_CUT)

    def _reserved_texts(self) -> list[str]:
        added = self.tokenizer.get_added_vocab()
        banned = set(banned_ids(self._model.config, self.tokenizer, keep=eos_ids(self._model, self.tokenizer)))
        return [text for text, i in added.items() if i in banned]


def turns_of(prompt: Prompt, question: str, pictures: int) -> list[Turn]:
    """The prompt's history and its question; a mark `<image>` is a picture, and those without a mark stand in front.

    Raises:
        PromptError: marks and pictures differ in number.
    """
    turns = [Turn(t["role"], _parts(t["content"], pictures)) for t in prompt.inputs.get("history") or []]
    left = pictures - sum(turn.parts.count(None) for turn in turns)
    parts = _parts(question, pictures)
    if None not in parts:
        parts = (None,) * left + parts
    if parts.count(None) != left:
        marks = pictures - left + parts.count(None)
        raise PromptError(f"{marks} {IMAGE_MARK} in the text for {pictures} pictures")
    return [*turns, Turn("user", parts)]


def _parts(text: str, pictures: int) -> tuple[str | None, ...]:
    """The text cut at its marks, if there are pictures."""
    if not pictures:
        return (text,)
    parts: list[str | None] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [None] if i else []
        parts += [piece] if piece else []
    # templates look at the first part of a turn, and `_check_places` renders turns without their pictures
    return tuple(parts) if any(parts) else (*parts, "")


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """(L,) int64: ids of a rendered text, which has all its special tokens already."""
    ids: Tensor = tokenizer([text], return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return ids


def _plain(message: dict[str, Any]) -> dict[str, Any] | None:
    """The message with its text alone as content, for templates that know no parts; None where it shows a picture."""
    content = message["content"]
    if isinstance(content, str):
        return message
    texts = [part["text"] for part in content if part["type"] == "text"]
    return message | {"content": "".join(texts)} if len(texts) == len(content) else None


def size_in_bytes(tokens: PromptTokens) -> int:
    """Memory that encoded tokens hold, pictures included."""
    pixels = tokens.pixels.tensors.values() if tokens.pixels else ()
    tensors = (tokens.ids, tokens.types, tokens.positions, *pixels)
    pictures = sum(3 * i.width * i.height for i in tokens.images)
    return sum(t.numel() * t.element_size() for t in tensors) + len(tokens.text) + pictures

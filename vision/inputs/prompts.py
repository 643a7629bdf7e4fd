"""Prompts become tokens: chat template, images by the model's own processor, placeholders expanded and counted.

Prompt("a", {"question": "How many?", "images": ["a.png"]})
-> turns     user: (picture, "How many?")
-> text      <|im_start|>user <|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|> ...
-> tokens    the ids of that text, with one <|image_pad|> for every feature of the picture, and its pixels
"""

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

# A character of no language, at which a rendered template is cut: no template touches it.
_CUT = "\ue001"

# Outputs of a processor that are not about pictures.
_TEXT_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}

# Memory for prompts of earlier iterations; one with a picture of a megapixel takes 25 MB.
ENCODED_BYTES = 2**30


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
        """True where all pictures stand before the texts."""
        num_pictures = self.parts.count(None)
        return None not in self.parts[num_pictures:]

    def then(self, text: str) -> Turn:
        """The turn with more text at its end."""
        if not text:
            return self
        *before, last = self.parts
        return Turn(self.role, (*self.parts, text) if last is None else (*before, last + text))


class PromptEncoder:
    """Encodes prompts, each once an iteration.

    The prompts of an iteration are kept until the next one begins, and up to `ENCODED_BYTES` of earlier ones.

    Args:
        hf: the model; read for its configuration and its rotary rule.
        processor: from `vision.inputs.loading.load_processor`.
        options: instruction, system text, and the longest prompt, images included; longer ones are refused, not cut.
        keep_images: keep the pictures beside the pixels, for engines that do their own processing.
        opening: leave the user's turn open after the question and this text; by default the model's turn begins.
    """

    def __init__(
        self,
        hf: Any,
        processor: Any,
        options: PolicyOptions,
        *,
        limits: Limits | None = None,
        keep_images: bool = False,
        opening: str | None = None,
    ) -> None:
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
        # By content: training and evaluation files may use an id twice.
        key = self.key(prompt)
        tokens: PromptTokens | None = self._kept.get(key)
        if tokens is None:
            tokens = self._encode(prompt)
            self._kept.put(key, tokens, size_in_bytes(tokens))
        return tokens

    def begin_iteration(self) -> None:
        """Give up the last iteration's prompts; those that are used from now on stay until the next call."""
        self._kept.begin_iteration()

    def key(self, prompt: Prompt) -> tuple[str, ...]:
        """The inputs on which a prompt's tokens depend."""
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

        Text behind a film goes on after its largest position, as in the models' release and in vLLM; transformers
        from 5.3 on lets it overlap the film's later rows in time.
        """
        grids: dict[str, list[Tensor]] = {}
        seconds = []
        for pixels in shown:
            grids.setdefault(pixels.kind, []).append(pixels.tensors["image_grid_thw"])
            if pixels.kind == "video":
                seconds.append(pixels.seconds)
        media = {f"{kind}_grid_thw": torch.cat(own) for kind, own in grids.items()}
        if seconds:
            media["second_per_grid_ts"] = torch.tensor(seconds)
        # (3, 1, L): time, row and column
        batch_positions, _ = self._model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], **media)
        positions: Tensor = batch_positions[:, 0]
        is_film = types == 2
        last_of_film = is_film[:-1] & ~is_film[1:]
        for end in last_of_film.nonzero().flatten().tolist():
            gap = int(positions[:, : end + 1].max()) + 1 - int(positions[:, end + 1].min())
            positions[:, end + 1 :] += max(gap, 0)
        return positions

    def tokens(self, text: str, pixels: Pixels | None = None, pictures: Sequence[Image.Image] = ()) -> PromptTokens:
        """Tokens of a text whose placeholders are spelt out, one per feature; for observations and films.

        Raises:
            PromptError: the placeholders are not as many as the features of `pixels`.
        """
        ids = tokenise(self.tokenizer, text)
        types = torch.zeros_like(ids)
        types[ids == self.image_token] = 1
        types[ids == self.video_token] = 2
        num_features = 0
        if pixels is not None:
            merge = self._model.config.vision_config.spatial_merge_size
            num_features = int(pixels.tensors["image_grid_thw"].prod(-1).sum()) // merge**2
        if int((types > 0).sum()) != num_features:
            raise PromptError(f"{int((types > 0).sum())} placeholders for {num_features} features in {text[:80]!r}")
        return self._placed(ids, types, pixels, text, pictures)

    def _encode(self, prompt: Prompt) -> PromptTokens:
        """The tokens of a prompt that is in no cache."""
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
        """The prompt's question.

        Raises:
            PromptError: it, or an earlier turn, is no sound text or holds a placeholder of the model.
        """
        question = str(prompt.inputs.get("question", ""))
        history = [str(turn["content"]) for turn in prompt.inputs.get("history") or []]
        whole = "\n".join([question, *history])
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
        """The tokens of turns with their pictures; `name` is for messages."""
        text = self._render(turns, name)
        outputs: Any = {}
        if pictures:
            # The text has its special tokens, so the processor's tokenizer must not add them once more.
            outputs = self.processor(
                text=[text], images=[list(pictures)], return_tensors="pt", add_special_tokens=False
            )
            ids = outputs["input_ids"][0]
        else:
            ids = tokenise(self.tokenizer, text)
        if self.image_token is None:
            types = torch.zeros_like(ids)
        else:
            types = (ids == self.image_token).long()
        self._check_length(name, types, f"{len(pictures)} images")
        pixels = self._pixels(outputs, pictures) if pictures else None
        return self._placed(ids, types, pixels, text, pictures)

    def _check_length(self, name: str, types: Tensor, media: str) -> None:
        """Raise PromptError for a prompt that is too long; a cut could fall into the placeholders of a picture."""
        if len(types) > self.options.max_prompt_tokens:
            raise PromptError(
                f"prompt {name!r} has {len(types)} tokens, {int((types > 0).sum())} of them from {media}; the limit "
                f"is policy.max_prompt_tokens={self.options.max_prompt_tokens}. Raise it or use smaller pictures; "
                "prompts are never cut"
            )

    def _placed(
        self, ids: Tensor, types: Tensor, pixels: Pixels | None, text: str, pictures: Sequence[Image.Image]
    ) -> PromptTokens:
        """The tokens with their positions: (L,), or (3, L) where the model has a rotary rule of its own."""
        positions = torch.arange(len(ids))
        if attribute(attribute(self._model, "model"), "get_rope_index") is not None:
            positions = self.rope(ids, types, [pixels] if pixels else [])
        kept = tuple(pictures) if self.keep_images else ()
        return PromptTokens(ids, types, positions, int(positions.max()) + 1, text, kept, pixels)

    def _pixels(self, outputs: Any, pictures: Sequence[Image.Image]) -> Pixels:
        """Those outputs of the processor that the model's image encoder takes."""
        parameters = inspect.signature(self._model.model.get_image_features).parameters
        tensors = {}
        for name, tensor in outputs.items():
            if name not in _TEXT_OUTPUTS and name in parameters:
                tensors[name] = tensor
        return Pixels("/".join(image_key(picture) for picture in pictures), tensors)

    def turns(self) -> tuple[str, str]:
        """The texts that the chat template writes between a user's turn and the model's answer, and between that
        answer and the next user's turn.

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
        """The chat template filled with messages, up to where the model's turn begins if `answer`.

        Raises:
            PromptError: there is no template, or it refuses the messages.
        """
        # Some folders keep the template with the processor, others with the tokenizer.
        owner = self.processor if attribute(self.processor, "chat_template") else self.tokenizer
        if not attribute(owner, "chat_template"):
            raise PromptError("the processor has no chat template; save one with it")
        try:
            return str(owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except Exception as error:
            # Templates raise whatever they like. Some know no parts, only texts.
            plain = [_plain(message) for message in messages]
            has_pictures = None in plain
            if not has_pictures and plain != list(messages):
                return self._filled([message for message in plain if message is not None], answer)
            remedies = []
            if has_pictures:
                remedies.append("take a template that places pictures (content as a list of parts)")
            if self.options.system:
                remedies.append("leave policy.system out")
            remedies.append("give the model's folder another chat_template.jinja")
            roles = ", ".join(str(message["role"]) for message in messages)
            raise PromptError(
                f"the chat template refuses turns of {roles} ({type(error).__name__}: {error}); "
                + ", or ".join(remedies)
            ) from error

    def _render(self, turns: Sequence[Turn], name: str) -> str:
        """The whole prompt as text, special tokens included, as `tokenise` takes it.

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
        instruction = f"\n{self.options.instruction}" if self.options.instruction else ""
        last = last.then(instruction + (self.opening or ""))
        system = self.options.system
        if before and before[0].role == "system":
            system, before = "".join(before[0].texts), before[1:]
        if not self.tokenizer.chat_template and not attribute(self.processor, "chat_template"):
            if before or None in last.parts:
                problem = "earlier turns cannot be shown" if before else "images cannot be placed"
                raise PromptError(f"the processor has no chat template, so {problem}; save one with it")
            lines = [system] if system else []
            lines.append("".join(last.texts))
            if self.opening is None:
                lines.append("")
            return "\n".join(lines)
        head = [Turn("system", (system,))] if system else []
        # An open user's turn is the text before a mark at its end: the template would close the turn behind it.
        if self.opening is None:
            return self._template([*head, *before, last], True)
        return self._template([*head, *before, last.then(_CUT)], False).split(_CUT)[0]

    def _check_places(self, turns: Sequence[Turn]) -> None:
        """Check that the chat template puts pictures where the turns have them.

        Raises:
            PromptError: it does not.
        """
        # Whether there is a picture in each gap between two texts, by the turns
        expected = [False]
        for turn in turns:
            for part in turn.parts:
                if part is None:
                    expected[-1] = True
                else:
                    expected.append(False)
        # and by the template: it writes something else there when pictures are left out.
        shown, plain = self._gaps(turns, True), self._gaps(turns, False)
        placed = [gap != plain_gap for gap, plain_gap in zip(shown, plain, strict=True)]
        if placed != expected:
            raise PromptError(
                "the chat template puts pictures elsewhere than where the row has them, between words; take another "
                "template, or rows with pictures in front"
            )

    def _gaps(self, turns: Sequence[Turn], pictures: bool) -> list[str]:
        """The texts that the template writes around those of the turns, with their pictures or without them."""
        marked = []
        for turn in turns:
            parts: list[str | None] = []
            for part in turn.parts:
                if part is not None:
                    parts.append(_CUT)
                elif pictures:
                    parts.append(None)
            marked.append(Turn(turn.role, tuple(parts)))
        return self._template(marked, True).split(_CUT)

    def _reserved_texts(self) -> list[str]:
        """The texts of the model's placeholders, which no question may hold."""
        added = self.tokenizer.get_added_vocab()
        banned = set(banned_ids(self._model.config, self.tokenizer, keep=eos_ids(self._model, self.tokenizer)))
        return [text for text, i in added.items() if i in banned]


def turns_of(prompt: Prompt, question: str, pictures: int) -> list[Turn]:
    """The prompt's history and its question; a mark `<image>` is a picture, and those without a mark stand in front.

    Raises:
        PromptError: marks and pictures differ in number.
    """
    history = prompt.inputs.get("history") or []
    turns = [Turn(turn["role"], _parts(turn["content"], pictures)) for turn in history]
    remaining = pictures - sum(turn.parts.count(None) for turn in turns)
    parts = _parts(question, pictures)
    if None not in parts:
        parts = (None,) * remaining + parts
    if parts.count(None) != remaining:
        marks = pictures - remaining + parts.count(None)
        raise PromptError(f"{marks} {IMAGE_MARK} in the text for {pictures} pictures")
    return [*turns, Turn("user", parts)]


def _parts(text: str, pictures: int) -> tuple[str | None, ...]:
    """The text cut at its marks, if there are pictures."""
    if not pictures:
        return (text,)
    parts: list[str | None] = []
    for index, piece in enumerate(text.split(IMAGE_MARK)):
        if index > 0:
            parts.append(None)
        if piece:
            parts.append(piece)
    # At least one text: templates look at the first part of a turn, and `_check_places` renders turns without
    # pictures.
    if not any(parts):
        parts.append("")
    return tuple(parts)


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
    if len(texts) < len(content):
        return None
    return message | {"content": "".join(texts)}


def size_in_bytes(tokens: PromptTokens) -> int:
    """Memory that encoded tokens hold, pictures included."""
    tensors = [tokens.ids, tokens.types, tokens.positions]
    if tokens.pixels:
        tensors += tokens.pixels.tensors.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    pictures = sum(3 * picture.width * picture.height for picture in tokens.images)
    return size + pictures + len(tokens.text)

"""Rows of questions as data sets publish them: one column of text, or turns of a conversation; media in any column.

A picture's place in a text is marked by `<image>`. A question without marks has its pictures in front.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.answer_text import choice_letter
from mmrl.reasoning.embedded import media_paths, medium_path
from mmrl.reasoning.rows import IMAGE_MARK, LIKE_ANSWERS, Row, without_image_marks
from mmrl.sample import Prompt

# Texts that models read as a picture, a film or a turn of the conversation; in a question they would shift the media.
_PLACEHOLDER = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad|image|im_start|im_end)\|>"
    r"|</?img>|<IMG_CONTEXT>|<image>|<video>|<image_soft_token>|<(?:start|end)_of_image>"
)
_FILM_MARK = "<video>"
_LEADING_MARKS = re.compile(rf"\A(?:{IMAGE_MARK}\s*+)*+")
# Columns in which public data sets name pictures and films.
IMAGE_COLUMNS = (
    "images", "image", "image_path", "image_paths", "image_url", "image_urls", "img", "img_path", "picture",
    "pictures", "photo",
)  # fmt: skip
VIDEO_COLUMNS = ("videos", "video", "video_path", "video_paths", "video_url", "clip", "film")
# Columns that hold a conversation, read where there is no column `question`; `prompt` is TRL's and may be a text.
_CONVERSATIONS = ("messages", "conversations", "prompt")
# Columns that data sets use for the same things as ours, to be told where ours is missing.
_LIKE = {
    "question": ("problem", "query", "instruction", "input", *_CONVERSATIONS),
    "answer": (*LIKE_ANSWERS, "completion", "response"),
    "options": ("choices", "candidates", "multiple_choices", "choice"),
}  # fmt: skip
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
# `A. red`, `(A) red`, `A) red`, `A: red`
_LETTERED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*)", re.DOTALL)

# role: system, user or assistant; content: a text with a mark per picture.
Turn = Mapping[str, str]


@dataclass(frozen=True)
class Columns:
    """Names of the columns; every other column is kept in the reference."""

    question: str = "question"
    images: str = "images"
    answer: str = "answer"
    options: str = "options"


@dataclass(frozen=True)
class Question:
    """The question of one row.

    text: the last question, without its options; `<image>` where a picture stands between words.
    images, videos: paths, in the order in which they are shown, pictures of `history` first. `history`: the turns
    before it. options: without letters. answer: as the row has it, else the assistant's last turn. others: the columns
    that were not read, and that turn where the row has an answer besides.
    """

    text: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    history: tuple[Turn, ...]
    options: tuple[str, ...]
    answer: Any
    others: Mapping[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """`Prompt.inputs`: the question ends with its options as lettered lines."""
        inputs: dict[str, Any] = {"question": with_options(self.text, self.options), "images": list(self.images)}
        if self.videos:
            inputs["videos"] = list(self.videos)
        if self.options:
            inputs["options"] = list(self.options)
        if self.history:
            inputs["history"] = [dict(turn) for turn in self.history]
        return inputs

    @property
    def reference(self) -> dict[str, Any]:
        """`Prompt.reference`: the answer and the other columns."""
        return dict(self.others) | {"answer": self.answer}


def read_question(row: Row, columns: Columns, *, films: bool = False) -> Question:
    """The question of a row.

    The text stands in the column `columns.question`; without it in `messages`, `conversations` or `prompt`, whose
    turns are `role, content` or `from, value`. A column `history` of turns, or of pairs of question and answer, goes
    before. A last turn of the assistant is the answer, or a written solution where the row has an answer besides.

    Args:
        films: the caller can show films.
    Raises:
        RowError: no text, turns or media that nobody can show, a column of media that nobody reads, more or fewer
            `<image>` than pictures, a model's own placeholder in a text.
    """
    column = _question_column(row, columns)
    talk = _Talk(column, row[column], row.get("history"))
    images, image_column = _column_media(row, columns.images, "image")
    videos, video_column = _column_media(row, "videos", "video") if films else ((), "")
    used = {"id", column, "history", image_column, video_column, columns.options, columns.answer}
    others = {name: value for name, value in row.items() if name not in used}
    remedy = "name it `video`" if films else "this task shows pictures; take task: {{name: video_jsonl}}"
    check_unread(others, f"{remedy}, or remove the column", "name it as task.images: {column}, or remove it")
    if talk.images and images:
        raise RowError(f"pictures twice: in {column!r} and in {image_column!r}; leave one of them out")
    if talk.videos and not films:
        raise RowError(f"a film in {column!r}: this task shows pictures; take task: {{name: video_jsonl}}")
    images = tuple(talk.images) or images
    videos += tuple(talk.videos)
    if videos:
        # Films are put before the first turn of the user, so its own mark would be one too many.
        first = next(turn for turn in talk.turns if turn["role"] == "user")
        first["content"] = _without_film_marks(first["content"])
    *history, last = _placed(talk, len(images))
    options = _options(row.get(columns.options), columns.options)
    texts = [turn["content"].replace(IMAGE_MARK, "") for turn in (*history, last)]
    check_text("\n".join([*texts, *options]))
    answer = row.get(columns.answer)
    if answer is None:
        answer = talk.written
    elif talk.written is not None:
        # The row has an answer besides, so the assistant's last turn is a written solution: kept, not compared with.
        others["completion" if others.get("solution") else "solution"] = talk.written
    check_json(others | {columns.answer: answer})
    return Question(last["content"], images, videos, tuple(history), options, answer, others)


def last_question(value: Any, column: str) -> str:
    """The text of a column that holds one, or a conversation of one turn.

    Raises:
        RowError: it holds neither, or media or more turns, which would be left out.
    """
    talk = _Talk(column, value)
    if len(talk.turns) > 1 or talk.written is not None or talk.images or talk.videos or not talk.turns[0]["content"]:
        raise RowError(f"column {column!r} holds more than one text; only a prompt is shown here")
    return talk.turns[0]["content"].strip()


def told_columns(prompts: Sequence[Prompt], columns: Columns) -> list[str]:
    """Warnings about columns that nobody reads: those that resemble one that every row lacks, and conversations."""
    references = [prompt.reference for prompt in prompts]
    lines = []
    for name in _CONVERSATIONS:
        unread = sum(bool(reference.get(name)) for reference in references)
        if unread:
            lines.append(
                f"{name!r} ({unread} rows) is not read beside {columns.question!r}; take task.question: {name}, if it "
                "holds the question"
            )
    has = {
        "answer": any(reference["answer"] is not None for reference in references),
        "options": any(prompt.inputs.get("options") for prompt in prompts),
    }
    for field in has:
        named = getattr(columns, field)
        counts = {name: sum(bool(reference.get(name)) for reference in references) for name in _LIKE[field]}
        similar = next((name for name in _LIKE[field] if counts[name]), None)
        if similar is not None and not has[field]:
            lines.append(
                f"no row has {named!r}, and {similar!r} ({counts[similar]} rows) resembles it; name it as "
                f"task.{field}: {similar}, if it is"
            )
    return lines


# ---- options --------------------------------------------------------------------------------------------------------


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, then `(A) ..`, `(B) ..` on lines of their own; options that have their letters keep one."""
    plain = plain_options(options)
    lines = [f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, plain, strict=False)]
    return "\n".join([question, *lines])


def plain_options(options: Sequence[str]) -> tuple[str, ...]:
    """Options without letters, when all carry A, B, C .. in order ("A. red", "(B) blue"); else as they are."""
    plain = []
    for option, letter in zip(options, string.ascii_uppercase, strict=False):
        parts = _LETTERED.match(option)
        if parts is None or (parts[1] or parts[2]) != letter:
            return tuple(options)
        plain.append(parts[3].strip())
    # More options than letters cannot all have one.
    return tuple(plain) if len(plain) == len(options) else tuple(options)


def _options(value: Any, column: str) -> tuple[str, ...]:
    """Options of a list, of lettered lines, of letter -> text, or of `{"label": [..], "text": [..]}`."""
    if value is None or value == "":
        return ()
    entries = value
    if isinstance(value, str):
        entries = value.strip().splitlines()
        entries = entries if plain_options(entries) != tuple(entries) else None
    elif isinstance(value, dict) and isinstance(value.get("label"), list) and isinstance(value.get("text"), list):
        entries = [f"{label}. {text}" for label, text in zip(value["label"], value["text"], strict=False)]
    elif isinstance(value, dict):
        # A table has every column in every row: options that a row lacks are null at its end.
        entries = [f"{letter}. {text}" for letter, text in value.items() if text is not None]
        entries = entries if plain_options(entries) != tuple(entries) else None
    if not isinstance(entries, list) or not all(map(_is_option, entries)):
        raise RowError(
            f"column {column!r} is no list of texts or numbers: {str(value)[:80]!r}; lettered lines and an object of "
            "A, B, C .. are read too"
        )
    if len(entries) > len(string.ascii_uppercase):
        raise RowError(f"{len(entries)} options; there are letters for {len(string.ascii_uppercase)}")
    return plain_options([str(entry) for entry in entries])


def _is_option(entry: Any) -> bool:
    return isinstance(entry, str | int | float) and bool(str(entry).strip())


def check_answer(answer: Any, options: Sequence[str]) -> None:
    """RowError when a question with options has an answer that is none of them."""
    if not options or not isinstance(answer, str | int | float) or isinstance(answer, bool):
        return
    if choice_letter(str(answer), options) is None:
        raise RowError(
            f"answer {str(answer)[:60]!r} names none of the {len(options)} options; give a letter or an option's text "
            "(a number is not read as an index: data sets count from 0 or from 1)"
        )


# ---- turns ----------------------------------------------------------------------------------------------------------


class _Talk:
    """The turns of a column, and the media that stand in them.

    Attributes:
        turns: role and content, the last one of the user. images, videos: paths in their order.
        written: the assistant's last turn, None without one. in_parts: turns are lists of parts, in which the
        place of a picture has a meaning.
    """

    def __init__(self, column: str, value: Any, history: Any = None) -> None:
        self.column = column
        self.images: list[str] = []
        self.videos: list[str] = []
        self.written: str | None = None
        self.in_parts = False
        entries = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise RowError(f"column {column!r} is no text and no list of turns: {str(value)[:80]!r}")
        self.turns: list[dict[str, str]] = [self._turn(entry) for entry in (*_history(history), *entries)]
        if self.turns and self.turns[-1]["role"] == "assistant":
            if column == "prompt":
                raise RowError("'prompt' ends with a turn of the assistant, which no policy here goes on with")
            self.written = self.turns.pop()["content"]
        if not self.turns or self.turns[-1]["role"] != "user":
            raise RowError(
                f"column {column!r} holds no question: it has to end with a user's turn, or with its answer"
            )
        if any(turn["role"] == "system" for turn in self.turns[1:]):
            raise RowError(f"column {column!r} has a system turn inside; only the first turn may be one")

    def _turn(self, entry: Row) -> dict[str, str]:
        """One turn as role and text; its media are noted."""
        name = entry.get("role") or entry.get("from")
        role = _ROLES.get(str(name))
        if role is None:
            raise RowError(
                f"a turn of {name!r} in {self.column!r}, which nobody here shows; known: {', '.join(_ROLES)}"
            )
        content = entry.get("content") if entry.get("content") is not None else entry.get("value")
        if entry.get("tool_calls"):
            raise RowError(f"a turn of {self.column!r} calls tools, which nobody here shows")
        if isinstance(content, Mapping):
            content = [content]
        if isinstance(content, list):
            self.in_parts = True
            content = "".join(self._part(part) for part in content)
        if not isinstance(content, str) or not content.strip():
            raise RowError(f"a turn of {self.column!r} has no text")
        return {"role": role, "content": content}

    def _part(self, part: Any) -> str:
        """One part of a turn as text; its medium is noted."""
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            raise RowError(f"a turn of {self.column!r} holds {str(part)[:60]!r}, no part with a type")
        filled = {key: value for key, value in part.items() if value is not None}
        kind = str(filled.pop("type", next(iter(filled), ""))).removeprefix("input_").removesuffix("_url")
        if kind == "text" and isinstance(filled.get("text"), str):
            return str(filled["text"])
        if kind not in ("image", "video"):
            raise RowError(f"a part {kind!r} in {self.column!r}, which nobody here shows")
        keys = (kind, f"{kind}_url", "path", "url", "bytes")
        source = next((filled[key] for key in keys if filled.get(key)), None)
        if kind == "video":
            if source is None:
                raise RowError(f"a film without a path in {self.column!r}")
            self.videos.append(medium_path(source, self.column, "video"))
            return _FILM_MARK
        if source is not None:
            self.images.append(medium_path(source, self.column))
        # Without a source the picture stands in the column of pictures.
        return IMAGE_MARK


def _history(value: Any) -> list[Mapping[str, Any]]:
    """The turns of a column of turns, or of pairs of question and answer."""
    if value and not isinstance(value, list):
        raise RowError(f"column 'history' is no list of turns: {str(value)[:60]!r}")
    turns: list[Mapping[str, Any]] = []
    for entry in value or []:
        if isinstance(entry, list) and len(entry) == 2:
            turns += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
        elif isinstance(entry, Mapping):
            turns.append(entry)
        else:
            raise RowError(f"column 'history' holds {str(entry)[:60]!r}, neither a turn nor question and answer")
    return turns


def _placed(talk: _Talk, images: int) -> list[Turn]:
    """The turns with a mark per picture, those of the last one left out where its pictures stand in front anyway.

    A text's marks at its end count as in front, as LLaVA's data are read.

    Raises:
        RowError: there are marks, but not one per picture.
    """
    turns = [dict(turn) for turn in talk.turns]
    texts = [turn["content"] for turn in turns]
    marks = check_marks(texts, images)
    if images and not marks:
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = IMAGE_MARK * images + first["content"]
    text = turns[-1]["content"]
    bare = _without_leading_marks(text) if talk.in_parts else without_image_marks(text)
    if not bare.strip():
        raise RowError(f"the question holds nothing but {IMAGE_MARK}")
    turns[-1]["content"] = text if IMAGE_MARK in bare else bare
    return list(turns)


def _without_leading_marks(text: str) -> str:
    return _LEADING_MARKS.sub("", text, count=1)


def _without_film_marks(text: str) -> str:
    """The text without the mark of a film at its ends: a film stands before the first turn."""
    bare = text.strip().removeprefix(_FILM_MARK)
    return bare.removesuffix(_FILM_MARK).strip()


def _question_column(row: Row, columns: Columns) -> str:
    value = row.get(columns.question)
    if isinstance(value, list) or (isinstance(value, str) and value.strip()):
        return columns.question
    filled = [column for column in _CONVERSATIONS if row.get(column)]
    if filled and columns.question == Columns.question and not value:
        return filled[0]
    similar = [column for column in _LIKE["question"] if row.get(column)]
    remedy = f"; name it as task.question: {similar[0]}" if similar else ""
    raise RowError(f"no text in column {columns.question!r}; columns are {sorted(row)}{remedy}")


# ---- columns --------------------------------------------------------------------------------------------------------


def _column_media(row: Row, named: str, single: str) -> tuple[tuple[str, ...], str]:
    """Paths of the named column, or of `single` where that is empty, and the column's name."""
    column = next((name for name in (named, single) if row.get(name)), named)
    return media_paths(row.get(column), column, single), column


def check_unread(columns: Mapping[str, Any], film: str, picture: str) -> None:
    """Look for media among columns that nobody reads and nobody would see.

    Args:
        film, picture: what to do about a film and about pictures; `{column}` is the column's name.
    Raises:
        RowError: a column that is not empty looks like media by its name, or holds bytes.
    """
    for column, value in columns.items():
        if not value:
            continue
        if column in VIDEO_COLUMNS:
            raise RowError(f"unread column {column!r}: it looks like a film; {film.format(column=column)}")
        if column in IMAGE_COLUMNS or _holds_bytes(value):
            raise RowError(f"unread column {column!r}: it looks like pictures; {picture.format(column=column)}")


def _holds_bytes(value: Any) -> bool:
    entry = value[0] if isinstance(value, list) and value else value
    return isinstance(entry, bytes) or (isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes))


def check_json(others: Mapping[str, Any]) -> None:
    """RowError for a value of a table that no run folder can hold."""
    for column, value in others.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise RowError(f"column {column!r} is no JSON value ({error}); write it as text, or remove it") from error


def check_marks(texts: Sequence[str], images: int) -> int:
    """The number of places of pictures that the turns' texts mark; RowError unless all pictures have one.

    Those of the last text may be left out together: they stand in front of it.
    """
    *before, last = (text.count(IMAGE_MARK) for text in texts)
    marks = sum(before) + last
    if marks != images and (last or sum(before) > images):
        raise RowError(f"{marks} {IMAGE_MARK} in the text for {images} pictures")
    return marks


def check_text(text: str) -> None:
    """Raise RowError for a text with a placeholder that a model reads as a picture, a film or a turn."""
    placeholder = _PLACEHOLDER.search(text)
    if placeholder:
        raise RowError(
            f"the text holds the placeholder {placeholder[0]!r}; remove it, media are given by their column"
        )

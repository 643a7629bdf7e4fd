"""Final answers as text: the reply without its thinking, the answer that it states, and when two answers are equal."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# <think>, <seed:think>, [THINK], ◁think▷ (Kimi-VL), <|begin_of_thought|>: what is written before the reply
_THINKING_TAG = re.compile(
    r"<(?P<xml>/?)(?:seed:)?(?:think|thinking|thought|thoughts|reasoning)>|\[(?P<square>/?)THINK\]"
    r"|◁(?P<triangle>/?)think▷|<\|(?P<token>begin|end)_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAGS = ("<answer>", "</answer>")
_TAGS = (_ANSWER_TAGS, ("<correct_answer>", "</correct_answer>"), ("<|answer_start|>", "<|answer_end|>"))
_HEADER = "### The final answer is:"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# "answer: 5", "the answer is 5", "the answer to the question is 5"; the last such words of a line count
_ANSWER_WORD = re.compile(r"(?<![</|_])\banswer\b|答案", re.IGNORECASE)
_ANSWER_TAIL = re.compile(
    r"(?:\s+(?:to|of|for)\b.*?\bis\b|\s+(?:is|(?:would|must|should) be)\b|是|为)?\s*[:=：]?\s*(\S.*)$", re.IGNORECASE
)

# ---- finding --------------------------------------------------------------------------------------------------------


def reply_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the parts of a completion that are its reply: what stands outside of the thinking.

    Thinking is `<think> .. </think>` (also thinking, thought, reasoning, [THINK], ◁think▷ and other marks in use). A
    template may have opened it, so everything before a closing mark that nothing opened is thinking; one that is not
    closed, since the completion was cut, goes to the end.
    """
    spans: list[tuple[int, int]] = []
    start, opened = 0, False
    for tag in _THINKING_TAG.finditer(text):
        closing = tag.group("xml", "square", "triangle").count("/") > 0 or (tag["token"] or "").lower() == "end"
        if closing and not opened:
            spans.clear()
        elif not closing and not opened:
            spans.append((start, tag.start()))
        opened = not closing
        if closing:
            start = tag.end()
    if not opened:
        spans.append((start, len(text)))
    return spans


def without_thinking(text: str) -> str:
    """The reply of a completion, see `reply_spans`: the one step that comes before anything is read out of it."""
    return "".join(text[start:end] for start, end in reply_spans(text))


def extract_answer(text: str) -> str | None:
    r"""The final answer that a completion states outside of its thinking, or None when it states none.

    The first of these forms that is there and not empty, each time its last occurrence:
    1. `<answer>..</answer>`, `<correct_answer>..</correct_answer>`, `<|answer_start|>..<|answer_end|>`
    2. what follows `### The final answer is:`, up to the next `###`
    3. `\boxed{..}` or `\fbox{..}` with balanced braces
    4. a last line with `answer: X`, `the answer is X`, `the answer to .. is X`, `答案：X`
    A box inside 1, 2 or 4 is opened.
    """
    reply = without_thinking(text)
    for find_form in (_tagged, _after_header, boxed, _last_line):
        answer = find_form(reply)
        if answer is not None and answer.strip():
            return unboxed(answer)
    return None


def unboxed(answer: str) -> str:
    """An answer without the box that it may stand in."""
    inner = boxed(answer)
    return (answer if inner is None else inner).strip()


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{..}` or `\fbox{..}` whose braces balance, None without one."""
    end = len(text)
    for box in reversed(list(_BOX.finditer(text))):
        depth = 0
        for i in range(box.end(), end):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[box.end() + 1 : i]
        end = box.start()
    return None


def answer_in_tags(reply: str) -> str | None:
    """The text in the last closed `<answer>..</answer>` of a reply, None without one."""
    return _inside(reply, *_ANSWER_TAGS)


def _tagged(text: str) -> str | None:
    return next((answer for tags in _TAGS if (answer := _inside(text, *tags)) is not None), None)


def _inside(text: str, opening: str, closing: str) -> str | None:
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    return text[start + len(opening) : text.index(closing, start)] if start >= 0 else None


def _after_header(text: str) -> str | None:
    _, header, rest = text.rpartition(_HEADER)
    return rest.partition("###")[0] if header else None


def _last_line(text: str) -> str | None:
    line = final_line(text).replace("*", "")
    for word in reversed(list(_ANSWER_WORD.finditer(line))):
        stated = _ANSWER_TAIL.match(line, word.end())
        if stated:
            return stated.group(1).strip().removesuffix(".").removesuffix("。")
    return None


def final_line(text: str) -> str:
    """The last line of the reply that is not blank."""
    return without_thinking(text).rstrip().rpartition("\n")[2]


# ---- normal form ----------------------------------------------------------------------------------------------------

_SPACES = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "\\(", "\\)", "\\[", "\\]", "**")
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x2212: 0x2D}
_WRAPPER_OR_BRACE = re.compile(
    r"(\\(?:text(?:bf|it|rm|sf|tt|sc|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname\*?)\s*+\{)|(?<!\\)[{}]"
)
_EMPTY_SET = re.compile(r"\\(?:varnothing|emptyset)(?![a-zA-Z])|∅|\\\{\s*\\\}")
# "1,234", "1\,234" and "1{,}234" group the digits of one number; "1, 234" is a list
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\\,|\\!|\{,\})\d{3})+)(?!\d)")
_GROUPED_BY_COMMA = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)[eE]([+-]?\d+)")
# A number with a larger exponent is not spelt out.
_LARGEST_EXPONENT = 999


def normalise(answer: str) -> str:
    r"""A form in which equal answers are usually equal strings; different answers stay different.

    Case, outer and repeated spaces, spaces around signs, full-width characters, `$`, LaTeX spacing, `\text{..}` and
    its like, a final full stop, grouped digits of a number (1,234 and 1\,234), powers of ten (1.2e3), zeros that say
    nothing (007, 5.0, .50), fractions of plain numbers (`\frac12` is 1/2, `1\frac12` is 1 1/2), the empty set.
    Units, percent signs and algebra are left alone.
    """
    text = answer.translate(FULL_WIDTH).replace("\\%", "%").replace("\\$", "")
    text = _EMPTY_SET.sub("∅", text)
    text = _GROUPED.sub(lambda m: m.group(1) + re.sub(r"\D", "", m.group(2)), text)
    for token in _SPACES:
        text = re.sub(re.escape(token) + r"(?![a-z])", " ", text) if token[-1].isalpha() else text.replace(token, " ")
    text = unwrapped(text)
    # A digit before a fraction makes a mixed number, not a product.
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))", _fraction, text)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = " ".join(text.split()).removesuffix(".").lower()
    if _GROUPED_BY_COMMA.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r" ?([^\w\s∅]) ?", r"\1", text)
    power = _SCIENTIFIC.fullmatch(text)
    if power and len(power.group(2)) < 6 and abs(int(power.group(2))) <= _LARGEST_EXPONENT:
        text = format(Decimal(power.group(1)).scaleb(int(power.group(2))), "f")
    number = _NUMBER.fullmatch(text)
    return _plain_number(*number.groups("")) if number and any(number.groups("")[1:]) else text


def unwrapped(text: str) -> str:
    r"""The text with the content of `\text{..}`, `\mathrm{..}` and their like in place of them, however nested."""
    opened: list[re.Match[str]] = []
    dropped: list[tuple[int, int]] = []
    for mark in _WRAPPER_OR_BRACE.finditer(text):
        if mark[0] != "}":
            opened.append(mark)
        elif opened and (opening := opened.pop())[1]:
            dropped += [opening.span(), mark.span()]
    kept, done = [], 0
    for start, end in sorted(dropped):
        kept.append(text[done:start])
        done = end
    return "".join([*kept, text[done:]])


def _fraction(match: re.Match[str]) -> str:
    top, bottom = match.group(1) or match.group(3), match.group(2) or match.group(4)
    return f"{top}/{bottom}"


def _plain_number(sign: str, whole: str, part: str) -> str:
    digits = (whole.lstrip("0") or "0") + ("." + part.rstrip("0") if part.rstrip("0") else "")
    return ("-" if sign == "-" and digits != "0" else "") + digits


# ---- equality -------------------------------------------------------------------------------------------------------

_QUANTITY = re.compile(r"([+-]?[\d./]+)(?: ?([a-zµμ°%][a-zµμ°²³^/0-9]*))?")
_UNITS = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm",
    "kilometer": "km", "kilometre": "km", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l",
    "milliliter": "ml", "millilitre": "ml", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h",
    "inch": "in", "foot": "ft", "feet": "ft", "degree": "°", "dollar": "usd", "cent": "¢",
}  # fmt: skip
_BASED = re.compile(r"([0-9a-z]+)_(?:\{(\d+)\}|(\d+))")
_BOUND = r"(-?(?:\d+(?:\.\d+)?(?:/\d+)?|\\infty))"
_SIGNS = {
    "\\geq": ">=", "\\ge": ">=", "\\geqslant": ">=", "≥": ">=", "\\leq": "<=", "\\le": "<=", "\\leqslant": "<=",
    "≤": "<=", "\\gt": ">", "\\lt": "<",
}  # fmt: skip
_ONE_SIDED = re.compile(rf"[a-z](>=|<=|>|<){_BOUND}")
_TWO_SIDED = re.compile(rf"{_BOUND}(<=|<)[a-z](<=|<){_BOUND}")


def compare(answer: str, reference: str) -> bool | None:
    """True for equal answers, False for different ones, None where their texts do not tell and only algebra can.

    Plain numbers are compared exactly. A unit on one side alone does not count, two different units differ. Digits
    with a base, such as 101_2, have the value that they spell. Inequalities equal their intervals.
    """
    a, b = normalise(answer), normalise(reference)
    if a == b:
        return True
    if _SCIENTIFIC.fullmatch(a) or _SCIENTIFIC.fullmatch(b):
        # A number too large to spell out equals itself alone.
        return False
    if _number(a) is not None and _number(b) is not None:
        return _number(a) == _number(b)
    for decide in (_compare_based, _compare_quantities, _compare_intervals):
        verdict = decide(a, b)
        if verdict is not None:
            return verdict
    return None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text) if _NUMBER.fullmatch(text) else None
    except InvalidOperation:
        return None


def _compare_based(a: str, b: str) -> bool | None:
    if not (_BASED.fullmatch(a) or _BASED.fullmatch(b)):
        return None
    values = _integer(a), _integer(b)
    return None if None in values else values[0] == values[1]


def _integer(text: str) -> int | None:
    """The value of digits with or without a base, None where they are none or there is no such base."""
    based = _BASED.fullmatch(text)
    digits, base = (based.group(1), int(based.group(2) or based.group(3))) if based else (text, 10)
    try:
        return int(digits, base) if 2 <= base <= 36 and len(digits) < 1000 else None
    except ValueError:
        return None


def _compare_quantities(a: str, b: str) -> bool | None:
    one, other = _QUANTITY.fullmatch(a), _QUANTITY.fullmatch(b)
    if one is None or other is None:
        return None
    units = _unit(one.group(2)), _unit(other.group(2))
    if "%" in units:
        # A percentage is another number without its sign.
        return None
    if one.group(1) != other.group(1):
        return None
    return units[0] == units[1] or not all(units)


def _unit(name: str | None) -> str:
    """One spelling for each unit, "" without one."""
    if not name:
        return ""
    singular = name.removesuffix("s") if len(name) > 2 else name
    return _UNITS.get(name, _UNITS.get(singular, singular))


def _compare_intervals(a: str, b: str) -> bool | None:
    one = _interval(a)
    return True if one is not None and one == _interval(b) else None


def _interval(text: str) -> str | None:
    r"""`[3,\infty)` of an inequality in one letter or of an interval, None of anything else."""
    text = re.sub(r"^[a-z]\\in(?![a-z])", "", text)
    for sign, plain in sorted(_SIGNS.items(), key=lambda item: -len(item[0])):
        text = text.replace(sign, plain)
    text = text.replace(" ", "").replace("∞", "\\infty")
    one = _ONE_SIDED.fullmatch(text)
    if one:
        sign, bound = one.groups()
        if sign[0] == ">":
            return f"{'[' if sign == '>=' else '('}{bound},\\infty)"
        return f"(-\\infty,{bound}{']' if sign == '<=' else ')'}"
    two = _TWO_SIDED.fullmatch(text)
    if two:
        low, left, right, high = two.groups()
        return f"{'[' if left == '<=' else '('}{low},{high}{']' if right == '<=' else ')'}"
    return text if re.fullmatch(rf"[\[(]{_BOUND},\+?{_BOUND}[\])]", text) else None


# ---- choices --------------------------------------------------------------------------------------------------------

_LETTER_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LETTER_FIRST = re.compile(r"\s*\(?([A-Z])[.):]\s+")
_LETTER_SAID = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s++is)?+\s*+[:=]?+\s*+(?:option\s++)?+\(?+([A-Z])\b(?!')", re.IGNORECASE
)
_LETTER_MARKED = re.compile(r"\(([A-Za-z])\)|(?<!\S)([A-Z])[.):](?!\S)")


def choice_letter(text: str, options: Sequence[str] | None = None) -> str | None:
    """The option that `text` chooses, as a capital letter; None when it chooses none or several.

    Looks, in this order, for: a lone letter or exactly an option, its text with or without its letter; a stated
    `answer is A`; `(A)`, `A.`, `A)`, `A:` anywhere; the text of an option inside. The first form that occurs decides.

    Args:
        options: their texts, with or without the letter in front; None allows every letter and looks for no text.
    """
    text = unwrapped(text.translate(FULL_WIDTH))
    texts = None if options is None else [option_text(o) for o in options]
    letters_of_options = string.ascii_uppercase[: 26 if texts is None else len(texts)]
    for form in (_whole, _said, _marked, _contained):
        letters = {x for x in form(text, texts or []) if x in letters_of_options}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def option_text(option: str) -> str:
    """The normal form of an option without the letter in front of it."""
    return normalise(_LETTER_FIRST.sub("", option, count=1) if _LETTER_FIRST.match(option) else option)


def _whole(text: str, texts: Sequence[str]) -> list[str]:
    alone, first = _LETTER_ALONE.fullmatch(text), _LETTER_FIRST.match(text)
    same = [string.ascii_uppercase[i] for i, t in enumerate(texts[:26]) if t == option_text(text)]
    letters = [alone.group(1)] if alone else [first.group(1)] if first and same else []
    return same + [x.upper() for x in letters]


def _said(text: str, texts: Sequence[str]) -> list[str]:
    # Only the words are free in case: "the answer is a cat" names no option
    return [x for x in _LETTER_SAID.findall(text.replace("*", "")) if x.isupper()]


def _marked(text: str, texts: Sequence[str]) -> list[str]:
    return [(a or b).upper() for a, b in _LETTER_MARKED.findall(text)]


def _contained(text: str, texts: Sequence[str]) -> list[str]:
    inside = normalise(text)
    hits = [i for i, t in enumerate(texts[:26]) if t and re.search(rf"(?<!\w){re.escape(t)}(?!\w)", inside)]
    # "cat" inside "black cat" is not a second choice
    longest = [i for i in hits if not any(texts[i] != texts[j] and texts[i] in texts[j] for j in hits)]
    return [string.ascii_uppercase[i] for i in longest]

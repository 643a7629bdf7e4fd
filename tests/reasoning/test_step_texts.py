import json
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verbs import run_verb

from mmrl.reasoning.annotate.judge import paragraphs
from mmrl.reasoning.step_texts import (
    Layout,
    ParsedStep,
    StepParseError,
    join,
    merge,
    parse,
    read_numbered_tags,
)
from mmrl.reasoning.tags import between
from vision.inputs.step_rule import step_rule, token_texts

SPECIAL = (
    "<|reasoning_start|><|reasoning_step_start|><|reasoning_step_name_start|>Look<|reasoning_step_name_end|>"
    "<|reasoning_step_thought_start|>Two dots.<|reasoning_step_thought_end|>"
    "<|reasoning_step_reflection_start|>Sure.<|reasoning_step_reflection_end|><|reasoning_step_end|>"
    "<|reasoning_proceed|><|reasoning_step_start|><|reasoning_step_name_start|>Add<|reasoning_step_name_end|>"
    "<|reasoning_step_thought_start|>1 + 1 = 2<|reasoning_step_thought_end|><|reasoning_step_end|><|reasoning_end|>"
    "<|answer_start|>2<|answer_end|>"
)
SECTIONED = (
    "[Visual Elements]\n<step_1>\nA ring.\n</step_1>\n<step_2>\nA dot.\n</step_2>\n\n"
    "[Reasoning]\n<step_1>\nThe dot is inside.\n</step_1>\n\n<correct_answer>\nB\n</correct_answer>"
)
HEADERS = (
    "### Image Description:\nA ring.\n\n### Rationales:\nCount.\n\n### Let's think step by step.\n\n"
    "### Step 1:\nOne ring.\n\n### Step 2:\nNo more.\n\n### The final answer is: 1"
)
P, R, A, F, U = "perception", "reasoning", "answer", "reflection", "unknown"

# text in the format's own layout, then (text, kind) of its steps
WORKED = {
    "double_newline": ("\n\na = 1\n\n \n\n- b + c\nd\n\n", [("\n\na = 1", U), (" \n\n- b + c\nd\n\n", U)]),
    "newline": ("a = 1\n - b\t\nc", [("a = 1", U), (" - b\t", U), ("c", U)]),
    "numbered": (
        "Think.\nStep 1: by Step 1: a\n\nb\nStep 2: c\n†Answer: 7",
        [("Think.", U), ("Step 1: by Step 1: a\n\nb", R), ("Step 2: c", R), ("†Answer: 7", A)],
    ),
    "tags": ("<step>a\nb</step>\n<step>c < d</step>\n<answer>7</answer>", [("a\nb", R), ("c < d", R), ("7", A)]),
    "sectioned_tags": (SECTIONED, [("A ring.", P), ("A dot.", P), ("The dot is inside.", R), ("B", A)]),
    "headers": (HEADERS, [("A ring.", P), ("Count.", R), ("One ring.", R), ("No more.", R), ("1", A)]),
    "special_tokens": (SPECIAL, [("Two dots.", R), ("Sure.", F), ("1 + 1 = 2", R), ("2", A)]),
    "paragraph_tags": ("<paragraph_0>\na\n</paragraph_0>\n\n<paragraph_1>\nb\n</paragraph_1>", [("a", U), ("b", U)]),
}


@pytest.mark.parametrize("format", get_args(Layout))
def test_worked_texts_are_parsed_and_joined_exactly(format):
    text, want = WORKED[format]
    steps = parse(text, format)
    assert [(s.text, s.kind) for s in steps] == want
    assert [s.index for s in steps] == list(range(len(want)))
    assert all(text[slice(*s.char_span)] == s.text for s in steps)
    assert join(steps, format) == text


def test_sections_and_names_are_kept():
    assert [s.section for s in parse(SECTIONED, "sectioned_tags")] == ["Visual Elements"] * 2 + ["Reasoning", None]
    assert [s.name for s in parse(HEADERS, "headers")][1:4] == ["Rationales", "Step 1", "Step 2"]
    special = parse(SPECIAL, "special_tokens")
    assert [(s.section, s.name) for s in special] == [("step 1", "Look")] * 2 + [("step 2", "Add"), (None, None)]


def test_inline_numbers_and_order_within_a_section():
    steps = parse("Step 1: a from Step 3: no. Step 2: b", "numbered")
    assert [s.text for s in steps] == ["Step 1: a from Step 3: no.", "Step 2: b"]
    swapped = SECTIONED.replace("step_1>\nA ring.\n</step_1", "step_9>\nA ring.\n</step_9").replace("step_2", "step_1")
    assert [s.text for s in parse(swapped.replace("step_9", "step_2"), "sectioned_tags")][:2] == ["A dot.", "A ring."]


@pytest.mark.parametrize("format, text, message", [
    ("double_newline", " \n\n ", "no step"),
    ("newline", "\n", "no step"),
    ("numbered", "a\nb", "no `Step 1:`"),
    ("numbered", "Step 1: a\nStep 3: b", "Step 3 follows Step 1"),
    ("numbered", "Step 2: a\nStep 1: b", "Step 2 follows Step 0"),
    ("numbered", "Step 1:\nStep 2: b", "Step 1 is empty"),
    ("numbered", "Step 1: a\n†Answer: 7\nStep 2: b", "after the answer"),
    ("tags", "<step>a</step>", "one <answer>"),
    ("tags", "<answer>7</answer>", "one or more <step>"),
    ("tags", "<answer>7</answer><step>a</step>", "and then one"),
    ("tags", "<step> </step><answer>7</answer>", "is empty"),
    ("sectioned_tags", SECTIONED.replace("[Visual Elements]", ""), "Visual Elements"),
    ("sectioned_tags", SECTIONED.replace("[Reasoning]", ""), "Reasoning"),
    ("sectioned_tags", SECTIONED.replace("correct_answer", "answer"), "correct_answer"),
    ("sectioned_tags", SECTIONED.replace("</step_2>", "</step_3>").replace("</step_1>\n\n", "</step_7>"), r"\[Reasoning\] has no step"),
    ("sectioned_tags", SECTIONED.replace("step_2", "step_3"), "without gaps"),
    ("headers", HEADERS.replace("### Image Description:\nA ring.\n\n", ""), "Image Description first"),
    ("headers", HEADERS.rsplit("\n\n", 1)[0], "The final answer is last"),
    ("headers", HEADERS.replace("Step 2", "Step 3"), "without gaps"),
    ("headers", "hello\n" + HEADERS, "before the first header"),
    ("special_tokens", SPECIAL.replace("<|answer_end|>", ""), "answer_end"),
    ("special_tokens", SPECIAL.replace("thought", "other"), "needs a name and a thought"),
    ("paragraph_tags", "no tag", "no step"),
    ("paragraph_tags", "<paragraph_0>a</paragraph_0><paragraph_0>b</paragraph_0>", "twice"),
])  # fmt: skip
def test_responses_that_lack_a_part_are_errors(format, text, message):
    with pytest.raises(StepParseError, match=message):
        parse(text, format)


def test_mixed_closing_tags_do_not_match():
    assert read_numbered_tags("<step_1>a</step_2> <step_3>b</step_3>", "step") == {3: "b"}


@pytest.mark.parametrize(
    "format", ["numbered", "tags", "sectioned_tags", "headers", "special_tokens", "paragraph_tags"]
)
def test_a_marker_inside_a_step_is_refused(format):
    text, _ = WORKED[format]
    steps = parse(text, format)
    other = steps[1]
    bad = ParsedStep(f"{other.text}\n{text}", 1, other.kind, (0, 0), other.section, other.name)
    with pytest.raises(ValueError):
        join([steps[0], bad, *steps[2:]], format)


def test_unknown_formats_name_the_known():
    for call in (lambda: parse("a", "lines"), lambda: join(parse("a", "newline"), "lines")):
        with pytest.raises(ValueError, match="known: double_newline"):
            call()
    with pytest.raises(ValueError, match="no steps"):
        join([], "tags")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab \n+-<>", max_size=40))
def test_double_newline_gives_back_every_text(text):
    if not text.strip():
        return
    steps = parse(text, "double_newline")
    assert join(steps, "double_newline") == text
    assert all(s.text.strip() and text[slice(*s.char_span)] == s.text for s in steps)
    for max_steps in (1, 2, 3):
        merged = merge(steps, max_steps)
        assert len(merged) <= max_steps and join(merged, "double_newline") == text
        assert all(text[slice(*s.char_span)] == s.text for s in merged)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(alphabet="ab +-<>\u043a\u0438\n", min_size=1, max_size=12).map(str.strip).filter(bool),
        min_size=1,
        max_size=5,
    )
)
def test_tagged_formats_give_back_their_steps(texts):
    for format, kinds in (("tags", [R]), ("sectioned_tags", [P, R]), ("paragraph_tags", [])):
        steps = [ParsedStep(t, i, k, (0, 0)) for i, (k, t) in enumerate((k, t) for k in kinds or [U] for t in texts)]
        if kinds:
            steps.append(ParsedStep("7", len(steps), A, (0, 0)))
        read = parse(join(steps, format), format)
        assert [(s.text, s.kind, s.index) for s in read] == [(s.text, s.kind, s.index) for s in steps]


pieces = [*WORKED["headers"][0].split("\n"), *SECTIONED.split("\n"), *SPECIAL.replace("|>", "|>\n").split("\n")]
pieces += [
    "Step 1:",
    "\nStep 2:",
    "\n†Answer: 7",
    "<step>",
    "</step>",
    "<answer>7</answer>",
    "<paragraph_1>",
    "</paragraph_1>",
]
pieces += ["Step " + "9" * 5000 + ":", "<step_" + "9" * 5000 + ">", " ", "\n", "\n\n", "a"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(pieces), max_size=14), st.sampled_from(["", "\n"]))
def test_shuffled_markers_are_steps_or_a_parse_error(chosen, glue):
    text = glue.join(chosen)
    for format in get_args(Layout):
        try:
            steps = parse(text, format)
        except StepParseError:
            continue
        assert all(s.text.strip() and text[slice(*s.char_span)] == s.text for s in steps)
        assert [s.text for s in parse(join(steps, format), format)] == [s.text for s in steps]


@pytest.mark.parametrize("count, max_steps, want", [(13, 12, 7), (24, 12, 12), (25, 12, 9), (3, 12, 3), (0, 12, 0)])
def test_merge_by_hand(count, max_steps, want):
    steps = parse("\n\n".join("abcdefghijklmnopqrstuvwxyz"[:count]), "double_newline") if count else []
    assert len(merge(steps, max_steps)) == want


def test_merge_keeps_what_a_group_shares():
    merged = merge(parse(SECTIONED, "sectioned_tags"), 2)
    assert [(s.text, s.kind, s.section) for s in merged] == [
        ("A ring.\n\nA dot.", P, "Visual Elements"),
        ("The dot is inside.\n\nB", U, None),
    ]
    with pytest.raises(ValueError, match="max_steps=0"):
        merge(merged, 0)


def test_judges_are_matched_by_index():
    shown = paragraphs(["a", "b", "c"])
    assert [s.text for s in parse(shown, "paragraph_tags")] == ["a", "b", "c"]
    critique = "<analysis_2>c is fine</analysis_2> then <analysis_0>\na is fine\n</analysis_0>"
    assert read_numbered_tags(critique, "analysis") == {0: "a is fine", 2: "c is fine"}
    assert [s.index for s in parse("<paragraph_4>x</paragraph_4><paragraph_1>y</paragraph_1>", "paragraph_tags")] == [
        1,
        4,
    ]


# --- StepRule ---


CORPUS = [
    "Step 1: a b.\nStep 2: c\n\nd.\n\n",
    "<step>a</step>\n<step_2>b</step_2><answer>c</answer>",
    "\n\n\n a: b>\n",
] * 3


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges across anything
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=["<|sep|>"]
    )


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "[UNK]",
        "a",
        "b",
        "Step",
        "1",
        ":",
        "\n",
        "\n\n",
        ".\n",
        "\nb",
        "</step>",
        "x>",
        ".\n\nb",
        "\n\n\n",
        ":\n",
    ]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", eos_token="<eos>", additional_special_tokens=["<|sep|>"]
    )


RULES = ("line", "blank_line", "numbered", "tag", "special_token")
TOKENIZERS = {"bytes": byte_level(), "words": word_level()}
RULE = {
    (n, r): step_rule(t, {"name": "special_token", "token": "<|sep|>"} if r == "special_token" else r)
    for n, t in TOKENIZERS.items() for r in RULES if (n, r) != ("words", "numbered")
}  # fmt: skip


def encode(text, name="bytes"):
    return TOKENIZERS[name].encode(text, add_special_tokens=False)


def texts_of_steps(rule, text):
    ids = encode(text)
    return [TOKENIZERS["bytes"].decode(ids[a:b]) for a, b in RULE["bytes", rule].split_ids(ids)]


@pytest.mark.parametrize("rule, pieces", [
    ("line", ["x = 1\n", "y\n", "z"]),
    ("line", ["\n\n x\n", "y"]),
    ("blank_line", ["x\ny\n\n", "z\n"]),
    ("numbered", ["Step 1: x\nStep 2:", " y\nand Step 9: z\nStep 10:", " w"]),
    ("numbered", ["Hm.\nStep 1:", " x"]),
    ("tag", ["<step>x</step>", "\n<step_2>y > z</step_2>", "\n<answer>1</answer>"]),
    ("tag", ["</step></step> x</step>", "y"]),
    ("special_token", ["x\n\n<|sep|>", "<|sep|> y <|sep|>", "z"]),
])  # fmt: skip
def test_rules_by_hand_on_single_bytes(rule, pieces):
    """One id per byte and no merge that runs over a separator: the spans are the texts."""
    tokenizer = TOKENIZERS["bytes"]
    whole, ids, spans = "".join(pieces), [], []
    for part in pieces:
        start = len(ids)
        for i, run in enumerate(part.split("<|sep|>")):
            ids += [tokenizer.convert_tokens_to_ids("<|sep|>")] if i else []
            ids += [encode(c)[0] for c in run]
        spans.append((start, len(ids)))
    assert tokenizer.decode(ids) == whole
    assert RULE["bytes", rule].split_ids(ids) == spans


def test_a_token_that_runs_over_the_separator_stays_whole():
    tokenizer, rule = TOKENIZERS["words"], RULE["words", "line"]
    ids = tokenizer.convert_tokens_to_ids(["\n\n", "a", "\nb", "\nb", "a", ".\n\nb", "\n"])
    # \nb first brings no separator after content, .\n\nb does; the last \n is a step without content
    assert rule.split_ids(ids) == [(0, 3), (3, 6), (6, 7)]
    assert rule.is_blank(ids[6:]) and not rule.is_blank(ids[3:6])
    blank = RULE["words", "blank_line"]
    # this decoder writes a space between tokens, so two \n tokens are no blank line, but one token can be
    ids = tokenizer.convert_tokens_to_ids(["a", "\n", "\n", "\n\n\n", "\n\n", "b"])
    assert blank.split_ids(ids) == [(0, 4), (4, 6)]


def test_eos_is_no_content():
    rule, eos = RULE["bytes", "line"], TOKENIZERS["bytes"].eos_token_id
    ids = [*encode("x"), *encode("\n"), eos]
    assert rule.split_ids(ids) == [(0, 2), (2, 3)]
    assert rule.is_blank(ids[2:]) and not rule.is_blank(ids[:2])


ids_of = {n: st.lists(st.integers(0, len(t) - 1), max_size=30) for n, t in TOKENIZERS.items()}
near = st.text(alphabet="\n\n Step12:</>a", max_size=40).map(encode)


@settings(max_examples=150, deadline=None)
@given(st.one_of(near, ids_of["bytes"]), ids_of["words"])
def test_spans_tile_and_are_those_of_token_by_token_use(from_bytes, from_words):
    for (name, _), rule in RULE.items():
        ids = from_bytes if name == "bytes" else from_words
        naive, start = [], 0
        for end in range(1, len(ids) + 1):
            if rule.ends_step(ids[start:end]):
                assert rule.candidates[ids[end - 1]]
                assert not rule.is_blank(ids[start:end])
                naive.append((start, end))
                start = end
        naive += [(start, len(ids))] if start < len(ids) else []
        assert rule.split_ids(ids) == naive
        assert [t for a, b in naive for t in range(a, b)] == list(range(len(ids)))


def test_ends_are_where_the_text_says():
    """Against the decoded text: a line step holds one line end after its content, in the span's last token."""
    texts = token_texts(TOKENIZERS["bytes"])
    for text in CORPUS:
        ids = encode(text)
        spans = RULE["bytes", "line"].split_ids(ids)
        assert "".join(texts[i] for i in ids) == text
        for a, b in spans[:-1]:
            assert "\n" in texts[ids[b - 1]]
            assert "\n" not in "".join(texts[i] for i in ids[a : b - 1]).lstrip()


def test_leading_spaces_survive_a_sentencepiece_decoder():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁a": 1, "<0x0A>": 2, "Step": 3, "▁1": 4, ":": 5, "<0xE4>": 6, "a": 7}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert token_texts(tokenizer)[1:6] == [" a", "\n", "Step", " 1", ":"]
    rule = step_rule(tokenizer, "numbered")
    assert rule.split_ids([1, 2, 3, 4, 5, 1]) == [(0, 5), (5, 6)]
    assert step_rule(tokenizer, "line").split_ids([6, 2, 1]) == [(0, 2), (2, 3)]  # a broken character, then a line end


def test_wider_logits_and_wrong_settings():
    tokenizer = TOKENIZERS["bytes"]
    size = len(tokenizer)
    rule = step_rule(tokenizer, "line", size + 7)
    assert rule.candidates.shape == (size + 7,)
    assert not rule.ends_step([size + 3, *encode("\n")])
    for steps, width, message in (
        ("lines", None, r"unknown step rule 'lines' \(did you mean line\?\)"),
        ("line", 3, "width of the logits"),
        ("special_token", None, "policy.steps.token is missing; it has no default"),
        ({"name": "special_token", "token": "<none>"}, None, "no token of this tokenizer"),
        ({"name": "special_token", "tokn": "x"}, None, r"unknown key policy.steps.tokn='x' \(did you mean token\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            step_rule(tokenizer, steps, width)


def test_a_vocabulary_without_the_separator_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="never end a step"):
        step_rule(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), "line")


# --- as a record format ---


def test_responses_become_solutions_and_back(tmp_path):
    from mmrl.reasoning.formats import read_format

    source = tmp_path / "responses.jsonl"
    rows = [{"id": "a", "question": "How many?", "response": WORKED["tags"][0], "answer": "2"},
            {"id": "b", "question": "How many?", "response": "no step here"}]  # fmt: skip
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records, again_file = tmp_path / "records.jsonl", tmp_path / "back.jsonl"
    form = "{name: responses, steps: tags}"
    told = run_verb("convert", source, records, "--format", form, "--max-bad", "0.5")
    assert "1 rows, 1 set aside" in told
    (record,), _ = read_format(tmp_path / "records.jsonl", "records", unlabelled=True)
    assert [(s.text, s.kind) for s in record.steps] == WORKED["tags"][1] and record.answer == "2"
    run_verb("convert", records, again_file, "--format", "records", "--to", form)
    again = json.loads(again_file.read_text())
    assert again["response"] == WORKED["tags"][0] and again["question"] == "How many?"
    merged, _ = read_format(source, {"name": "responses", "max_steps": 1}, unlabelled=True)
    assert [len(r.steps) for r in merged] == [1, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "x", "\n"]), max_size=12).map("".join))
def test_parts_between_marks_are_those_of_the_pattern(text):
    found = [(name, text[slice(*span)]) for name, span in between(text, "<([ab])>", "</([ab])>")]
    assert found == re.findall(r"(?s)<([ab])>(.*?)</\1>", text)

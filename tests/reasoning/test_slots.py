"""Slots: one per step, recorded while ids are joined, whatever the texts hold (numbers: prm.md, A2)."""

import functools
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.reasoning.slots import IGNORED, SlotError, SlotIds, StepFormat, lay_out, slot_ids
from mmrl.rollout import Prompt
from mmrl.scorers.labelled import solution_forest
from vision.inputs.loading import load_model
from vision.inputs.options import PolicyOptions
from vision.prm import VisionPrm

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder, make, tokenizer_for

SEP = SlotIds((), (9,), -1)
RESERVED = ("<prm>", "<image>", "<|image_pad|>")
NASTY = (*RESERVED, "+", "-", "ки", " ки", "x+", "1 - 2 = ", "\n", "\n\n", "a", " ", "é", "答")


# ---- the layout ------------------------------------------------------------------------------------------------


def test_worked_example_of_ids_and_labels():
    out = lay_out([10, 11], [[20, 21], [30]], SEP, [1, 0], bos=1)
    assert out.ids == [1, 10, 11, 20, 21, 9, 30, 9]
    assert out.label_row == [IGNORED] * 5 + [1, IGNORED, 0]
    assert out.slots == [5, 7] and out.starts == [3, 6, 8] and out.dropped == 0


def test_last_only_keeps_the_label_of_the_last_step_that_fits():
    assert lay_out([10], [[20], [30], [40]], SEP, [1, 0, 1], last_only=True).labels == [None, None, 1]
    cut = lay_out([10], [[20], [30], [40]], SEP, [1, 0, 1], last_only=True, max_length=5)
    assert cut.labels == [None, 0] and cut.dropped == 1


@pytest.mark.parametrize("length, steps", [(3, 1), (4, 1), (5, 2), (7, 2), (8, 3), (100, 3)])
def test_truncation_drops_whole_steps_with_their_labels(length, steps):
    """Labels computed before, markers cut after: shifted labels (vl_prm.md, 11.8)."""
    out = lay_out([10], [[20], [30], [40, 41]], SEP, [0.9, 0.5, 0.25], max_length=length)
    assert len(out.slots) == len(out.labels) == steps and out.dropped == 3 - steps
    assert len(out.ids) <= length and out.starts[-1] == len(out.ids)
    assert out.labels == [0.9, 0.5, 0.25][:steps]
    assert [out.ids[s] for s in out.slots] == [9] * steps


def test_labels_stay_floats_and_none_stays_none():
    """int() cuts 0.9 to 0; a bool column turns -100 into True (vl_prm.md, 11.3 and 11.4)."""
    out = lay_out([10], [[20], [30], [40]], SEP, [0.9, None, True])
    assert out.labels == [0.9, None, True]
    assert out.label_row == [IGNORED, IGNORED, 0.9, IGNORED, IGNORED, IGNORED, 1.0]
    assert lay_out([10], [[20]], SEP).labels == [None]


@pytest.mark.parametrize(
    "steps, labels, length, message",
    [([], None, None, "has no step"), ([[1], []], None, None, "step 1 is empty"),
     ([[1]], [1, 0], None, "2 labels for 1 steps"), ([[1, 2]], None, 3, "the first step do not fit")],
)  # fmt: skip
def test_what_cannot_be_laid_out(steps, labels, length, message):
    with pytest.raises(SlotError, match=message):
        lay_out([10], steps, SEP, labels, max_length=length)


def test_a_marker_equal_to_padding_or_in_the_question_is_no_slot():
    """Slots are positions, never found by id (prm.md, convention 4)."""
    out = lay_out([9, 10, 9], [[9, 20], [30, 9, 9]], SEP)
    assert out.slots == [5, 9] and len(out.ids) == 10
    padded = out.ids + [9] * 4
    assert [padded[s] for s in out.slots] == [9, 9]


@pytest.mark.parametrize("offset, slots", [(0, [4, 8]), (-1, [3, 7])])
def test_read_offset(offset, slots):
    """Labels sit on the marker, scores are read there or one before (prm.md, convention 3)."""
    words = {"<e>": [9], ", ": [7]}
    format = slot_ids(StepFormat("<e>", ", ", read_offset=offset), words.__getitem__)
    out = lay_out([10, 11], [[20, 21], [30, 31]], format, [1, 0])
    assert out.ids == [10, 11, 20, 21, 9, 7, 30, 31, 9]
    assert out.slots == slots and [i for i, y in enumerate(out.label_row) if y != IGNORED] == [4, 8]


def test_turns_read_the_last_token_before_the_answer():
    """Not at the answer token, which gives the distribution of what follows it (vl_prm.md, 11.2)."""
    words = {"+": [1], "-": [2], "<e>a:": [50, 51], "<e>u:": [60, 61]}
    turns = StepFormat("+", markers="turns", read_offset=-1, positive="+", negative="-")
    out = lay_out([10], [[20], [30]], slot_ids(turns, words.__getitem__, "<e>u:", "<e>a:"))
    assert out.ids == [10, 20, 50, 51, 1, 60, 61, 30, 50, 51, 1]
    assert [out.ids[s] for s in out.slots] == [51, 51] and [out.ids[s + 1] for s in out.slots] == [1, 1]


def test_without_a_marker_the_last_token_of_the_step_is_read():
    format = slot_ids(StepFormat("", "\n"), lambda text: [ord(c) for c in text])
    out = lay_out([1], [[20, 21], [30]], format)
    assert out.ids == [1, 20, 21, 10, 30] and [out.ids[s] for s in out.slots] == [21, 30]


# ---- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [({"read_offset": 1}, "read_offset=1"), ({"markers": "turns"}, "markers: turns"),
     ({"marker": "", "read_offset": -1}, "name the marker"), ({"positive": "+"}, "give both"),
     ({"markers": "turns", "read_offset": -1, "marker": "-", "positive": "+", "negative": "-"}, "markers: turns")],
)  # fmt: skip
def test_formats_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        StepFormat(**options)


def test_format_round_trip():
    one = StepFormat("<prm>", "\n\n", positive="Yes", negative="No", aggregate="mean")
    assert StepFormat(**one.to_json()) == one


def test_verdicts_must_be_one_token_each_and_differ():
    """A verdict the tokenizer does not know gives equal logits, so a score of 1/2 for ever (vl_prm.md, 11.5)."""
    encode = functools.partial(tokenizer_for("text").encode, add_special_tokens=False)
    with pytest.raises(ValueError, match="'Yes' becomes 3 tokens"):
        slot_ids(StepFormat(positive="Yes", negative="n"), encode)
    with pytest.raises(ValueError, match="are the same token"):
        slot_ids(StepFormat(positive="к", negative="и"), encode)
    with pytest.raises(ValueError, match="marker 'ab' becomes 2 tokens"):
        slot_ids(StepFormat("ab", read_offset=-1), encode)
    assert slot_ids(StepFormat("ab"), encode).closing == tuple(encode("ab"))  # read at the marker: its last token


# ---- texts -----------------------------------------------------------------------------------------------------


@functools.cache
def bpe():
    """Byte-level BPE whose merges cross the border of step and marker: "x ки", "xки", "2+", "+ ", "\\n\\n1"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["x ки\n", "xки\n", "1 + 2+ 3\n\n1", "= 2 ки\n\n- 3 ки", "a\n\nb+\n-"] * 50 + ["2+", "+\n"] * 200
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*RESERVED, "ки")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def encode(text):
    return bpe().encode(text, add_special_tokens=False)


def test_markers_do_not_merge_with_their_neighbours():
    """`x ки`, `xки`, `)ки` tokenise differently: the bug users report most (vl_prm.md, 1.2)."""
    assert len(encode("2+")) < len(encode("2")) + len(encode("+"))  # joined text would move the marker
    format = slot_ids(StepFormat("+", "\n\n", positive="+", negative="-"), encode)
    steps = ["x", "1 + 2", "2", "a)"]
    out = lay_out(encode("q+"), [encode(s) for s in steps], format)
    assert [out.ids[s] for s in out.slots] == encode("+") * 4
    assert [bpe().decode(out.ids[a : b + 1]) for a, b in zip(out.starts, out.slots, strict=False)] == [
        ("\n\n" if i else "") + s + "+" for i, s in enumerate(steps)
    ]


def scorers():
    turns = {"markers": "turns", "read_offset": -1, "marker": "+", "positive": "+", "negative": "-"}
    return {
        "added": {"marker": "<prm>", "joiner": "\n\n"}, "cyrillic": {"marker": "ки", "positive": "+", "negative": "-"},
        "line": {"marker": "\n"}, "plain": {"marker": "+", "positive": "+", "negative": "-"}, "turns": turns,
        "none": {"marker": "", "joiner": "\n"}, "ahead": {"marker": "<prm>", "read_offset": -1},
    }  # fmt: skip


@functools.cache
def scorer(name):
    """A model with the tokenizer above; only its ids are of interest."""
    hf = load_model(family_folder("text"))
    hf.resize_token_embeddings(len(bpe()), mean_resizing=False)
    tokenizer = bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    format = StepFormat(**scorers()[name])
    return VisionPrm(hf, tokenizer, format, "tokens" if format.positive else "linear", PolicyOptions())


def slots_of(prm, steps):
    """What the scorer lays out for a chain of readable steps: ids, and the packed index of each slot."""
    rollout, _ = solution_forest([Prompt("p", {"question": "is 1 + 1 - 1\nки?"})], [[steps]])
    good = prm.readable(rollout)
    wanted = good.nonzero().flatten()
    if not len(wanted):
        return good, [], []
    asked = prm._trees.of_steps(rollout, wanted)
    (tree,), (reads,) = asked.trees, asked.slots
    return good, tree.packed.ids.tolist(), reads.tolist()


@pytest.mark.parametrize("name", list(scorers()))
def test_a_thousand_random_texts_never_shift_a_slot(name):
    """As many slots as steps, each at its own marker, or the step is refused; and so is all that follows it."""
    prm, g = scorer(name), random.Random(name)
    marker = encode(scorers()[name]["marker"])
    refused = 0
    for _ in range(1000 if name in ("added", "turns") else 100):
        steps = ["".join(g.choices(NASTY, k=g.randint(1, 6))) for _ in range(g.randint(1, 4))]
        banned = list(RESERVED[1:]) + ([scorers()[name]["marker"]] if name in ("added", "cyrillic", "ahead") else [])
        good, ids, reads = slots_of(prm, steps)
        want, alive = [], True
        for text in steps:
            alive = alive and not any(b in text for b in banned)
            want.append(alive and bool(text.strip()))
        assert good.tolist() == want
        refused += not alive
        read = -1 if scorers()[name].get("read_offset") else 0
        assert len(reads) == sum(want) and reads == sorted(reads)
        for slot, text in zip(reads, [t for t, ok in zip(steps, want, strict=True) if ok], strict=True):
            if marker:
                assert ids[slot - read] == marker[-1]
            else:
                assert ids[slot] == encode(text.strip())[-1]
    assert refused > 10


def test_a_step_that_says_the_marker_is_refused_only_if_the_marker_is_reserved():
    """A minus sign or a plus in a formula is text, not a target (vl_prm.md, 11.1)."""
    assert slots_of(scorer("added"), ["a", "b <prm> c", "d"])[0].tolist() == [True, False, False]
    assert slots_of(scorer("plain"), ["1 + 1", "- 2", "+"])[0].tolist() == [True, True, True]
    assert slots_of(scorer("line"), ["a\n\nb", "c"])[0].tolist() == [True, True]


@given(st.lists(st.sampled_from(NASTY), min_size=1, max_size=5), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_slots_lie_inside_and_ascend(steps, length):
    format = slot_ids(StepFormat("ки", "\n"), encode)
    runs = [encode(s) for s in steps]
    try:
        out = lay_out(encode("q?"), runs, format, [0.5] * len(runs), max_length=length)
    except SlotError as error:
        assert "do not fit" in str(error)
        return
    assert len(out.slots) == len(out.labels) == len(out.starts) - 1 == len(runs) - out.dropped
    assert all(a <= s < b for a, s, b in zip(out.starts[:-1], out.slots, out.starts[1:], strict=True))
    assert [out.ids[s] for s in out.slots] == encode("ки") * len(out.slots)
    assert sum(y != IGNORED for y in out.label_row) == len(out.slots)


def test_special_tokens_of_an_image_model_are_refused_in_steps(tmp_path):
    prm = VisionPrm.build(model=str(make("qwen2_5_vl", tmp_path / "m")))
    rollout, _ = solution_forest(
        [Prompt("p", {"question": "?"})],
        [[["a", "see <|image_pad|>"], ["<|vision_start|>b"], ["<image> is text here"]]],
    )
    assert prm.readable(rollout).tolist() == [True, False, False, True] and prm.dropped == 2

import pytest

from mmrl.reasoning.annotate.direct import parse_labels
from mmrl.reasoning.annotate.judge import (
    judge_prompt,
    paragraphs,
    parse_critique,
    parse_first_error,
    parse_grade,
    parse_severities,
    parse_verdict,
)
from mmrl.reasoning.annotate.spare import read_spare
from mmrl.reasoning.records import Step


def test_paragraphs_count_from_zero():
    assert paragraphs(["a", "b"]) == "<paragraph_0>\na\n</paragraph_0>\n\n<paragraph_1>\nb\n</paragraph_1>"
    with pytest.raises(ValueError, match="step 1"):
        paragraphs(["a", "x </paragraph_0> y"])
    with pytest.raises(ValueError, match="no steps"):
        paragraphs([])


@pytest.mark.parametrize("ask", ["first_error", "critique", "step"])
def test_prompts_hold_question_and_steps(ask):
    text = judge_prompt("How many {red} dots?", ["One \\frac{1}{2}.", "Two."], ask)
    assert "How many {red} dots?" in text and "<paragraph_1>\nTwo.\n</paragraph_1>" in text
    assert "paragraph 1 right" in text if ask == "step" else "\\boxed{" in text


@pytest.mark.parametrize("text, want", [
    ("so \\boxed{2}.", 2), ("\\boxed{0} no, \\boxed{ -1 }", -1), ("\\boxed{1} then \\boxed{\\text{2}}", 2),
    ("\\boxed{two}", None), ("\\boxed{}", None), ("no box, 3", None), ("\\boxed{1.0}", None), ("", None),
    ("\\boxed{" + "9" * 5000 + "}", None), ("\\boxed{1} but \\boxed{x}", None),
    ("\\boxed {2}", 2), ("\\boxed{ 2 }", 2), ("\\fbox{2}", 2), ("\\boxed{\\text{ 2 }}", 2), ("$\\boxed{$2$}$", 2),
    ("\\boxed{\\text{paragraph 2}}", 2), ("\\boxed{paragraph_2}", 2), ("<think>\\boxed{1}</think> \\boxed{2}", 2),
    ("<think>\\boxed{1} and cut off", None), ("◁think▷\\boxed{1}◁/think▷ none: \\boxed{-1}", -1), ("\\boxed{2, 3}", None),
])  # fmt: skip
def test_first_error(text, want):
    assert parse_first_error(text) == want


def test_first_error_must_exist():
    assert parse_first_error("\\boxed{4}") == 4
    assert parse_first_error("\\boxed{4}", num_steps=4) is None
    assert parse_first_error("\\boxed{-2}", num_steps=4) is None
    assert parse_first_error("\\boxed{3}", num_steps=4) == 3


@pytest.mark.parametrize("text, want", [
    ("\\boxed{Yes}", True), ("\\boxed{\\text{No}}", False), ("\\boxed{Correct}.", True), ("\\boxed{incorrect}", False),
    ("\\boxed{maybe}", None), ("correct", None), ("<conclusion>\nCorrect\n</conclusion>", True),
    ("<conclusion>Incorrect.</conclusion>", False), ("<conclusion>Correct", None), ("<conclusion>both</conclusion>", None),
    ("<think>\\boxed{No}</think> <conclusion>Correct</conclusion>", True), ("\\boxed{ \\text{ No } }", False),
])  # fmt: skip
def test_verdict(text, want):
    assert parse_verdict(text) is want


def analysis(i, verdict):
    return f"<analysis_{i}>text \\boxed{{{verdict}}}</analysis_{i}>\n"


def test_critique_is_matched_by_index_not_zipped():
    text = "".join(analysis(i, "correct") for i in (0, 1, 3)) + "\\boxed{correct}"  # step 2 skipped, all right
    c = parse_critique(text, 4)
    assert (c.labels, c.overall, c.first_error, c.ignored) == ((1, 1, None, 1), True, -1, 0)


@pytest.mark.parametrize("text, labels, first", [
    (analysis(0, "correct") + analysis(1, "incorrect") + "\\boxed{incorrect}", (1, 0, None), 1),
    (analysis(1, "incorrect") + analysis(0, "correct"), (1, 0, None), 1),
    (analysis(0, "correct") + analysis(1, "incorrect") + "\\boxed{correct}", (1, 0, None), None),  # contradiction
    (analysis(0, "correct") + analysis(1, "correct") + "\\boxed{incorrect}", (1, 1, None), None),
    ("".join(analysis(i, "correct") for i in range(3)) + "\\boxed{incorrect}", (1, 1, 1), None),
    (analysis(1, "incorrect") + "\\boxed{incorrect}", (None, 0, None), None),
    (analysis(0, "correct") + analysis(0, "incorrect"), (None, None, None), None),
    ("<analysis_0>\\boxed{correct}</analysis_1>", (None, None, None), -1),  # the box belongs to no step
    ("nonsense", (None, None, None), None),
])  # fmt: skip
def test_critiques(text, labels, first):
    c = parse_critique(text, 3)
    assert (c.labels, c.first_error) == (labels, first)


def test_critique_of_steps_that_do_not_exist():
    assert parse_critique(analysis(0, "correct") + analysis(7, "incorrect"), 1).ignored == 1


P, R, U = "perception", "reasoning", "unknown"


def sections(visual, reasoning, verdict):
    """A reply of VL-PRM300K's judge: analyses that say nothing themselves, numbered from 1 in each section."""
    parts = {"Visual Elements": visual, "Reasoning": reasoning}
    said = [f"[{title}]\n" + "".join(f"<analysis_{k}>\nI see.\n</analysis_{k}>\n" for k in numbers)
            for title, numbers in parts.items()]  # fmt: skip
    return "\n".join(said) + f"\n<conclusion>\n{verdict}\n</conclusion>"


@pytest.mark.parametrize("text, labels, first", [
    (sections([1, 2], [1, 2], "Correct"), (1, 1, 1, 1), -1),
    (sections([1], [1, 2], "Correct"), (1, None, 1, 1), -1),  # an analysis less than steps
    (sections([1, 2], [1], "Incorrect"), (1, 1, 0, None), 2),
    (sections([1], [], "Incorrect"), (0, None, None, None), 0),
    (sections([1, 2], [1, 2], "Incorrect"), (1, 1, 1, 0), 3),
    (sections([1, 2], [2], "Incorrect"), (1, 1, None, 0), None),  # nothing is said of a step before it
    (sections([2, 1], [], "Incorrect"), (None, None, None, None), None),  # which one is the last?
    (sections([1, 2], [1, 7], "Incorrect"), (1, 1, 1, None), None),  # there is no such step
    (sections([1, 2], [1, 2], "Perhaps"), (None, None, None, None), None),
    (sections([], [], "Correct"), (1, 1, 1, 1), -1),
    (sections([], [], "Incorrect"), (None, None, None, None), None),
    ("<think>" + sections([1], [], "Incorrect") + "</think>" + sections([1, 2], [1, 2], "Correct"), (1, 1, 1, 1), -1),
    ("[Perception]\n" + analysis(1, "correct") + analysis(2, "correct") + "[Reasoning]\n" + analysis(1, "incorrect")
     + "<conclusion>Incorrect</conclusion>", (1, 1, 0, None), 2),
    ("[Visual Elements]\n" + analysis(1, "correct") + "[Reasoning]\n" + analysis(1, "correct"), (1, None, 1, None), None),
])  # fmt: skip
def test_critiques_that_count_anew_in_every_section(text, labels, first):
    c = parse_critique(text, 4, [P, P, R, R])
    assert (c.labels, c.first_error) == (labels, first)


def test_a_title_inside_an_analysis_is_no_section():
    text = "[Visual Elements]\n<analysis_1>\n[Reasoning]\nfine</analysis_1><analysis_2>no</analysis_2>"
    assert parse_critique(text + "<conclusion>Incorrect</conclusion>", 3, [P, P, R]).labels == (1, 0, None)


def test_sections_of_steps_of_unknown_kind_have_no_place():
    c = parse_critique(sections([1, 2], [1], "Incorrect"), 4, [U] * 4)
    assert (c.labels, c.overall, c.first_error, c.ignored) == ((None,) * 4, False, None, 3)
    assert parse_critique(sections([1, 2], [1, 2], "Correct"), 4).labels == (1, 1, 1, 1)


def test_a_conclusion_without_sections_counts_from_one():
    text = "<analysis_1>a</analysis_1><analysis_2>b</analysis_2><conclusion>Incorrect</conclusion>"
    assert parse_critique(text, 3).labels == (1, 0, None)
    assert parse_critique(text.replace("_2", "_0").replace("_1", "_5"), 3).labels == (None, None, None)
    assert parse_critique(text.replace("_1", "_0").replace("_2", "_1"), 3).labels == (1, 0, None)


def test_labels_of_a_judge_reach_the_steps_of_their_section():
    steps = [Step("a", P), Step("b", P), Step("c", R)]
    assert parse_labels(sections([1, 2], [1], "Incorrect"), steps, "critique") == (1, 1, 0)
    assert parse_labels(sections([1, 2], [1], "Perhaps"), steps, "critique") is None
    assert parse_labels("<think>\\boxed{0}</think>\\boxed{2}", steps, "first_error") == (1, 1, 0)


def test_severities_in_the_thinking_are_no_verdict():
    text = "<think>" + analysis(0, "critical") + "</think>" + analysis(0, "minor")
    assert parse_severities(text, 2) == (1, None)
    assert parse_grade("<think>\\boxed{2}</think>\\boxed{\\text{7}}") == 7


def spare(*items):
    return "[" + ", ".join(f'{{"student_step": {s}, "label": "{y}"}}' for s, y in items) + "]"


def test_spare_examples():
    assert read_spare(spare((1, "CORRECT"), (2, "INCORRECT")), 3) == (1, 0, 0)


@pytest.mark.parametrize("text", [
    "Here:\n```json\n" + spare((1, "CORRECT"), (2, "INCORRECT")) + "\n```",
    "[{'student_step': 1, 'label': 'CORRECT',}, {'student_step': 2, 'label': 'INCORRECT'}]",
    '[{"student_step": "1", "label": "correct"}, {"student_step": "Step 2", "label": "UNSURE"}]',
    '{student_step: 1, label: CORRECT}\n{label: INCORRECT, student_step: 2}',
    '[{"student_step": 1, "why": "\\frac{1}{2}", "label": "CORRECT"}, {"student_step": 1, "label": "CORRECT"}',
    '[{"student_step": 1, "label": "CORRECT"}, {"student_step": 2, "label": "INCORR',
])  # fmt: skip
def test_spare_is_read_leniently(text):
    assert read_spare(text, 2) == (1, 0)


def test_spare_reads_the_reply_alone():
    assert read_spare("<think>" + spare((1, "INCORRECT")) + "</think>" + spare((1, "CORRECT")), 1) == (1,)
    assert read_spare("<think>" + spare((1, "INCORRECT")), 1) is None


def test_spare_leaves_out_what_it_cannot_place():
    text = '[{"student_step": 1, "label": "CORRECT"}, {"student_step": 9, "label": "CORRECT"}, {"label": "CORRECT"}, ' \
           '{"student_step": true, "label": "CORRECT"}, {"student_step": 2, "label": null}]'  # fmt: skip
    assert read_spare(text, 2) == (1, 0)
    conflicting = spare((1, "CORRECT"), (1, "INCORRECT"), (2, "CORRECT"))
    assert read_spare(conflicting, 2) == (0, 1)


@pytest.mark.parametrize("text", ["", "I cannot say.", "[1, 2]", "{}", "[]", "[" * 5000])
def test_spare_nonsense_is_unparsed_not_wrong(text):
    assert read_spare(text, 2) is None

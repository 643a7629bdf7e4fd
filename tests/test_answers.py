from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.reasoning.answer_text import boxed, choice_letter, extract_answer, normalise
from mmrl.reasoning.answers import ExactAnswer, MathAnswer, MultipleChoice
from mmrl.rollout import Prompt, Sample


def sample(text, answer="5", **inputs):
    reference = answer if isinstance(answer, dict) else {"answer": answer}
    return Sample(Prompt("p0", inputs, reference), text, 0)


ROWS = (Path(__file__).parent / "data" / "answer_pairs.tsv").read_text().splitlines()[1:]
PAIRS = [line.split("\t") for line in ROWS]


@pytest.fixture(scope="module")
def verifier():
    reward = MathAnswer()
    yield reward
    reward.close()


# ---- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, want",
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{4} no, \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{4} and cut off: \\boxed{\\frac{1", "4"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("<think>\\boxed{3}</think><answer> 4 </answer>", "4"),  # a tag outranks a box elsewhere
        ("<answer>\\boxed{4}</answer>", "4"),
        ("<answer>1</answer> hm <answer>2\n3</answer>", "2\n3"),
        ("<answer></answer> \\boxed{6}", "6"),  # an empty form is none
        ("<answer>7", None),
        ("[Reasoning] .. <correct_answer>B</correct_answer>", "B"),
        ("<|answer_start|>left<|answer_end|>", "left"),
        ("### Step 1: x\n### The final answer is: 12 \n### Notes: y", "12"),
        ("### The final answer is: \\boxed{12}", "12"),
        ("2 + 3 = 5\nanswer 5", "5"),
        ("2 + 3 = 5\nAnswer: 5.\n\n", "5"),
        ("**Answer:** 5", "5"),
        ("†Answer: 5", "5"),
        ("So the answer is (B).", "(B)"),
        ("answer: 5\nbut let me think again", None),  # only the last line states one
        ("2 + 3 = 5", None),
        ("", None),
        ("<think>first I get \\boxed{3}</think>\n\nThe answer is 4.", "4"),
        ("perhaps \\boxed{3}</think>So \\boxed{4}", "4"),  # the template opened the thinking
        ("<think>perhaps <answer>A</answer></think>", None),
        ("<think>\\boxed{3} and cut off", None),
        ("[THINK]\\boxed{3}[/THINK] \\boxed{4}", "4"),
        ("<seed:think>\\boxed{3}</seed:think>\\boxed{4}", "4"),
        ("◁think▷\\boxed{3}◁/think▷ The answer is 4", "4"),
        ("perhaps \\boxed{3}◁/think▷ \\boxed{4}", "4"),
        ("<|begin_of_thought|>\\boxed{3}<|end_of_thought|> \\boxed{4}", "4"),
        ("<THOUGHTS>\\boxed{3}</THOUGHTS> \\boxed{4}", "4"),
        ("I think> \\boxed{4}", "4"),
        ("\\boxed{3} <think>a</think> hm</think> so it is", None),
        ("<answer>4</answer> as said </answer>", "4"),
        ("<think>a</think> \\boxed{1} <think>\\boxed{2}</think>", "1"),
        ("The answer to the question is 4.", "4"),
        ("The answer to the ultimate question of life is 42", "42"),
        ("答案：7", "7"),
        ("所以答案是 7。".replace("。", ""), "7"),
        ("所以答案是 7。", "7"),
        ("The answer would be 4.", "4"),
        ("so \\boxed {2}", "2"),
        ("so \\fbox{2}", "2"),
    ],
)
def test_extract_answer(text, want):
    assert extract_answer(text) == want


def test_boxes():
    assert boxed("\\boxed{}") == "" and boxed("boxed{5}") is None and boxed("\\boxed{a}} {") == "a"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="{}\\boxed a1", max_size=60))
def test_any_text_is_read(text):
    content = boxed(text)
    assert content is None or (f"\\boxed{{{content}}}" in text and content.count("{") == content.count("}"))
    assert extract_answer(text) != ""


# ---- comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", " 5.0 "),
        ("0.5", ".50"),
        ("1,234,567", "1234567"),
        ("-3", "−3"),
        ("-0", "0"),
        ("007", "7"),
        ("$\\dfrac{1}{2}$", "1/2"),
        ("\\dfrac{x}{2}", "\\frac{x}{2}"),
        ("Left  cat.", "left cat"),
        ("\\text{north}", "North"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("50 \\%", "50%"),
        ("\\$5", "$5$"),
    ],
)
def test_equal_normal_forms(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", "-5"),
        ("1 1/2", "11/2"),
        ("12", "1 2"),
        ("(1,200)", "1200"),
        ("5", "50"),
        ("0.05", "0.5"),
        ("x^2", "x2"),
        ("50%", "50"),
        ("\\leftarrow", "arrow"),
        ("100", "1"),
    ],
)
def test_different_normal_forms(a, b):
    assert normalise(a) != normalise(b)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab xy019.,-/()", max_size=40))
def test_outer_spaces_and_case_do_not_matter(text):
    assert normalise(f"  {text.upper()}\n") == normalise(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**9), 10**9))
def test_numbers_have_one_form(n):
    assert normalise(f"{n:,}") == normalise(f"{n}.00") == str(n)


ANIMALS = ["A. cat", "B. black cat", "C. dog", "D. 12"]


@pytest.mark.parametrize(
    "text, want",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("\\text{B}", "B"),
        ("\\mathrm{B}", "B"),
        ("\\textbf{(B)}", "B"),
        ("\\text{\\textbf{B}}", "B"),
        ("\\textsf{B}", "B"),
        ("\\mbox{B}", "B"),
        ("Ｂ", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("A) cat", "A"),
        ("(c) dog", "C"),
        ("B: black cat, not (A)", None),
        ("(A) dog", None),  # the letter and the text disagree
        ("The answer is B", "B"),
        ("the answer is a dog", "C"),  # an article names no option
        ("(A) is wrong, so the answer is (C)", "C"),
        ("I choose (C) here", "C"),
        ("it must be D. Done", "D"),
        ("Black cat", "B"),
        ("12.0", "D"),
        ("I see a black cat there", "B"),  # the longer text covers the shorter one
        ("I see a dog and a black cat", None),
        ("(A) or (C)", None),
        ("answer is A or answer is B", None),
        ("E", None),
        ("(F) or (B)", "B"),  # F is no option
        ("category", None),
        ("", None),
    ],
)
def test_choice_letter(text, want):
    assert choice_letter(text, ANIMALS) == want


def test_choice_letter_without_texts_and_with_letters_as_texts():
    assert choice_letter("(E)") == "E" and choice_letter("cat") is None
    assert choice_letter("A", ["B", "A"]) is None  # option A, or option B whose text is "A"
    assert choice_letter("(A) point (B)", ["point (B)", "point (A)"]) == "A"
    assert choice_letter("the same", ["the same", "the same"]) is None


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_exact_answer():
    texts = ["\\boxed{5.0}", "\\boxed{6}", "five", "answer 5"]
    assert ExactAnswer()([sample(t) for t in texts]) == [1.0, 0.0, 0.0, 1.0]
    assert ExactAnswer()([Sample(Prompt("p", {}, 5), "answer: 5", 0)]) == [1.0]


def test_multiple_choice():
    reward = MultipleChoice()
    options = {"answer": "C", "options": ANIMALS}
    texts = [
        "<answer>(C)</answer>",
        "I think so.\nIt is the dog",
        "<answer>dog</answer>",
        "(A) or (C)",
        "no idea",
        "B",
    ]
    assert reward([sample(t, options) for t in texts]) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert reward([sample("<answer>C</answer>", "dog", options=ANIMALS)]) == [1.0]  # options of the prompt
    assert reward([sample("<answer>C</answer>", "horse", options=ANIMALS)]) == [None]  # the reference is unclear


@pytest.mark.parametrize("reward", [ExactAnswer, MultipleChoice, MathAnswer])
def test_a_row_without_answer_is_unscored_alone_and_an_output_that_is_no_text_is_an_error(reward):
    judge = reward()
    answers = [{"label": 1}, {"answer": None}, "B", " ", "", float("inf"), float("nan")]
    assert judge([sample("answer B", a, options=ANIMALS) for a in answers]) == [
        None,
        None,
        1.0,
        None,
        None,
        None,
        None,
    ]
    assert judge([sample("answer B", {"answer": None}), sample("answer B", "B")]) == [None, 1.0]
    assert "prompt 'p0': the reference {'answer': None} holds no answer" in judge.last_error
    with pytest.raises(ValueError, match="prompt 'p0': this reward reads texts, the output is a list"):
        reward()([sample([5])])


@pytest.fixture(scope="module")
def scripted():
    reward = MathAnswer(verify_s=0.5, verifier="foreign_rewards:looping_verifier")
    yield reward
    reward.close()


@pytest.mark.parametrize("bad, kind", [("loop", "timeout"), ("crash", "crash"), ("raise", "error")])
def test_a_verifier_that_fails_costs_its_sample_only(scripted, bad, kind):
    before = scripted.failures[kind]
    texts = ["\\boxed{5e0}", f"\\boxed{{{bad}}}", "\\boxed{50e-1}", f"answer {bad}", "\\boxed{6}", "no answer given"]
    assert scripted([sample(t) for t in texts[:-1]]) == [1.0, None, 1.0, None, 0.0]
    assert scripted.failures[kind] == before + 1  # the equal pair was not tried again
    assert scripted.last_error is not None
    assert scripted([sample(texts[0])]) == [1.0] and scripted.last_error is None


def test_what_needs_no_verifier_starts_no_process():
    reward = MathAnswer()
    assert reward([sample("\\boxed{5.0}"), sample("I do not know")]) == [1.0, 0.0]
    assert reward._worker.pid is None


def test_math_verify_decides_and_a_power_tower_is_killed():
    reward = MathAnswer(verify_s=1.0)
    pairs = [
        ("\\boxed{\\frac12}", "0.5", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{\\sqrt{8}}", "$2\\sqrt{2}$", 1.0),
        ("\\boxed{x+1}", "x+2", 0.0),
        ("\\boxed{left}", "right", 0.0),
        ("\\boxed{9^{9^{9^{9}}}}", "5", None),
        ("\\boxed{2+3}", "5", 1.0),
    ]
    assert reward([sample(text, answer) for text, answer, _ in pairs]) == [want for *_, want in pairs]
    assert reward.failures == {"timeout": 1} and reward._worker.starts == 2
    assert reward.last_error == "no answer within 1 s"
    reward.close()


@pytest.mark.parametrize("answer, reference, equal", PAIRS)
def test_answer_pairs_are_equal_or_not_whichever_is_the_reference(verifier, answer, reference, equal):
    both = [(answer, reference), (reference, answer)]
    assert verifier([sample(f"so \\boxed{{{a}}}", b) for a, b in both]) == [float(equal)] * 2


def test_the_pairs_hold_verdicts_of_both_kinds():
    assert len({tuple(pair) for pair in PAIRS}) == len(PAIRS) >= 240
    assert sum(equal == "0" for *_, equal in PAIRS) >= 75


def test_wrong_limit():
    with pytest.raises(ValueError, match="verify_s=0 must be above 0"):
        MathAnswer(verify_s=0)

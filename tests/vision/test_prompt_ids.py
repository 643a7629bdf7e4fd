"""One road from text to ids: exactly one mark begins a prompt, whatever the template writes and the tokenizer adds."""

import shutil

import pytest
from families import FAMILIES, VLM_FAMILIES, family_folder, picture
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from vision_tiny import vision_recipe

from mmrl.config import ConfigError, parse_config
from mmrl.rollout import Prompt
from mmrl.trainers.branch_grpo import BranchGrpo
from vision.policy import VisionPolicy
from vision.prm import VisionPrm
from vision.prompts import PromptError, tokenise


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "a.png"
    picture(0).save(file)
    return str(file)


def marked_family(folder, family, in_template):
    """A family's folder whose tokenizer adds its first special token, and whose template may write it as well."""
    shutil.copytree(family_folder(family), folder)
    file = folder / "tokenizer.json"
    core = Tokenizer.from_file(str(file))
    mark = "<|begin|>"
    core.add_special_tokens([mark])
    number = core.token_to_id(mark)
    core.post_processor = TemplateProcessing(
        single=f"{mark} $A", pair=f"{mark} $A $B", special_tokens=[(mark, number)]
    )
    core.save(str(file))
    template = folder / "chat_template.jinja"
    if in_template:
        template.write_text("{{ bos_token }}" + template.read_text())
    return mark, number


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_prompt_begins_with_one_mark(tmp_path, image, family, in_template):
    mark, number = marked_family(tmp_path / "m", family, in_template)
    policy = VisionPolicy.build(model=str(tmp_path / "m"), max_new_tokens=4)
    if policy.tokenizer.bos_token != mark:
        pytest.skip("this family's tokenizer names no such mark")
    shows = [[], [image]] if policy.encode.image_token is not None else [[]]
    for images in shows:
        tokens = policy.encode(Prompt("p", {"question": "hi", "images": images}))
        assert tokens.ids.tolist().count(number) == 1 and int(tokens.ids[0]) == number
        # an engine that does its own processing tokenises the text: the same ids, placeholders aside
        again = tokenise(policy.tokenizer, tokens.text).tolist()
        assert again.count(number) == 1 and (images or again == tokens.ids.tolist())


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_pictures_between_words_and_in_earlier_turns(image, family):
    encode = VisionPolicy.build(model=str(family_folder(family)), max_new_tokens=4).encode
    history = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "seen"}]
    in_front = encode(Prompt("p", {"question": "hi", "images": [image] * 2}))
    placed = encode(Prompt("p", {"question": "a <image> b", "images": [image] * 2, "history": history}))
    shown = (placed.types > 0).nonzero().flatten().tolist()
    runs = [i for i, at in enumerate(shown) if i == 0 or at > shown[i - 1] + 1]
    words = encode.tokenizer.decode(placed.ids[shown[runs[-1] - 1] + 1 : shown[runs[-1]]])
    assert len(shown) == int((in_front.types > 0).sum()) and "seen" in words and "a " in words
    assert "b" in encode.tokenizer.decode(placed.ids[shown[-1] + 1 :])


def test_policy_and_reward_model_read_the_same_ids(tmp_path, image):
    marked_family(tmp_path / "m", "gemma3", True)
    prompt = Prompt("p", {"question": "hi", "images": [image]})
    policy = VisionPolicy.build(model=str(tmp_path / "m"), max_new_tokens=4)
    scorer = VisionPrm.build(model=str(tmp_path / "m"), head="linear")
    assert policy.encode(prompt).ids.tolist() == scorer._body.encode(prompt).ids.tolist()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported.*leave policy.system out"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
            "take a template that places pictures",
        ),
    ],
)
def test_a_template_that_raises_is_an_error_of_its_prompt(tmp_path, image, template, message):
    shutil.copytree(family_folder("qwen2_5_vl"), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    policy = VisionPolicy.build(model=str(tmp_path / "m"), system="Be brief.")
    with pytest.raises(PromptError, match=message):
        policy.encode(Prompt("p", {"question": "hi", "images": [image]}))


def test_a_template_of_plain_texts_serves_prompts_without_pictures(tmp_path):
    shutil.copytree(family_folder("qwen2_5_vl"), tmp_path / "m")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    policy = VisionPolicy.build(model=str(tmp_path / "m"))
    assert policy.encode(Prompt("p", {"question": "hi"})).text == "user: hi "


@pytest.mark.parametrize("inputs, message", [
    ({"question": "hi", "videos": ["/nowhere/clip.mp4"]}, "shows 1 films, which nobody here reads"),
    ({"question": "what is \ud83d this?"}, "half of a character cut in two"),
])  # fmt: skip
def test_what_cannot_be_read_is_an_error_of_its_prompt(inputs, message):
    policy = VisionPolicy.build(model=str(family_folder("text")))
    with pytest.raises(PromptError, match=message):
        policy.encode(Prompt("p", inputs))
    assert policy.admit([Prompt("p", inputs), Prompt("q", {"question": "hi"})]) == [Prompt("q", {"question": "hi"})]


class NoAnswers:
    """Four questions of which `bad` have their answer in a column of another name."""

    rewards = ("math_answer",)

    def __init__(self, bad: int) -> None:
        references = [{"solution": "5"} if i < bad else {"answer": "5"} for i in range(4)]
        self.prompts = [Prompt(f"q{i}", {"question": "hi"}, r) for i, r in enumerate(references)]
        self.eval_prompts = self.prompts[:1]


@pytest.mark.parametrize("bad", [1, 3])
def test_rows_that_no_reward_can_score_are_told_before_a_model_is_loaded(tmp_path, bad):
    model = family_folder("text") if bad == 1 else tmp_path / "no model there"
    tree = vision_recipe(model, tmp_path, tmp_path / "run", run={"iterations": 1, "max_unusable": 0.5})
    tree["task"] = {"name": "test_prompt_ids:NoAnswers", "bad": bad}
    tree["rewards"] = [{"name": "math_answer"}]
    if bad == 3:
        with pytest.raises(ConfigError, match=r"3 of 4 prompts can never be rewarded.*task.answer: solution"):
            BranchGrpo(parse_config(tree))
        return
    trainer = BranchGrpo(parse_config(tree))
    assert trainer.rollouts.admission.bad == {"q0"}
    assert {p.id for p in trainer.rollouts.prompts(0)} <= {"q1", "q2", "q3"}

"""One road from text to ids: exactly one mark begins a prompt, whatever the template writes and the tokenizer adds."""

import shutil

import pytest
import torch
from agent_tiny import agent
from families import FAMILIES, VLM_FAMILIES, family_folder, picture
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from vision_tiny import vision_recipe

import video.encoding
from mmrl.config import ConfigError, parse_config
from mmrl.rollout import BranchPlan, Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.trainers.branch_grpo import BranchGrpo
from vision.growth.engine_sync import SyncedEngine
from vision.growth.engine_vllm import VllmEngine
from vision.growth.vllm_backends import Reply
from vision.inputs.loading import load_processor
from vision.inputs.prompts import PromptError
from vision.policy import VisionPolicy
from vision.prm import VisionPrm


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "a.png"
    picture(0).save(file)
    return str(file)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from make_clips import write_clip

    return str(write_clip(tmp_path_factory.mktemp("clip") / "c.mp4", frames=40, size=(64, 96), gop=20))


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


class Vllm:
    """vLLM's part in what the model sees: the folder's own tokenizer, and placeholders of pictures that it processes
    itself expanded by the folder's own processor. Every sample ends at once."""

    max_model_len = 4096

    def __init__(self, folder):
        self.tokenizer, self.processor = AutoTokenizer.from_pretrained(folder), load_processor(folder)
        self.requests = []

    def generate(self, calls):
        self.requests += calls
        end = self.tokenizer.eos_token_id
        return [Reply(self._seen(c), 0, [([end], [-1.0])] * c.sampling_params["n"]) for c in calls]

    def _seen(self, call):
        if not call.images:
            return call.ids
        text = self.tokenizer.decode(call.ids)
        return self.processor(text=[text], images=[list(call.images)], add_special_tokens=False)["input_ids"][0]

    def wake(self): ...
    def sleep(self): ...
    def load(self, weights): ...


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_policy_reward_model_vllm_and_films_read_the_same_ids(tmp_path, image, clip, family, in_template):
    """What each of them runs, by its own code: exactly one mark, at the beginning."""
    mark, number = marked_family(tmp_path / "m", family, in_template)
    folder = str(tmp_path / "m")
    policy = VisionPolicy.build(model=folder, max_new_tokens=4)
    assert policy.tokenizer.bos_token == mark
    hf, processor, rule = policy.model.hf, policy.processor, policy.rule
    vllm = Vllm(folder)
    engine = SyncedEngine(VllmEngine(vllm), shared=False)
    with_engine = VisionPolicy(hf, processor, rule, policy.options, engine)
    scorer = VisionPrm.build(model=folder, head="linear")
    shows = [{}, {"images": [image]}] if policy.encode.image_token is not None else [{}]
    for shown in shows:
        prompt = Prompt("p", {"question": "hi", **shown})
        tree, _, _ = policy._trees.of_steps(policy.rollout([prompt], BranchPlan({0: 1}), seed=0), torch.tensor([0]))
        ids = tree[0].ids[0].tolist()
        assert ids.count(number) == 1 and ids[0] == number
        written = solution_forest([prompt], [[["a"]]])[0]
        assert scorer._trees.of_steps(written, torch.tensor([0])).trees[0].ids[0].tolist() == ids
        # a reply about other tokens than the policy trains on would be an error of the engine
        with_engine.rollout([prompt], BranchPlan({0: 1}), seed=0)
        request = vllm.requests[-1]
        assert request.ids.count(number) == 1 and request.ids[0] == number and len(request.images) == len(shown)
        assert vllm._seen(request) == ids
    if family in video.encoding.FAMILIES:
        films = agent(folder)
        assert films.encode(prompt).ids.tolist() == ids
        text = films.encode(Prompt("p", {"question": "hi"})).ids.tolist()
        prompt = Prompt("p", {"question": "hi", "videos": [clip]})
        ids = films.encode(prompt).ids.tolist()
        before = next(i for i, (a, b) in enumerate(zip(ids, text, strict=False)) if a != b)
        assert ids.count(number) == 1 and before > 0 and ids[len(ids) - len(text) + before :] == text[before:]
        talks = films._dialogue._replay.environment
        VisionPolicy(films.model.hf, processor, rule, films.options, engine, talks, films.encode).rollout(
            [prompt], BranchPlan({0: 1}), seed=0
        )
        [first, *later] = vllm.requests[len(shows) :]
        assert first.ids == ids and later
        # what the turns of a conversation are shown begins no further document
        assert all(call.ids[: len(ids)] == ids and call.ids.count(number) == 1 for call in later)


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


def test_steps_in_turns_begin_with_the_same_single_mark(tmp_path):
    _, number = marked_family(tmp_path / "m", "text", True)
    format = {"markers": "turns", "read_offset": -1, "marker": "+", "positive": "+", "negative": "-"}
    scorer = VisionPrm.build(model=str(tmp_path / "m"), head="tokens", format=format)
    written = solution_forest([Prompt("p", {"question": "hi"})], [[["a", "b"]]])[0]
    [tree] = scorer._trees.of_steps(written, torch.tensor([0, 1])).trees
    assert torch.cat(tree.ids).tolist().count(number) == 1 and int(tree.ids[0][0]) == number


FORBIDDEN = "{% if 'secret' in messages | string %}{{ raise_exception('no secrets') }}{% endif %}"


def test_a_prompt_that_the_template_refuses_is_set_aside_by_each_of_them(tmp_path, image, clip, caplog):
    """With the way out; a reward model has no opinion about its steps and scores its neighbour's."""
    shutil.copytree(family_folder("qwen2_5_vl"), tmp_path / "m")
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(FORBIDDEN + template.read_text())
    folder = str(tmp_path / "m")
    policy = VisionPolicy.build(model=folder)
    engine = SyncedEngine(VllmEngine(Vllm(folder)), shared=False)
    with_engine = VisionPolicy(policy.model.hf, policy.processor, policy.rule, policy.options, engine)
    scorer = VisionPrm.build(model=folder, head="linear")
    for component, shown in (
        (policy, {"images": [image]}), (with_engine, {"images": [image]}), (scorer, {"images": [image]}),
        (agent(folder), {"videos": [clip]}),
    ):  # fmt: skip
        good, bad = (Prompt(i, {"question": q, **shown}) for i, q in (("good", "hi"), ("bad", "a secret")))
        caplog.clear()
        assert component.admit([bad, good]) == [good]
        assert "prompt 'bad': the chat template refuses turns of user (TemplateError: no secrets)" in caplog.text
        assert "give the model's folder another chat_template.jinja" in caplog.text
    bad, good = (Prompt(p.id, {**p.inputs, "videos": [], "images": [image]}) for p in (bad, good))
    written = solution_forest([bad, good], [[["a"]], [["a"]]])[0]
    assert scorer(written).isnan().tolist() == [True, False] == scorer.root_scores(written).isnan().tolist()


def test_a_run_goes_on_without_the_prompts_that_a_template_refuses(tmp_path):
    """Question 3 of 8 by the policy's template, questions 5 to 7 by the reward model's."""
    for name, count in (("policy", 3), ("scorer", 5)):
        shutil.copytree(family_folder("qwen2_5_vl"), tmp_path / name)
        template = tmp_path / name / "chat_template.jinja"
        refused = "'it it it it' not in text and 'it it it' in text" if count == 3 else "'it it it it it' in text"
        template.write_text(
            "{% set text = messages | string %}{% if " + refused + " %}{{ raise_exception('no') }}{% endif %}"
            + template.read_text()
        )  # fmt: skip
    tree = vision_recipe(
        tmp_path / "policy", tmp_path, tmp_path / "run", plan={0: 2}, credit={"estimators": [{"name": "step_grpo"}]},
        step_rewards=[{"name": "vision_prm", "model": str(tmp_path / "scorer"), "head": "tokens",
                       "format": {"positive": "+", "negative": "-"}}],
        run={"iterations": 1, "prompts_per_iteration": 8, "max_unusable": 0.5},
    )  # fmt: skip
    trainer = BranchGrpo(parse_config(tree))
    metrics = trainer.train()
    assert trainer.run.sampler.admission.bad == {"q3"} and metrics["rollout/unusable_prompts"] == 1
    [scored] = trainer.run.meter.step_scores
    assert not scored.failed and 0 < int(scored.parts["vision_prm"].isnan().sum()) < len(scored.parts["vision_prm"])


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
    model = family_folder("text")
    if bad == 3:
        model = tmp_path / "no model there"
        model.mkdir()
    tree = vision_recipe(model, tmp_path, tmp_path / "run", run={"iterations": 1, "max_unusable": 0.5})
    tree["task"] = {"name": "test_prompt_ids:NoAnswers", "bad": bad}
    tree["rewards"] = [{"name": "math_answer"}]
    if bad == 3:
        with pytest.raises(ConfigError, match=r"3 of 4 prompts can never be rewarded.*task.answer: solution"):
            BranchGrpo(parse_config(tree))
        return
    trainer = BranchGrpo(parse_config(tree))
    assert trainer.run.sampler.admission.bad == {"q0"}
    assert {p.id for p in trainer.run.sampler.prompts(0)} <= {"q1", "q2", "q3"}

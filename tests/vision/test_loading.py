"""Every family from folder to logits and back, and folders that must not load."""

import json
import shutil

import pytest
import torch
from families import (
    FAMILIES,
    HIDDEN,
    SPECIAL,
    VLM_FAMILIES,
    WINDOW,
    family_folder,
    make,
    picture,
    prompt_inputs,
    tokenizer_for,
)

from vision.inputs.loading import (
    banned_ids,
    eos_ids,
    image_token_id,
    is_vision,
    load_model,
    load_processor,
    save_model,
    tokenizer_of,
    vision_tower,
)


def loaded(family):
    folder = family_folder(family)
    return load_model(folder), load_processor(folder)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def broken_copy(folder, tmp_path, *, without=(), **changed):
    """A copy of a folder; `file=function` edits that JSON file."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in without:
        (copy / name).unlink()
    for name, edit in changed.items():
        file = copy / f"{name}.json"
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_to_logits_and_bit_equal_after_saving(family, tmp_path):
    model, processor = loaded(family)
    inputs = prompt_inputs(family, processor)
    before = logits(model, inputs)
    assert before.shape == (1, inputs["input_ids"].shape[1], len(tokenizer_of(processor)))
    assert before.isfinite().all() and not model.training and model.dtype == torch.float32

    save_model(model, processor, tmp_path)
    again = load_processor(tmp_path)
    inputs_again = prompt_inputs(family, again)
    assert inputs.keys() == inputs_again.keys()
    assert all(torch.equal(inputs[key], inputs_again[key]) for key in inputs)
    assert torch.equal(before, logits(load_model(tmp_path), inputs_again))


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_a_picture_costs_few_tokens_and_changes_the_answer(family):
    model, processor = loaded(family)
    assert is_vision(model.config)
    one, other = (prompt_inputs(family, processor, seed=seed) for seed in (0, 1))
    assert 4 <= int((one["input_ids"] == image_token_id(model.config)).sum()) <= 16
    assert torch.equal(one["input_ids"], other["input_ids"])
    difference = (logits(model, one) - logits(model, other))[0, -1].abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_tokens_changes_the_answer(family):
    """Swaps two letters well before the end: positions and masks of these models are visible in the logits."""
    model, processor = loaded(family)
    one = prompt_inputs(family, processor, text="ab is 1, so?")
    other = prompt_inputs(family, processor, text="ba is 1, so?")
    assert (logits(model, one) - logits(model, other))[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tower_runs_once_per_forward(family):
    model, processor = loaded(family)
    tower, calls = vision_tower(model), []
    if family == "text":
        assert tower is None and not is_vision(model.config) and image_token_id(model.config) is None
        return
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    logits(model, prompt_inputs(family, processor))
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "idefics3", "text"])
def test_vision_tower_inside_lora_and_adapter_folder(family, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = loaded(family)
    tower = vision_tower(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert vision_tower(wrapped) is tower
    save_model(wrapped, processor, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    # of an adapter's folder the base is loaded, and its own processor
    base = load_model(tmp_path)
    assert type(base) is type(model) and type(load_processor(tmp_path)) is type(processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_banned_ids_are_the_placeholders_and_padding(family):
    model, processor = loaded(family)
    tokenizer = tokenizer_of(processor)
    banned = banned_ids(model.config, tokenizer)
    # ids 0 to 3 are <|unk|>, <|pad|>, <|end|>, <|begin|>; then the family's own; <end_of_utterance> ends a turn
    own = [i for i, token in enumerate(SPECIAL[family], start=4) if token != "<end_of_utterance>"]
    assert banned == [1, *own]
    assert eos_ids(model, tokenizer) == {2}


def test_end_tokens_stay_allowed():
    model, processor = loaded("llava")
    tokenizer = tokenizer_of(processor)
    padding = tokenizer.pad_token_id
    assert padding not in banned_ids(model.config, tokenizer, keep={padding})
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.eos_token_id not in banned_ids(model.config, tokenizer)


def test_end_tokens_of_generation_config_and_tokenizer():
    model, processor = loaded("text")
    model.generation_config.eos_token_id = [1, 7]
    assert eos_ids(model, processor) == {1, 2, 7}
    processor.eos_token = None
    assert eos_ids(model, processor) == {1, 7}
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="generation_config"):
        eos_ids(model, processor)


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_saved_processor_names_the_library_class(family):
    """Other programs look the class up by this name; a name of ours would give them a bare tokenizer."""
    import transformers

    settings = json.loads((family_folder(family) / "processor_config.json").read_text())
    kind = getattr(transformers, settings["processor_class"])
    assert kind.__module__.startswith("transformers.models.")
    assert not settings["image_processor"]["image_processor_type"].endswith("Pil")
    assert ("video_processor" in settings) == ("video_processor" in kind.get_attributes())


def test_video_settings_survive(tmp_path):
    given = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    folder = broken_copy(family_folder("qwen2_5_vl"), tmp_path, processor_config=lambda c: c.pop("video_processor"))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(given))
    for _ in range(2):
        load_processor(folder).save_pretrained(folder)
        assert json.loads((folder / "processor_config.json").read_text())["video_processor"] == given
        (folder / "video_preprocessor_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_folder_in_the_older_layout(family, tmp_path):
    """Before transformers 5, settings lay in preprocessor_config.json and the template in chat_template.json."""
    folder = broken_copy(family_folder(family), tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor") | {"processor_class": settings["processor_class"]}
    settings.pop("video_processor", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chat_template.jinja").unlink()
    (folder / "processor_config.json").unlink()
    if family == "llava":  # this family has settings of its own
        (folder / "processor_config.json").write_text(json.dumps(settings))
    old, new = load_processor(folder), load_processor(family_folder(family))
    before, after = prompt_inputs(family, old), prompt_inputs(family, new)
    assert all(torch.equal(before[key], after[key]) for key in after)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm", "internvl"])
def test_videos_are_refused(family):
    _, processor = loaded(family)
    with pytest.raises(ValueError, match="pictures only"):
        processor(text=["a"], videos=[[picture(), picture()]])


def test_white_space_survives_where_the_library_would_choose_the_family_tokenizer(tmp_path):
    """A Qwen2 text model with a tokenizer of its own: AutoTokenizer drops spaces and newlines here."""
    from transformers import Qwen2Config

    Qwen2Config(hidden_size=HIDDEN).save_pretrained(tmp_path)
    tokenizer_for("text").save_pretrained(tmp_path)
    text = "red  = 3\n3 + 2 = 5"
    tokenizer = load_processor(tmp_path)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_equal_seeds_give_equal_models(tmp_path):
    first, second, third = (make("text", tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    weights = [load_model(folder).state_dict() for folder in (first, second, third)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_gemma3_window_is_shorter_than_a_row():
    model, processor = loaded("gemma3")
    text = model.config.get_text_config()
    assert text.layer_types == ["sliding_attention", "full_attention"] and text.sliding_window == WINDOW
    inputs = prompt_inputs("gemma3", processor)
    narrow = logits(model, inputs)
    text.sliding_window = 1000
    assert (narrow - logits(model, inputs))[0, -1].abs().max() > 1e-3


# ---- folders that must not load -------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_missing_folder_and_missing_config(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="'half' is unknown; choose one of float32"):
        load_model(family_folder("text"), dtype="half")


def test_dtype_and_attention_are_used():
    model = load_model(family_folder("text"), dtype="bfloat16", attn="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_folder_without_image_processor(tmp_path):
    folder = broken_copy(family_folder("qwen2_5_vl"), tmp_path, without=["processor_config.json"])
    with pytest.raises(ValueError, match="needs a tokenizer and an image processor"):
        load_processor(folder)


def test_folder_without_tokenizer(tmp_path):
    folder = broken_copy(family_folder("llava"), tmp_path, without=["tokenizer.json", "tokenizer_config.json"])
    with pytest.raises(ValueError, match="needs a tokenizer and an image processor"):
        load_processor(folder)


def test_unknown_processor_class_is_named(tmp_path):
    """The library would load the bare tokenizer without a word."""
    folder = broken_copy(
        family_folder("idefics3"), tmp_path, processor_config=lambda c: c.update(processor_class="MyProcessor")
    )
    with pytest.raises(ValueError, match="no processor class 'MyProcessor' for a idefics3 model"):
        load_processor(folder)


def test_processor_class_that_is_no_processor(tmp_path):
    folder = broken_copy(
        family_folder("idefics3"), tmp_path, processor_config=lambda c: c.update(processor_class="Qwen2Tokenizer")
    )
    with pytest.raises(ValueError, match="Qwen2Tokenizer"):
        load_processor(folder)


def test_folder_without_processor_class_takes_the_one_of_the_model(tmp_path):
    folder = broken_copy(
        family_folder("qwen3_vl"), tmp_path, processor_config=lambda c: c.pop("processor_class"),
        tokenizer_config=lambda c: c.pop("processor_class", None),
    )  # fmt: skip
    assert type(load_processor(folder)).__name__ == "Qwen3VLProcessor"


def test_image_token_of_another_tokenizer(tmp_path):
    folder = broken_copy(family_folder("llava"), tmp_path, config=lambda c: c.update(image_token_index=5000))
    with pytest.raises(ValueError, match="image token 5000"):
        load_processor(folder)

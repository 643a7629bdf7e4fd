"""Sharded weights on two CPU processes: whole runs of the trainer equal one process with whole weights.

accelerate ignores FSDP on a CPU, so the worker shards by torch's fully_shard where accelerate would, and everything
above that line is the real trainer. The engine is a twin of the model that lives on synced weights alone, as vLLM does.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import family_folder
from processes import run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner
from vision_tiny import vision_recipe

from mmrl.cli import app
from mmrl.config import ConfigError, load_config, parse_config
from mmrl.rollout import ActionLogProbs, Actions, Prompt, Rollout
from mmrl.sharding import full_state, is_sharded, keep_float32, whole
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.policy_update import current_logp
from mmrl.tree import UNFINISHED, StepTree
from vision.inputs.loading import load_model, load_processor, save_model

CONFIGS = Path(__file__).parents[2] / "configs"

# blocks of the image encoder may be sharded too where every job encodes once: trained, and nothing runs without grad
ALL_BLOCKS = {"policy": {"train_vision": True}}
AS_THE_RECIPE = {
    "policy": {"gradient_checkpointing": True},
    "loss": {"kl": 0.5, "kl_form": "k3", "recompute_old_logp": True, "importance_cap": 2.0},
}


def tied_model(folder):
    """A tiny Qwen2.5-VL whose output layer is its embedding, as in the models up to 3B."""
    source = family_folder("qwen2_5_vl")
    hf = load_model(source)
    hf.config.tie_word_embeddings = hf.config.text_config.tie_word_embeddings = True
    hf.tie_weights()
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    save_model(hf, load_processor(source), folder)
    return folder


@pytest.fixture
def clean(monkeypatch):
    """The worker also runs in this process, where it changes accelerate."""
    monkeypatch.setattr(Accelerator, "prepare", Accelerator.prepare)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run_worker(folder, processes, sections):
    """Metrics by iteration, the saved weights, and what each rank noted."""
    output = folder / f"r{processes}"
    tree = vision_recipe(
        folder / "model", folder / "pictures", output, task={"pictures": 1},
        policy={"max_tokens": 120} | sections["policy"], loss=sections.get("loss", {}),
        optim={"lr": 0.05}, run={"processes": processes},
    )  # fmt: skip
    recipe = folder / f"r{processes}.json"
    recipe.write_text(json.dumps(tree))
    if processes == 1:
        work(recipe)
    else:
        run_ranks(processes, __file__, recipe)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    notes = [json.loads((output / f"rank{r}.json").read_text()) for r in range(processes)]
    return rows, load_file(output / "model" / "model.safetensors"), notes


@pytest.mark.multiproc
@pytest.mark.parametrize("sections", [ALL_BLOCKS, AS_THE_RECIPE], ids=["all_blocks", "as_the_recipe"])
def test_two_sharded_processes_equal_one_whole(tmp_path, sections, clean):
    (tmp_path / "pictures").mkdir()
    start = load_file(tied_model(tmp_path / "model") / "model.safetensors")
    one, want_weights, _ = run_worker(tmp_path, 1, sections)
    two, got_weights, notes = run_worker(tmp_path, 2, sections)

    assert want_weights.keys() == got_weights.keys()
    for name, w in want_weights.items():
        torch.testing.assert_close(got_weights[name], w, atol=1e-5, rtol=0)
    assert start.keys() == want_weights.keys()  # the tied weight is written once
    assert max(float((want_weights[n] - w).abs().max()) for n, w in start.items()) > 1e-3
    loaded = load_model(tmp_path / "r2" / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight

    for key in ("reward/mean", "policy/grad_norm", "policy/loss"):
        got, want = ([r[key] for r in rows if key in r] for rows in (two, one))
        assert len(want) == 2 and got == pytest.approx(want, abs=1e-4)
    gap = "mismatch/max" if "loss" in sections else "policy/ratio_dev_max"
    assert all(r[gap] < 1e-4 for r in two if gap in r)  # the engine sampled with the weights of the last update

    assert notes[0]["calls"] == notes[1]["calls"] and notes[0]["own"] != notes[1]["own"]  # uneven work, equal calls
    assert [n["whole_equals_state"] for n in notes] == [True, None]  # the main process alone gets the state
    for note in notes:
        assert note["syncs"] == 3  # before each of the two rollouts and the last evaluation
        assert "policy.engine: vllm" in note["refused"]


def test_the_accelerate_file_says_what_sharding_needs():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml"))
    fsdp = config.fsdp_config
    known = vars(launch_command_parser().parse_args(["script"]))
    assert config.distributed_type == "FSDP" and set(fsdp) <= set(known)
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_reshard_after_forward"] is True
    assert not fsdp["fsdp_cpu_ram_efficient_loading"] and not fsdp["fsdp_activation_checkpointing"]
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] in load_model(family_folder("qwen2_5_vl"))._no_split_modules


def test_the_recipe_fits_the_accelerate_file():
    from accelerate.commands.config.config_args import load_config_from_file

    machine = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml"))
    recipe = load_config(CONFIGS / "vision" / "vlm_3b_fsdp2.yaml")
    assert recipe.run.prompts_per_iteration % machine.num_processes == 0
    assert recipe.run.mixed_precision == machine.mixed_precision and recipe.policy.options["engine"] == "vllm"


def test_log_probs_are_not_rounded_by_the_mixed_precision_of_accelerate():
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # what it would do
    keep_float32(plugin)
    kept = plugin.mixed_precision_policy
    assert (kept.param_dtype, kept.reduce_dtype, kept.output_dtype) == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize("prefix", ["", "hf."])
def test_saving_a_given_state_takes_it_in_place_of_the_models_own(tmp_path, prefix):
    from vision.policy import VisionPolicy

    policy = VisionPolicy.build(model=str(family_folder("qwen2_5_vl")))
    state = {prefix + n: torch.full_like(p, 0.5) for n, p in policy.model.hf.named_parameters()}
    policy.save(tmp_path / "m", state)
    assert all(bool((p == 0.5).all()) for p in load_model(tmp_path / "m").parameters())


def test_what_cannot_run_sharded_is_refused(monkeypatch):
    from vision.policy import VisionPolicy

    policy = VisionPolicy.build(model=str(family_folder("text")), mode="prefix_packed", lora_rank=2)
    for module in ("mmrl.reference", "vision.policy"):
        monkeypatch.setattr(f"{module}.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="prefix_packed cannot run with sharded weights"):
        policy._body.job([], lambda mode: None, sharded=True)
    with pytest.raises(RuntimeError, match="LoRA"), policy._reference.applied(policy.model, policy.model.hf):
        pass


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "recipe, variables, message",
    [
        ("diffusion/digits_branch", FSDP2, "policy.name='diffusion' cannot be trained with sharded weights; start plain"),
        ("diffusion/digits_latent_reward", FSDP2, "scorer.name='latent_reward' cannot be trained with sharded weights"),
        ("vision/shapes_steps", {"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported; set fsdp_version: 2"),
        ("vision/shapes_steps", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed takes a step .* shard by FSDP2 instead"),
        ("vision/shapes_prm", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed takes a step .* or start plain processes"),
        ("vision/shapes_step_dpo", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM takes a step at every backward"),
    ],
)  # fmt: skip
def test_what_could_not_be_right_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, recipe, variables, message
):
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path / "cache"))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    done = CliRunner().invoke(app, ["train", str(CONFIGS / f"{recipe}.yaml"), f"run.output={tmp_path / 'run'}"])
    assert isinstance(done.exception, ConfigError) and re.search(message, str(done.exception))
    assert not list(tmp_path.iterdir())


def test_sharding_that_is_not_in_force_is_told(tmp_path, monkeypatch, caplog, clean):
    (tmp_path / "pictures").mkdir()
    for variable, value in FSDP2.items():
        monkeypatch.setenv(variable, value)
    tree = vision_recipe(family_folder("qwen2_5_vl"), tmp_path / "pictures", tmp_path / "run", run={"iterations": 1})
    BranchGrpo(parse_config(tree))
    assert "FSDP was asked for and is not in force" in caplog.text


def test_a_gathered_adapter_is_saved_as_peft_saves_it(tmp_path, monkeypatch):
    from vision.growth.engine_sync import SyncedEngine
    from vision.policy import VisionPolicy

    policy = VisionPolicy.build(model=str(family_folder("text")), lora_rank=2)
    policy.save(tmp_path)
    monkeypatch.setattr("vision.growth.engine_sync.is_sharded", lambda model: True)
    seen = {}

    class Engine:
        def sync_lora(self, folder):
            seen.update(load_file(folder / "adapter_model.safetensors"))

    SyncedEngine(Engine(), shared=False)._follow(policy.model.hf)
    want = load_file(tmp_path / "adapter_model.safetensors")
    assert seen.keys() == want.keys() and all(torch.equal(seen[n], w) for n, w in want.items())


def test_current_logp_makes_as_many_calls_as_it_is_told():
    calls = []

    class Counting:
        def micro_batches(self, rollout, steps):
            return [steps[:1], steps[1:]]

        def log_probs(self, rollout, part):
            calls.append(part.tolist())
            return ActionLogProbs(part, torch.ones(len(part)))

    tree = StepTree(
        torch.tensor([-1, -1]), torch.tensor([0, 0]), torch.tensor([UNFINISHED, UNFINISHED]),
        torch.full((2,), torch.nan), tok_start=torch.tensor([0, 1]), tok_end=torch.tensor([1, 2]),
    )  # fmt: skip
    rollout = Rollout([Prompt("a", {})], tree, Actions(torch.zeros(2), torch.ones(2, dtype=torch.bool), {}))
    new = current_logp(Counting(), rollout, torch.tensor([0, 1]), rounds=lambda own: own + 2)
    assert calls == [[0], [1], [0], [0]] and new.tolist() == [1.0, 1.0]
    current_logp(Counting(), rollout, torch.tensor([], dtype=torch.long), rounds=lambda own: 1)  # nothing of its own
    assert len(calls) == 5


# ---- the worker -------------------------------------------------------------------------------------------------


class Twin:
    """An engine with a model of its own, which knows the trained weights by `sync` alone."""

    def __init__(self, folder):
        self.hf, self.syncs = load_model(folder), 0

    def open(self, request):
        from vision.growth.engine_hf import TransformersEngine

        return TransformersEngine(self.hf).open(request)

    def sync(self, weights):
        self.hf.load_state_dict(dict(weights))
        self.syncs += 1

    def wake(self):
        pass

    sleep = wake


def shard(network, blocks):
    """What accelerate does on GPUs: these layers and the rest are one unit each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = [m for m in network.modules() if type(m).__name__ in blocks]
    assert {type(m).__name__ for m in found} == set(blocks)
    for module in found:
        fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def work(file):
    from vision.growth.engine_sync import SyncedEngine
    from vision.policy import VisionPolicy

    config = parse_config(json.loads(Path(file).read_text()))
    policy = VisionPolicy.build(**config.policy.options)
    assert isinstance(policy, VisionPolicy)
    twin = Twin(config.policy.options["model"])
    policy._engine = SyncedEngine(twin, shared=False)
    blocks = ["Qwen2_5_VLDecoderLayer"]
    if config.policy.options.get("train_vision"):
        blocks.append("Qwen2_5_VLVisionBlock")

    def prepare(accelerator, model, optimizer):
        if config.run.processes > 1:
            shard(model, blocks)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.SGD(trained, lr=config.optim.lr)  # Adam would blow up rounding of small gradients

    Accelerator.prepare = prepare
    trainer = BranchGrpo(config, policy=policy)
    note = {"calls": 0, "own": []}
    update, forward = trainer.loop.update, policy.model.forward

    def counted_update(losses, idle):
        note["own"].append(len(losses))
        return update(losses, idle)

    def counted_forward(*arguments):
        note["calls"] += 1
        return forward(*arguments)

    def save_and_check(folder):  # here, because the process group is gone when the run is over
        BranchGrpo.save_model(trainer, folder)
        if config.run.processes > 1:
            note.update(checks(policy, trainer.run.task.eval_prompts))
        file = trainer.loop.folder.root / f"rank{trainer.loop.accelerator.process_index}.json"
        file.write_text(json.dumps(note | {"syncs": twin.syncs}))

    trainer.loop.update, policy.model.forward, trainer.save_model = counted_update, counted_forward, save_and_check
    trainer.train()


def checks(policy, prompts):
    assert is_sharded(policy.model)
    state = full_state(policy.model)
    gathered = {n: whole(p).detach() for n, p in policy.model.named_parameters()}
    policy._engine = None
    with pytest.raises(RuntimeError) as refused:
        policy.generate(prompts, seed=0)
    equal = all(torch.equal(state[n], w) for n, w in gathered.items()) if state else None
    return {"whole_equals_state": equal, "refused": str(refused.value)}


if __name__ == "__main__":
    work(sys.argv[1])

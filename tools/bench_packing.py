"""Time and peak memory of one policy update (forward and backward) in every layout, side by side in one run.

    python tools/bench_packing.py                    # 30M parameters, CPU
    python tools/bench_packing.py --hidden 2048 --layers 24 --device cuda --dtype bfloat16

Every layout runs in a process of its own (peak memory is that process's), in interleaved order; CPU seconds on a CPU,
wall seconds on a GPU. "rows" is every sample with its own row and its own image encoding, what row-wise trainers do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

MODES = ("rows", "rows_shared_image", "packed", "prefix_packed")
GROUPS = {  # name -> (children of a live node per level, image tokens, prompt tokens, tokens per completion)
    "flat 8, P=1024": ((8,), 576, 1024, 96),
    "flat 8, P=256": ((8,), 64, 256, 96),
    "tree 2x2x2, P=256": ((2, 2, 2), 64, 256, 96),
    "tree 2x2x2, P=1024": ((2, 2, 2), 576, 1024, 96),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    parser.add_argument("--one", nargs=2, metavar=("GROUP", "MODE"), help="measure one and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    for group in args.groups:
        found: dict[str, list[dict[str, float]]] = {m: [] for m in MODES}
        for _ in range(args.repeats):
            for mode in MODES:
                found[mode].append(_child(args, group, mode))
        _table(group, found)


def _child(args: argparse.Namespace, group: str, mode: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", group, mode]
    for name in ("hidden", "layers", "device", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _table(group: str, found: dict[str, list[dict[str, float]]]) -> None:
    middle = {m: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for m, runs in found.items()}
    base = middle["rows"]
    print(
        f"\n{group}: {base['unique']:.0f} unique tokens, {base['row_tokens'] / base['unique']:.1f}x in separate rows"
    )
    print(f"{'layout':20}{'seconds':>9}{'MiB':>8}{'faster':>9}{'memory':>9}{'logp diff':>11}")
    for mode, r in middle.items():
        print(
            f"{mode:20}{r['seconds']:9.2f}{r['mib']:8.0f}{base['seconds'] / r['seconds']:8.1f}x"
            f"{base['mib'] / max(r['mib'], 1e-9):8.1f}x{abs(r['logp'] - base['logp']):11.1e}"
        )


def measure(args: argparse.Namespace, group: str, mode: str) -> dict[str, float]:
    """Seconds and extra MiB of one update after a warm-up on a small one."""
    import torch

    from vision.forward.attention import style_of
    from vision.forward.network import Network, run_job
    from vision.forward.passes import build_job

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hf = new_model(args.hidden, args.layers).to(args.device, getattr(torch, args.dtype))
    network, style = Network(hf), style_of(hf)
    timings = {}
    for tree in (new_tree(hf, (2,), 16, 32, 8), new_tree(hf, *GROUPS[group])):
        wanted = [torch.arange(tree.packed.prompt, len(tree.packed))]
        job = build_job([tree], wanted, mode, style)
        network.zero_grad(set_to_none=False)
        before, start = _memory(args.device), _now(args.device)
        logp = network(run_job, job, 1.0, (), None, None)["logp"]
        logp.mean().backward()
        timings = {"seconds": _now(args.device) - start, "mib": _memory(args.device) - before}
    return timings | {"unique": len(tree.packed), "row_tokens": _row_tokens(tree), "logp": float(logp.mean())}


def _row_tokens(tree) -> int:
    from vision.forward.packing import rows_of

    return sum(len(r) for r in rows_of(tree.packed, tree.parent, "rows"))


def _now(device: str) -> float:
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str) -> float:
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def new_model(hidden: int, layers: int):
    """A random Qwen2.5-VL; hidden 512 and 8 layers give about 30M parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": max(layers // 2, 1), "hidden_size": hidden // 2, "intermediate_size": 2 * hidden, "num_heads": 4,
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "out_hidden_size": hidden,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=2, video_token_id=3, vision_start_token_id=4,
        vision_end_token_id=5,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def new_tree(hf, branches: tuple[int, ...], image_tokens: int, prompt_tokens: int, completion: int):
    """A random prompt with one square image, and a tree whose completions have `completion` tokens in all."""
    import torch

    from vision.forward.passes import TokenTree
    from vision.inputs.tokens import Pixels, PromptTokens

    side = round((4 * image_tokens) ** 0.5)
    grid = torch.tensor([[1, side, side]])
    pixels = Pixels("image", {"pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14), "image_grid_thw": grid})
    tokens = (side // 2) ** 2
    ids = torch.cat([torch.full((tokens,), 2), torch.randint(8, 4096, (prompt_tokens - tokens,))])
    types = (ids == 2).long()
    positions, _ = hf.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grid)
    prompt = PromptTokens(ids, types, positions[:, 0], int(positions.max()) + 1, pixels=pixels)
    parent, lists, level = [-1], [ids], [0]
    for k in branches:
        level = _grow(parent, lists, level, k, completion // len(branches))
    return TokenTree(prompt, parent, lists)


def _grow(parent: list[int], lists: list, level: list[int], k: int, length: int) -> list[int]:
    import torch

    out = []
    for v in level:
        for _ in range(k):
            out.append(len(parent))
            parent.append(v)
            lists.append(torch.randint(8, 4096, (length,)))
    return out


if __name__ == "__main__":
    main()

"""The recipe for users' own files: what doctor says of it, and a run that leaves an adapter."""

import json
from pathlib import Path

from families import family_folder, picture

from mmrl.config import load_config
from mmrl.doctor import examine
from mmrl.trainers.branch_grpo import BranchGrpo

RECIPES = Path(__file__).parents[2] / "configs" / "vision"
SHORT = ["run.cpu=true", "run.iterations=1", "run.prompts_per_iteration=2", "run.trackers=[]", "run.report=false"]


def test_recipe_for_users_files(tmp_path):
    rows = []
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
        rows.append({"question": f"{i} + 1?", "images": [f"{i}.png"], "answer": str(i + 1), "key_steps": [["add"]]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = [
        f"policy.model={family_folder('qwen2_5_vl')}", "policy.max_new_tokens=12", "policy.max_batch=8",
        f"task.train={tmp_path / 'rows.jsonl'}", f"task.eval={tmp_path / 'rows.jsonl'}", f"task.media_root={tmp_path}",
    ]  # fmt: skip
    config = load_config(RECIPES / "vlm_3b_lora.yaml", [*SHORT, *mine, f"run.output={tmp_path / 'r'}"])
    text = "\n".join(map(str, examine(config)))
    assert "step_rar" in text and "at most as forecast" in text and "fine" in text
    metrics = BranchGrpo(config).train()
    assert metrics["policy/skipped_updates"] == 0 and "mismatch/max" in metrics
    assert (tmp_path / "r" / "model" / "adapter_config.json").is_file()

"""Run on every rank by test_run_folder.py: an average of sharded weights is written and read back."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmrl.trainers.checkpoint import load_tensors, save_tensors
from mmrl.trainers.ema import Ema


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(10.0).reshape(5, 2)  # five rows on two ranks: uneven parts
    sharded = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    ema = Ema([sharded, torch.nn.Parameter(torch.ones(3))], decay=0.5)
    assert isinstance(ema.shadow[0], DTensor)
    with torch.no_grad():
        sharded.add_(2.0)
    ema.update()
    save_tensors(folder, ema.tensors())
    for shadow in ema.shadow:
        shadow.zero_()
    load_tensors(folder, ema.tensors())
    read = {"sharded": ema.shadow[0].full_tensor().tolist(), "plain": ema.shadow[1].tolist()}
    (folder / f"rank{rank}.json").write_text(json.dumps(read))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

#!/usr/bin/env bash
# Run an mmrl verb on N processes of this machine: tools/launch.sh N train RECIPE [key=value ...]
#
# On GPUs it uses `accelerate launch` (DDP, or what the file named by ACCELERATE_CONFIG says).
# Without a GPU it uses torchrun with gloo, because `accelerate launch --cpu --num_processes N` starts ONE process.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: tools/launch.sh NUM_PROCESSES VERB RECIPE [key=value ...]" >&2
    exit 2
fi
processes=$1
shift
config=${ACCELERATE_CONFIG:-}
if [ -n "$config" ] && grep -qE "^distributed_type: *.?DEEPSPEED" "$config"; then
    echo "error: $config: DeepSpeed is not supported; shard by FSDP2 (configs/accelerate/fsdp2.yaml) instead" >&2
    exit 2
fi
# training stops when another number of processes started than was asked for
check=()
case "$1" in
    train) check=("run.processes=$processes") stay=run.cpu=true ;;
    rollouts) stay=run.cpu=true ;;
    annotate) stay=cpu=true ;;
    *)
        echo "error: mmrl $1 runs in one process: leave tools/launch.sh out" >&2
        exit 2
        ;;
esac
python=${MMRL_PYTHON:-python}
# one thread per process: spinning OpenMP threads of several processes fight for the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    exec "$python" -m accelerate.commands.launch --num_processes "$processes" \
        ${config:+--config_file "$config"} -m mmrl "$@" "${check[@]}"
fi
if [ -n "$config" ]; then echo "no GPU is seen: ACCELERATE_CONFIG=$config is not used" >&2; fi
# accelerate starts gloo only where it is told to stay on the CPU
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m mmrl "$@" "${check[@]}" "$stay"

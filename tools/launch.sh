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
python=${MMRL_PYTHON:-python}
# one thread per process: spinning OpenMP threads of several processes fight for the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# training stops when another number of processes started than was asked for
check=()
if [ "$1" = train ]; then check=("run.processes=$processes"); fi
if "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    exec "$python" -m accelerate.commands.launch --num_processes "$processes" \
        ${ACCELERATE_CONFIG:+--config_file "$ACCELERATE_CONFIG"} -m mmrl "$@" "${check[@]}"
fi
# accelerate starts gloo only where it is told to stay on the CPU
case "$1" in
    train | rollouts) check+=("run.cpu=true") ;;
    annotate) check+=("cpu=true") ;;
esac
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m mmrl "$@" "${check[@]}"

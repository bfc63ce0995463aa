#!/usr/bin/env bash
# Train on several GPUs (or CPU processes) of one or more machines.
# Example: bash tools/dist_train.sh configs/upernet_unireplknet_s_ade20k.py 8
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
CONFIG=${1:?config} GPUS=${2:?number of processes}
ARGS=("$CONFIG" "${@:3}")
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$GPUS" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "${ARGS[@]}" --launcher pytorch

#!/usr/bin/env bash
# Train through Slurm.
# Example: GPUS=8 bash tools/slurm_train.sh PARTITION JOB configs/upernet_unireplknet_s_ade20k.py
set -euo pipefail
PARTITION=${1:?partition} JOB_NAME=${2:?job name} CONFIG=${3:?config}
GPUS=${GPUS:-8} GPUS_PER_NODE=${GPUS_PER_NODE:-8} CPUS_PER_TASK=${CPUS_PER_TASK:-5}
# shellcheck disable=SC2086
exec srun -p "$PARTITION" --job-name="$JOB_NAME" --gres="gpu:$GPUS_PER_NODE" --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" "${@:4}" --launcher slurm

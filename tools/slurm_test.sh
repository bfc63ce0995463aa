#!/usr/bin/env bash
# Test through Slurm.
# Example: GPUS=8 bash tools/slurm_test.sh PARTITION JOB configs/upernet_unireplknet_s_ade20k.py CHECKPOINT
set -euo pipefail
PARTITION=${1:?partition} JOB_NAME=${2:?job name} CONFIG=${3:?config} CHECKPOINT=${4:?checkpoint}
GPUS=${GPUS:-8} GPUS_PER_NODE=${GPUS_PER_NODE:-8} CPUS_PER_TASK=${CPUS_PER_TASK:-5}
# shellcheck disable=SC2086
exec srun -p "$PARTITION" --job-name="$JOB_NAME" --gres="gpu:$GPUS_PER_NODE" --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" "${@:5}" --launcher slurm

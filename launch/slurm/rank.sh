#!/usr/bin/env bash
# One rank of a Slurm job, started by srun: what DeepSpeed's launcher would set, from what Slurm sets.
#   bash launch/slurm/rank.sh MODULE ARGUMENT ...
set -euo pipefail
# "2(x3),1": 2 tasks on each of 3 nodes, 1 on the fourth.
sizes=()
for part in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do
    times=1
    if [[ "$part" =~ x([0-9]+) ]]; then times="${BASH_REMATCH[1]}"; fi
    for ((i = 0; i < times; i++)); do sizes+=("${part%%[!0-9]*}"); done
done
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_SIZE="${sizes[$SLURM_NODEID]}"
module="$1"
shift
exec python -u -m "$module" "$@"

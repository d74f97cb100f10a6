#!/usr/bin/env bash
# bash launch/step3_ppo.sh CONFIG [key=value ...] [--hostfile F | --num-gpus N | --cpu N] [--dry-run] [--max-restarts N]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python -m tristage.launch step3_ppo.train "$@"

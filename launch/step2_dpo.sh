#!/usr/bin/env bash
# bash launch/step2_dpo.sh CONFIG [key=value ...] [deepspeed launcher options: --num_gpus N, --hostfile F, --include ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch_step step2_dpo.train "$@"

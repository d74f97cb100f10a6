#!/usr/bin/env bash
# bash launch/step1_sft.sh CONFIG [key=value ...] [deepspeed launcher options: --num_gpus N, --hostfile F, --include ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch_step step1_sft.train "$@"

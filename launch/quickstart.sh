#!/usr/bin/env bash
# From a bare clone to a table that shows RLHF working: environment, a made-up task, three steps, evaluation.
#   bash launch/quickstart.sh [OUT] [SEED]        OUT: output/quickstart      a second run resumes where it stopped
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
exec python -m tristage.quickstart "${1:-$ROOT/output/quickstart}" --seed "${2:-0}" \
    --configs "${CONFIGS:-$ROOT/configs/quickstart}" --size "${SIZE:-small}"

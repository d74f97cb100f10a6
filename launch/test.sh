#!/usr/bin/env bash
# Lint, types and tests.   bash launch/test.sh [--all] [pytest arguments]      --all: the slow ones too
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
selection=(-m "not slow and not multinode")
if [[ "${1:-}" == --all ]]; then
    selection=()
    shift
fi
cd "$ROOT"
ensure_environment "[test]"
build_cpu_op
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
mypy
mypy --strict tristage/algo
python -m pytest "${selection[@]}" "$@"

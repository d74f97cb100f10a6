"""Policies on the same held-out prompts, sampled with the same random numbers: every response of each as JSON.

    deepspeed --num_gpus 1 --module results.evaluate --config configs/quickstart/step3_ppo.yaml output=OUT [...]

OUT/policies.json: {name: [key=value, ...]}, the settings in which each policy differs. OUT/<name>.jsonl gets its
samples in the order of the prompts, as step 3 writes them to samples.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path

from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.heldout import evaluate
from tristage import dist
from tristage.config import load_config
from tristage.training.run import entry_point


def main(argv: list[str]) -> None:
    output = Path(load_config(PPOConfig, argv).output)
    for name, own in json.loads((output / "policies.json").read_text(encoding="utf-8")).items():
        settings = load_config(PPOConfig, [*argv, *own])
        found = evaluate(PPORun.build(read_inputs(settings, train=False), dist.init(settings.device), train=False))
        if dist.is_main():
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in found.samples)
            (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    entry_point(main)

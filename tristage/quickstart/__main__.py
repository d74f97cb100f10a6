"""The three steps on a made-up task, then a table of what each changed; called by launch/quickstart.sh.

    python -m tristage.quickstart OUT [--seed 0] [--configs configs/quickstart] [--size small]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tristage.launch.pipeline import Step, run_steps
from tristage.quickstart.task import SIZES

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"


def main(argv: list[str]) -> int:
    """Exit code of the first part that fails."""
    parser = argparse.ArgumentParser("python -m tristage.quickstart")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    given = parser.parse_args(argv)
    # In processes of their own: this one stays small while the ranks run.
    prepare = ["tristage.quickstart.prepare", str(given.out), "--seed", given.seed, "--size", given.size]
    return (
        subprocess.call([sys.executable, "-m", *prepare])
        or run_steps(quickstart_steps(given.out, given.configs, given.seed))
        or subprocess.call([sys.executable, "-m", "tristage.quickstart.report", str(given.out)])
    )


def quickstart_steps(out: Path, configs: Path, seed: str) -> list[Step]:
    """Each step with the data of the made-up task, from the folders of the steps before."""
    sft, reward, ppo = (out / name for name in ("step1_sft", "step2_reward_model", "step3_ppo"))

    def data(name: str) -> list[str]:
        files = {side: out / f"data/{name}.{side}.jsonl" for side in ("train", "heldout")}
        return [f"seed={seed}", *(f"data.{side}={file}" for side, file in files.items())]

    starts = [f"actor.model={sft}/final", f"reward.model={reward}/final"]
    return [
        Step("step 1", "step1_sft.train", configs / "step1_sft.yaml", sft, [f"model={out}/model", *data("sft")]),
        Step(
            *("step 2", "step2_reward_model.train", configs / "step2_reward_model.yaml", reward),
            [f"model={sft}/final", *data("preference")],
        ),
        Step("step 3", "step3_ppo.train", configs / "step3_ppo.yaml", ppo, [*starts, *data("prompts")]),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

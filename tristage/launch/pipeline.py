"""Runs several steps one after the other, each starting from the folders of those before.

    python -m tristage.launch.pipeline CONFIG_DIR OUT [launcher options, key=value that all three steps have]

Finished steps are skipped, a stopped step resumes; at the end it writes OUT/report.html and prints its verdicts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tristage.config import load_config, settings_class
from tristage.errors import UserError
from tristage.launch.check_config import check_config
from tristage.launch.main import launch_step
from tristage.launch.options import parse_words
from tristage.runs.finished import has_finished, is_finished


class Step(NamedTuple):
    """One step of a pipeline."""

    name: str
    module: str
    config: Path
    output: Path
    words: list[str]  # key=value and launcher options

    def is_finished(self, models: bool = True) -> bool:
        """Whether `output` holds what a run with these settings wrote to its end. Raises UserError if another did."""
        if not has_finished(self.output):
            return False
        words = ["--config", str(self.config), *parse_words(self.all_words).settings]
        step = settings_class(str(self.config), self.module.removesuffix(".train"))
        return is_finished(load_config(step, words), models)

    @property
    def all_words(self) -> list[str]:
        return [f"output={self.output}", *self.words]


def main(argv: list[str]) -> int:
    """Exit code of the first step that fails; 2 and one sentence for what the user must fix."""
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        print("usage: bash launch/pipeline.sh CONFIG_DIR OUT [launcher options, key=value]", file=sys.stderr)
        return 2
    configs, out, *words = argv
    if code := run_steps(recipe_steps(Path(configs), Path(out), words)):
        return code
    from tristage.reporting.report import announce  # jinja2 takes time, and a launch that fails does not need it

    announce(Path(out))
    return 0


def recipe_steps(configs: Path, out: Path, words: list[str]) -> list[Step]:
    """The three steps of a recipe, step 3 starting from the folders of the others."""
    sft, reward, ppo = (out / name for name in ("step1_sft", "step2_reward_model", "step3_ppo"))
    starts = [f"actor.model={sft}/final", f"reward.model={reward}/final"]
    return [
        Step("step 1", "step1_sft.train", configs / "step1_sft.yaml", sft, words),
        Step("step 2", "step2_reward_model.train", configs / "step2_reward_model.yaml", reward, words),
        Step("step 3", "step3_ppo.train", configs / "step3_ppo.yaml", ppo, [*starts, *words]),
    ]


def run_steps(steps: Sequence[Step]) -> int:
    """Run those that are not finished, after checking all their configs; the exit code of the first that fails."""
    try:
        for step in steps:
            if not step.is_finished(models=False):  # a mistake in step 3's config is reported before step 1 trains
                given = parse_words(step.all_words)
                words = [step.module, "--config", str(step.config), *given.settings]
                check_config(words, given.options, models=False)
        for step in steps:
            if step.is_finished():
                print(f"{step.name}: already finished ({step.output}/final)", flush=True)
            elif code := launch_step(step.module, str(step.config), step.all_words):
                return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

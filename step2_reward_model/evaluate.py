"""How often a reward model ranks correctly, how certain that is, and how much of it is length.

    python -m step2_reward_model.evaluate --config configs/quickstart/step2_reward_model.yaml model=OUT/final

for the config's held-out rows, or `data.heldout=...` for others; `--interactive` takes a prompt and answers typed in.
"""

from __future__ import annotations

import sys

from rich.console import Console

from step2_reward_model.config import RewardModelConfig
from step2_reward_model.heldout import evaluate
from step2_reward_model.interactive import require_one_rank, score_typed
from step2_reward_model.measures import Measurements, length_warning
from step2_reward_model.report import tables
from tristage import dist
from tristage.config import load_config
from tristage.data.sets import load_heldout
from tristage.engine import frozen_engine
from tristage.models.reward_model import load_reward_model
from tristage.training import run, setup


def main(argv: list[str]) -> None:
    interactive = "--interactive" in argv
    settings = load_config(RewardModelConfig, [word for word in argv if word != "--interactive"])
    _, config, tokenizer = setup.check_training(settings)
    heldout = None if interactive else load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    if interactive:
        require_one_rank()
    model = load_reward_model(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    engine = frozen_engine(model, config)
    if heldout is None:
        score_typed(engine, settings, tokenizer, device, iter(sys.stdin))
    else:
        show(evaluate(engine, heldout, settings, tokenizer, device))


def show(measured: Measurements) -> None:
    """Print the tables, and the warning where one is due, on rank 0."""
    if dist.is_main():
        console = Console(width=None if sys.stdout.isatty() else 100)
        for table in tables(measured):
            console.print(table)
    if warning := length_warning(measured):
        dist.print0(warning)


if __name__ == "__main__":
    run.entry_point(main)

"""Held-out loss and perplexity of a policy, per answer token.

    python -m step1_sft.evaluate --config configs/quickstart/step1_sft.yaml model=OUT/final
"""

from __future__ import annotations

from step1_sft.config import SFTConfig
from step1_sft.heldout import evaluate
from tristage import dist
from tristage.config import load_config
from tristage.data.sets import load_heldout
from tristage.engine import frozen_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.training import run, setup


def main(argv: list[str]) -> None:
    settings = load_config(SFTConfig, argv)
    _, config, tokenizer = setup.check_training(settings)
    heldout = load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    model = load_causal_lm(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    metrics = evaluate(frozen_engine(model, config), heldout, settings.micro_batch, tokenizer, device)
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)

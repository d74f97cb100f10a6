"""Held-out loss, accuracy and margins of a policy's implicit rewards, and the accuracy of "the longer answer wins".

    python -m step2_dpo.evaluate --config configs/quickstart/step2_dpo.yaml model=OUT/final reference.model=START
"""

from __future__ import annotations

from step2_dpo.config import DPOConfig
from step2_dpo.heldout import evaluate
from step2_dpo.reference import check_reference, load_reference, no_reference
from tristage import dist
from tristage.config import load_config
from tristage.data.sets import load_heldout
from tristage.engine import frozen_engine
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.training import run, setup


def main(argv: list[str]) -> None:
    settings = load_config(DPOConfig, argv)
    plan, config, tokenizer = setup.check_training(settings)
    if settings.reference is not None and settings.reference_path == settings.model:
        raise UserError(
            f"{settings.file}: key `reference.model`: is `model` itself, so all margins would be 0; "
            "give the model that training started from"
        )
    reference_config = check_reference(settings, plan, tokenizer)
    heldout = load_heldout(settings, tokenizer)
    device = dist.init(settings.device)
    reference = no_reference if reference_config is None else load_reference(settings, reference_config, tokenizer)
    model = load_causal_lm(settings.model, tokenizer, engine_config=config, **setup.loading(settings))
    metrics = evaluate(frozen_engine(model, config), reference, heldout, settings, tokenizer, device)
    for name, value in metrics.items():
        dist.print0(f"{name} {value:.4f}")


if __name__ == "__main__":
    run.entry_point(main)

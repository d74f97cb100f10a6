"""Step 2 with the head that transformers makes, N(0, 0.02), in place of N(0, 1/sqrt(d+1)); for the ablation.

    deepspeed --num_gpus 1 --module results.small_head --config configs/quickstart/step2_reward_model.yaml
"""

from typing import Any

import torch

from step2_reward_model.train import main
from tristage.models import reward_model
from tristage.training.run import entry_point


def init_head(head: torch.nn.Linear, seed: int, engine_config: dict[str, Any] | None) -> None:
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    reward_model._init_head = init_head
    entry_point(main)

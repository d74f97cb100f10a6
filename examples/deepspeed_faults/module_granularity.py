"""ZeRO 3 computes with weights that it has not gathered if stage3_module_granularity_threshold is set.

    deepspeed --num_gpus 2 examples/deepspeed_faults/module_granularity.py
"""

import deepspeed
import torch


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


model = torch.nn.Sequential(Block(), Block())
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 100_000},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
try:
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 8)).square().mean())
        engine.step()
    print("trains")
except RuntimeError as error:
    print(f"fails: {error}")

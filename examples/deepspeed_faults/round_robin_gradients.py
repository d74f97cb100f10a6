"""DeepSpeed's map from a parameter to its float32 copy is wrong with round_robin_gradients, at ZeRO 1 and 2.

    deepspeed --num_gpus 2 examples/deepspeed_faults/round_robin_gradients.py

The flat buffer holds the parameters in round-robin order, and the map counts offsets in the model's order.
"""

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2, "round_robin_gradients": True},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
for name, parameter in engine.module.named_parameters():
    copy = safe_get_full_fp32_param(parameter)
    print(f"{name}: its float32 copy is {'right' if torch.equal(copy, parameter.data) else 'that of others'}")

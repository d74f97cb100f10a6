"""Step 3 with EOS outside the losses, as in DeepSpeed-Chat where padding has the id of EOS; for the ablation.

    deepspeed --num_gpus 1 --module results.without_eos --config configs/quickstart/step3_ppo.yaml

The score still stands at the EOS and reaches the tokens before it through the advantages; the policy and value losses,
the metrics of the update and the count of tokens leave the EOS out.
"""

import torch

from step3_ppo.train import main
from tristage.batches import Experience
from tristage.training.run import entry_point


def mask_without_eos(experience: Experience) -> torch.Tensor:
    """[N,R] bool, True on response tokens but the one that ends a response."""
    sequences = experience.sequences
    stops = torch.isin(sequences.responses, torch.tensor(sequences.stop_ids, device=sequences.responses.device))
    return sequences.response_mask & ~stops


if __name__ == "__main__":
    Experience.mask = property(mask_without_eos)  # type: ignore[assignment,method-assign]
    entry_point(main)

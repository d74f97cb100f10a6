"""How responses are sampled: backends behind `deepspeed.runtime.rollout.RolloutEngine`."""

from deepspeed.runtime.rollout import SamplingConfig

from tristage.rollout.padded import PaddedRollout, SeededRequest
from tristage.rollout.sampling import row_uniforms

__all__ = ["PaddedRollout", "SamplingConfig", "SeededRequest", "row_uniforms"]

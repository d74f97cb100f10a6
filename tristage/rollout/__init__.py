"""How responses are sampled: backends behind `deepspeed.runtime.rollout.RolloutEngine`."""

from deepspeed.runtime.rollout import SamplingConfig

from tristage.rollout.base import RolloutBackend, SampledBatch, SeededRequest
from tristage.rollout.padded import PaddedRollout
from tristage.rollout.sampling import row_uniforms
from tristage.rollout.static import StaticRollout

__all__ = [
    "PaddedRollout",
    "RolloutBackend",
    "SampledBatch",
    "SamplingConfig",
    "SeededRequest",
    "StaticRollout",
    "row_uniforms",
]

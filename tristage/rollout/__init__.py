"""How responses are sampled: backends behind `deepspeed.runtime.rollout.RolloutEngine`."""

from deepspeed.runtime.rollout import SamplingConfig

from tristage.rollout.base import RolloutBackend, RolloutError, SampledBatch, SeededRequest
from tristage.rollout.padded import PaddedRollout, generate_padded
from tristage.rollout.sampling import choose, row_uniforms
from tristage.rollout.static import StaticRollout
from tristage.rollout.vllm import VllmRollout, check_vllm

__all__ = [
    "PaddedRollout",
    "RolloutBackend",
    "RolloutError",
    "SampledBatch",
    "SamplingConfig",
    "SeededRequest",
    "StaticRollout",
    "VllmRollout",
    "check_vllm",
    "choose",
    "generate_padded",
    "row_uniforms",
]

"""Step 3 taken apart: a run up to its first iteration, whose phases a test calls one by one."""

from __future__ import annotations

import dataclasses

import torch

from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.heldout import Evaluation, evaluate
from step3_ppo.rollout import make_experience, sample_responses, score_responses
from step3_ppo.update import check_first_iteration, ppo_update
from tristage import dist
from tristage.batches import Experience, PromptBatch
from tristage.config import load_config

CPU = torch.device("cpu")
RESPONSE = 12
ODD = ("data.heldout_limit=7", "logged_samples=1000")


class Run:
    """Step 3 up to its first iteration, and the phases of an iteration one by one."""

    def __init__(self, config: str, *overrides: str):
        self.settings: PPOConfig = load_config(PPOConfig, ["--config", config, *overrides])
        dist.init("cpu")
        self.ppo = PPORun.build(read_inputs(self.settings), CPU)
        self.engines, self.rollouts, self.tokenizer = self.ppo.engines, self.ppo.rollouts, self.ppo.inputs.tokenizer

    def batch(self, iteration: int = 1) -> PromptBatch:
        return self.ppo.prompts(iteration)

    def experience(self, iteration: int = 1) -> tuple[Experience, dict[str, float]]:
        batch, settings, functions = self.batch(iteration), self.settings, self.ppo.inputs.functions
        sampled = sample_responses(self.rollouts, batch, settings.rollout, settings.seed, iteration)
        own = score_responses(self.engines, self.tokenizer, sampled, batch, settings, functions)
        return make_experience(self.engines, own, batch, settings, self.ppo.control)

    def check(self, experience: Experience) -> None:
        check_first_iteration(self.engines, experience, self.settings, self.rollouts.name)

    def update(self, experience: Experience, iteration: int = 1) -> dict[str, float]:
        return ppo_update(self.engines, experience, iteration, self.settings, self.ppo.inputs.plan)[0]

    def evaluate(self, prompts: int | None = None) -> Evaluation:
        inputs = dataclasses.replace(self.ppo.inputs, heldout=self.ppo.inputs.heldout[:prompts])
        return evaluate(dataclasses.replace(self.ppo, inputs=inputs))

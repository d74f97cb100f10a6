"""A run of step 3, built in one place for training, evaluation, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from step3_ppo.config import PPOConfig
from step3_ppo.engines import Engines, build_engines, check_models
from step3_ppo.rewards import RewardTerm, check_turns, load_functions
from step3_ppo.rollout import Control, make_rollouts, prompt_batch
from step3_ppo.update import ActorExtras
from tristage import dist
from tristage.answering.scorers import TextScorer
from tristage.batches import PromptBatch, SFTBatch
from tristage.checkpoint import Checkpoint, load_checkpoint
from tristage.config import BatchPlan, world_size_from_environment
from tristage.data.collate import collate_sft, pick
from tristage.data.loader import Loader, deal
from tristage.data.packing import Blocks
from tristage.data.sets import load_heldout, load_sets, load_text_blocks
from tristage.data.store import Rows
from tristage.engine.average import WeightAverage
from tristage.errors import UserError
from tristage.rollout import RolloutBackend
from tristage.storage.pieces import Piece
from tristage.training import setup
from tristage.training.health import Health
from tristage.training.speed import Speed


@dataclass(frozen=True)
class Inputs:
    """What a run checks and reads before ranks join and models load."""

    settings: PPOConfig
    plan: BatchPlan
    configs: dict[str, dict[str, Any]]  # the DeepSpeed config of each engine, by name
    tokenizer: Any
    prompts: Rows  # empty where a policy is only evaluated
    heldout: Rows
    pretraining: Blocks | None
    functions: list[RewardTerm]
    grader: TextScorer | None


def read_inputs(settings: PPOConfig, train: bool = True) -> Inputs:
    """Check everything cheap, models first, then read the data; with train=False only what an evaluation needs.

    Raises:
        UserError: no such device, a DeepSpeed JSON, folder, function or row that is wrong, too few prompts.
    """
    dist.check_device(settings.device, settings.file)
    ranks = world_size_from_environment()
    plan = settings.plan(ranks) if train else BatchPlan.make(ranks, 1, ranks)
    configs = setup.deepspeed_configs(settings, plan)
    if not train:
        configs.pop("critic", None)
    tokenizer = check_models(settings)
    functions, grader = load_functions(settings)
    if not train:
        heldout = load_heldout(settings, tokenizer)
        check_turns(settings, heldout)
        return Inputs(settings, plan, configs, tokenizer, heldout[:0], heldout, None, functions, grader)
    prompts, heldout = load_sets(settings, tokenizer)
    check_turns(settings, prompts, heldout)
    if len(prompts) < settings.rollout.prompts:
        raise UserError(
            f"{settings.file}: rollout.prompts is {settings.rollout.prompts} but `data.train` gives only "
            f"{len(prompts)} prompts; lower it or give more prompts"
        )
    mix = settings.pretraining
    blocks = None if mix is None else load_text_blocks(mix.data, settings, tokenizer, mix.block_tokens)
    return Inputs(settings, plan, configs, tokenizer, prompts, heldout, blocks, functions, grader)


@dataclass
class PPORun:
    """What an iteration works on: the inputs, the engines, and what carries over to the next iteration."""

    inputs: Inputs
    device: torch.device
    engines: Engines
    rollouts: RolloutBackend
    control: Control
    health: Health
    average: WeightAverage | None = None  # of the actor, with `ema`
    first: int = 0  # iterations that a checkpoint has done

    @property
    def settings(self) -> PPOConfig:
        return self.inputs.settings

    @classmethod
    def build(cls, inputs: Inputs, device: torch.device, train: bool = True) -> PPORun:
        """Load the models and give each its engine, once ranks have joined; with train=False all are frozen."""
        settings = inputs.settings
        engines = build_engines(settings, inputs.configs, inputs.tokenizer, train)
        rollouts = make_rollouts(engines.actor, inputs.tokenizer, settings)
        return cls(inputs, device, engines, rollouts, Control.of(settings.ppo), Health(settings))

    def restore(self, found: Checkpoint | None) -> None:
        """Continue from the checkpoint `found`; None starts from the first iteration.

        Raises:
            UserError: the disk has no room for the checkpoints to come, or the checkpoint is of other models.
        """
        settings = self.settings
        self.first = load_checkpoint(settings, found, self.engines.trained())
        self.health = Health.restored(settings, found)
        self.average = make_average(settings, self.engines.actor)
        if found is not None and found.control is not None:
            self.control.load_state_dict(found.control)
        if self.average is not None and found is not None and (pieces := found.pieces("own")) is not None:
            self.average.restore(pieces)

    @cached_property
    def speed(self) -> Speed:
        """What the models' work takes."""
        return Speed(self.settings, self.device)

    @property
    def own_pieces(self) -> Callable[[], list[Piece]] | None:
        """The tensors that checkpoints hold in addition to the engines'."""
        return None if self.average is None else self.average.pieces

    @cached_property
    def loader(self) -> Loader:
        """Each iteration rollout.prompts prompts, dealt one at a time so that ranks get like lengths."""
        settings, prompts = self.settings, self.inputs.prompts
        plan = BatchPlan.make(settings.rollout.prompts, 1, dist.world_size())
        epochs = settings.iterations * settings.rollout.prompts / len(prompts)
        return Loader(prompts.lengths, plan, dist.rank(), settings.seed, epochs)

    def prompts(self, iteration: int) -> PromptBatch:
        """This rank's prompts of an iteration, each rollout.samples times."""
        inputs, settings, loader = self.inputs, self.settings, self.loader
        rows = loader.all_rows(iteration - 1)
        places = [place for (place,) in deal(range(len(rows)), inputs.prompts.lengths[rows], loader.plan, loader.rank)]
        batch = prompt_batch(inputs.prompts, rows, places, settings, inputs.tokenizer, settings.rollout.samples)
        return batch.to(self.device)

    def names(self, iteration: int) -> list[str]:
        """Where the prompt of each response came from, in the order of the experience's rows."""
        rows, samples = self.inputs.prompts, self.settings.rollout.samples
        return [rows.where(row) for row in self.loader.all_rows(iteration - 1) for _ in range(samples)]

    @cached_property
    def extras(self) -> ActorExtras:
        """The pretraining mix and the moving average, where the settings ask for them."""
        after_step = None if self.average is None else self.average.update
        settings, tokenizer = self.settings, self.inputs.tokenizer
        mix, blocks = settings.pretraining, self.inputs.pretraining
        if mix is None or blocks is None:
            return ActorExtras(after_step=after_step)
        plan = settings.pretraining_plan(dist.world_size())
        epochs = settings.total_steps * mix.blocks / len(blocks)
        loader = Loader(blocks.lengths, plan, dist.rank(), settings.seed, epochs)

        def batches(step: int) -> list[SFTBatch]:
            return [collate_sft(pick(blocks, micro), tokenizer.pad_token_id) for micro in loader.step_rows(step)]

        return ActorExtras(batches, mix.coef, after_step)


def make_average(settings: PPOConfig, actor: Any) -> WeightAverage | None:
    """The moving average of the actor that `ema` asks for, as it starts."""
    if settings.ema is None:
        return None
    steps = settings.total_steps - settings.warmup_steps  # the actor's, which follow the critic's warm-up
    return WeightAverage(actor, settings.ema.decay, settings.warmup_steps + int(settings.ema.start * steps))

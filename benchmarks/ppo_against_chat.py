"""CPU seconds of a PPO iteration and of one in DeepSpeed-Chat's style, on the same models and sizes, in one run.

    python -m benchmarks.ppo_against_chat [OUT.json] [--repetitions N] [--smallest]

Actor and reference: OPT of 30 million parameters (512 wide, 8 layers, vocabulary 8192); critic and reward model: 5.4
million (256 wide, 4 layers). Random weights, float32, AdamW (fused), prompts of 128 random tokens, at most 128 tokens
of response, two gloo ranks. Each contestant runs in processes of its own, in turns; a figure is the median over the
iterations of all repetitions, per rank. Full: no token ends a response. Mixed: about one token in 64 does, for both: a
mean near 55.

The loop in DeepSpeed-Chat's style is written from a reading of what it does, and keeps what costs: transformers'
`generate` on the engine's module (under ZeRO-3 every token gathers every parameter), rows padded to the limit, full
logits and log_softmax of prompt and response, each micro-batch an optimizer step. `chat, wide` is its best setting: one
generation batch for all rows of an iteration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch.nn import functional as F
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from benchmarks import tiny
from step3_ppo.build import PPORun, read_inputs
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import make_experience, sample_responses, score_responses
from step3_ppo.update import ppo_update
from tristage import dist
from tristage.batches import PromptBatch
from tristage.models.causal_lm import load_causal_lm
from tristage.models.quiet import quiet_libraries
from tristage.models.reward_model import RewardModel, load_reward_model
from tristage.models.tokenizer import load_tokenizer

RANKS, MICRO_BATCH, VOCABULARY = 2, 4, 8192
STOPS = [*range(20, 148)]  # of 8192 tokens of about the same chance: one in 64 ends a response
# Name -> (contestants, ZeRO stage, rows per rank and iteration, mixed lengths)
EXPERIMENTS = {
    "ZeRO-2, 4 rows, full": (("tristage", "chat"), 2, 4, False),
    "ZeRO-2, 4 rows, mixed": (("tristage", "chat"), 2, 4, True),
    "ZeRO-2, 64 rows, full": (("tristage", "chat", "chat, wide"), 2, 64, False),
    "ZeRO-2, 64 rows, mixed": (("tristage", "chat", "chat, wide"), 2, 64, True),
    "ZeRO-3, 4 rows, full": (("tristage", "chat"), 3, 4, False),
}


class Sizes:
    """What a run of the experiments is made of."""

    def __init__(self, smallest: bool) -> None:
        self.tokens = 8 if smallest else 128  # of a prompt, and of a response at most
        self.layers = (1, 1) if smallest else (8, 4)
        self.widths = (32, 32) if smallest else (512, 256)


def write_models(folder: Path, sizes: Sizes) -> None:
    """folder/actor, folder/reward and folder/rows."""
    tiny.write_model(folder / "tokens")
    tokenizer = load_tokenizer(str(folder / "tokens"))
    for name, layers, width in zip(("actor", "trunk"), sizes.layers, sizes.widths, strict=True):
        config = OPTConfig(
            vocab_size=VOCABULARY, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=layers, dropout=0.0,
            num_attention_heads=max(1, width // 64), ffn_dim=4 * width, max_position_embeddings=2 * sizes.tokens + 2,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny.write_reward_model(folder / "reward", str(folder / "trunk"))
    tiny.write_rows(folder / "rows", 512)


class Clock:
    """CPU seconds of this process by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - start


def prompts_of(rank: int, rows: int, tokens: int, iteration: int) -> torch.Tensor:
    """[rows, tokens] of this rank."""
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    return torch.randint(1000, VOCABULARY, (rows, tokens), generator=generator)


# ---- tristage --------------------------------------------------------------------------------------------------------


class Tristage:
    def __init__(self, folder: Path, sizes: Sizes, stage: int, rows: int, mixed: bool) -> None:
        values = [
            f"max_prompt_tokens={sizes.tokens}", f"rollout.max_response_tokens={sizes.tokens}",
            f"rollout.prompts={RANKS * rows}", f"rollout.rows_at_once={rows}", "ppo.epochs=1",
            f"ppo.minibatch={RANKS * MICRO_BATCH}", f"ppo.micro_batch={MICRO_BATCH}",
            *([f"rollout.stop_token_ids={STOPS}"] if mixed else []),
        ]  # fmt: skip
        paths = [str(folder / name) for name in ("actor", "reward", "rows/prompts.jsonl")]
        self.settings: PPOConfig = tiny.ppo_config(folder / f"run{dist.rank()}", *paths, stage, *values)
        self.run = PPORun.build(read_inputs(self.settings), torch.device("cpu"))
        self.rows, self.tokens = rows, sizes.tokens

    def iteration(self, number: int, clock: Clock) -> int:
        """Tokens of responses."""
        run, settings = self.run, self.settings
        ids = prompts_of(dist.rank(), self.rows, self.tokens, number)
        draws = torch.arange(self.rows) + self.rows * dist.rank()
        batch = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), draws, torch.ones(self.rows, dtype=torch.bool))
        with clock("rollout"):
            sampled = sample_responses(run.rollouts, batch, settings.rollout, settings.seed, number)
        with clock("score"):
            own = score_responses(run.engines, run.inputs.tokenizer, sampled, batch, settings, [])
            experience, _ = make_experience(run.engines, own, batch, settings, run.control)
        with clock("update"):
            ppo_update(run.engines, experience, number, settings, run.inputs.plan)
        return int(sampled.sequences.response_mask.sum())


# ---- a loop in DeepSpeed-Chat's style --------------------------------------------------------------------------------


class Chat:
    def __init__(self, folder: Path, sizes: Sizes, stage: int, rows: int, mixed: bool, wide: bool) -> None:
        self.rows, self.tokens, self.generated = rows, sizes.tokens, rows if wide else min(rows, MICRO_BATCH)
        self.tokenizer = load_tokenizer(str(folder / "actor"))
        self.stops, self.synced = STOPS if mixed else [], stage == 3
        self.actor, self.critic = (self._engine(folder, name, stage, True) for name in ("actor", "reward"))
        frozen = 3 if stage == 3 else 0
        self.reference, self.reward = (self._engine(folder, name, frozen, False) for name in ("actor", "reward"))

    def _engine(self, folder: Path, name: str, stage: int, learns: bool) -> Any:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
        }  # fmt: skip
        load: Any = load_reward_model if name == "reward" else load_causal_lm
        model = load(str(folder / name), self.tokenizer, dtype=torch.float32, engine_config=config)
        module = model if isinstance(model, RewardModel) else model.model
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True) if learns else None
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        return engine

    def iteration(self, number: int, clock: Clock) -> int:
        """Tokens of responses."""
        ids, made = prompts_of(dist.rank(), self.rows, self.tokens, number), 0
        torch.manual_seed(number)
        with clock("rollout"):
            sequences = torch.cat([self._generate(part) for part in ids.split(self.generated)])
        for part in sequences.split(MICRO_BATCH):
            with clock("score"):
                experience = self._score(part)
            with clock("update"):
                self._update(*experience)
            made += int(experience[1][:, self.tokens :].sum())
        return made

    @torch.no_grad()
    def _generate(self, ids: torch.Tensor) -> torch.Tensor:
        """[b,P] -> [b,P+R], padded to the limit."""
        self.actor.eval()
        ends = [self.tokenizer.eos_token_id, *self.stops] if self.stops else [-1]
        config = GenerationConfig(
            do_sample=True, max_new_tokens=self.tokens, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id
        )
        mask = torch.ones_like(ids)
        found = self.actor.module.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=self.synced
        )
        return F.pad(found, (0, 2 * self.tokens - found.shape[1]), value=self.tokenizer.pad_token_id)

    @torch.no_grad()
    def _score(self, sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(sequences, mask, log-probabilities, values, advantages, returns) of every token."""
        for engine in (self.actor, self.critic, self.reference, self.reward):
            engine.eval()
        mask = sequences != self.tokenizer.pad_token_id
        logprobs, reference = (self._logprobs(engine, sequences, mask) for engine in (self.actor, self.reference))
        values = self.critic(sequences, mask)[:, :-1]
        score = self.reward(sequences, mask)[:, -1]
        rewards = -0.1 * (logprobs - reference)
        rewards[:, -1] += score.clamp(-5, 5)
        advantage, advantages = torch.zeros(len(sequences)), []
        for t in reversed(range(self.tokens - 1, rewards.shape[1])):
            after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            advantage = rewards[:, t] + after - values[:, t] + 0.95 * advantage
            advantages.append(advantage)
        found = torch.stack(advantages[::-1], dim=1)
        return sequences, mask, logprobs, values, found, found + values[:, self.tokens - 1 :]

    def _update(
        self,
        sequences: torch.Tensor,
        mask: torch.Tensor,
        logprobs: torch.Tensor,
        values: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
    ) -> None:
        start, answers = self.tokens - 1, mask[:, self.tokens :].float()
        self.actor.train()
        self.critic.train()
        ratio = (self._logprobs(self.actor, sequences, mask)[:, start:] - logprobs[:, start:]).exp()
        loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        self.actor.backward((loss * answers).sum() / answers.sum())
        self.actor.step()
        new = self.critic(sequences, mask)[:, start:-1]
        clipped = torch.clamp(new, values[:, start:] - 0.2, values[:, start:] + 0.2)
        error = 0.5 * torch.max((new - returns) ** 2, (clipped - returns) ** 2)
        self.critic.backward((error * answers).sum() / answers.sum())
        self.critic.step()

    @staticmethod
    def _logprobs(engine: Any, sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = engine(sequences, attention_mask=mask.long(), use_cache=False).logits
        return F.log_softmax(logits[:, :-1], dim=-1).gather(2, sequences[:, 1:, None]).squeeze(2)


# ---- the comparison --------------------------------------------------------------------------------------------------


def run_contestant(
    rank: int, name: str, folder: str, smallest: bool, stage: int, rows: int, mixed: bool, iterations: int
) -> dict[str, Any]:
    """CPU seconds by phase and response tokens of each iteration after the first, and the peak of resident memory."""
    quiet_libraries()
    dist.init("cpu")
    sizes = Sizes(smallest)
    if name == "tristage":
        contestant: Any = Tristage(Path(folder), sizes, stage, rows, mixed)
    else:
        contestant = Chat(Path(folder), sizes, stage, rows, mixed, wide=name == "chat, wide")
    found = []
    for number in range(1, iterations + 2):
        clock = Clock()
        tokens = contestant.iteration(number, clock)
        found.append(clock.seconds | {"tokens": tokens})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"iterations": found[1:], "peak_gib": peak}


def compare(name: str, folder: str, smallest: bool, repetitions: int) -> dict[str, Any]:
    contestants, stage, rows, mixed = EXPERIMENTS[name]
    if smallest:
        rows = min(rows, 8)
    iterations = 1 if stage == 3 or rows > MICRO_BATCH else 3
    raw: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    for _ in range(repetitions):
        for contestant in contestants:
            raw[contestant] += tiny.run_ranks(
                RANKS, run_contestant, contestant, folder, smallest, stage, rows, mixed, iterations
            )
    return {"contestants": {contestant: summary(ranks, rows) for contestant, ranks in raw.items()}, "raw": raw}


def summary(ranks: list[dict[str, Any]], rows: int) -> dict[str, float]:
    """Medians over ranks and iterations."""
    iterations = [iteration for rank in ranks for iteration in rank["iterations"]]
    sums = [sum(i[phase] for phase in ("rollout", "score", "update")) for i in iterations]
    phases = {phase: statistics.median(i[phase] for i in iterations) for phase in ("rollout", "score", "update")}
    return phases | {
        "iteration": statistics.median(sums),
        "least": min(sums),
        "most": max(sums),
        "response_tokens_a_row": statistics.mean(i["tokens"] for i in iterations) / rows,
        "ms_a_response_token": 1e3 * sum(sums) / sum(i["tokens"] for i in iterations),
        "peak_gib": max(rank["peak_gib"] for rank in ranks),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=EXPERIMENTS, help="one experiment")
    parser.add_argument("--smallest", action="store_true", help="networks of one layer and 8 tokens, to try it out")
    options = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), Sizes(options.smallest))
        for name in [options.only] if options.only else EXPERIMENTS:
            found[name] = compare(name, folder, options.smallest, options.repetitions)
            for contestant, figures in found[name]["contestants"].items():
                line = "  ".join(f"{key} {value:.2f}" for key, value in figures.items())
                print(f"{name:24} {contestant:11} {line}", flush=True)
    if options.out:
        libraries = {"torch": torch, "transformers": transformers, "deepspeed": deepspeed}
        versions = {name: library.__version__ for name, library in libraries.items()}
        versions["python"] = platform.python_version()
        Path(options.out).write_text(json.dumps({"versions": versions, "experiments": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

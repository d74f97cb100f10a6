"""Every key of a DeepSpeed JSON that is said to work trains four engines in one process as ZeRO 0 does without it.

Actor and critic take three steps, reference and reward score; then every weight and moment is compared as well.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils.logging import logger

from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist
from tristage.config import BatchPlan, OptimizerSettings
from tristage.config.deepspeed_keys import KEYS, ZERO, check_keys
from tristage.data.collate import collate_sft
from tristage.engine import engine_config, frozen_engine, train_engine
from tristage.engine.state import engine_pieces
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer

# Name of a case -> (stages, key -> value). Two ranks, float32. Keys that do not meet share a case.
LOGS: dict[str, Any] = {
    "comms_logger": {"enabled": True, "verbose": True},
    "dump_state": True,
    "flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False},
    "memory_breakdown": True,
    "steps_per_print": 1,
    "wall_clock_breakdown": True,
}
GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((0, 1, 2, 3), {}),
    "data types": ((0, 1), {"communication_data_type": "fp32", "log_level": "error"}),
    "more data types": (
        (2, 3),
        {"communication_data_type": "fp32", "data_types.grad_accum_dtype": "fp32", "log_level": "error"},
    ),
    "small buckets": (
        (1, 2),
        {"contiguous_gradients": False, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000,
         "use_multi_rank_bucket_allreduce": False, "reduce_scatter": True},
    ),
    "another layout": (
        (1, 2),
        {"parameter_alignment": True, "ignore_unused_parameters": False, "reduce_scatter": False},
    ),
    "overlap": ((2,), {"overlap_comm": True, "contiguous_gradients": True}),
    "nothing at once": (
        (3,),
        {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
         "stage3_max_reuse_distance": 0, "sub_group_size": 1000, "reduce_bucket_size": 1000,
         "contiguous_gradients": False, "stage3_allgather_sequential": True},
    ),
    "some whole": (
        (3,),
        {"stage3_param_persistence_threshold": 10**5, "stage3_model_persistence_threshold": 5000,
         "stage3_use_all_reduce_for_fetch_params": True, "memory_efficient_linear": False,
         "stage3_gather_16bit_weights_on_model_save": True, "reduce_scatter": True},
    ),
    "checks": ((3,), {"log_trace_cache_warnings": True, "enable_sanity_checks": True}),
    "leaf modules": ((3,), {"leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaMLP"]}}),
    "groups of ranks": ((3,), {"zero_hpz_partition_size": 2}),
    "offload": ((1, 2, 3), {"offload_optimizer.device": "cpu", "offload_optimizer.pin_memory": False}),
    "offload all": (
        (3,),
        {"offload_optimizer.device": "cpu", "offload_param.device": "cpu", "offload_param.pin_memory": False},
    ),
    "logs": ((0, 1, 2, 3), LOGS),  # the last: comms_logger is of the whole process
}  # fmt: skip
# What DeepSpeed then logs or prints.
LOGGED = ("comm op", "DeepSpeedEngine configuration", "Engine before step", "lr=", "bwd_microstep", "Flops Profiler")
TOLERANCE = 1e-5
Case = tuple[str, int]  # name, stage


def full_name(key: str) -> str:
    return key if key in KEYS else f"{ZERO}.{key}"


def json_of(case: Case) -> dict[str, Any]:
    """The whole DeepSpeed JSON of a case."""
    name, stage = case
    found: dict[str, Any] = {ZERO: {"stage": stage}}
    for key, value in GROUPS[name][1].items():
        *groups, last = full_name(key).split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return found


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(template: dict[str, Any], model: str, alone: bool = False) -> tuple[list[float], dict[str, Any]]:
    """(losses and scores, this rank's pieces) of four engines; `alone`: the others have no use of the key."""
    plan, tokenizer = BatchPlan.make(8, 2, dist.world_size()), load_tokenizer(model)
    other = {ZERO: {"stage": 0}} if alone else template
    engines = []
    for number, json_values in enumerate((template, other, other, other)):
        config = engine_config(json_values, "float32", plan, clip_norm=1.0)
        network = load_causal_lm(model, tokenizer, dtype=torch.float32, engine_config=config)
        optimizer = OptimizerSettings(learning_rate=1e-2 / (1 + number), weight_decay=0.1, warmup_steps=2)
        trained = number < 2
        engines.append(train_engine(network, config, optimizer, 12) if trained else frozen_engine(network, config))
    found = []
    rows = tiny.random_examples([(3, 5), (2, 9)], tokenizer, seed=9)
    batch = collate_sft(rows, tokenizer.pad_token_id)
    for number in range(3):
        for engine in engines[:2]:
            found.append(tiny.sft_train_step(engine, plan, tokenizer, number))
        for engine in engines[2:]:
            with torch.no_grad():
                logprobs, _ = engine(batch.input_ids, batch.attention_mask, batch.loss_mask)
            found.append(logprobs.float().sum().item())
    pieces = {
        f"{number}/{piece.name}/{piece.start}": (piece.total, piece.tensor.detach().float().cpu().numpy().copy())
        for number, engine in enumerate(engines[:2])
        for piece in engine_pieces(engine)
    }
    return found, pieces


def walk(rank: int, model: str, wanted: list[Case]) -> dict[int, Any]:
    dist.init("cpu")
    found = {}
    for number, case in enumerate(wanted):
        kept, level, printed = Kept(), logger.level, io.StringIO()
        logger.setLevel(logging.INFO)
        logger.addHandler(kept)
        try:
            with contextlib.redirect_stdout(printed):
                trained = train(json_of(case), model, alone=case[0] == "groups of ranks")
            found[number] = (*trained, [*kept.lines, printed.getvalue()] if case[0] == "logs" else [])
        except Exception as error:
            found[number] = repr(error)
        finally:
            logger.removeHandler(kept)
            logger.setLevel(level)
    return found


CASES: list[Case] = [(name, stage) for name, (stages, _) in GROUPS.items() for stage in stages]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    model = tiny.write_model(tmp_path_factory.mktemp("keys") / "model")
    return run_ranks(2, walk, model, CASES, timeout=600)


def whole(ranks: list[dict[int, Any]], number: int) -> dict[str, np.ndarray]:
    """Every weight and moment, put together from the pieces of both ranks."""
    found: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, (total, values) in rank[number][1].items():
            tensor, _, start = name.rpartition("/")
            found.setdefault(tensor, np.full(total, np.nan))[int(start) : int(start) + len(values)] = values
    return found


@pytest.mark.slow  # 3 minutes
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name} at ZeRO {stage}" for name, stage in CASES])
def test_a_key_that_works_changes_no_number(runs: list[dict[int, Any]], number: int) -> None:
    plain = CASES.index(("plain", 0))
    for rank in runs:
        assert not isinstance(rank[number], str), rank[number]
        assert rank[number][0] == pytest.approx(rank[plain][0], rel=TOLERANCE)
    ours, theirs = whole(runs, number), whole(runs, plain)
    assert set(ours) == set(theirs) and len(ours) > 40
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=TOLERANCE, err_msg=name)
    if CASES[number][0] == "logs":
        said = "\n".join(runs[0][number][2])
        assert [line for line in LOGGED if line not in said] == []


def test_every_key_that_works_is_tried_at_the_stages_where_it_does() -> None:
    tried = {(full_name(key), stage) for stages, keys in GROUPS.values() for key in keys for stage in stages}
    tried |= {(f"{ZERO}.stage", stage) for stage in GROUPS["plain"][0]}
    works = {name: key for name, key in KEYS.items() if key.verdict == "works" and not key.not_run}
    assert {(name, stage) for name, key in works.items() for stage in key.stages} == tried
    for case in CASES:
        check_keys(Path("zero.json"), json_of(case), "a.yaml")

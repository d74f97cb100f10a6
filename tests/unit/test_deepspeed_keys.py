"""A DeepSpeed JSON that would change the gradient, do nothing or stop late is refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

from step1_sft.config import SFTConfig
from tests.helpers.tiny import write_yaml
from tristage.config import load_config, read_deepspeed_json
from tristage.config.deepspeed_keys import REFUSED, REMOVED, check_keys
from tristage.errors import UserError

ZERO = "zero_optimization"
SWITCHED_ON: list[tuple[dict[str, Any], str]] = [
    ({"gradient_allreduce_op": "sum"}, "`gradient_allreduce_op`: gradients would be too large by the number of ranks"),
    ({"gradient_predivide_factor": 2.0}, "`gradient_predivide_factor`: at some ZeRO stages gradients would be scaled"),
    ({"prescale_gradients": True}, "`prescale_gradients`: ZeRO with reduce_scatter stops at it; remove it"),
    ({ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
     "`zero_optimization.offload_optimizer.super_offload`: without DeepSpeed's own gradient accumulation no gradient"),
    ({ZERO: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "`zero_optimization.zenflow`: it needs DeepSpeed's own"),
    ({ZERO: {"stage": 2, "compute_grad_norm": False}}, "`zero_optimization.compute_grad_norm`: every gradient norm"),
    ({ZERO: {"stage": 2, "cpu_offload": True}}, '`zero_optimization.cpu_offload`: write "offload_optimizer": {"devi'),
    ({ZERO: {"stage": 3, "overlap_comm": True}}, "`zero_optimization.overlap_comm` works at stage 2 only; remove it"),
    ({ZERO: {"stage": 2, "mics_shard_size": 2}}, "`zero_optimization.mics_shard_size`: DeepSpeed has removed it"),
    ({"torch_autocast": {"enabled": True}}, "`torch_autocast`: the YAML's `precision` sets the data type; remove it"),
    ({"data_types": {"param_dtype": "bf16"}}, "`data_types.param_dtype`: the YAML's `precision` sets the data type"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "`data_types.grad_accum_dtype` works at stages 2 and 3 only"),
    ({"hybrid_engine": {"enabled": True}}, "`hybrid_engine`: rollouts use the actor's own weights; remove it and see"),
    ({"compile": {"deepcompile": True}}, "`compile`: models are not compiled; remove it"),
    ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel`: there is no tensor, sequence or expert parallelism"),
    ({"expert_parallel": {"enabled": True}}, "`expert_parallel`: there is no tensor, sequence or expert parallelism"),
    ({"sequence_parallel_size": 2}, "`sequence_parallel_size`: there is no tensor, sequence or expert parallelism"),
    ({"checkpoint": {"load_universal": True}}, "`checkpoint`: checkpoints are written by tristage; remove it and use"),
    ({"elasticity": {"enabled": False}}, "`elasticity`: DeepSpeed has removed it; remove it"),
    ({"curriculum_learning": {"enabled": True}}, "`curriculum_learning`: DeepSpeed has removed it; remove it"),
    ({"activation_checkpointing": {"partition_activations": True}}, "`activation_checkpointing`: it does nothing here"),
]  # fmt: skip


def problem_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_keys(Path("zero.json"), values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("values, sentence", SWITCHED_ON, ids=lambda value: str(value)[:40])
def test_a_harmful_key_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    assert problem_of(values).startswith(f"zero.json: {sentence}")


@pytest.mark.parametrize("key", [*REFUSED, *REMOVED])
def test_every_key_of_the_tables_is_refused_and_says_what_to_do(key: str) -> None:
    values: Any = "some value"
    for part in reversed(key.split(".")):
        values = {part: values}
    message = problem_of(values)
    assert message.startswith(f"zero.json: `{key}`: ") and ("remove it" in message or "write" in message)


def test_what_is_off_is_accepted() -> None:
    off = {
        "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0, "prescale_gradients": False, "compile": {},
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512}, "torch_autocast": {"enabled": False},
        ZERO: {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "super_offload": False}},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", "wall_clock_breakdown": False,
    }  # fmt: skip
    for values in (off, {ZERO: {"stage": 3, "overlap_comm": False, "offload_optimizer": None}}):
        assert check_keys(Path("zero.json"), values) is None


def test_a_run_reads_its_json_through_the_tables(tmp_path: Path) -> None:
    values = {"model": "a/b", "output": "out", "data": {"train": "a.jsonl"}, "global_batch": 2, "micro_batch": 1}
    more = {"optimizer": {"learning_rate": 1.0}, "deepspeed": "zero.json"}
    settings = load_config(SFTConfig, ["--config", write_yaml(tmp_path / "sft.yaml", values | more)])
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({ZERO: {"stage": 1}, "gradient_allreduce_op": "sum"}))
    with pytest.raises(UserError, match=f"^{file}: `gradient_allreduce_op`: gradients would be too large"):
        read_deepspeed_json("zero.json", settings)


def test_deepspeeds_own_list_of_what_it_removed_is_in_the_table() -> None:
    assert {*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"{ZERO}.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)} <= {*REMOVED}


def test_refused_keys_are_spelt_as_deepspeed_reads_them() -> None:
    root = Path(deepspeed.__file__).parent
    folders = ("runtime", "autotuning", "module_inject")
    source = "".join(path.read_text() for folder in folders for path in (root / folder).rglob("*.py"))
    source += (root / "__init__.py").read_text()
    for key in REFUSED:
        assert key.rpartition(".")[2] in source, key

"""The table of DeepSpeed's keys is whole, and what it does not let through is refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from step1_sft.config import SFTConfig
from tests.helpers.tiny import write_yaml
from tristage.cli.main import main
from tristage.config import load_config, read_deepspeed_json
from tristage.config.deepspeed_keys import KEYS, check_keys, rows
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
    ({ZERO: {"stage": 3, "overlap_comm": True}}, "`zero_optimization.overlap_comm` does nothing at stage 3; remove it"),
    ({ZERO: {"stage": 2, "mics_shard_size": 2}}, "`zero_optimization.mics_shard_size`: DeepSpeed has removed it"),
    ({"torch_autocast": {"enabled": True}}, "`torch_autocast`: the YAML's `precision` sets the data type; remove it"),
    ({"data_types": {"param_dtype": "bf16"}}, "`data_types.param_dtype`: the YAML's `precision` sets the data type"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "`data_types.grad_accum_dtype` does nothing at stage 0; rem"),
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
        check_keys(Path("zero.json"), values, "a.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("values, sentence", SWITCHED_ON, ids=lambda value: str(value)[:40])
def test_a_harmful_key_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    assert problem_of(values).startswith(f"zero.json: {sentence}")


@pytest.mark.parametrize("key", [name for name, key in KEYS.items() if key.verdict != "works"])
def test_every_key_that_does_not_work_is_refused_and_says_what_to_do(key: str) -> None:
    values: Any = "some value"
    for part in reversed(key.split(".")):
        values = {part: values}
    message = problem_of(values)
    assert message.startswith(f"zero.json: `{key}`") and ("remove it" in message or "write" in message)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({ZERO: {"stage": 3, "prefetch_bucket_size": 1}},
         "unknown key `zero_optimization.prefetch_bucket_size`; did you mean `zero_optimization.stage3_prefetch_buck"),
        ({"entirely_new": 1}, "unknown key `entirely_new`; remove it (`deepspeed_unchecked` in a.yaml hands keys on"),
        ({"data_types": "bf16"}, "`data_types` is 'bf16'; write its keys in braces"),
        ({"train_batch_size": 8}, "`train_batch_size` is set by `global_batch` in a.yaml; remove it from the JSON"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest(values: dict[str, Any], sentence: str) -> None:
    assert problem_of(values).startswith(f"zero.json: {sentence}")


def test_an_unknown_key_that_the_yaml_names_is_let_through_and_no_other() -> None:
    unchecked = ["zero_optimization.new_key", "gradient_allreduce_op"]
    check_keys(Path("zero.json"), {ZERO: {"stage": 2, "new_key": 1}}, "a.yaml", unchecked)
    with pytest.raises(UserError, match="`gradient_allreduce_op`: gradients would be too large"):
        check_keys(Path("zero.json"), {"gradient_allreduce_op": "sum"}, "a.yaml", unchecked)


def test_what_is_off_is_accepted() -> None:
    off = {
        "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0, "prescale_gradients": False, "compile": {},
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512}, "torch_autocast": {"enabled": False},
        ZERO: {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "super_offload": False}},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", "wall_clock_breakdown": False,
    }  # fmt: skip
    for values in (off, {ZERO: {"stage": 3, "overlap_comm": False, "offload_optimizer": None}}):
        assert check_keys(Path("zero.json"), values, "a.yaml") is None


def test_a_run_reads_its_json_through_the_tables(tmp_path: Path) -> None:
    values = {"model": "a/b", "output": "out", "data": {"train": "a.jsonl"}, "global_batch": 2, "micro_batch": 1}
    more = {"optimizer": {"learning_rate": 1.0}, "deepspeed": "zero.json"}
    settings = load_config(SFTConfig, ["--config", write_yaml(tmp_path / "sft.yaml", values | more)])
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({ZERO: {"stage": 1}, "gradient_allreduce_op": "sum"}))
    with pytest.raises(UserError, match=f"^{file}: `gradient_allreduce_op`: gradients would be too large"):
        read_deepspeed_json("zero.json", settings)
    file.write_text(json.dumps({"brand_new": 1}))
    with pytest.raises(UserError, match=f"^{file}: unknown key `brand_new`.*`deepspeed_unchecked` in {settings.file}"):
        read_deepspeed_json("zero.json", settings)
    settings = load_config(SFTConfig, ["--config", settings.file, "deepspeed_unchecked=brand_new"])
    assert read_deepspeed_json("zero.json", settings) == {"brand_new": 1}


# -- the table holds all that DeepSpeed reads ------------------------------------------------------------------


class Reads(dict[str, Any]):
    """A group of settings that notes each key that is asked for."""

    def __init__(self, path: str = "", **groups: Any) -> None:
        super().__init__(groups)
        self.path, self.seen = path, set[str]()

    def __deepcopy__(self, memo: Any) -> Reads:
        return self

    def __copy__(self) -> Reads:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.path + key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.path}{key}")
        return super().__contains__(key)

    def keys(self) -> Reads:  # type: ignore[override]  # for `name in values.keys()`
        return self


def known(name: str) -> bool:
    """In the table, alone, with its group, or as a group whose keys are there one by one."""
    return name in KEYS or name.split(".")[0] in KEYS or any(key.startswith(f"{name}.") for key in KEYS)


def test_every_key_that_deepspeed_reads_is_in_the_table() -> None:
    types = Reads("data_types.")
    top = Reads(train_micro_batch_size_per_gpu=1, data_types=types)
    DeepSpeedConfig(top)
    assert len(top.seen) > 50 and len(types.seen) == 4
    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    found = top.seen | types.seen | {f"{ZERO}.{name}" for name in zero}
    for part, model in (
        ("offload_param", DeepSpeedZeroOffloadParamConfig), ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig)
    ):  # fmt: skip
        found |= {f"{ZERO}.{part}.{name}" for name in model.model_fields}
    found |= {*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"{ZERO}.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)}
    assert sorted(name for name in found if not known(name)) == []
    elsewhere = {"sequence_parallel_size", "data_parallel_size", "autotuning"}  # read at other places
    assert sorted(name for name in KEYS if name not in found | elsewhere) == []


def test_doctor_prints_a_row_per_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--deepspeed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KEYS) == len(list(rows()))
    assert lines[0].split()[:2] == ["aio", "works"] and "NVMe" in lines[0]

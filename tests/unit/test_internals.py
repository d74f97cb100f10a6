"""What tristage relies on inside DeepSpeed: each name exists in the installed version, and is missed if it is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from tests.helpers import tiny
from tristage.config import BatchPlan, OptimizerSettings
from tristage.engine import engine_config, frozen_engine, train_engine
from tristage.engine.internals import REQUIRED, _owners, replaced, require
from tristage.errors import UserError

REPO = Path(__file__).parents[2]
NAMES = [(kind, name) for kind, names in REQUIRED.items() for name in names]
LOSS_SCALER_FIELDS = {"init_scale": 2.0**8, "scale_window": 10, "min_scale": 1.0, "delayed_shift": 1}


def make(stage: int, precision: str = "float32", trained: bool = True) -> Any:
    config = engine_config({"zero_optimization": {"stage": stage}}, precision, BatchPlan.make(1, 1, 1))
    model = nn.Linear(4, 4, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    settings = OptimizerSettings(learning_rate=1e-3)
    return train_engine(model, config, settings, 1) if trained else frozen_engine(model, config)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Any]]:
    with tiny.one_rank():
        yield {
            "zero0": make(0), "bf16": make(0, "bf16"), "zero2": make(2), "zero3": make(3),
            "frozen": make(0, trained=False), "frozen3": make(3, trained=False),
        }  # fmt: skip


@pytest.fixture(scope="module")
def owners(engines: dict[str, Any]) -> dict[str, Any]:
    """An object of every kind, as the installed DeepSpeed makes them; this machine may have no fp16 and no offload."""
    found = {kind: owner for engine in engines.values() for kind, owner in _owners(engine)}
    found["fp16 loss scaler"] = DynamicLossScaler(**LOSS_SCALER_FIELDS, consecutive_hysteresis=False)
    dynamic = {"low_precision_dtype": torch.float16, "dynamic_loss_scale": True, "static_loss_scale": 1.0}
    found["fp16 loss scaler without ZeRO"] = LossScaleConfig(**dynamic, dynamic_loss_args=None)
    names = DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names
    found["optimizer of ZeRO 3 with a part offloaded"] = SimpleNamespace(**dict.fromkeys(names))
    return found


class Without:
    """`owner` as it would be without one of its names."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.owner, name)


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[f"{kind}-{name}" for kind, name in NAMES])
def test_a_name_exists_and_is_missed_if_it_is_gone(kind: str, name: str, owners: dict[str, Any]) -> None:
    require(kind, owners[kind])
    sentence = rf"DeepSpeed \S+: its {kind} has no `{name}`, which tristage needs; install .* constraints.txt names"
    with pytest.raises(UserError, match=sentence):
        require(kind, Without(owners[kind], name))


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [
        (DeepSpeedEngine, "_take_model_step", (0,)),
        (DeepSpeedEngine, "clip_fp32_gradients", (0, "float32", False)),
        (DeepSpeedZeroOptimizer, "_update_scale", (2,)),
        (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups", (3,)),
        (DeepSpeedZeRoOffload, "_remove_module_hooks", (3, "float32", False)),
    ],
)
def test_an_engine_is_checked_when_it_is_made(
    owner: Any, name: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    with tiny.one_rank(), pytest.raises(UserError, match=f"has no `{name}`"):
        make(*arguments)


@pytest.mark.parametrize(("engine", "kind"), [("zero2", "fp16 loss scaler"), ("bf16", "fp16 loss scaler without ZeRO")])
def test_in_fp16_the_loss_scaler_is_checked(
    engine: str, kind: str, engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind not in dict(_owners(engines[engine]))
    monkeypatch.setattr(engines[engine], "fp16_enabled", lambda: True)
    assert kind in dict(_owners(engines[engine]))


def test_with_a_part_offloaded_the_second_optimizer_is_checked(
    engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "optimizer of ZeRO 3 with a part offloaded"
    assert kind not in dict(_owners(engines["zero3"]))
    monkeypatch.setattr(engines["zero3"], "zero_partial_offload", lambda: 0.5)
    assert kind in dict(_owners(engines["zero3"]))


def test_nothing_is_replaced_under_a_name_that_the_class_has_not() -> None:
    owner = nn.Linear(2, 2)
    with replaced(owner, "forward", lambda x: x + 1):
        assert float(owner(torch.zeros(1))) == 1
    assert "forward" not in vars(owner)
    with pytest.raises(UserError, match="its Linear has no `_step`"), replaced(owner, "_step", None):
        pass
    assert "_step" not in vars(owner)


# ---- the table and the sources --------------------------------------------------------------------------------------


def inner_names(path: Path) -> set[str]:
    """Names of other objects that a file uses and that are private, or belong to ZeRO-3's parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    used = {node.attr for node in attributes if ast.unparse(node.value) not in ("self", "cls")}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {name for name in used if re.fullmatch(r"(_[a-z]|ds_)\w*", name)}


def test_the_table_has_every_private_name_that_the_package_uses_and_no_other() -> None:
    files = [path for path in (REPO / "tristage/engine").glob("*.py") if path.name != "internals.py"]
    required = {name for names in REQUIRED.values() for name in names}
    schedulers = {"_step_count", "_last_lr"}  # torch's, checked in state.py
    assert set().union(*map(inner_names, files)) - schedulers - required == set()
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert [name for name in sorted(required) if not re.search(rf"\b{name}\b", text)] == []


def test_deepspeeds_private_names_stay_in_one_package() -> None:
    private = {name for names in REQUIRED.values() for name in names if name.startswith(("_", "ds_"))}
    engine = REPO / "tristage/engine"
    others = [path for path in REPO.glob("tristage/**/*.py") if engine not in path.parents]
    others += [*REPO.glob("step[0-9]_*/*.py"), *REPO.glob("benchmarks/**/*.py")]
    assert {path.name: found for path in others if (found := inner_names(path) & private)} == {}

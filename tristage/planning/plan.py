"""How much memory a run needs, from its YAML and the config.json of its models: no weights are read, nothing is run.

A phase of the run holds what is always there (memory.resident) and what it adds; the largest phase is the peak.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tristage.config import (
    CONFIGS,
    BatchPlan,
    EngineSpec,
    RolloutSpec,
    RunSettings,
    read_deepspeed_json,
    read_values,
)
from tristage.data.loader import WIDTH
from tristage.errors import UserError
from tristage.models.lora import check_lora
from tristage.models.sizes import model_shape
from tristage.planning.formulas import (
    GIB,
    SAMPLED_LOGIT,
    Bill,
    Engine,
    Machine,
    Zero,
    backward,
    forward,
    kept_gradients,
    kv_cache_bytes,
    reduction,
    resident,
    step,
    total,
)

SHIPPED = CONFIGS / "deepspeed"
# Least communication first: 0 to 2 move as much (2 P a step), 3 half as much again (the ZeRO paper, section 7), and
# what is offloaded goes over PCIe as well.
CHEAPEST_FIRST = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# In addition to tensors: CUDA's context, NCCL, fragments (a GPU), Python and its libraries (a process). Not measured.
GPU_ALLOWANCE, PROCESS_ALLOWANCE = 1.5 * GIB, 1.5 * GIB


@dataclass(frozen=True)
class Phase:
    """A part of a step, and what it adds to what is always there."""

    name: str
    adds: Bill


@dataclass(frozen=True)
class Plan:
    """What a run needs on each GPU, and on each node's host."""

    engines: tuple[Engine, ...]
    machine: Machine
    resident: dict[str, Bill]  # engine -> what it holds all the time, on a GPU
    phases: tuple[Phase, ...]
    host: Bill  # a node's

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: total(phase.adds))

    @property
    def kept_bytes(self) -> float:
        """Of weights, optimizer and what else is there all the time."""
        return sum(map(total, self.resident.values()))

    @property
    def gpu_bytes(self) -> float:
        allowance = 0.0 if self.machine.cpu else GPU_ALLOWANCE
        return self.kept_bytes + total(self.peak.adds) + allowance

    @property
    def host_bytes(self) -> float:
        return total(self.host)

    @property
    def fits(self) -> bool:
        if self.machine.host_memory is not None and self.host_bytes > self.machine.host_memory:
            return False
        return self.gpu_bytes <= self.machine.gpu_memory


def _sum(one: Bill, other: Bill) -> Bill:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one | other}


def make_plan(settings: RunSettings, engines: tuple[Engine, ...], machine: Machine) -> Plan:
    """Put the engines of a step together.

    Raises:
        UserError: batches that don't divide over the ranks.
    """
    both = {engine.name: resident(engine, machine) for engine in engines}
    # Without GPUs the host's memory is the rank's own.
    held = {name: _sum(gpu, host) if machine.cpu else gpu for name, (gpu, host) in both.items()}
    averaged, rollout = settings.engine_specs()[0].averaged, settings.rollout_spec()
    if averaged:
        held[engines[0].name] |= {"EMA": 4 * engines[0].trained / machine.ranks}
    phases = _phases(engines, machine) if rollout is None else _ppo_phases(rollout, engines, machine, held)
    return Plan(engines, machine, held, tuple(phases), _host(engines, machine, both, averaged))


def _phases(engines: tuple[Engine, ...], machine: Machine) -> Iterator[Phase]:
    """Steps 1 and 2: one engine learns; in DPO a reference is asked before."""
    for engine in engines:
        if engine.frozen:
            yield Phase(f"asking the {engine.name}", forward(engine, machine))
        else:
            waiting = {"gradients": kept_gradients(engine, machine)}
            yield Phase("forward and backward", backward(engine, machine))
            yield Phase("end of backward", reduction(engine, machine))
            yield Phase("optimizer step", waiting | step(engine, machine))


def _ppo_phases(
    rollout: RolloutSpec, engines: tuple[Engine, ...], machine: Machine, held: dict[str, Bill]
) -> Iterator[Phase]:
    actor = engines[0]
    free = machine.gpu_memory - sum(map(total, held.values()))
    whole = actor.weights if actor.zero.stage == 3 else 0.0
    name = "rollout"
    # the rule of engine.parameters_fit
    if actor.zero.stage == 3 and (rollout.gather_weights == "never" or whole > free / 2):
        whole, name = actor.gathered, "rollout, gathering at every token (slow)"
    rows = min(rollout.rows_at_once, rollout.rows // machine.ranks)
    yield Phase(
        name,
        {
            "gathered": whole,
            "KV cache": kv_cache_bytes(actor, rows, rollout.tokens),
            "logits": SAMPLED_LOGIT * rows * actor.shape.vocabulary,
        },
    )
    for engine in engines:
        width = 1 if engine is actor else WIDTH["cpu" if machine.cpu else "cuda"]
        scorer = dataclasses.replace(engine, rows=min(width * engine.rows, max(1, rollout.rows // machine.ranks)))
        yield Phase(f"scoring by the {engine.name}", forward(scorer, machine, entropy=engine is actor))
    learners = [engine for engine in engines if not engine.frozen]
    waiting = {engine.name: kept_gradients(engine, machine) for engine in learners}
    for engine in learners:
        others = sum(size for name, size in waiting.items() if name != engine.name)
        kept = {"the other's gradients": others}
        yield Phase(f"{engine.name}'s backward", kept | backward(engine, machine))
        yield Phase(f"{engine.name}'s end of backward", kept | reduction(engine, machine))
    for engine in learners:
        yield Phase(f"{engine.name}'s step", {"gradients": sum(waiting.values())} | step(engine, machine))


def _host(
    engines: tuple[Engine, ...], machine: Machine, both: dict[str, tuple[Bill, Bill]], ema: bool
) -> Bill:
    """Of one node: what is offloaded, and the largest of what loading, saving and evaluating an average hold."""
    ranks = min(machine.ranks, machine.ranks_per_node)
    offloaded = ranks * sum(total(host) for _, host in both.values())
    # Before its engine takes it, each rank has a whole model, but for ZeRO 3, which partitions while it loads.
    loading = max(ranks * engine.weights if engine.zero.stage != 3 else engine.weights for engine in engines)
    saving = max((engine.weights for engine in engines if not engine.frozen), default=0.0)
    averaging = ranks * engines[0].bytes * engines[0].trained if ema else 0.0
    return {
        "processes": ranks * PROCESS_ALLOWANCE,
        "offloaded": offloaded,
        "loading, saving": max(loading, saving, averaging),
    }


def engines_of(settings: RunSettings, machine: Machine) -> tuple[Engine, ...]:
    """The engines of a step by its settings.

    Raises:
        UserError: a model without config.json, an unreadable JSON, batches that don't divide.
    """
    plan = settings.plan(machine.ranks)
    return tuple(_engine(spec, settings, plan) for spec in settings.engine_specs() if not spec.freed_before_training)


def _engine(spec: EngineSpec, settings: RunSettings, plan: BatchPlan) -> Engine:
    start = start_of(spec.path, settings, spec.path_key)
    if spec.lora is not None:
        check_lora(spec.lora, start, f"{settings.file}: key `{spec.key('lora.targets')}`", spec.trust_remote_code)
    shape = model_shape(start, spec.scalar_head, spec.lora, spec.trust_remote_code)
    return Engine(
        spec.name,
        shape,
        Zero.of(read_deepspeed_json(spec.deepspeed, settings, spec.key("deepspeed"))),
        4 if settings.precision == "float32" else 2,
        frozen=spec.frozen,
        adapters=spec.lora is not None,
        quantized=spec.quantize is not None,
        scalar_head=spec.scalar_head,
        extra=shape.head // shape.vocabulary if spec.value_head else 0,
        checkpointing=spec.gradient_checkpointing,
        rows=spec.rows,
        tokens=spec.tokens,
        scored=spec.scored,
        entropy=spec.entropy,
        accumulation=plan.accumulation,
    )


def start_of(path: str, settings: RunSettings, key: str) -> str:
    """The folder or id whose config.json has the shape of `path`, which an earlier step may not have written yet.

    A recipe's steps stand in one folder: the one whose `output` it is says what it starts from.
    """
    if (Path(path) / "config.json").is_file():
        return path
    for file in sorted(settings.folder.glob("step[12]_*.yaml")):
        values = read_values(file)
        if path == f"{values.get('output')}/final" and "model" in values:
            return start_of(str(values["model"]), settings, key)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{settings.file}: key `{key}`: there is no {path} yet, and no step next to this config writes it; name a "
            f"folder or id with its config.json, as in {key}=facebook/opt-1.3b"
        )
    return path


def alternatives(
    settings: RunSettings, engines: tuple[Engine, ...], machine: Machine, checkpointing: bool = False
) -> dict[str, Plan]:
    """The plan with each JSON of configs/deepspeed/ for every engine, the cheapest in communication first."""
    found = {}
    for name in CHEAPEST_FIRST:
        zero = Zero.of(json.loads((SHIPPED / f"{name}.json").read_text()))
        found[name] = make_plan(settings, tuple(_changed(e, zero, checkpointing) for e in engines), machine)
    return found


def _changed(engine: Engine, zero: Zero, checkpointing: bool) -> Engine:
    """A frozen engine is whole where the others are not at ZeRO 3."""
    own = Zero() if engine.frozen and zero.stage != 3 else zero
    recomputes = not engine.frozen and (checkpointing or engine.checkpointing)
    return dataclasses.replace(engine, zero=own, checkpointing=recomputes)

"""`tristage plan`: the tables that it prints, and its verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from tristage.config import RunSettings
from tristage.planning.formulas import GIB, Bill, Machine, total
from tristage.planning.plan import GPU_ALLOWANCE, Plan, alternatives, engines_of, make_plan


def report(settings: RunSettings, machine: Machine, console: Console) -> bool:
    """Print what the configured run needs, what other settings would, and what to choose. Returns whether it fits."""
    plan = make_plan(settings, engines_of(settings, machine), machine)
    console.print(_engine_table(plan))
    console.print(_phase_table(plan))
    for line in _host_lines(plan):
        console.print(line)
    others = alternatives(settings, plan.engines, machine)
    console.print(_other_table(others))
    console.print(verdict(settings, plan, others))
    return plan.fits


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _place(plan: Plan) -> str:
    return "process" if plan.machine.cpu else "GPU"


def _engine_table(plan: Plan) -> Table:
    names = list(dict.fromkeys(name for bill in plan.resident.values() for name, size in bill.items() if size))
    title = f"always there, GiB per {_place(plan)} ({plan.machine.ranks} ranks)"
    table = _table(title, "engine", "ZeRO", "parameters", "trained", *names, "together")
    for engine in plan.engines:
        bill = plan.resident[engine.name]
        cells = [_gib(bill.get(name, 0.0)) for name in names]
        counts = [f"{engine.parameters / 1e6:,.1f} M", f"{engine.trained / 1e6:,.1f} M"]
        table.add_row(engine.name, engine.zero.parts, *counts, *cells, _gib(total(bill)))
    return table


def _phase_table(plan: Plan) -> Table:
    table = _table("and in each phase", "phase", "adds", "of it")
    table.columns[2].justify = "left"
    for phase in plan.phases:
        table.add_row(phase.name, _gib(total(phase.adds)), _parts(phase.adds))
    return table


def _parts(bill: Bill) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in bill.items() if size >= GIB / 200)


def _host_lines(plan: Plan) -> Iterator[str]:
    if plan.machine.cpu:
        return
    ranks = min(plan.machine.ranks, plan.machine.ranks_per_node)
    yield f"a GPU's context, NCCL and fragments: {_gib(GPU_ALLOWANCE)} more, an allowance"
    yield f"host of a node of {ranks} ranks: {_gib(plan.host_bytes)} GiB ({_parts(plan.host)})"


def _other_table(plans: dict[str, Plan]) -> Table:
    machine = next(iter(plans.values())).machine
    table = _table("with configs/deepspeed/", "JSON", "GiB per GPU", "GiB per node", "fits")
    for name, plan in plans.items():
        table.add_row(f"{name}.json", _gib(plan.gpu_bytes), _gib(plan.host_bytes), "yes" if plan.fits else "no")
    if machine.cpu:
        table.columns[1].header, table.columns[2].header = "GiB per process", ""
    return table


def verdict(settings: RunSettings, plan: Plan, others: dict[str, Plan]) -> str:
    """Whether it fits, and the cheapest setting that does, in a sentence or two."""
    machine = plan.machine
    available = f"{_gib(machine.gpu_memory)} GiB per {_place(plan)}"
    needs = f"{_gib(plan.gpu_bytes)} of {available}, the most in: {plan.peak.name}"
    if machine.host_memory is not None:
        needs += f"; {_gib(plan.host_bytes)} of {_gib(machine.host_memory)} GiB per node"
    says = f"{'fits' if plan.fits else 'does not fit'}: {needs}."
    if best := next((name for name, other in others.items() if other.fits), None):
        return f"{says} The cheapest that fits: configs/deepspeed/{best}.json for every engine."
    again = alternatives(settings, plan.engines, machine, checkpointing=True)
    if best := next((name for name, other in again.items() if other.fits), None):
        return f"{says} The cheapest that fits: configs/deepspeed/{best}.json with gradient_checkpointing: true."
    return f"{says} No ZeRO stage makes it fit: use more GPUs, `lora`, a smaller micro_batch or shorter rows."

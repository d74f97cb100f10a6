"""What every group of settings is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Settings(BaseModel):
    """Base of every group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _split_at_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


SPLIT_AT_COMMAS = BeforeValidator(_split_at_commas, json_schema_input_type=str | tuple[str | float, ...])

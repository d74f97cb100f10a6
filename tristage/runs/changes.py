"""Whether two runs are the same run: which settings may differ between them, and what has changed.

Used on resume (checkpoint/finding.py) and to check a finished run (finished.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tristage.config import RunSettings
from tristage.config.renamed import new_name

# Settings that may change between a checkpoint and a resumed run: the result does not depend on them (except for
# rounding, where they divide the work). A key also stands for its group; "*" for any first part, "[]" for any item.
MAY_CHANGE_ON_RESUME = {
    *("output", "device", "resume", "resume_changed", "check_disk", "watchdog_seconds", "max_bad_steps"),
    *("save_every", "keep_last", "keep_every_n_steps", "keep_best", "evaluate_every", "logged_samples", "grader"),
    *("samples_every", "eval_command", "profile", "health", "trackers"),
    *("micro_batch", "ppo.micro_batch", "ppo.micro_batch_tokens", "rollout.rows_at_once"),
    *("rollout.backend", "rollout.cuda_graphs", "rollout.gather_weights", "rollout.tensor_parallel"),
    "precompute_reference",
    *("deepspeed", "*.deepspeed", "gradient_checkpointing", "*.gradient_checkpointing"),
    *("data.cache", "data.workers", "trust_remote_code", "*.trust_remote_code"),
    *("reward.functions[].timeout_seconds", "reward.functions[].retries"),
}


def changed_settings(then: Mapping[str, Any], settings: RunSettings) -> tuple[dict[str, str], dict[str, str]]:
    """Key -> "old -> new" of each difference from the saved settings `then`: (those that may change, the others)."""
    new, given = (dict(_flat(settings.model_dump(mode="json", exclude_defaults=only))) for only in (False, True))
    old = {new_name(key, new) or key: value for key, value in _flat(then)}
    # A setting that was added after `then` was saved had its default there.
    old |= {key: value for key, value in new.items() if key not in old and key not in given}
    changed = {key: f"{old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    free = {key: change for key, change in changed.items() if _is_free(key)}
    return free, {key: change for key, change in changed.items() if key not in free}


def changed_inputs(then: Mapping[str, str], now: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """"key (name)" -> a description, for each input whose two fingerprints are known (not "") and differ."""
    changed = [key for key in then if then[key] and now.get(key) and then[key] != now[key]]
    return {f"{key} ({names[key]})" if key in names else key: "its content is not the same" for key in changed}


def join_changes(changes: Mapping[str, str]) -> str:
    """Changes as a part of a sentence."""
    return ", ".join(f"{key}: {change}" for key, change in changes.items())


def _is_free(key: str) -> bool:
    parts = re.sub(r"\[\d+\]", "[]", key).split(".")
    begins = {".".join(parts[:n]) for n in (1, 2, 3)}
    return bool(begins & MAY_CHANGE_ON_RESUME) or (len(parts) > 1 and f"*.{parts[1]}" in MAY_CHANGE_ON_RESUME)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """("group.key", value) of nested settings; "group.key[0].key" in a list of groups."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            for i, each in enumerate(value):
                yield from _flat(each, f"{prefix}{key}[{i}].")
        else:
            yield prefix + key, value

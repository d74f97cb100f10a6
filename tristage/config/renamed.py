"""Settings that had another name before 1.0. A config with an old name is refused in a sentence that gives the new."""

from __future__ import annotations

from collections.abc import Collection

# Old key -> new key, both complete.
RENAMED = {
    "keep_every": "keep_every_n_steps",
    "keep_best.lower": "keep_best.lower_is_better",
    "data.overlap": "data.heldout_overlap",
    "normalize_rows": "normalize_prompts",
    "num_samples": "logged_samples",
    "reward.on_critic": "reward.share_critic_trunk",
    "reward.retokenize": "reward.own_tokenizer",
    "rollout.gather": "rollout.gather_weights",
    "value_head.old_kl_coef": "value_head.old_policy_kl_coef",
    "ppo.kl_target": "ppo.adaptive_kl_target",
    "ppo.kl_horizon": "ppo.adaptive_kl_horizon",
}


def new_name(key: str, known: Collection[str]) -> str | None:
    """The name that a step with the keys `known` now has for `key`; None if it was not renamed."""
    new = RENAMED.get(key)
    return new if new in known else None

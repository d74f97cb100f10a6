"""Find mistakes in a config within a second, before torch is imported, a GPU is probed or a rank starts.

    python -m tristage.launch.check_config [--models-later] MODULE CONFIG [key=value ...]

`--models-later`: steps before this one will write the models that it names.
The launchers call `check_config`; jobs that start ranks another way run the command. The ranks repeat these checks and
add others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tristage.config import (
    RunSettings,
    load_config,
    named_paths,
    read_deepspeed_json,
    require_folder_or_hub_id,
    settings_class,
)
from tristage.data.sources import require_exists, resolve_preset
from tristage.errors import UserError
from tristage.launch.nodes import read_nodes
from tristage.launch.options import requested_ranks
from tristage.runs.finished import require_finished


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence for what the user must fix."""
    later = argv[0] == "--models-later"
    module, config, *words = argv[later:]
    try:
        check_config([module, "--config", config, *words], [], models=not later)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_config(words: Sequence[str], options: Sequence[str], models: bool = True, data: bool = True) -> RunSettings:
    """The settings of MODULE --config CONFIG [key=value ...], once what they name exists and their batches divide.

    A node that starts ranks on others need not hold their models and data.

    Args:
        options: of the launcher; with a hostfile or a count, batches are checked against the number of ranks.
        models: False if steps before this one will write the models.

    Raises:
        UserError: what is wrong, with file, key and fix.
    """
    module, *rest = words
    settings = load_config(settings_class(rest[1], module.removesuffix(".train")), rest)
    nodes = read_nodes(options)
    check_named(settings, models and not nodes, data and not nodes)
    ranks = requested_ranks(nodes, options)
    if ranks is not None:
        settings.plan(ranks)
    return settings


def check_named(settings: RunSettings, models: bool, data: bool) -> None:
    """Check the DeepSpeed JSONs, and that models and data exist. Raises UserError."""
    for key, value in named_paths(settings):
        if models or key.endswith("deepspeed"):
            check_path(settings, key, value)
    for source in (*settings.data.train, *settings.data.heldout):
        source = resolve_preset(source, settings)
        if data:
            require_exists(source)


def check_path(settings: RunSettings, key: str, value: str) -> None:
    """Check what one of `named_paths` names. Raises UserError."""
    if key.endswith("deepspeed"):
        read_deepspeed_json(value, settings, key)
    else:
        require_folder_or_hub_id(value, settings, key)
        require_finished(value, settings, key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

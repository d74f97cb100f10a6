"""What a config says wrong, told in the first second: before torch is imported, a GPU looked for or a rank started.

    python -m tristage.launch.check_config [--models-later | --elsewhere] MODULE CONFIG [key=value ...] -- [options]

`--models-later`: steps before this one will write the models that it names. `--elsewhere`: models and data need not be
on this machine. Called by launch/; ranks look again, and at more.
"""

from __future__ import annotations

import sys

from tristage.config import RunSettings, load_config, read_deepspeed_json, require_folder_or_hub_id
from tristage.config.steps import settings_class
from tristage.data.sources import check_there, resolve_preset
from tristage.errors import UserError
from tristage.launch.dry_run import batch_table
from tristage.launch.nodes import read_nodes
from tristage.launch.options import ranks_asked, split_words
from tristage.runs.finished import require_finished
from tristage.runs.inputs import named_paths


def main(argv: list[str]) -> int:
    """Exit code 2 and one sentence for what a user must mend."""
    flag = argv[0] if argv[0] in ("--models-later", "--elsewhere") else ""
    module, config, *rest = argv[bool(flag) :]
    words, options = split_words(rest)
    try:
        settings = load_config(settings_class(config, module.removesuffix(".train")), ["--config", config, *words])
        nodes = read_nodes(options)
        here = flag != "--elsewhere" and not nodes  # the node that launches others needs neither
        check(settings, models=here and not flag, data=here)
        ranks = ranks_asked(nodes, options)
        if ranks is not None:
            batch_table(settings, ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(settings: RunSettings, models: bool, data: bool) -> None:
    """Look at the DeepSpeed JSONs, and whether models and data are there. Raises UserError."""
    for key, value in named_paths(settings):
        if models or key.endswith("deepspeed"):
            check_path(settings, key, value)
    for source in (*settings.data.train, *settings.data.heldout):
        source = resolve_preset(source, settings)
        if data:
            check_there(source)


def check_path(settings: RunSettings, key: str, value: str) -> None:
    """Look at what one of `named_paths` names. Raises UserError."""
    if key.endswith("deepspeed"):
        read_deepspeed_json(value, settings, key)
    else:
        require_folder_or_hub_id(value, settings, key)
        require_finished(value, settings, key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

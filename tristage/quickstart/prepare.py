"""Make the quickstart's data and its untrained model.

    python -m tristage.quickstart.prepare OUT [--seed 0] [--size small|tiny]
        [--architecture llama|opt|gpt2] [--pad-is-eos]

Writes OUT/data/{sft,preference,ranking,prompts}.{train,heldout}.jsonl and OUT/model (an ordinary Hugging Face folder),
then OUT/prepared.json with the arguments. If that file already has the same arguments, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tristage.models.quiet import quiet_libraries
from tristage.quickstart.network import make_network, make_tokenizer
from tristage.quickstart.task import SIZES, make_data
from tristage.storage.durable import remove_tree


def main(argv: list[str]) -> None:
    quiet_libraries()
    parser = argparse.ArgumentParser(prog="tristage.quickstart.prepare")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--architecture", choices=("llama", "opt", "gpt2"), default="llama")
    parser.add_argument("--pad-is-eos", action="store_true", help="the pad token is the EOS token")
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    done = out / "prepared.json"
    if done.is_file() and json.loads(done.read_text()) == arguments:
        print(f"task and model already exist: {out}")
        return
    done.unlink(missing_ok=True)
    prepare(out, **arguments)
    done.write_text(json.dumps(arguments))
    print(f"made the task and an untrained model: {out}")


def prepare(out: Path, seed: int, size: str, architecture: str, pad_is_eos: bool) -> None:
    """Write data and model; the same arguments write the same bytes."""
    data = make_data(SIZES[size], seed)
    remove_tree(out / "data")
    (out / "data").mkdir(parents=True)
    for name, rows in data.items():
        (out / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in data["sft.train"] for text in row.values()]
    tokenizer = make_tokenizer(texts, pad_is_eos=pad_is_eos)
    remove_tree(out / "model")
    tokenizer.save_pretrained(out / "model")
    make_network(tokenizer, architecture, size, seed).save_pretrained(out / "model")


if __name__ == "__main__":
    main(sys.argv[1:])

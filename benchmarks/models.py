"""What contestants train: an OPT-style actor and reward model with random weights, a tokenizer and rows, in a folder.

    python -m benchmarks.models FOLDER [--smallest]

Nothing is downloaded, and nothing here needs tristage: peers read the same folder. A word of the vocabulary is a token
("w7"), so that rows are lists of random ids written as text.

An untrained network would end a response at random. Here the chance of EOS is exact at every token: the last
LayerNorm gives 1 in its first place whatever the input, and the first column of the tied head is therefore a bias of
the logits. `actor` never draws EOS, so that every response is as long as the limit; `actor-mixed` draws it with a
chance that makes the mean length 40 % of the limit, and the longest ones are cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, EOS, UNK, FIRST_WORD = 0, 1, 2, 3
MEAN_SHARE = 0.4  # of the limit, of responses of mixed length
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Sizes:
    """The networks and rows of a benchmark."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    vocabulary: int = 8192
    reward_width: int = 256
    reward_layers: int = 4
    positions: int = 1024
    prompt: int = 128  # tokens of a prompt of step 3
    response: int = 128  # the limit of a response
    row: int = 256  # the limit of a row of steps 1 and 2
    rows: int = 512  # how many


SMALLEST = Sizes(32, 2, 2, 128, 16, 1, 64, 12, 6, 16, 256)


def actor_config(sizes: Sizes) -> OPTConfig:
    return _config(sizes, sizes.width, sizes.layers, sizes.heads)


def reward_config(sizes: Sizes) -> OPTConfig:
    return _config(sizes, sizes.reward_width, sizes.reward_layers, sizes.heads // 2, num_labels=1)


def _config(sizes: Sizes, width: int, layers: int, heads: int, **more: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=sizes.vocabulary, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=layers,
        num_attention_heads=heads, ffn_dim=4 * width, max_position_embeddings=sizes.positions, dropout=0.0,
        attention_dropout=0.0, layerdrop=0.0, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS, **more,
    )  # fmt: skip


def make_actor(sizes: Sizes, mixed: bool = False) -> OPTForCausalLM:
    """The same weights for any response lengths, but for the chance of EOS."""
    torch.manual_seed(0)
    model = OPTForCausalLM(actor_config(sizes))
    norm, head = model.model.decoder.final_layer_norm, model.lm_head.weight
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0.0, 1.0
        head[:, 0] = 0.0
        head[[PAD, UNK, EOS]] = 0.0
        head[[PAD, UNK, EOS], 0] = -30.0
        if mixed:
            # Logits of words are normal with variance |h|^2 * var(w); their logsumexp is log(n) + half the variance.
            variance = (sizes.width - 1) * float(head[FIRST_WORD:, 1:].var())
            others = math.log(sizes.vocabulary - FIRST_WORD) + variance / 2
            head[EOS, 0] = others + math.log(odds_of_eos(sizes.response))
    return model


def odds_of_eos(limit: int) -> float:
    """The odds p / (1 - p) of EOS at a token with which responses of at most `limit` tokens have MEAN_SHARE of it."""
    low, high = 1e-6, 0.999
    for _ in range(60):
        chance = (low + high) / 2
        mean = (1 - (1 - chance) ** limit) / chance
        low, high = (chance, high) if mean > MEAN_SHARE * limit else (low, chance)
    return chance / (1 - chance)


def make_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(FIRST_WORD, sizes.vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=sizes.positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def natural_length(rng: random.Random, limit: int) -> int:
    """Log-normal, as texts are, with a mean near half the limit."""
    return min(limit, max(2, round(rng.lognormvariate(math.log(0.46 * limit), 0.7))))


def write(folder: Path, sizes: Sizes) -> None:
    """The models, and rows: prompts.jsonl, sft.jsonl and pairs.jsonl."""
    tokenizer, rng = make_tokenizer(sizes), random.Random(0)
    models: dict[str, Any] = {name: make_actor(sizes, name == "actor-mixed") for name in ("actor", "actor-mixed")}
    models["reward"] = OPTForSequenceClassification(reward_config(sizes))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(FIRST_WORD, sizes.vocabulary)}" for _ in range(length))

    def half() -> str:
        return text(natural_length(rng, sizes.row // 2) - 1)  # a place for EOS

    rows = range(sizes.rows)
    _write_rows(folder / "prompts.jsonl", [{"prompt": text(sizes.prompt)} for _ in rows])
    _write_rows(folder / "sft.jsonl", [{"prompt": half(), "response": half()} for _ in rows])
    _write_rows(folder / "pairs.jsonl", [{"prompt": half(), "chosen": half(), "rejected": half()} for _ in rows])
    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(sizes)))


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- for contestants other than ours -----------------------------------------------------------------------------------


def read_sizes(folder: str | Path) -> Sizes:
    return Sizes(**json.loads(Path(folder, "sizes.json").read_text()))


def read_ids(folder: str | Path, name: str) -> list[dict[str, list[int]]]:
    """The rows of NAME.jsonl in token ids, for contestants that read no text: answers end in EOS."""
    rows = [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text().splitlines()]
    return [{key: _ids(text) + [EOS] * (key != "prompt") for key, text in row.items()} for row in rows]


def _ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def open_actor(folder: str, name: str = "actor") -> Any:
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32, trust_remote_code=False)


def open_reward(folder: str) -> Any:
    path = f"{folder}/reward"
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)


def open_tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(f"{folder}/actor", padding_side="left", trust_remote_code=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smallest", action="store_true", help="a network of a few thousand parameters")
    options = parser.parse_args(argv)
    write(options.folder, SMALLEST if options.smallest else Sizes())


if __name__ == "__main__":
    main()

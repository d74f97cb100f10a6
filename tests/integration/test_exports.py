"""What the steps export, opened by plain transformers without a network, gives the numbers that the engine gave."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import step1_sft.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.saves import synced_before_rename
from tristage import dist
from tristage.config import BatchPlan
from tristage.engine import engine_config, frozen_engine, generation_mode
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.saving import save_model
from tristage.models.tokenizer import load_tokenizer
from tristage.runs.finished import read_finished
from tristage.runs.inputs import model_fingerprint

IDS = torch.arange(4, 28).reshape(2, 12)
SHORT = ("max_steps=2", "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=0")
LORA = "lora={rank: 2, alpha: 8}"
MAINS = {"sft": step1_sft.train, "reward": step2_reward_model.train, "ppo": step3_ppo.train}
# run: step, ZeRO stage, overrides, folders. Those of `sharded` are written in many small files.
RUNS: dict[str, tuple[str, int, tuple[str, ...], tuple[str, ...]]] = {
    "sft": ("sft", 2, SHORT, ("final",)),
    "sft_sharded": ("sft", 3, SHORT, ("final",)),
    "sft_lora": ("sft", 3, (*SHORT, LORA), ("final",)),
    "reward_sharded": ("reward", 3, (*SHORT, "normalize=true"), ("final",)),
    "reward_lora": ("reward", 1, (*SHORT, LORA), ("final",)),
    "ppo": ("ppo", 3, ("iterations=2", "ema={decay: 0.5}"), ("final", "final_critic", "final_ema")),
    "ppo_head": ("ppo", 2, ("iterations=1", "critic=null", "value_head={}"), ("final",)),
    "ppo_lora": ("ppo", 0, ("iterations=1", f"actor.{LORA}", f"critic.{LORA}"), ("final", "final_critic")),
}
FOLDERS = [f"{run}/{final}" for run, (*_, finals) in RUNS.items() for final in finals]


def run_all(rank: int, base: str) -> None:
    for run, (step, stage, overrides, _) in RUNS.items():
        folder, rows = Path(base) / run, f"{base}/rows"
        if step == "sft":
            tiny.sft_config(folder, f"{base}/actor", f"{rows}/sft.jsonl", stage)
        elif step == "reward":
            tiny.reward_model_config(folder, f"{base}/actor", f"{rows}/ranking.jsonl", stage)
        else:
            tiny.ppo_config(folder, f"{base}/actor", f"{base}/scorer", f"{rows}/prompts.jsonl", stage)
        MAINS[step].save_model = partial(save_and_ask, "40KB" if "sharded" in run else "5GB")
        MAINS[step].main(["--config", str(folder / f"{step}.yaml"), f"output={folder}", *overrides])


def save_and_ask(shard_size: str, engine: Any, tokenizer: Any, folder: Path) -> list[Path]:
    """save_model, and beside the folder what the engine says of IDS."""
    assert not (folder.parent / "finished.json").exists()  # which is written after the last export
    written = save_model(engine, tokenizer, folder, shard_size)
    with generation_mode(engine), torch.no_grad():
        logits = engine.module.model(IDS).logits
    if dist.is_main():
        torch.save(logits, folder.with_suffix(".logits"))
    return written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("exports")
    rows = tiny.write_rows(base / "rows")
    actor = tiny.teach(tiny.write_model(base / "actor", "llama_untied"), rows["sft"])
    tiny.write_reward_model(base / "scorer", actor)
    run_ranks(2, run_all, str(base), timeout=400)
    return base


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def is_scorer(name: str) -> bool:
    return name.startswith("reward") or name.endswith("_critic")


def open_plainly(folder: Path) -> Any:
    kind = AutoModelForSequenceClassification if is_scorer(f"{folder.parent.name}/{folder.name}") else (
        AutoModelForCausalLM
    )
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_plain_transformers_gives_the_engine_s_own_numbers(name: str, base: Path, offline: None) -> None:
    expected = torch.load((base / name).with_suffix(".logits"), weights_only=True)
    found = open_plainly(base / name)(IDS).logits
    print(f"{name}: {(found - expected).abs().max():.2g} of {expected.abs().max():.2g}")
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    start = AutoModelForSequenceClassification if is_scorer(name) else AutoModelForCausalLM
    before = start.from_pretrained(base / ("scorer" if is_scorer(name) else "actor"))(IDS).logits
    assert (found - before).abs().max() > 1e-3  # it was trained


@pytest.mark.parametrize("name", RUNS)
def test_the_run_says_that_it_has_finished_and_what_it_exported(name: str, base: Path) -> None:
    folders = read_finished(base / name)["folders"]
    found = [path for path in (base / name).iterdir() if path.name.startswith("final") and path.is_dir()]
    assert folders == {path.name: model_fingerprint(path) for path in found}
    assert set(RUNS[name][3]) <= folders.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_template_and_generation_settings_are_there(name: str, base: Path, offline: None) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (base / name, base / "actor"))
    turns = [{"role": "user", "content": "Name four fruits."}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    if not is_scorer(name):
        assert GenerationConfig.from_pretrained(base / name).eos_token_id == ours.eos_token_id


@pytest.mark.parametrize("name", ["sft_sharded/final", "reward_sharded/final"])
@torch.no_grad()
def test_the_next_step_opens_a_model_in_several_files(name: str, base: Path, offline: None) -> None:
    shards = sorted((base / name).glob("model-*.safetensors"))
    assert len(shards) > 3 and not (base / name / "model.safetensors").exists()
    index = json.loads((base / name / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert set(index["weight_map"]) == {key for shard in shards for key in load_file(shard)}
    tokenizer, expected = load_tokenizer(str(base / name)), torch.load(
        (base / name).with_suffix(".logits"), weights_only=True
    )
    if is_scorer(name):
        model = load_reward_model(str(base / name), tokenizer, dtype=torch.float32, new_head_seed=None)
        assert model.score_scale != 1  # normalised, and the next step knows
    else:
        model = load_causal_lm(str(base / name), tokenizer, dtype=torch.float32)
    torch.testing.assert_close(model.eval().model(IDS).logits, expected, rtol=0, atol=1e-5)


def test_a_value_head_is_exported_as_a_critic(base: Path, offline: None) -> None:
    folder = base / "ppo_head/final_critic"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    policy = load_file(base / "ppo_head/final/model.safetensors")
    critic = load_file(folder / "model.safetensors")
    assert model.num_labels == 1 and critic.keys() - policy.keys() == {"score.weight"}
    assert all(torch.equal(critic[name], policy[name]) for name in critic if name != "score.weight")


# ---- kills and full disks -------------------------------------------------------------------------------------------

FROZEN = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
CALLS = ("fsync", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """Nothing of the exporting code may run after it, as after SIGKILL: only `except Exception` is allowed there."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Exports:
    """An old and a new model, exported to the same folder in many small files."""

    def __init__(self, base: Path):
        self.folder, self.engines = base / "final", {}
        config = engine_config(FROZEN, "float32", BatchPlan.make(1, 1, 1))
        for seed, name in enumerate(("old", "new")):
            path = tiny.write_model(base / name, seed=seed)
            self.tokenizer = load_tokenizer(path)
            self.engines[name] = frozen_engine(load_causal_lm(path, self.tokenizer, dtype=torch.float32), config)
        self.whole = {name: self.save(name) for name in self.engines}

    def save(self, name: str) -> dict[str, bytes]:
        save_model(self.engines[name], self.tokenizer, self.folder, "40KB")
        assert not list(self.folder.parent.glob("final.*"))
        return contents(self.folder)

    def save_killed(self, name: str, moment: int) -> str | None:
        """Killed before its `moment`-th call that matters to the disk: which; None if it made fewer."""
        left = moment

        def counting(call: str, function: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed(call)
                return function(*arguments, **options)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            for call in CALLS:
                patch.setattr(os, call, counting(call, getattr(os, call)))
            try:
                self.save(name)
            except Killed as killed:
                return str(killed)
        return None


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    with tiny.one_rank():
        yield Exports(tmp_path_factory.mktemp("killed"))


def test_a_kill_at_any_moment_leaves_the_old_folder_the_new_one_or_none(exports: Exports) -> None:
    calls, found = [], []
    for moment in range(1, 1000):
        exports.save("old")
        call = exports.save_killed("new", moment)
        if call is None:
            break
        calls.append(call)
        now = contents(exports.folder) if exports.folder.exists() else None
        assert now is None or now in exports.whole.values(), (moment, call)
        found.append("none" if now is None else "old" if now == exports.whole["old"] else "new")
        assert exports.save("new") == exports.whole["new"]
    assert calls.index("rename") > calls.index("fsync") > -1 and calls.count("rename") == 2
    assert calls[: calls.index("rename")].count("fsync") > 10  # every file before any is renamed
    print(found)
    assert found == sorted(found, key=["old", "none", "new"].index) and found.count("none") == 1


def test_every_file_is_synced_before_the_folder_has_its_name(exports: Exports) -> None:
    exports.save("old")
    with synced_before_rename() as unsynced:
        exports.save("new")
    assert unsynced == {exports.folder: []}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    error: Exception, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports.save("old")

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match=r"final: the disk is full after \d+ bytes of the model"):
        exports.save("new")
    assert contents(exports.folder) == exports.whole["old"]
    assert not list(exports.folder.parent.glob("final.*"))

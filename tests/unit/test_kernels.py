"""Settings of attention and Liger's kernels reach the models; what this machine or a family lacks is refused first.

Liger needs a GPU: what is called, with what and when is shown with a recorder in its place.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import step1_sft.train
from step3_ppo.engines import build_engines, check_models
from tests.helpers import tiny
from tristage import dist
from tristage.config import LoraSettings
from tristage.data.collate import collate_packed, collate_sft
from tristage.errors import UserError
from tristage.models import kernels
from tristage.models.causal_lm import load_causal_lm
from tristage.models.kernels import Kernels, check_kernels, check_quantized
from tristage.models.loading import check_model, check_packable
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer
from tristage.training import setup

FAMILIES = ("llama", "gpt2", "opt", "qwen2", "gpt_neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {family: tiny.write_model(base / family, family, gain=2.0) for family in (*FAMILIES, "gemma2", "bloom")}


def load(path: str, attention: str, load_model: Any = load_causal_lm) -> Any:
    options = {"new_head_seed": 1} if load_model is load_reward_model else {}
    kernels = Kernels(attention=attention)
    return load_model(path, load_tokenizer(path), dtype=torch.float32, kernels=kernels, **options)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_eager_and_sdpa_give_the_same_logprobs(family: str, packed: bool, folders: dict[str, str]) -> None:
    tokenizer = load_tokenizer(folders[family])
    examples = tiny.random_examples([(9, 4), (3, 1), (1, 20)], tokenizer, seed=2)
    rows: Any = [examples[:2], examples[1:]] if packed else examples
    batch = (collate_packed if packed else collate_sft)(rows, tokenizer.pad_token_id)
    found = []
    for attention in ("eager", "sdpa"):
        policy = load(folders[family], attention)
        assert policy.model.config._attn_implementation == attention
        logprobs, _ = policy(
            batch.input_ids, batch.attention_mask, batch.loss_mask, position_ids=batch.position_ids
        )
        found.append(logprobs[batch.loss_mask[:, 1:]])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert found[0].std() > 0.1


@pytest.mark.parametrize("load_model", [load_causal_lm, load_reward_model])
def test_auto_is_the_choice_of_transformers(load_model: Any, folders: dict[str, str]) -> None:
    assert load(folders["llama"], "auto", load_model).model.config._attn_implementation == "sdpa"
    assert load(folders["gemma2"], "auto", load_model).model.config._attn_implementation == "eager"
    assert load(folders["llama"], "eager", load_model).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "family, words, sentence",
    [
        ("llama", ["attention=flex_attention"], "flex_attention has no backward pass on CPUs; use auto, eager or sdpa"),
        ("llama", ["attention=flash_attention_2"], "flash_attention_2 computes in half precision only; set `precis"),
        ("llama", ["attention=flash_attention_2", "precision=bf16"], "llama cannot have flash_attention_2 here (Flash"),
        ("gemma2", ["attention=sdpa"], "gemma2 cannot have sdpa here (Gemma2ForCausalLM does not support"),
        ("bloom", ["attention=sdpa"], "bloom cannot have sdpa here (BloomForCausalLM does not support"),
    ],
)
def test_attention_that_is_not_there_is_one_sentence_before_anything_is_read(
    family: str, words: list[str], sentence: str, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = tiny.sft_config(tmp_path, folders[family], "unused.jsonl", 0, *words)
    with pytest.raises(UserError) as error:
        setup.check_training(settings)
    assert str(error.value).startswith(f"{settings.file}: key `attention`: ") and sentence in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        step1_sft.train.main(["--config", settings.file, *words])
    assert not Path(settings.output).exists()


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_packing_by_a_mask_of_ours_wants_attention_that_takes_one(attention: str, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"by a mask, which {attention} does not take; set `attention: sdpa`"):
        check_packable(folders["opt"], attention)
    check_packable(folders["opt"], "sdpa", 2)


def test_flash_attention_packs_in_micro_batches_of_one_only(folders: dict[str, str]) -> None:
    check_packable(folders["llama"], "flash_attention_2", 1)
    with pytest.raises(UserError, match="kept apart in micro-batches of one sequence only; set `micro_batch: 1`"):
        check_packable(folders["llama"], "flash_attention_2", 2)


# ---- Liger ----------------------------------------------------------------------------------------------------------


def liger_check(path: str, folder: Path) -> None:
    settings = tiny.sft_config(folder, path, "unused.jsonl", 0, "liger_kernel=true")
    check_kernels(settings, path, check_model(path, 32, "policy"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Stands in for Liger on a GPU: what is asked of it."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    module = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda model, **options: calls.append((model, options)),
    )
    found, spec = importlib.import_module, importlib.util.find_spec
    monkeypatch.setattr(
        kernels.importlib, "import_module", lambda name: module if name == kernels.LIGER else found(name)
    )
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: "here" if name == "liger_kernel" else spec(name, *rest)
    )
    monkeypatch.setattr(dist, "uses_gpu", lambda device: True)
    return calls


def test_liger_wants_a_gpu(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sft.yaml: key `liger_kernel`: Liger's kernels run on GPUs only; remove it"):
        liger_check(folders["llama"], tmp_path)


def test_liger_must_be_installed(
    folders: dict[str, str], tmp_path: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger_check(folders["llama"], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="key `liger_kernel`: the package liger-kernel is not installed; `pip install"):
        liger_check(folders["llama"], tmp_path)


def test_a_family_that_liger_does_not_know_is_refused(folders: dict[str, str], tmp_path: Path, recorder: Any) -> None:
    with pytest.raises(UserError, match="key `liger_kernel`: Liger has no kernels for a opt model .*opt.; remove it"):
        liger_check(folders["opt"], tmp_path)


def test_liger_is_put_into_trained_and_frozen_models_before_their_engines(
    folders: dict[str, str], tmp_path: Path, recorder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = tiny.write_reward_model(tmp_path / "reward", folders["llama"])
    words = ["liger_kernel=true", "actor.lora={rank: 2}"]
    settings = tiny.ppo_config(tmp_path, folders["llama"], reward, "unused.jsonl", 0, *words)
    tokenizer = check_models(settings)
    monkeypatch.setattr("step3_ppo.engines.train_engine", lambda model, *rest: recorder.append(model) or model)
    monkeypatch.setattr("step3_ppo.engines.frozen_engine", lambda model, *rest: recorder.append(model) or model)
    monkeypatch.setattr(dist, "uses_gpu", lambda device: False)
    engines = build_engines(settings, setup.deepspeed_configs(settings, settings.plan(1)), tokenizer)
    assert len(recorder) == 8
    for (patched, options), wrapper, engine in zip(recorder[::2], recorder[1::2], engines.present(), strict=True):
        assert patched is wrapper.model and wrapper is engine
        assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_without_the_setting_liger_is_left_alone(folders: dict[str, str], recorder: list[Any]) -> None:
    load(folders["llama"], "auto")
    assert recorder == []


# ---- quantised weights, where bitsandbytes is not there -------------------------------------------------------------


def test_quantised_weights_want_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantized(None, "cpu", "key")
    check_quantized(LoraSettings(), "cpu", "key")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError) as error:
        check_quantized(LoraSettings(quantize="nf4"), "cpu", "a.yaml: key `lora.quantize`")
    assert str(error.value) == (
        "a.yaml: key `lora.quantize`: the package bitsandbytes is not installed; `pip install bitsandbytes`, "
        "or remove it"
    )


def test_quantised_weights_want_a_device_that_bitsandbytes_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(supported_torch_devices={"cuda"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: "here")
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: old)
    with pytest.raises(UserError, match="key: this version of bitsandbytes has no kernels for cpu; install 0.50"):
        check_quantized(LoraSettings(quantize="nf4"), "cpu", "key")
    monkeypatch.setattr(dist, "uses_gpu", lambda device: True)
    check_quantized(LoraSettings(quantize="nf4"), "auto", "key")

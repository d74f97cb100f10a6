"""A model with adapters against the same mathematics written out, and its exports in plain transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import oracles, tiny
from tristage.config import BatchPlan, LoraSettings, OptimizerSettings
from tristage.engine import engine_config, train_engine
from tristage.models.causal_lm import load_causal_lm
from tristage.models.reward_model import load_reward_model
from tristage.models.saving import save_model
from tristage.models.tokenizer import load_tokenizer

FAMILIES = ["gpt2", "llama_untied", "opt", "qwen2", "gpt_neox", "gemma2"]
LORA = LoraSettings(rank=3, alpha=6)
KINDS = {
    "policy": (load_causal_lm, AutoModelForCausalLM, {}),
    "reward": (load_reward_model, AutoModelForSequenceClassification, {"new_head_seed": 4}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("lora") / request.param, request.param, gain=1.5)


def load(path: str, kind: str = "policy", lora: LoraSettings | None = LORA, **options: Any) -> Any:
    load_model, _, more = KINDS[kind]
    return load_model(path, load_tokenizer(path), dtype=torch.float32, lora=lora, **more, **options)


def randomize(wrapper: Any) -> dict[str, torch.Tensor]:
    """Give B values, as training would; the adapters by name."""
    generator = torch.Generator().manual_seed(8)
    adapters = {name: p for name, p in wrapper.model.named_parameters() if ".lora_" in name}
    for name, parameter in adapters.items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return {name: p.detach().clone() for name, p in adapters.items()}


def some_ids(path: str) -> torch.Tensor:
    return torch.randint(4, len(load_tokenizer(path)), (3, 17), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def test_at_initialisation_logits_are_those_of_the_base_to_the_last_bit(path: str) -> None:
    ids = some_ids(path)
    assert torch.equal(logits(load(path).model, ids), logits(load(path, lora=None).model, ids))


def test_logits_are_those_of_the_explicit_merge_in_float64(path: str) -> None:
    wrapper, ids = load(path), some_ids(path)
    adapters = {name: tensor.double() for name, tensor in randomize(wrapper).items()}
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    state = dict(plain.named_parameters())
    changes = oracles.lora_changes(adapters, LORA.alpha / LORA.rank, transposed=plain.config.model_type == "gpt2")
    assert changes and changes.keys() <= state.keys()
    merged = {name: state[name] + change for name, change in changes.items()}
    with torch.no_grad():
        expected = functional_call(plain, merged, (ids,)).logits
    assert (expected - logits(plain, ids)).abs().max() > 1e-2  # the adapters matter
    torch.testing.assert_close(logits(wrapper.model, ids).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_over_a_frozen_trunk_gives_adapters_their_gradients(path: str) -> None:
    ids, mask = some_ids(path), torch.ones(3, 17, dtype=torch.bool)
    gradients = []
    for recompute in (False, True):
        wrapper = load(path, gradient_checkpointing=recompute)
        randomize(wrapper)
        wrapper.train()
        wrapper(ids, mask, mask)[0].sum().backward()
        gradients.append({name: p.grad for name, p in wrapper.named_parameters()})
    for name, found in gradients[1].items():
        assert (found is not None) == (".lora_" in name)
        if found is not None:
            assert found.abs().max() > 0
            torch.testing.assert_close(found, gradients[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_folder_and_adapter_folder_open_elsewhere_and_agree(path: str, kind: str, tmp_path: Path) -> None:
    auto_class, options = KINDS[kind][1], {"num_labels": 1} if kind == "reward" else {}
    wrapper, ids = load(path, kind), some_ids(path)
    randomize(wrapper)
    with tiny.one_rank():
        config = engine_config({}, "float32", BatchPlan.make(1, 1, 1))
        engine = train_engine(wrapper, config, OptimizerSettings(learning_rate=1e-3), 1)
        expected = logits(engine.module.model, ids[:1])
        save_model(engine, load_tokenizer(path), tmp_path / "final")
    merged, loading = auto_class.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(merged.config, "peft_config") and type(merged) is type(wrapper.model)
    torch.testing.assert_close(logits(merged, ids[:1]), expected, rtol=1e-5, atol=2e-5)
    base = auto_class.from_pretrained(path, pad_token_id=wrapper.model.config.pad_token_id, **options)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "final_adapter"))
    torch.testing.assert_close(logits(adapted, ids[:1]), expected, rtol=1e-5, atol=1e-6)
    assert (expected - logits(load(path, kind, lora=None).model, ids[:1])).abs().max() > 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "final_adapter"]

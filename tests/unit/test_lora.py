"""Settings of LoRA, which layers they mean, and what merging does to a state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import tiny
from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.lora import adapters_off, add_adapters, check_lora, merge_state
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for name in ("llama_untied", "gpt2"):
        tiny.write_model(folder / name, name)
    return folder


def load(folder: Path, name: str, load_model: Any = load_causal_lm, seed: int = 0, **lora: Any) -> Any:
    path = str(folder / name)
    options = {"new_head_seed": 1} if load_model is load_reward_model else {}
    return load_model(
        path, load_tokenizer(path), dtype=torch.float32, lora=LoraSettings(**lora), lora_seed=seed, **options
    ).model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_string_of_targets_is_split_at_commas() -> None:
    assert LoraSettings(targets="q_proj,v_proj").targets == ("q_proj", "v_proj")  # type: ignore[arg-type]
    assert LoraSettings().targets == ("all-linear",)


def test_all_linear_is_every_linear_layer_but_the_output_projection(folder: Path) -> None:
    names = trained(load(folder, "llama_untied"))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == LLAMA
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in names)
    layers = load(folder, "llama_untied").config.num_hidden_layers
    assert len(names) == 2 * len(LLAMA) * layers


def test_named_targets_alone_are_trained(folder: Path) -> None:
    names = trained(load(folder, "gpt2", targets=("attn.c_proj",)))
    assert names and all(".attn.c_proj.lora_" in name for name in names)


def test_a_scalar_head_is_trained_beside_the_adapters(folder: Path) -> None:
    names = trained(load(folder, "gpt2", load_reward_model))
    assert "score.weight" in names and all(name == "score.weight" or ".lora_" in name for name in names)


def test_adapters_have_the_rank_and_start_from_their_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = load(folder, "gpt2", seed=5, rank=3).state_dict()
    assert torch.equal(torch.rand(3), expected)  # nobody else's draws change
    torch.manual_seed(2)
    same, other = (load(folder, "gpt2", seed=seed, rank=3).state_dict() for seed in (5, 6))
    a = [name for name in one if ".lora_A." in name]
    assert a and all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in a)
    assert all(one[name].shape[0] == 3 for name in a)
    assert not any(one[name].any() for name in one if ".lora_B." in name)


@pytest.mark.parametrize("name, endings", [("llama_untied", LLAMA), ("gpt2", {"c_attn", "c_fc", "c_proj"})])
@pytest.mark.parametrize("target", ["query", "lm_head", "proj", "embed_tokens"])
def test_a_target_that_matches_nothing_is_one_sentence_with_what_would(
    name: str, endings: set[str], target: str, folder: Path
) -> None:
    lora = LoraSettings(targets=(min(endings), target))
    with pytest.raises(UserError) as error:
        check_lora(lora, str(folder / name), "a.yaml: key `lora.targets`")
    assert str(error.value) == (
        f"a.yaml: key `lora.targets`: {folder / name} has no inner linear layer whose name ends in `{target}`; "
        f"it has {', '.join(sorted(endings))}"
    )


def test_targets_that_match_pass_the_check(folder: Path) -> None:
    assert check_lora(None, "nowhere", "key") is None
    for lora in (LoraSettings(), LoraSettings(targets=("c_attn", "mlp.c_proj"))):
        assert check_lora(lora, str(folder / "gpt2"), "key") is None


def test_merging_adds_alpha_over_rank_times_b_a() -> None:
    class Model(nn.Module):
        config, dtype, get_output_embeddings = {"model_type": "none"}, torch.bfloat16, lambda self: None

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3, dtype=torch.bfloat16)

    model: Any = Model()
    with torch.no_grad():
        model.inner.weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    add_adapters(model, LoraSettings(rank=1, alpha=3), "none", seed=0)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    state["inner.lora_A.default.weight"] = torch.tensor([[1.0, -1]])
    state["inner.lora_B.default.weight"] = torch.tensor([[1.0], [0], [2]])
    merge_state(model, state)
    assert state.keys() == {"inner.weight", "inner.bias"}
    assert state["inner.weight"].dtype == torch.bfloat16
    assert state["inner.weight"].tolist() == [[4, -1], [3, 4], [11, 0]]


def test_adapters_switched_off_leave_the_base_and_come_back_trained(folder: Path) -> None:
    model, ids = load(folder, "gpt2"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = model(ids).logits
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        with_adapters, before = model(ids).logits, trained(model)
        with adapters_off(model):
            assert torch.equal(model(ids).logits, base) and trained(model) == before
        assert torch.equal(model(ids).logits, with_adapters) and not torch.equal(with_adapters, base)
        with pytest.raises(ZeroDivisionError), adapters_off(model):
            raise ZeroDivisionError
        assert torch.equal(model(ids).logits, with_adapters)

"""QLoRA on two ranks: adapters beside weights in 4 bits, at every ZeRO stage, and what is exported.

Needs bitsandbytes, whose CPU kernels these are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import step1_sft.train
import step2_dpo.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.interrupted import Killed, kill_at, untimed
from tests.helpers.ranks import run_ranks
from tristage.cli import main as cli
from tristage.config import LoraSettings
from tristage.models.causal_lm import load_causal_lm
from tristage.models.kernels import Kernels
from tristage.models.reward_model import load_reward_model
from tristage.models.tokenizer import load_tokenizer

bnb = pytest.importorskip("bitsandbytes")

MAINS = {"sft": step1_sft.train, "reward": step2_reward_model.train, "dpo": step2_dpo.train, "ppo": step3_ppo.train}
LORA = "lora={rank: 4, alpha: 8, quantize: nf4}"
TRAINED = [LORA, "optimizer.learning_rate=1e-2", "max_steps=4", "save_every=2"]
PPO = [f"actor.{LORA}", f"critic.{LORA}", "iterations=2", "ema={decay: 0.5}"]
RUNS: dict[str, tuple[str, int, list[str]]] = {  # name: step, ZeRO stage, words
    **{f"sft{stage}": ("sft", stage, TRAINED) for stage in (0, 1, 2, 3)},
    **{f"killed{stage}": ("sft", stage, TRAINED) for stage in (2, 3)},
    "bf16": ("sft", 3, [*TRAINED, "precision=bf16", "gradient_checkpointing=true"]),
    "reward": ("reward", 2, TRAINED),
    "dpo": ("dpo", 3, TRAINED),
    "apart": ("ppo", 2, PPO),
    "within": ("ppo", 2, [*PPO, "reference=null"]),
}


def run_all(rank: int, base: str) -> None:
    for name, (step, _, words) in RUNS.items():
        argv = ["--config", f"{base}/{name}/{step}.yaml", *words]
        if name.startswith("killed"):
            with kill_at(3), pytest.raises(Killed):
                MAINS[step].main(argv)
        MAINS[step].main(argv)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("qlora")
    rows = tiny.write_rows(base / "rows")
    model = tiny.teach(tiny.write_model(base / "model"), rows["sft"], steps=3)
    scorer = tiny.write_reward_model(base / "scorer", model)
    for name, (step, stage, _) in RUNS.items():
        if step == "sft":
            tiny.sft_config(base / name, model, rows["sft"], stage)
        elif step == "reward":
            tiny.reward_model_config(base / name, model, rows["ranking"], stage)
        elif step == "dpo":
            tiny.dpo_config(base / name, model, rows["ranking"], stage)
        else:
            tiny.ppo_config(base / name, model, scorer, rows["prompts"], stage)
    run_ranks(2, run_all, str(base), timeout=500)
    return base


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [line for line in untimed(folder / "metrics.jsonl") if line["split"] == split]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def quantized(base: Path, load: Any = load_causal_lm, **options: Any) -> Any:
    path = str(base / "model")
    kernels = Kernels(quantize="nf4")
    return load(path, load_tokenizer(path), dtype=torch.float32, lora=LoraSettings(), kernels=kernels, **options)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_inner_linear_layers_take_4_bits_and_all_else_is_as_it_was(kind: str, base: Path) -> None:
    reward = {"load": load_reward_model, "new_head_seed": 1} if kind == "reward" else {}
    model, plain = quantized(base, **reward).model, AutoModelForCausalLM.from_pretrained(base / "model")
    whole = dict(plain.named_parameters())
    packed = 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or name.startswith("score."))
        assert parameter.dtype == torch.float32
        if name.endswith("_proj.base_layer.weight"):
            packed += 1
            assert 4 * parameter.numel() == whole[name.replace(".base_layer", "")].numel() / 2  # bytes
        elif name in whole:
            assert torch.equal(parameter, whole[name])
    assert packed == 7 * model.config.num_hidden_layers


def test_logprobs_and_gradients_are_those_of_dequantised_weights_which_are_near_the_whole_ones(base: Path) -> None:
    path, plain = str(base / "model"), AutoModelForCausalLM.from_pretrained(base / "model")
    wrapper = quantized(base)
    whole_lora = load_causal_lm(path, load_tokenizer(path), dtype=torch.float32, lora=LoraSettings())
    ids = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask, rounded = torch.ones_like(ids).bool(), {}
    for name, parameter in wrapper.model.named_parameters():
        if name.endswith("_proj.base_layer.weight"):
            key = name.replace(".base_layer", "")
            rounded[key] = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            whole = plain.get_parameter(key)
            assert 0.01 < (rounded[key] - whole).norm() / whole.norm() < 0.15  # 16 levels
            whole_lora.model.get_parameter(name).data.copy_(rounded[key])
    found = []
    for policy in (wrapper, whole_lora):
        generator = torch.Generator().manual_seed(8)
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found.append(policy.train()(ids, mask, mask)[0])
        found[-1].sum().backward()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    ours, theirs = ({name: p.grad for name, p in m.named_parameters()} for m in (wrapper, whole_lora))
    for name, gradient in ours.items():
        assert (gradient is not None) == (".lora_" in name)
        if gradient is not None:
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@torch.no_grad()
def test_an_evaluation_leaves_the_quantised_weights_as_they_are(base: Path) -> None:
    wrapper, ids = quantized(base), torch.tensor([[5, 9, 14, 7]])
    before = {name: p.clone().view(torch.uint8) for name, p in wrapper.named_parameters()}  # as floats some are NaN
    trained = wrapper.train().model(ids).logits
    assert torch.equal(wrapper.eval().model(ids).logits, trained)
    assert torch.equal(wrapper.train().model(ids).logits, trained)
    assert all(torch.equal(p.view(torch.uint8), before[name]) for name, p in wrapper.named_parameters())
    layers = [module for module in wrapper.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft0", "sft1", "sft2", "sft3", "bf16"])
def test_training_lowers_the_loss(name: str, base: Path) -> None:
    before, after = (line["sft/loss"] for line in lines(base / name / "sft", "heldout"))
    assert after < before - 0.05


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_every_zero_stage_trains_alike(stage: int, base: Path) -> None:
    ours, theirs = (lines(base / f"sft{s}/sft") for s in (stage, 0))
    assert len(theirs) == 4
    for key in ("sft/loss", "optimizer/grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4)


@pytest.mark.parametrize("stage", (2, 3))
def test_a_killed_run_resumes_as_if_nothing_had_happened(stage: int, base: Path) -> None:
    ours, theirs = base / f"killed{stage}/sft", base / f"sft{stage}/sft"
    assert untimed(ours / "metrics.jsonl") == untimed(theirs / "metrics.jsonl")
    mine, its = weights(ours / "final"), weights(theirs / "final")
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_the_reference_of_a_quantised_policy_is_quantised_alike(base: Path) -> None:
    """DPO and PPO stop at their first step if policy and reference differ."""
    assert len(lines(base / "dpo/dpo")) == 4
    ours, theirs = (untimed(base / name / "ppo/metrics.jsonl") for name in ("within", "apart"))
    assert len(ours) == 4 and ours == theirs
    assert lines(base / "apart/ppo")[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


# ---- what is exported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft0/sft", "sft3/sft", "dpo/dpo", "within/ppo"])
def test_final_is_the_adapter_merged_into_the_whole_base(name: str, base: Path, tmp_path: Path) -> None:
    final, start = weights(base / name / "final"), weights(base / "model")
    assert final.keys() == start.keys()
    moved = {key for key in start if not torch.equal(start[key], final[key])}
    assert moved == {key for key in start if key.endswith("_proj.weight")}
    adapter = base / name / "final_adapter"
    assert cli.main(["merge", str(base / "model"), str(adapter), str(tmp_path / "merged")]) == 0
    assert all(torch.equal(tensor, final[key]) for key, tensor in weights(tmp_path / "merged").items())
    ids = torch.tensor([[5, 9, 14, 7, 30]])
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(base / "model")
        adapted = peft.PeftModel.from_pretrained(whole, str(adapter)).eval()(ids).logits
        opened = AutoModelForCausalLM.from_pretrained(base / name / "final")
        torch.testing.assert_close(opened.eval()(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    assert not hasattr(opened.config, "quantization_config")


def test_exports_have_the_precision_of_the_run_and_scalar_heads(base: Path) -> None:
    assert {tensor.dtype for tensor in weights(base / "bf16/sft/final").values()} == {torch.bfloat16}
    head, start = weights(base / "reward/reward/final"), load_reward_model(
        str(base / "model"), load_tokenizer(str(base / "model")), dtype=torch.float32, new_head_seed=0
    ).model.state_dict()  # fmt: skip
    assert head["score.weight"].shape == (1, head["model.embed_tokens.weight"].shape[1])
    assert not torch.equal(head["score.weight"], start["score.weight"])
    average, final = (weights(base / f"within/ppo/{name}") for name in ("final_ema", "final"))
    assert average.keys() == final.keys() and any(not torch.equal(average[key], final[key]) for key in final)
    assert (base / "within/ppo/final_critic/model.safetensors").is_file()

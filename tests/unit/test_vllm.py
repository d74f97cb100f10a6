"""The `vllm` backend without vLLM: which weights are pushed, how both copies are compared, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

import step3_ppo.update
import tristage.rollout.vllm
from step3_ppo.engines import Engines, _check_backend
from step3_ppo.rollout import importance_metrics
from step3_ppo.update import Minibatch, check_sampler
from tests.helpers import oracles, tiny
from tristage.batches import Experience, Sequences
from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.causal_lm import load_causal_lm
from tristage.models.lora import merge_state
from tristage.models.saving import stream_weights
from tristage.models.tokenizer import load_tokenizer
from tristage.rollout.vllm import Sums, _counted, add_shards, differing_layer, parameter_sums, sums_of
from tristage.training.metrics import Averages

VLLM = "rollout.backend=vllm"


# ---- the weights that are pushed ------------------------------------------------------------------------------------


def engine_of(path: str, lora: LoraSettings | None = None) -> Any:
    model = load_causal_lm(path, load_tokenizer(path), dtype=torch.float32, lora=lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at 0 an adapter changes nothing
            nn.init.normal_(parameter, std=0.1)
    return SimpleNamespace(module=model)


@pytest.mark.parametrize("architecture", ["llama", "llama_untied", "opt", "gpt2"])
def test_the_pushed_weights_are_the_exported_ones(tmp_path: Path, architecture: str) -> None:
    path = tiny.write_model(tmp_path / "model", architecture)
    pushed = dict(stream_weights(engine_of(path)))
    exported = load_file(Path(path) / "model.safetensors")
    assert pushed.keys() == exported.keys()
    assert all(torch.equal(pushed[name], exported[name]) for name in exported)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 keeps its weights transposed
def test_adapters_are_pushed_merged_and_the_model_keeps_them_apart(tmp_path: Path, architecture: str) -> None:
    lora = LoraSettings(rank=2, targets=("all-linear",))
    engine = engine_of(tiny.write_model(tmp_path / "model", architecture), lora)
    before = {name: x.clone() for name, x in engine.module.model.state_dict().items()}
    pushed = dict(stream_weights(engine))
    merged = {name: x.clone() for name, x in before.items()}
    merge_state(engine.module.model, merged)
    assert pushed.keys() <= merged.keys() and not any("lora" in name for name in pushed)
    assert all(torch.equal(pushed[name], merged[name]) for name in pushed)
    after = engine.module.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- sums of both copies --------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """As vLLM holds q and k [4,6] of one layer, and a norm: fused, and the rows of rank `rank` of 2."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, norm: torch.Tensor, rank: int | None = None):
        super().__init__()
        q, k = (x if rank is None else x.chunk(2)[rank] for x in (q, k))
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].qk = nn.Parameter(torch.cat([q, k, torch.zeros(3, 6)]))  # padded
        self.layers[0].norm = nn.Parameter(norm)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {f"model.layers.0.{name}.weight": torch.randn(4, 6, generator=g) for name in "qk"}
    return made | {"model.layers.0.norm.weight": 1 + torch.randn(6, generator=g)}


def pushed_sums(weights: dict[str, torch.Tensor]) -> dict[str, Sums]:
    sums: dict[str, Sums] = {}
    assert [name for name, _ in _counted(weights.items(), sums)] == list(weights)
    return sums


def test_sums_agree_however_a_layer_is_fused_padded_and_split(weights: dict[str, torch.Tensor]) -> None:
    ours = pushed_sums(weights)
    assert list(ours) == ["layer 0"] and ours["layer 0"].numel == 54
    for ranks in ([None], [0, 1]):
        shards = [parameter_sums(Fused(*weights.values(), rank=rank)) for rank in ranks]
        assert differing_layer(ours, add_shards(shards), 1e-7) is None


@pytest.mark.parametrize("wrong", ["changed", "swapped sign", "missing", "nan"])
def test_a_weight_that_was_not_pushed_is_seen(weights: dict[str, torch.Tensor], wrong: str) -> None:
    ours, name = pushed_sums(weights), "model.layers.0.k.weight"
    theirs = {key: x.clone() for key, x in weights.items()}
    if wrong == "changed":
        theirs[name][2, 3] += 1e-5
    elif wrong == "swapped sign":  # the sum of squares stays
        theirs[name] *= -1
    elif wrong == "missing":
        del theirs[name]
    else:
        theirs[name][0, 0] = torch.nan
    found = differing_layer(ours, pushed_sums(theirs), 1e-7)
    assert found is not None and found.startswith("layer 0: ")


def test_sums_of_a_packed_kernel_are_compared_within_the_dtypes_rounding(weights: dict[str, torch.Tensor]) -> None:
    ours = pushed_sums(weights)
    for change, differs in ((1e-6, False), (1e-2, True)):
        packed = {"layer 0": Sums(ours["layer 0"].total + change, None, 0)}
        assert (differing_layer(ours, packed, 1e-7) is not None) is differs


def test_a_weight_that_is_the_same_on_all_ranks_counts_once() -> None:
    split, whole = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    shards = [{"a.0.x": sums_of(split[rank]), "a.0.y": sums_of(whole)} for rank in range(2)]
    assert add_shards(shards)["layer 0"].total == 6.0


# ---- what is refused ------------------------------------------------------------------------------------------------


def config(folder: Path, *words: str, actor: str = "actor") -> Any:
    return tiny.ppo_config(folder, actor, "reward", "rows.jsonl", 0, *words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["rollout.importance_cap=3"], "key `rollout.importance_cap` has no effect"),
        (["rollout.importance_sampling=mask", "rollout.backend=static"], "key `rollout.importance_sampling` has no"),
        (["rollout.tensor_parallel=2", "rollout.backend=padded"], "key `rollout.tensor_parallel` has no effect"),
        (["rollout.cuda_graphs=true", "rollout.backend=padded"], "key `rollout.cuda_graphs` has no effect"),
        ([VLLM, "rollout.gather_weights=never"], "key `rollout.gather_weights` has no effect"),
        ([VLLM, "rollout.importance_sampling=off", "rollout.importance_cap=3"], "key `rollout.importance_cap` has no"),
        ([VLLM, "rollout.top_p=0.9", "rollout.temperature=0.7"], "set rollout.temperature to 1"),
        ([VLLM, "actor.lora={rank: 4, targets: [all-linear], quantize: nf4}"], "remove `actor.lora.quantize`"),
    ],
)
def test_settings_that_do_not_go_with_the_backend_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises((UserError, ValidationError)) as raised:
        config(tmp_path, *words)
    assert message in str(raised.value)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.1", known: tuple[str, ...] = ()) -> None:
    module = SimpleNamespace(ModelRegistry=SimpleNamespace(get_supported_archs=lambda: known))
    monkeypatch.setattr(tristage.rollout.vllm, "_installed_version", lambda: version)
    monkeypatch.setattr(tristage.rollout.vllm, "_import_vllm", lambda: module)


def refusal(settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        _check_backend(settings)
    return str(raised.value)


def test_a_vllm_that_is_absent_old_or_ignorant_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, VLLM, actor=tiny.write_model(tmp_path / "model"))
    start = f"{settings.file}: key `rollout.backend`: vLLM "
    monkeypatch.setattr(tristage.rollout.vllm, "_installed_version", lambda: None)
    assert refusal(settings).startswith(f"{start}is not installed; `pip install tristage[vllm]`, or set rollout.")
    fake_vllm(monkeypatch, "0.9.2")
    assert refusal(settings).startswith(f"{start}0.9.2 is too old; install 0.32 or newer")
    fake_vllm(monkeypatch, known=("OPTForCausalLM",))
    assert refusal(settings).startswith(f"{start}0.33.1 does not know llama models ({tmp_path}/model)")


def test_tensor_parallel_divides_the_ranks_of_a_node_and_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm(monkeypatch, known=("LlamaForCausalLM",))
    path, key = tiny.write_model(tmp_path / "model"), "key `rollout.tensor_parallel`: "
    for ranks, parallel, message in (
        ("3", 2, "2 does not divide the 3 ranks of a node"),
        ("4", 4, "4 does not divide the 2 attention heads"),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert f"{key}{message}; give a number that does" in refusal(
            config(tmp_path / ranks, VLLM, f"rollout.tensor_parallel={parallel}", actor=path)
        )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    _check_backend(config(tmp_path, VLLM, "rollout.tensor_parallel=2", actor=path))


# ---- what the sampler's log-probabilities do ------------------------------------------------------------------------


def experience(change: float) -> Experience:
    """2 rows of 3 response tokens, the last one not real; the sampler differs by `change` on the first token."""
    sequences = Sequences(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0]] * 2).bool(), (0,), 1)
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -3.0, 0.0]])
    sampled = logprobs.clone()
    sampled[0, 0] -= change
    sampled[:, 2] = 50.0  # not real
    zeros = torch.zeros_like(logprobs)
    advantages = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, 0.0]])
    return Experience(sequences, logprobs, zeros, zeros, advantages, zeros, sampled_logprobs=sampled)


@pytest.mark.parametrize("precision, change, refused", [
    ("float32", 5e-4, False), ("float32", 2e-3, True), ("bf16", 0.3, False), ("bf16", 0.5, True),
    ("float32", float("nan"), True), ("bf16", float("nan"), True),
])  # fmt: skip
def test_a_sampler_that_disagrees_with_training_is_refused_with_the_numbers(
    tmp_path: Path, precision: str, change: float, refused: bool
) -> None:
    settings = config(tmp_path, VLLM, f"precision={precision}")
    if not refused:
        return check_sampler(experience(change), settings, "vllm")
    with pytest.raises(UserError, match=rf"backend vllm differ .* by .* \({precision}: tolerance .*set rollout"):
        check_sampler(experience(change), settings, "vllm")


@pytest.mark.parametrize("kind, cut", [("truncate", 0.25), ("mask", 0.25)])
def test_the_ratio_is_logged_over_real_tokens(tmp_path: Path, kind: str, cut: float) -> None:
    settings = config(tmp_path, VLLM, f"rollout.importance_sampling={kind}")
    found = importance_metrics(experience(1.0), settings.rollout)
    e = torch.tensor(1.0).exp().item()
    assert {name: float(x) for name, x in found.items()} == pytest.approx({
        "rollout/importance_mean": (e + 3) / 4, "rollout/importance_max": e, "rollout/importance_cut": cut,
    })  # fmt: skip
    low = importance_metrics(experience(-1.0), settings.rollout)["rollout/importance_cut"]
    assert float(low) == (0.25 if kind == "mask" else 0.0)


@pytest.mark.parametrize("kind", ["off", "truncate", "mask"])
def test_each_tokens_policy_loss_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    settings = config(tmp_path, VLLM, f"rollout.importance_sampling={kind}")
    made = experience(1.0)
    logprobs = made.logprobs + torch.tensor([[0.1, -0.1, 0.0]])
    micro = SimpleNamespace(ids=None, mask=None, score_mask=None, align=lambda x: x)
    monkeypatch.setattr(Sequences, "micro_batch", lambda self, rows: micro)
    monkeypatch.setattr(step3_ppo.update, "backward_mean", lambda engine, loss, tokens: loss)
    engines = Engines(lambda *_: (logprobs, logprobs), None, None, None)
    minibatch = Minibatch(engines, made, settings, Averages(), Averages(), False, False)
    expected = 0.0
    for row, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        new, old, sampled = (float(x[row, t]) for x in (logprobs, made.logprobs, made.sampled_logprobs))
        weight = 1.0 if kind == "off" else oracles.importance_weight(old, sampled, 2.0, kind)
        expected += weight * oracles.clipped_policy_loss(new, old, float(made.advantages[row, t]), settings.ppo.clip)
    assert float(minibatch._actor_backward(torch.arange(2), 4.0)) == pytest.approx(expected, rel=1e-5)

"""`tristage plan`: each component by hand for a network of a thousand parameters, what ranks share, what is printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import tiny
from tests.helpers.published import write_config
from tristage.cli import main as cli
from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.causal_lm import CausalLM
from tristage.models.sizes import ModelShape, model_shape
from tristage.planning import formulas as memory
from tristage.planning import plan
from tristage.planning.formulas import GIB, Engine, Machine, Zero, total

SHAPE = ModelShape(
    **{"parameters": 1000, "linear": 800, "adapters": 0, "head": 100, "largest": 100, "layers": 2, "hidden": 10},
    **{"heads": 2, "query": 10, "key_value": 10, "inner": 40, "inner_kept": 2, "vocabulary": 50},
    **{"rms_norm": False, "query_norm": False, "attention_matrix": False, "plain_head": True, "experts": False},
)
FOUR = Machine(4, 4, 80 * GIB, None)


def engine(stage: int = 0, bytes: int = 2, shape: ModelShape = SHAPE, **more: Any) -> Engine:
    zero = more.pop("zero", Zero(stage, bucket=200, max_live=300))
    return Engine("model", shape, zero, bytes, **more)


# -- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, weights, master, adam, gradients",
    [(0, 2000, 4000, 8000, 2000), (1, 2000, 1000, 2000, 2000), (2, 2000, 1000, 2000, 500), (3, 500, 1000, 2000, 500)],
)
def test_states_of_a_thousand_bf16_parameters_on_four_ranks(stage, weights, master, adam, gradients):
    gpu, host = memory.resident(engine(stage), FOUR)
    assert host == {}
    assert (gpu["weights"], gpu["master"], gpu["Adam"]) == (weights, master, adam)
    assert gpu["gradients"] + memory.kept_gradients(engine(stage), FOUR) == gradients


def test_at_zero_0_a_parameter_costs_the_sixteen_bytes_of_the_zero_paper():
    gpu, _ = memory.resident(engine(), FOUR)
    assert total(gpu) + memory.kept_gradients(engine(), FOUR) == 16 * 1000


def test_float32_weights_are_their_own_master_at_zero_0_alone():
    assert [memory.resident(engine(stage, 4), FOUR)[0]["master"] for stage in range(4)] == [0, 1000, 1000, 1000]


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_what_zero_shards_adds_up_to_the_whole_over_ranks(ranks):
    machine = Machine(ranks, 8, 80 * GIB, None)
    for stage, sharded in ((1, ["master", "Adam"]), (3, ["weights", "master", "Adam", "gradients"])):
        gpu, whole = (memory.resident(engine(s), machine)[0] for s in (stage, 0))
        for name in sharded:
            of_all = 2000 if name == "gradients" else whole[name]
            assert ranks * gpu[name] == pytest.approx(of_all)
    assert ranks * memory.kept_gradients(engine(2), machine) == pytest.approx(2000)


def test_an_offloaded_optimizer_is_the_hosts():
    gpu, host = memory.resident(engine(zero=Zero(2, offload_optimizer=True)), FOUR)
    assert gpu == {"weights": 2000, "buckets": 0}
    assert host == {"master": 1000, "Adam": 2000, "gradients": 1000 + 500}  # float32, and a buffer in bf16
    gpu, host = memory.resident(engine(zero=Zero(3, offload_optimizer=True, offload_param=True, bucket=200)), FOUR)
    assert gpu == {"weights": 0, "buckets": 400}
    assert host == {"weights": 500, "master": 1000, "Adam": 2000, "gradients": 1000 + 500}


def test_a_frozen_engine_has_weights_alone():
    gpu, _ = memory.resident(engine(3, frozen=True), FOUR)
    assert total(gpu) == gpu["weights"] == 500
    assert memory.kept_gradients(engine(frozen=True), FOUR) == 0


def test_adapters_alone_are_trained_and_a_scalar_head_with_them():
    adapted = dataclasses.replace(SHAPE, adapters=60)
    assert (engine(shape=adapted, adapters=True).trained, engine(shape=adapted, adapters=True).parameters) == (60, 1060)
    assert engine(shape=adapted, adapters=True, scalar_head=True).trained == 60 + 100
    assert engine(extra=10).trained == 1010  # a value head


def test_quantised_linear_layers_take_four_and_a_half_bits():
    adapted = dataclasses.replace(SHAPE, adapters=60)
    assert engine(shape=adapted, adapters=True, quantized=True).weights == 800 * 4.5 / 8 + 2 * 260


# -- what a phase adds -------------------------------------------------------------------------------------


def test_zero_3_gathers_what_it_may_and_the_projection_throughout():
    assert engine(3).gathered == 2 * 300
    assert engine(zero=Zero(3, max_live=10)).gathered == 2 * (100 + 100)
    assert engine(zero=Zero(3)).gathered == 2 * 1000  # all of it is less than DeepSpeed's limit
    assert engine(2).gathered == 0


def test_a_gpu_has_whole_buckets_from_the_start_and_a_cpu_what_was_touched():
    two = Zero(2, buffers=2, bucket=5000)
    copying = dataclasses.replace(two, copies=True)
    assert memory.reduction(engine(zero=two), FOUR)["buckets"] == 2 * 2 * 5000
    assert memory.reduction(engine(zero=copying), FOUR)["buckets"] == 2 * (2 * 5000 + 1000)  # and one flattened
    assert memory.reduction(engine(zero=copying), dataclasses.replace(FOUR, cpu=True))["buckets"] == 2 * (1000 + 1000)
    assert memory.backward(engine(zero=two), FOUR)["buckets"] == 2 * 2 * 5000  # reduced at the end alone
    assert memory.backward(engine(1), FOUR)["buckets"] == 2 * 200


def test_partitions_wait_beside_the_bucket_from_the_second_micro_batch_on():
    whole = Zero(2, bucket=5000)
    assert [memory.reduction(engine(zero=whole, accumulation=n), FOUR)["gradients"] for n in (1, 2)] == [0, 500]
    assert memory.backward(engine(2), FOUR)["gradients"] == 500  # a small bucket is emptied on the way
    assert memory.reduction(engine(0), FOUR)["gradients"] == 2000


def test_the_step_makes_float32_gradients_of_its_part():
    assert memory.step(engine(2), FOUR) == {"float32 gradients": 1000}
    assert memory.step(engine(0, 4), FOUR) == {"reduction": 4000}
    assert memory.step(engine(0), FOUR) == {"float32 gradients": 4000}  # larger than the reduction's 2000, and after it
    assert memory.step(engine(zero=Zero(2, offload_optimizer=True)), FOUR) == {}


def test_a_gpt_block_keeps_korthikantis_bytes_less_dropout_and_the_attention_matrix():
    assert memory.layer_bytes(SHAPE, 2, 100) == (34 - 2) * 10
    whole = dataclasses.replace(SHAPE, attention_matrix=True)
    assert memory.layer_bytes(whole, 2, 100) == 32 * 10 + 2 * 100 * (4 + 2)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer():
    kept, recomputed = (memory.activation_bytes(engine(checkpointing=on, tokens=7, rows=3)) for on in (False, True))
    assert kept - recomputed == 21 * (2 * 320 - (2 * 2 * 10 + 320))


@pytest.mark.parametrize("cpu, chunk, block", [(True, 2**27, 2**20), (False, 2**29, 2**25)])
def test_logits_exist_for_a_chunk_and_in_float32_for_a_block_at_a_time(cpu, chunk, block):
    machine = dataclasses.replace(FOUR, cpu=cpu)
    few, many = (engine(bytes=2, rows=rows, scored=100) for rows in (2, 100_000))
    assert memory.logit_bytes(few, machine, 16) == 50 * 200 * (2 + 3 * 4)
    assert memory.logit_bytes(many, machine, 16) == pytest.approx(chunk + 3 * block, rel=1e-4)
    large = engine(bytes=4, rows=9, shape=dataclasses.replace(SHAPE, vocabulary=2**28))
    assert memory.logit_bytes(large, machine, 16) == 2**28 * (4 + 3 * 4)  # a token at a time


def test_logits_of_a_head_that_is_not_in_chunks_exist_for_all_tokens():
    whole = dataclasses.replace(SHAPE, plain_head=False)
    assert memory.logit_bytes(engine(rows=20, scored=100, shape=whole), FOUR, 16) == 2000 * 50 * 16
    assert memory.logit_bytes(engine(rows=20, scored=100, scalar_head=True), FOUR, 16) == 0


def test_the_cache_of_decoding_has_keys_and_values_of_every_layer():
    assert memory.kv_cache_bytes(engine(), rows=3, tokens=5) == 2 * 3 * 5 * 2 * 10 * 2


FAMILIES = {
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "llama": {"intermediate_size": 160, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_inner": 160},
    "bloom": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_keeps(family, dtype, tmp_path):
    found = []
    for layers in (1, 3):
        path = write_family(tmp_path / str(layers), family, layers)
        found.append(saved_bytes(path, dtype))
    layer = memory.layer_bytes(model_shape(path), dtype.itemsize, 32)
    assert layer == pytest.approx((found[1] - found[0]) / 2 / (2 * 32), rel=0.03)


def write_family(folder: Path, family: str, layers: int) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 50}
    dropouts = {name: 0.0 for name in ("dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")}
    AutoConfig.for_model(family, **sizes, **FAMILIES[family], **dropouts).save_pretrained(folder)
    return str(folder)


def saved_bytes(path: str, dtype: torch.dtype) -> int:
    """Bytes that a forward of [2,32] leaves for its backward, weights not counted."""
    model = CausalLM(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(2, 32, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randint(50, (2, 32)), mask, mask)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


# -- shapes ------------------------------------------------------------------------------------------------


def test_the_shape_of_a_model_is_that_of_the_built_one(tmp_path):
    path = tiny.write_model(tmp_path / "model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(path)
    lora = LoraSettings(rank=3, targets=("q_proj", "down_proj"))
    shape = model_shape(path, lora=lora)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.adapters == 2 * 3 * ((48 + 48) + (96 + 48))  # two layers
    assert (shape.layers, shape.hidden, shape.query, shape.key_value, shape.inner) == (2, 48, 48, 24, 96)
    assert model_shape(path, scalar_head=True).head == 48


def test_a_shape_needs_no_weights(tmp_path):
    assert model_shape(write_config(tmp_path, "facebook/opt-66b")).parameters > 65e9


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config.json alone."""
    return write_config(tmp_path_factory.mktemp("opt"), "facebook/opt-350m")


def ppo_plan(tmp_path: Path, model: str, *overrides: str, machine: Machine = FOUR, stage: int = 2) -> plan.Plan:
    settings = tiny.ppo_config(tmp_path, model, model, "rows", stage, "ppo.micro_batch=1", *overrides)
    return plan.make_plan(settings, plan.engines_of(settings, machine), machine)


def test_ppo_holds_four_engines_and_both_gradients(tmp_path, model):
    found = ppo_plan(tmp_path, model)
    assert [(e.name, e.zero.stage, e.frozen) for e in found.engines] == [
        ("actor", 2, False), ("critic", 2, False), ("reference", 0, True), ("reward", 0, True)
    ]  # fmt: skip
    steps = {phase.name: phase.adds for phase in found.phases}
    both = sum(memory.kept_gradients(e, FOUR) for e in found.engines)
    assert steps["actor's step"]["gradients"] == steps["critic's step"]["gradients"] == both > 0
    assert found.gpu_bytes == pytest.approx(
        sum(map(total, found.resident.values())) + total(found.peak.adds) + plan.GPU_ALLOWANCE
    )


LORA = "actor.lora={rank: 4}"


@pytest.mark.parametrize(
    "overrides, names",
    [
        ([LORA, "reference=null"], ["actor", "critic", "reward"]),
        (["critic.lora={rank: 4}", "reward.share_critic_trunk=true",
          "reward={model: M, share_critic_trunk: true}"], None),
        (["critic=null", "ppo.advantage=rloo", "rollout.samples=2"], ["actor", "reference", "reward"]),
        (["critic=null", "value_head={coef: 0.1}"], ["actor", "reference", "reward"]),
    ],
)
def test_engines_that_a_setting_leaves_out_are_not_counted(tmp_path, model, overrides, names):
    overrides = [word.replace("M,", f"{model},") for word in overrides]
    found = ppo_plan(tmp_path, model, *overrides)
    assert [e.name for e in found.engines] == (names or ["actor", "critic", "reference"])
    if "value_head={coef: 0.1}" in overrides:
        assert found.engines[0].extra == 512


def test_an_average_is_spread_over_the_ranks(tmp_path, model):
    found = ppo_plan(tmp_path, model, "ema={decay: 0.9}")
    assert found.resident["actor"]["EMA"] == found.engines[0].parameters  # 4 bytes over 4 ranks


def test_a_rollout_gathers_the_whole_actor_where_half_of_what_is_free_holds_it(tmp_path, model):
    actor = ppo_plan(tmp_path, model, stage=3).engines[0]

    def gathered(size: float, *more: str) -> float:
        machine = dataclasses.replace(FOUR, gpu_memory=size)
        rollout = ppo_plan(tmp_path, model, *more, machine=machine, stage=3).phases[0]
        assert rollout.name.endswith("(slow)") == (rollout.adds["gathered"] < actor.weights)
        return rollout.adds["gathered"]

    assert gathered(80 * GIB) == actor.weights
    assert gathered(3 * GIB) == gathered(80 * GIB, "rollout.gather_weights=never") == actor.gathered < actor.weights


def test_answers_of_a_pair_are_two_rows_and_dpo_has_a_reference(tmp_path, model):
    settings = tiny.dpo_config(tmp_path, model, "rows", 2, "micro_batch=1")
    engines = plan.engines_of(settings, FOUR)
    assert [(e.name, e.rows, e.frozen) for e in engines] == [("model", 2, False), ("reference", 2, True)]
    settings = tiny.dpo_config(tmp_path, model, "rows", 2, "micro_batch=1", "precompute_reference=true")
    assert len(plan.engines_of(settings, FOUR)) == 1
    settings = tiny.reward_model_config(tmp_path, model, "rows", 2, "micro_batch=1")
    assert plan.engines_of(settings, FOUR)[0].scalar_head


# -- the command -------------------------------------------------------------------------------------------


def command(tmp_path: Path, model: str, *words: str) -> int:
    file = tiny.sft_config(tmp_path, model, "rows", 2, "global_batch=8").file
    here = Path(file).rename(tmp_path / "step1_sft.yaml")
    return cli.main(["plan", str(here), "--gpus", "4", "device=auto", "precision=bf16", *words])


def test_the_command_says_what_fits(tmp_path, model, capsys):
    assert command(tmp_path, model) == 0
    out = capsys.readouterr().out
    assert "331.2 M" in out and "fits: " in out
    assert out.rstrip().endswith("configs/deepspeed/zero0.json for every engine.")


def test_the_cheapest_that_fits_is_named_where_the_setting_does_not(tmp_path, model, capsys):
    assert command(tmp_path, model, "--gpu-memory", "4.9") == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out and "The cheapest that fits: configs/deepspeed/zero3.json" in out


def test_checkpointing_is_named_where_no_stage_is_enough(tmp_path, model, capsys):
    words = ("--gpu-memory", "12", "max_tokens=2048", "global_batch=64", "micro_batch=16")
    assert command(tmp_path, model, *words) == 1
    assert "with gradient_checkpointing: true" in capsys.readouterr().out


def test_where_nothing_fits_it_says_what_to_change(tmp_path, model, capsys):
    assert command(tmp_path, model, "--gpu-memory", "1.6") == 1
    assert "No ZeRO stage makes it fit: use more GPUs" in capsys.readouterr().out


def test_a_host_that_is_too_small_is_no_fit(tmp_path, model):
    assert command(tmp_path, model, "--host-memory", "1") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpus", "3"], "don't divide"),
        (["--gpus", "0"], "--gpus 0: give a number above 0"),
        (["--gpu-memory", "-1"], "--gpu-memory -1"),
        (["model=output/nowhere/step1_sft/final"], "there is no output/nowhere/step1_sft/final yet"),
        (["deepspeed=nowhere.json"], "no file nowhere.json"),
        (["lora={targets: nothing}"], "`nothing`"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, model, capsys, words, said):
    assert command(tmp_path, model, *words) == 2
    assert said in capsys.readouterr().err


def test_an_id_whose_config_is_not_here_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command(tmp_path, "nobody/nothing") == 2
    assert "nobody/nothing: not a local folder and not in the cache" in capsys.readouterr().err


def test_a_folder_that_an_earlier_step_will_write_is_looked_up_in_its_config(tmp_path):
    (tmp_path / "step1_sft.yaml").write_text("{model: facebook/opt-1.3b, output: out/a}")
    (tmp_path / "step2_reward_model.yaml").write_text("{model: out/a/final, output: out/b}")
    settings = tiny.sft_config(tmp_path, "m", "rows")
    assert settings.folder == tmp_path
    assert plan.start_of("out/b/final", settings, "model") == "facebook/opt-1.3b"
    with pytest.raises(UserError, match="there is no out/c/final yet"):
        plan.start_of("out/c/final", settings, "model")


def test_what_is_read_of_a_deepspeed_json():
    values = json.loads((plan.SHIPPED / "zero3_offload.json").read_text())
    assert Zero.of(values) == Zero(3, True, True, buffers=1, bucket=5e7, max_live=3e7)
    assert Zero.of(json.loads((plan.SHIPPED / "zero2.json").read_text())) == Zero(2, buffers=2, bucket=5e8)
    assert Zero.of({}) == Zero()


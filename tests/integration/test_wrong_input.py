"""Whatever a user gets wrong stops the run before a model loads: one sentence on stderr, exit code 2.

A run that goes on to read weights ends in another error here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import step1_sft.evaluate
import step1_sft.train
import step2_reward_model.train
import step3_ppo.train
from tests.helpers.tiny import (
    REPO,
    deepspeed_json,
    ppo_config,
    reward_model_config,
    sft_config,
    write_model,
    write_reward_model,
    write_rows,
)
from tests.helpers.wrong_input import one_sentence, refusal_of
from tristage import dist
from tristage.quickstart.network import make_tokenizer

STEP1, STEP2, STEP3 = step1_sft.train, step2_reward_model.train, step3_ppo.train


class World(NamedTuple):
    """A folder with models, rows and one good config a step."""

    folder: Path
    configs: dict[ModuleType, str]

    def path(self, name: str) -> str:
        return str(self.folder / name)


ZEROS: dict[str, dict[str, Any]] = {
    "quantized": {"stage": 3, "zero_quantized_gradients": True},
    "second": {"stage": 3, "zero_hpz_partition_size": 2},
    "in_vain": {"stage": 2, "offload_param": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = write_model(folder / "model")
    rows = write_rows(folder / "rows", num_rows=48)
    for name in ("no_eos", "other_eos", "other_template", "other_vocabulary", "small_vocabulary"):
        shutil.copytree(model, folder / name)
    write_reward_model(folder / "reward", model)
    for name, zero in ZEROS.items():
        (folder / name).write_text(json.dumps({"zero_optimization": zero}))
    edit_json(folder / "no_eos/tokenizer_config.json", eos_token=None)
    edit_json(folder / "other_eos/tokenizer_config.json", eos_token="<bos>")
    small = AutoConfig.from_pretrained(model, vocab_size=10)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder / "small_vocabulary")
    template = folder / "other_template/chat_template.jinja"
    template.write_text(template.read_text().replace("Human", "Person"))
    make_tokenizer(["other words"]).save_pretrained(folder / "other_vocabulary")
    return World(
        folder,
        {
            STEP1: sft_config(folder, model, rows["sft"]).file,
            STEP2: reward_model_config(folder, model, rows["ranking"]).file,
            STEP3: ppo_config(folder, model, str(folder / "reward"), rows["prompts"]).file,
            step1_sft.evaluate: str(folder / "sft.yaml"),
        },
    )


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sentence_of(world: World, module: ModuleType, words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What the step says of its good config that `words` spoil."""
    return refusal_of(module, ["--config", world.configs[module], f"output={world.path('out')}", *words], capfd)


# What is wrong: (steps, words that spoil their good config, how the sentence starts). {name} is a path of the world,
# {config} the step's YAML, ... any text.
CASES = {
    "quantised gradients without a GPU": (
        [STEP1, STEP2], ["deepspeed={quantized}"],
        "{config}: key `deepspeed`: {quantized}: zero_optimization.zero_quantized_gradients has kernels for GPUs only",
    ),
    "quantised gradients of an actor without a GPU": (
        [STEP3], ["actor.deepspeed={quantized}"],
        "{config}: key `actor.deepspeed`: {quantized}: zero_optimization.zero_quantized_gradients has kernels for GPUs",
    ),
    "parameters offloaded where none are partitioned": (
        [STEP1, STEP2], ["deepspeed={in_vain}"], "{in_vain}: `zero_optimization.offload_param.device` does nothing at",
    ),
    "attention that a CPU lacks": (
        [STEP1, STEP2, STEP3], ["attention=flex_attention"],
        "{config}: key `attention`: flex_attention has no backward pass on CPUs; use auto, eager or sdpa",
    ),
    "kernels that a CPU lacks": (
        [STEP1, STEP2, STEP3], ["liger_kernel=true"],
        "{config}: key `liger_kernel`: Liger's kernels run on GPUs only; remove it",
    ),
    "missing model folder": (
        [STEP1, STEP2], ["model=./none"],
        "{config}: key `model`: there is no folder ./none; give a Hugging Face folder, or run the step that writes it",
    ),
    "missing folder of step 1": (
        [STEP3], ["actor.model={none}"], "{config}: key `actor.model`: there is no folder {none}; give",
    ),
    "missing folder of step 2": (
        [STEP3], ["reward.model={none}"], "{config}: key `reward.model`: there is no folder {none}; give",
    ),
    "a folder without a model": (
        [STEP1, STEP2], ["model={rows}"], "{config}: key `model`: {rows} has no config.json; give a model folder",
    ),
    "unknown key": (
        [STEP1, STEP2], ["optimizer.lerning_rate=1"],
        "{config}: unknown key `optimizer.lerning_rate`; did you mean `optimizer.learning_rate`?",
    ),
    "unknown key of step 3": (
        [STEP3], ["ppo.kl_coeff=1"], "{config}: unknown key `ppo.kl_coeff`; did you mean `ppo.kl_coef`?",
    ),
    "batches that don't divide": (
        [STEP1, STEP2], ["global_batch=7"],
        "{config}: global_batch, micro_batch: 7 rows don't divide into micro-batches of 2 on 1 ranks (2 x 1 = 2); "
        "use for instance 6 rows per step",
    ),
    "minibatches that don't divide": (
        [STEP3], ["ppo.micro_batch=3"],
        "{config}: ppo.minibatch, ppo.micro_batch: 8 rows don't divide into micro-batches of 3 on 1 ranks",
    ),
    "prompts that are no whole minibatches": (
        [STEP3], ["rollout.prompts=12"], "{config}: rollout.prompts 12 is not a multiple of ppo.minibatch 8;",
    ),
    "tokenizer without EOS": (
        [STEP1, STEP2], ["model={no_eos}"],
        "{no_eos}: the tokenizer has no EOS token; set `eos_token` in its tokenizer_config.json",
    ),
    "tokenizer without EOS in step 3": (
        [STEP3], ["actor.model={no_eos}"], "{no_eos}: the tokenizer has no EOS token; set `eos_token` in",
    ),
    "another template": (
        [STEP3], ["reward.model={other_template}"],
        "actor.model ({model}) and reward.model ({other_template}) disagree on the chat template; "
        "train both steps from models with the same tokenizer, or set `reward.own_tokenizer: true`",
    ),
    "another EOS": (
        [STEP3], ["reward.model={other_eos}"],
        "actor.model ({model}) and reward.model ({other_eos}) disagree on the EOS token ('<eos>' and '<bos>'); "
        "train both steps from models with the same tokenizer, or set `reward.own_tokenizer: true`",
    ),
    "another vocabulary": (
        [STEP3], ["reward.model={other_vocabulary}"],
        "actor.model ({model}) and reward.model ({other_vocabulary}) disagree on the vocabulary; "
        "train both steps from models with the same tokenizer, or set `reward.own_tokenizer: true`",
    ),
    "another critic than the actor, beside a reward model of its own tokens": (
        [STEP3], ["reward.own_tokenizer=true", "reward.model={other_template}", "critic.model={other_template}"],
        "actor.model ({model}) and critic.model ({other_template}) disagree on the chat template; train both steps",
    ),
    "another template than the actor's": (
        [STEP3], ["data.template={other_template}/chat_template.jinja"],
        "actor.model ({model}) and data.template ({other_template}/chat_template.jinja) disagree on the chat template; "
        "leave `data.template` out, or train step 1 with it",
    ),
    "another reference": (
        [STEP3], ["reference.model={other_template}"],
        "actor.model ({model}) and reference.model ({other_template}) disagree on the chat template; train both steps",
    ),
    "too few prompts": (
        [STEP3], ["rollout.prompts=64"],
        "{config}: rollout.prompts is 64 but `data.train` gives only ... prompts; lower it or give more",
    ),
    "missing data file": (
        [STEP1, STEP2, STEP3], ["data.train={none}.jsonl"],
        "{none}.jsonl: there is no such file or folder, correct the path",
    ),
    "missing held-out file": (
        [STEP1, STEP2, STEP3], ["data.heldout={none}.jsonl"],
        "{none}.jsonl: there is no such file or folder, correct the path",
    ),
    "rows of another step": (
        [STEP2], ["data.train={rows}/sft.jsonl"],
        "{rows}/sft.jsonl:1: ... ranked answers (prompt + chosen + rejected, or responses with ranks",
    ),
    "rows all too long": (
        [STEP1, STEP2], ["max_tokens=3"],
        "{rows}/....jsonl: no usable row (... longer than 3 tokens); give other rows or a larger token limit",
    ),
    "prompts all too long": (
        [STEP3], ["max_prompt_tokens=3"],
        "{rows}/prompts.jsonl: no usable row (... longer than 3 tokens); give other rows or a larger",
    ),
    "missing DeepSpeed JSON": (
        [STEP1, STEP2], ["deepspeed=none.json"],
        "{config}: key `deepspeed`: no file none.json, here or next to the config; give its path",
    ),
    "frozen engine at ZeRO 2": (
        [STEP3], ["reference.deepspeed=" + deepspeed_json(2)],
        "{config}: key `reference.deepspeed`: ZeRO stage 2 shards gradients and optimizer, which a frozen model does "
        "not have; use stage 0 or 3",
    ),
    "step 1's folder as reward model": (
        [STEP3], ["reward.model={model}"],
        "{model}: holds no reward model but a ['LlamaForCausalLM']; give step 2's final folder",
    ),
    "a reward model as policy": (
        [STEP1], ["model={reward}"],
        "{config}: key `model`: {reward}: holds a reward model, not a language model; give a language model, such as",
    ),
    "a reward model as actor": (
        [STEP3], ["actor.model={reward}"],
        "{config}: key `actor.model`: {reward}: holds a reward model, not a language model; give a language model",
    ),
    "a tokenizer larger than the model": (
        [STEP2], ["model={small_vocabulary}"],
        "{small_vocabulary}: the tokenizer has ... tokens but the model only 10; use the tokenizer that belongs to",
    ),
    "a tokenizer larger than the actor": (
        [STEP3], ["actor.model={small_vocabulary}"],
        "{small_vocabulary}: the tokenizer has ... tokens but the model only 10; use the tokenizer that belongs to",
    ),
    "frozen engine at ZeRO 1": (
        [STEP3], ["reward.deepspeed=" + deepspeed_json(1)],
        "{config}: key `reward.deepspeed`: ZeRO stage 1 shards gradients and optimizer, which a frozen model does",
    ),
    "grader of no module": (
        [STEP3], ["grader=no_such_module:f"],
        "{config}: key `grader`: no_such_module:f cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_module'); write module:function",
    ),
    "grader of no function": (
        [STEP3], ["grader=tristage.quickstart.task:none"],
        "{config}: key `grader`: tristage.quickstart.task:none cannot be imported (...); write module:function",
    ),
    "wrong model of an evaluation": (
        [step1_sft.evaluate], ["model=./none"], "{config}: key `model`: there is no folder ./none; give a Hugging",
    ),
}  # fmt: skip


EVERY_CASE = [(module, case) for case, (modules, *_) in CASES.items() for module in modules]


@pytest.mark.parametrize("module, case", EVERY_CASE, ids=lambda part: getattr(part, "__name__", part))
def test_wrong_input_is_one_sentence_and_nothing_is_written(world, capfd, module, case):
    _, words, expected = CASES[case]
    names = {path.name: str(path) for path in world.folder.iterdir()}
    names |= {"none": world.path("none"), "config": world.configs[module]}
    said = sentence_of(world, module, [word.format(**names) for word in words], capfd)
    pattern = re.escape(expected.format(**names)).replace(re.escape("..."), ".+")
    assert re.match(pattern, said), f"\n{said}\nis not\n{expected}"
    assert not Path(world.path("out")).exists()


def test_a_gpu_that_is_not_there_is_refused(world, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (STEP1, STEP2, STEP3):
        assert sentence_of(world, module, ["device=cuda"], capfd) == (
            f"{world.configs[module]}: key `device` is cuda but this machine shows no GPU; use `device: auto` or `cpu`"
        )


def test_prompts_that_ranks_cannot_share_are_refused(world, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert sentence_of(world, STEP3, [], capfd) == (
        f"{world.configs[STEP3]}: rollout.prompts 16 is not a multiple of 3 ranks; change it or the number of ranks"
    )


def test_second_partitions_of_two_engines_are_refused(world, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [f"{name}.deepspeed={world.path('second')}" for name in ("actor", "reference")]
    assert sentence_of(world, STEP3, words, capfd) == (
        f"{world.configs[STEP3]}: keys `actor.deepspeed` and `reference.deepspeed` have "
        "zero_optimization.zero_hpz_partition_size, and only one engine of a run can; leave it out of the other JSON"
    )


def test_a_checkpoint_that_cannot_be_verified_is_no_silent_new_start(world, capfd, tmp_path):
    folder = tmp_path / "checkpoints/step_000004"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 4}))
    (tmp_path / "checkpoints/latest").write_text("step_000004")
    said = sentence_of(world, STEP1, [f"output={tmp_path}"], capfd)
    assert said == (
        f"every checkpoint is damaged ({folder}: it has no manifest.json, as those of earlier versions, and cannot be "
        "verified); restore one, or start again with resume=never"
    )


@pytest.mark.parametrize(
    "module, words, positions, tokens",
    [
        (STEP1, ["max_tokens=129"], 128, 129),
        (STEP2, ["max_tokens=129"], 128, 129),
        (STEP3, ["max_prompt_tokens=100", "rollout.max_response_tokens=29"], 128, 129),
    ],
)
def test_a_model_with_too_few_positions_is_refused_before_its_weights(world, capfd, module, words, positions, tokens):
    said = sentence_of(world, module, words, capfd)
    assert said == (
        f"{world.path('model')}: the model has {positions} positions, rows up to {tokens}; lower the limits"
    )


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused_before_its_weights(world, capfd):
    said = sentence_of(world, STEP1, [f"model={world.path('small_vocabulary')}"], capfd)
    assert re.fullmatch(
        r".*small_vocabulary: the tokenizer has \d+ tokens but the model only 10; "
        "use the tokenizer that belongs to the model",
        said,
    )


def test_a_new_scalar_head_is_said_once(world, capfd, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(dist, "print0", lambda *words: said.extend(map(str, words)))
    sentence_of(world, STEP2, [], capfd)
    assert [line for line in said if "scalar head" in line] == [
        f"{world.path('model')} has no scalar head: a new one is initialised"
    ]
    said.clear()
    sentence_of(world, STEP2, [f"model={world.path('reward')}"], capfd)
    assert not [line for line in said if "scalar head" in line]
    shutil.rmtree(world.path("out"))


def test_a_valid_config_fails_only_on_the_missing_weights(world, capfd):
    """The claim that the others rest on: nothing else stops this run."""
    for module in (STEP1, STEP2, STEP3):
        assert sentence_of(world, module, [], capfd).startswith("weights are read now")
    shutil.rmtree(world.path("out"))


# -- as a user starts it -----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """This interpreter's commands first on PATH, a CPU, no ranks of an outer launch."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "PYTHONPATH": str(REPO),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("module", [STEP1, STEP2, STEP3], ids=lambda module: module.__name__)
def test_a_step_started_by_itself_says_the_sentence_and_ends_with_2(world, module):
    command = [sys.executable, "-m", module.__name__, "--config", world.configs[module], "sed=1"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert one_sentence(ended.stderr) == f"{world.configs[module]}: unknown key `sed`; did you mean `seed`?"


def test_the_launcher_says_the_sentence_once_and_ends_with_2(world, tmp_path):
    missing = f'{tmp_path}/a  "model" $(touch {tmp_path}/executed)'
    command = ["bash", str(REPO / "launch/step1_sft.sh"), world.configs[STEP1], f"model={missing}", "--num_gpus", "2"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: {world.configs[STEP1]}: key `model`: there is no folder {missing}; "
        "give a Hugging Face folder, or run the step that writes it first"
    ]
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not (tmp_path / "executed").exists()

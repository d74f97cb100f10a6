"""Step 2 without a reward model, as users run it: it learns, resumes, asks its reference once, says what is wrong."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import step2_dpo.evaluate
import step2_dpo.train
from step2_dpo import reference
from tests.helpers import tiny
from tests.helpers.interrupted import Killed, kill_at, untimed
from tests.helpers.ranks import run_ranks
from tests.helpers.wrong_input import refusal_of
from tristage.data.sets import load_sets
from tristage.quickstart import task
from tristage.quickstart.network import make_tokenizer
from tristage.training import setup
from tristage.training.metrics import read_metrics

SIMPO = ["loss=simpo", "beta=2.0", "gamma=1.0"]
PRECOMPUTE = "precompute_reference=true"
LONG = ["global_batch=32", "micro_batch=16", "epochs=1", "optimizer.schedule=cosine"]
SHORT = ["max_steps=8", "save_every=3", "evaluate_every=4"]
# {name: (kind of rows, ZeRO stage, words)}; "rows" is the folder of rows in the fixture.
RUNS = {
    "dpo": ("pairs", 2, LONG),
    "ipo": ("pairs", 2, [*LONG, "loss=ipo"]),
    "simpo": ("pairs", 2, [*LONG, *SIMPO]),
    "asked": ("ranking", 2, [*SHORT, "label_smoothing=0.1"]),
    "precomputed": ("ranking", 2, [*SHORT, "label_smoothing=0.1", PRECOMPUTE]),
    "precomputed_zero3": ("ranking", 3, [*SHORT, "label_smoothing=0.1", PRECOMPUTE]),
}
KILLED = {"parts": "asked", "precomputed_parts": "precomputed"}  # killed at step 5 and started again: as which run


def asks_nobody() -> Any:
    return mock.patch.object(reference, "load_reference", side_effect=AssertionError("the reference was loaded again"))


def run_all(rank: int, argvs: dict[str, list[str]]) -> None:
    for name in RUNS:
        step2_dpo.train.main(argvs[name])
    for name in KILLED:
        with kill_at(5), pytest.raises(Killed):
            step2_dpo.train.main(argvs[name])
        if name.startswith("precomputed"):
            with asks_nobody():
                step2_dpo.train.main(argvs[name])
        else:
            step2_dpo.train.main(argvs[name])


def write_pairs(folder: Path) -> None:
    """3000 pairs to learn from and 200 about other prompts, labelled without noise."""
    rng = random.Random(3)
    prompts = task.draw_prompts(1200, rng)
    for name, own, count in (("train", prompts[:1000], 3000), ("heldout", prompts[1000:], 200)):
        rows = task.make_preferences(own, count, rng, scale=0.0)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("dpo")
    rows = tiny.write_rows(base / "rows", num_rows=1024)
    model = tiny.teach(tiny.write_model(base / "model"), rows["sft"], steps=200)
    write_pairs(base)
    short = tiny.write_rows(base / "short")["ranking"]
    argvs = {}
    for name in [*RUNS, *KILLED]:
        kind, stage, words = RUNS[KILLED.get(name, name)]
        given = [f"data.heldout={base}/heldout.jsonl"] if kind == "pairs" else []
        path = str(base / "train.jsonl") if kind == "pairs" else short
        argvs[name] = ["--config", tiny.dpo_config(base / name, model, path, stage, *words).file, *words, *given]
    run_ranks(2, run_all, argvs, timeout=500)
    return base


def lines(folder: Path, name: str, split: str) -> list[dict[str, Any]]:
    return [line for line in untimed(folder / name / "dpo/metrics.jsonl") if line["split"] == split]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "dpo/final/model.safetensors")


# -- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_held_out_accuracy_rises_well_above_chance(name: str, folder: Path) -> None:
    first, *_, last = lines(folder, name, "heldout")
    assert first["dpo/accuracy"] == 0.5 or name == "simpo"
    assert last["dpo/accuracy"] > max(0.65, first["dpo/accuracy"])
    assert last["dpo/accuracy"] > last["dpo/length_baseline"] + 0.1
    assert last["dpo/loss"] < first["dpo/loss"]
    assert last["dpo/margin"] > first["dpo/margin"]


@pytest.mark.parametrize("name, loss", [("dpo", 0.693147), ("ipo", 25.0), ("asked", 0.693147)])
def test_an_untouched_policy_has_no_margins_and_the_loss_of_knowing_nothing(
    name: str, loss: float, folder: Path
) -> None:
    first = lines(folder, name, "heldout")[0]
    for metric in ("margin", "chosen_reward", "rejected_reward"):
        assert first[f"dpo/{metric}"] == pytest.approx(0.0, abs=1e-5)
    assert first["dpo/accuracy"] == 0.5
    assert first["dpo/loss"] == pytest.approx(loss, rel=1e-5)


def test_final_is_a_folder_that_transformers_opens(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "dpo/dpo/final")
    ours, start = weights(folder, "dpo"), load_file(folder / "model/model.safetensors")
    assert all(torch.equal(ours[name], parameter) for name, parameter in model.state_dict().items() if name in ours)
    assert any(not torch.equal(ours[name], start[name]) for name in start)


def test_evaluate_measures_a_trained_folder_as_training_did(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = [f"data.heldout={folder}/heldout.jsonl"]
    for name, words in (("dpo", [f"reference.model={folder}/model"]), ("simpo", SIMPO)):
        argv = ["--config", str(folder / name / "dpo.yaml"), f"model={folder}/{name}/dpo/final", *words, *kind]
        with tiny.one_rank():
            step2_dpo.evaluate.main(argv)
        said = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("dpo/"))
        expected = lines(folder, name, "heldout")[-1]
        assert said.keys() == {metric for metric in expected if metric.startswith("dpo/")}
        for metric, value in said.items():
            assert float(value) == pytest.approx(expected[metric], abs=2e-4)


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, whole", KILLED.items())
def test_a_resumed_run_ends_as_an_uninterrupted_one(parts: str, whole: str, folder: Path) -> None:
    for split, count in (("train", 8), ("heldout", 3)):
        assert lines(folder, parts, split) == lines(folder, whole, split)
        assert len(lines(folder, whole, split)) == count
    ours, theirs = weights(folder, parts), weights(folder, whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- the reference, precomputed -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["precomputed", "precomputed_zero3"])
def test_a_precomputed_reference_trains_as_a_live_one(name: str, folder: Path) -> None:
    for split in ("train", "heldout"):
        for mine, its in zip(lines(folder, name, split), lines(folder, "asked", split), strict=True):
            assert mine["step"] == its["step"]
            for metric, value in its.items():
                # An untouched policy's margins are rounding: which side of 0 they are on says nothing.
                if metric != "split" and not (metric == "dpo/accuracy" and its["dpo/margin"] == 0):
                    assert mine[metric] == pytest.approx(value, rel=1e-4, abs=2e-5), (split, mine["step"], metric)


def test_what_the_reference_said_is_its_log_probability_of_every_answer(folder: Path) -> None:
    (file,) = (folder / "precomputed/dpo/reference").iterdir()
    settings = tiny.dpo_config(folder / "again", str(folder / "model"), str(folder / "short/ranking.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    _, _, tokenizer = setup.check_training(settings)
    with np.load(file) as stored:
        for side, rows in zip(("train", "heldout"), load_sets(settings, tokenizer), strict=True):
            expected = []
            for examples, _ in rows:
                for ids, prompt_length in ((example.ids, example.prompt_length) for example in examples):
                    with torch.no_grad():
                        logits = model(torch.tensor([ids])).logits[0, prompt_length - 1 : -1]
                    found = torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[prompt_length:]]
                    expected.append(float(found.sum()))
            assert stored[f"{side}_logprobs"].tolist() == pytest.approx(expected, rel=1e-5)
            assert np.diff(stored[f"{side}_starts"]).tolist() == [len(examples) for examples, _ in rows]


def make(folder: Path, name: str, stage: int, *words: str) -> list[torch.nn.Module]:
    """Make the references of a run; the models that were loaded for it."""
    loaded: list[torch.nn.Module] = []
    load = reference.load_causal_lm

    def recording(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    rows = str(folder / "short/ranking.jsonl")
    settings = tiny.dpo_config(folder / name, str(folder / "model"), rows, stage, PRECOMPUTE, *words)
    with tiny.one_rank() as device, mock.patch.object(reference, "load_causal_lm", recording):
        plan, _, tokenizer = setup.check_training(settings)
        config = reference.check_reference(settings, plan, tokenizer)
        reference.make_references(settings, config, tokenizer, *load_sets(settings, tokenizer), device)
    return loaded


@pytest.mark.parametrize("stage", [0, 3])
def test_the_weights_of_a_precomputed_reference_are_freed(stage: int, folder: Path) -> None:
    (model,) = make(folder, f"freed{stage}", stage)
    held = [tensor for p in model.parameters() for tensor in (p, getattr(p, "ds_tensor", p))]
    assert held and sum(tensor.untyped_storage().nbytes() for tensor in held) == 0


def test_other_rows_another_reference_or_another_precision_are_computed_again(folder: Path) -> None:
    other = tiny.copy_model(str(folder / "model"), folder / "other_model")
    cases = ("data.heldout_limit=5", "data.split_seed=1", f"reference.model={other}", "precision=bf16")
    for words in ([], *([word] for word in cases)):
        assert len(make(folder, "keyed", 0, *words)) == 1, words
        assert not make(folder, "keyed", 0, *words), words
    assert len(list((folder / "keyed/dpo/reference").iterdir())) == 5


def test_a_policy_that_is_not_its_reference_stops_before_the_first_step(folder: Path) -> None:
    """The file's numbers are moved by a hundredth of a nat: far too much for rounding."""
    make(folder, "moved", 0)
    (file,) = (folder / "moved/dpo/reference").iterdir()
    with np.load(file) as stored:
        moved = {name: values + 0.01 if name.endswith("logprobs") else values for name, values in stored.items()}
    np.savez(file, **moved)
    with tiny.one_rank(), pytest.raises(RuntimeError, match=r"the log-ratio of an answer .* is \d"):
        step2_dpo.train.main(["--config", str(folder / "moved/dpo.yaml"), PRECOMPUTE, "max_steps=2"])
    assert not read_metrics(folder / "moved/dpo/metrics.jsonl")


def test_adapters_learn_beside_a_reference_that_is_their_start(folder: Path) -> None:
    words = ["lora={rank: 4, alpha: 8}", "max_steps=4"]
    argv = ["--config", tiny.dpo_config(folder / "lora", str(folder / "model"), str(folder / "short/ranking.jsonl"),
                                        0, *words).file, *words]  # fmt: skip
    with tiny.one_rank():
        step2_dpo.train.main(argv)
    start, end = load_file(folder / "model/model.safetensors"), weights(folder, "lora")
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    assert (folder / "lora/dpo/final_adapter/adapter_model.safetensors").is_file()


def test_another_reference_than_the_start_may_differ(folder: Path) -> None:
    other = tiny.write_model(folder / "untaught", seed=5)
    words = [f"reference.model={other}", "max_steps=1"]
    argv = ["--config", tiny.dpo_config(folder / "differs", str(folder / "model"), str(folder / "short/ranking.jsonl"),
                                        0, *words).file, *words]  # fmt: skip
    with tiny.one_rank():
        step2_dpo.train.main(argv)
    assert abs(lines(folder, "differs", "heldout")[0]["dpo/chosen_reward"]) > 0.1


# -- wrong input -------------------------------------------------------------------------------------------

# What is wrong: (words that spoil a good config, the sentence). {name} is a path of the folder, {config} the YAML.
WRONG = {
    "simpo with a reference": (
        SIMPO, "{config}: key `reference`: simpo has no reference model; remove it",
    ),
    "simpo that asks once": (
        [*SIMPO, "reference=null", PRECOMPUTE],
        "{config}: key `precompute_reference`: simpo has no reference model; remove it",
    ),
    "simpo without gamma": (
        ["loss=simpo", "reference=null", "beta=2.0"],
        "{config}: key `gamma` is missing; simpo needs one, `beta: 2.0` and `gamma: 1.0` are usual",
    ),
    "simpo without beta": (
        ["loss=simpo", "reference=null", "gamma=1.0"],
        "{config}: key `beta` is missing; simpo needs one, `beta: 2.0` and `gamma: 1.0` are usual",
    ),
    "simpo with label smoothing": (
        [*SIMPO, "reference=null", "label_smoothing=0.1"],
        "{config}: key `label_smoothing`: simpo has none; remove it or use `loss: sigmoid`",
    ),
    "ipo with label smoothing": (
        ["loss=ipo", "label_smoothing=0.1"],
        "{config}: key `label_smoothing`: ipo has none; remove it or use `loss: sigmoid`",
    ),
    "gamma without simpo": (
        ["gamma=1.0"], "{config}: key `gamma`: sigmoid has no target margin; remove it or use `loss: simpo`",
    ),
    "no reference": (
        ["reference=null"], "{config}: key `reference.deepspeed` is missing; sigmoid needs a reference model, add it",
    ),
    "reference at ZeRO 1": (
        ["reference.deepspeed=" + tiny.deepspeed_json(1)],
        "{config}: key `reference.deepspeed`: ZeRO stage 1 shards gradients and optimizer, which a frozen model does "
        "not have; use stage 0 or 3",
    ),
    "reference at ZeRO 2": (
        ["reference.deepspeed=" + tiny.deepspeed_json(2)],
        "{config}: key `reference.deepspeed`: ZeRO stage 2 shards gradients and optimizer, which a frozen model does "
        "not have; use stage 0 or 3",
    ),
    "missing reference": (
        ["reference.model=./none"],
        "{config}: key `reference.model`: there is no folder ./none; give a Hugging Face folder, or run the step that "
        "writes it first",
    ),
    "another template": (
        ["reference.model={other_template}"],
        "model ({model}) and reference.model ({other_template}) disagree on the chat template; train both steps from "
        "models with the same tokenizer",
    ),
    "another vocabulary": (
        ["reference.model={other_vocabulary}"],
        "model ({model}) and reference.model ({other_vocabulary}) disagree on the vocabulary; train both steps from "
        "models with the same tokenizer",
    ),
    "rows of another step": (
        ["data.train={rows}/sft.jsonl"],
        "{rows}/sft.jsonl:1: ... ranked answers (prompt + chosen + rejected, or responses with ranks...",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with models, rows and a good config."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny.write_model(folder / "model")
    for name in ("other_template", "other_vocabulary"):
        shutil.copytree(model, folder / name)
    template = folder / "other_template/chat_template.jinja"
    template.write_text(template.read_text().replace("Human", "Person"))
    make_tokenizer(["other words"]).save_pretrained(folder / "other_vocabulary")
    rows = tiny.write_rows(folder / "rows")
    config = tiny.dpo_config(folder, model, rows["ranking"]).file
    return {path.name: str(path) for path in folder.iterdir()} | {"config": config, "out": str(folder / "out")}


def sentence(module: Any, world: dict[str, str], words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    return refusal_of(module, ["--config", world["config"], f"output={world['out']}", *words], capfd)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
    case: str, world: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    words, expected = WRONG[case]
    said = sentence(step2_dpo.train, world, [word.format(**world) for word in words], capfd)
    pattern = re.escape(expected.format(**world)).replace(re.escape("..."), ".+")
    assert re.fullmatch(pattern, said), f"\n{said}\nis not\n{expected}"
    assert not Path(world["out"]).exists()


def test_an_evaluation_against_itself_is_refused(world: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    said = sentence(step2_dpo.evaluate, world, [], capfd)
    assert said == (
        f"{world['config']}: key `reference.model`: is `model` itself, so all margins would be 0; give the model that "
        "training started from"
    )


def test_a_valid_config_fails_only_on_the_missing_weights(
    world: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert sentence(step2_dpo.train, world, [], capfd).startswith("weights are read now")
    shutil.rmtree(world["out"])

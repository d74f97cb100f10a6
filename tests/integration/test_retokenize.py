"""A reward model with a tokenizer and template of its own scores what the actor says, on any number of ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import step3_ppo.evaluate
import step3_ppo.train
from tests.helpers import tiny
from tests.helpers.ppo_run import ODD, RESPONSE, Run
from tests.helpers.ranks import run_ranks
from tristage.errors import UserError
from tristage.quickstart import task
from tristage.quickstart.network import make_network, make_tokenizer
from tristage.training.metrics import read_metrics

OTHER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
# What a rollout is made to answer; "|" is where the token limit cut it off, before any EOS.
ANSWERS = ("fig, grape, kiwi.", "fig, |", "fig, grape|", "", "mango.")
MIX = ["rollout.samples=2", "rollout.prompts=8", "reward.functions=[{function: tests.helpers.rewards:count_commas}]"]
EQUAL = {"rtol": 0, "atol": 1e-6}


def permute(source: str, folder: Path) -> str:
    """The same reward model under another numbering of its tokens."""
    tiny.copy_model(source, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    order = np.random.default_rng(5).permutation(len(weights[name]))  # new id -> old id
    new = {int(old): place for place, old in enumerate(order)}
    weights[name] = weights[name][torch.from_numpy(order)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["vocab"] = {token: new[i] for token, i in core["model"]["vocab"].items()}
    for token in core["added_tokens"]:
        token["id"] = new[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(core))
    return str(folder)


def write_other(folder: Path) -> str:
    """A reward model that knows fewer words than the actor, under another template."""
    rng = random.Random(2)
    prompts = task.draw_prompts(20, rng)
    tokenizer = make_tokenizer(["[]", *prompts, *(task.draw_answer(prompt, rng) for prompt in prompts)])
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    make_network(tokenizer, "gpt2", "tiny").save_pretrained(folder / "base")
    return tiny.write_reward_model(folder, str(folder / "base"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """YAML files by what the reward model is: "same" reads the actor's tokens, the others their own."""
    folder = tmp_path_factory.mktemp("retokenize")
    rows = tiny.write_rows(folder / "rows")
    actor = tiny.teach(tiny.write_model(folder / "actor"), rows["sft"])
    scorer = tiny.write_reward_model(folder / "scorer", actor)
    scorers = {"same": scorer}
    scorers |= {"permuted": permute(scorer, folder / "permuted"), "other": write_other(folder / "other")}
    found = {}
    for name, path in scorers.items():
        values = tiny.ppo_values(folder / name / "ppo", actor, path, rows["prompts"])
        values["reward"]["own_tokenizer"] = name != "same"
        found[name] = tiny.write_yaml(folder / name / "ppo.yaml", values)
    with tiny.one_rank():
        yield found


def answer(run: Run, monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> list[str]:
    """Rollouts that answer row b with texts[b % n]; the prompts in words."""
    generate, tokenizer, prompts = run.rollouts.generate, run.tokenizer, []

    def generate_texts(request: Any, sampling: Any) -> Any:
        batch = generate(request, sampling)
        start = batch.input_ids.shape[1] - RESPONSE
        for row in range(len(batch.input_ids)):
            prompts.append(tokenizer.decode(batch.input_ids[row, :start][batch.attention_mask[row, :start]]))
            text = texts[row % len(texts)]
            ids = tokenizer(text.removesuffix("|"), add_special_tokens=False)["input_ids"]
            ids += [] if text.endswith("|") else [tokenizer.eos_token_id]
            batch.input_ids[row, start:] = torch.tensor(ids + [tokenizer.pad_token_id] * (RESPONSE - len(ids)))
            batch.attention_mask[row, start:] = torch.arange(RESPONSE) < len(ids)
        return batch

    monkeypatch.setattr(run.rollouts, "generate", generate_texts)
    return prompts


def scores_of(run: Run) -> torch.Tensor:
    """[B] by number of the draw: without KL and discount every return of a response is its score."""
    experience, _ = run.experience()
    return experience.returns[:, 0]


PLAIN = ("ppo.kl_coef=0", "ppo.lam=1", "ppo.reward_clip=null")


@pytest.mark.parametrize("score", ["last", "mean"])
def test_another_numbering_of_the_tokens_changes_no_score(
    score: str, configs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("same", "permuted"):
        run = Run(configs[name], *PLAIN, f"reward.score={score}")
        answer(run, monkeypatch, ANSWERS)
        found[name] = scores_of(run)
        assert (run.engines.reward_tokenizer is not None) is (name == "permuted")
    assert len(found["same"].unique()) > len(ANSWERS)
    torch.testing.assert_close(found["permuted"], found["same"], **EQUAL)


@torch.no_grad()
@pytest.mark.parametrize("score", ["last", "mean"])
def test_another_template_scores_the_text_that_it_writes(
    score: str, configs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(configs["other"], *PLAIN, f"reward.score={score}", "ppo.micro_batch=4")
    assert len(run.engines.reward_tokenizer) < len(run.tokenizer)
    prompts = answer(run, monkeypatch, ANSWERS)
    found = scores_of(run)
    tokenizer = AutoTokenizer.from_pretrained(run.settings.reward.model)
    model = AutoModelForSequenceClassification.from_pretrained(run.settings.reward.model, dtype=torch.float32).eval()
    draws = run.batch().draw_index.tolist()
    for row, prompt in enumerate(prompts):
        asked = prompt.removeprefix("Human: ").removesuffix("\nAssistant: ")
        text = ANSWERS[row % len(ANSWERS)]
        # Of a response that is EOS alone the template writes nothing.
        said = f" {text} <eos>".removesuffix("| <eos>") if text else "<eos>"
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (f"[{asked}]", said))
        values = model.score(model.transformer(torch.tensor([before + after])).last_hidden_state)[0, :, 0]
        expected = values[-1] if score == "last" else values[len(before) :].mean()
        torch.testing.assert_close(found[draws[row]], expected, **EQUAL)


def test_what_the_reward_model_cannot_hold_is_cut_at_its_left(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(configs["permuted"], *PLAIN)
    answer(run, monkeypatch, ANSWERS)
    whole = scores_of(run)
    run.engines.reward.module.model.config.max_position_embeddings = 9
    cut = scores_of(run)
    assert cut.isfinite().all() and not torch.allclose(whole, cut, **EQUAL)


def test_the_critic_is_the_actors_network_with_a_new_head(configs: dict[str, str]) -> None:
    run = Run(configs["other"])
    assert run.settings.critic_path == run.settings.actor_path
    actor, critic = run.engines.actor.module.model, run.engines.critic.module.model
    assert torch.equal(actor.model.norm.weight, critic.model.norm.weight) and critic.score.weight.abs().sum() > 0


def test_a_prompt_that_the_reward_models_template_refuses_stops_before_models_load(
    configs: dict[str, str], tmp_path: Path
) -> None:
    turns = [[{"role": "user", "content": "Name four fruits."}]] * 30
    turns.append([{"role": "system", "content": "Be kind."}, *turns[0]])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in turns))
    actor = tiny.copy_model(str(Path(configs["other"]).parents[1] / "actor"), tmp_path / "actor")
    takes_all = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "actor/chat_template.jinja").write_text(takes_all)
    words = [f"data.train={rows}", "data.heldout_overlap=allow", f"data.heldout={rows}", f"actor.model={actor}"]
    for main in (step3_ppo.train.main, step3_ppo.evaluate.main):
        with pytest.raises(UserError, match=r"reward\.model \(.*other\), .*rows.jsonl:31: .*refuses .* system turns"):
            main(["--config", configs["other"], f"output={tmp_path}/never", *words])
    assert not (tmp_path / "never").exists()


# -- two ranks -------------------------------------------------------------------------------------------------


def on_ranks(rank: int, config: str, stage: int) -> dict[str, Any]:
    run = Run(config, *MIX, *ODD, f"reward.deepspeed={tiny.deepspeed_json(stage)}")
    experience, metrics = run.experience()
    evaluated, one = run.evaluate(), run.evaluate(prompts=1)  # of two ranks, one has a filler alone
    found = {"metrics": metrics, "evaluated": evaluated.metrics, "one": one.metrics}
    return found | {"returns": experience.returns.numpy(), "scores": [sample["score"] for sample in evaluated.samples]}


def on_two_ranks(rank: int, config: str) -> dict[int, dict[str, Any]]:
    found = {stage: on_ranks(rank, config, stage) for stage in (0, 3)}
    step3_ppo.train.main(["--config", config, "iterations=2", "data.heldout_limit=7"])
    return found


@pytest.fixture(scope="module")
def two_ranks(configs: dict[str, str]) -> dict[int, dict[str, Any]]:
    return run_ranks(2, on_two_ranks, configs["other"], timeout=200)[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_scores_do_not_depend_on_the_ranks(
    stage: int, two_ranks: dict[int, dict[str, Any]], configs: dict[str, str]
) -> None:
    found, alone = two_ranks[stage], on_ranks(0, configs["other"], stage)
    assert found["returns"] == pytest.approx(alone["returns"], abs=2e-5)
    for name in ("metrics", "evaluated", "one"):
        assert found[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5)
    assert found["metrics"]["objective/score_count_commas"] > 0
    assert found["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert len(found["scores"]) == 7  # and one filler


def test_a_run_trains_exports_and_is_evaluated(
    two_ranks: dict[int, dict[str, Any]], configs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(configs["other"]).parent / "ppo"
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    assert all(np.isfinite(line["objective/score"]) for line in lines)
    actor = output.parents[1] / "actor"
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (output / "final", actor)]
    assert templates[0] == templates[1] != OTHER_TEMPLATE
    words = [f"actor.model={output}/final", f"reference.model={actor}", "data.heldout_limit=7"]
    step3_ppo.evaluate.main(["--config", configs["other"], *words])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("objective/"))
    assert float(printed["objective/score"]) == pytest.approx(lines[-1]["objective/score"], abs=1e-3)

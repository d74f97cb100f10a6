"""Our losses are TRL's: its trainers' own loss functions, called on the same models and rows as ours.

No trainer is built and nothing is trained: the stand-in for a trainer has the attributes that its loss reads. Its
models are transformers' own with TRL's fused head, ours are CausalLM, both read from the same folders.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from step2_dpo.config import DPOConfig
from step2_dpo.loss import prompt_losses
from tests.helpers import tiny
from tristage.algo.losses import dpo_loss, lm_loss, simpo_loss
from tristage.batches import PreferenceBatch, SFTBatch
from tristage.data.collate import collate_sft
from tristage.models.causal_lm import load_causal_lm
from tristage.models.tokenizer import load_tokenizer

pytest.importorskip("trl", reason="trl is not installed, so there is nothing to compare with (pip install trl)")
cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="this trl has no CPOTrainer")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="this trl has no DPOTrainer")
sft_trainer = pytest.importorskip("trl.trainer.sft_trainer", reason="this trl has no SFTTrainer")
trl_utils = pytest.importorskip("trl.trainer.utils", reason="this trl has no fused head")

# (prompt, answer) lengths of the better answers, then of the worse ones, as TRL wants them.
LENGTHS = [(9, 1), (4, 2), (12, 3), (3, 5), (9, 8), (4, 13), (12, 2), (3, 9)]
FUSED = ("log_probs", "entropy", "mean_logits", "is_top1")
TOLERANCE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
CPU = torch.device("cpu")


class Case:
    """Four pairs of random answers, two models, and what ours say of the answers."""

    def __init__(self, policy: str, reference: str, seed: int) -> None:
        tokenizer = load_tokenizer(policy)
        self.policy, self.reference = policy, reference
        self.batch: SFTBatch = collate_sft(tiny.random_examples(LENGTHS, tokenizer, seed), tokenizer.pad_token_id)
        self.counts = torch.tensor([answer for _, answer in LENGTHS])
        self.tokens = [self._said_by(path, tokenizer) for path in (policy, reference)]  # [8,T-1] each

    def _said_by(self, path: str, tokenizer: Any) -> Tensor:
        model = load_causal_lm(path, tokenizer, dtype=torch.float32)
        with torch.no_grad():
            return model(self.batch.input_ids, self.batch.attention_mask, self.batch.loss_mask)[0]

    def answers(self) -> tuple[Tensor, ...]:
        """policy_chosen, policy_rejected, ref_chosen, ref_rejected, [4] each."""
        return tuple(half for tokens in self.tokens for half in tokens.sum(1).chunk(2))

    def means(self) -> tuple[Tensor, ...]:
        """The same a token."""
        return tuple(half for tokens in self.tokens for half in (tokens.sum(1) / self.counts).chunk(2))

    def preference_batch(self) -> PreferenceBatch:
        batch, prompts = self.batch, torch.arange(4).repeat(2)
        ranks = torch.tensor([0.0] * 4 + [1.0] * 4)
        real = torch.ones(4, dtype=torch.bool)
        return PreferenceBatch(batch.input_ids, batch.attention_mask, batch.loss_mask, prompts, ranks, real)

    def logits(self) -> Tensor:
        """[8,T,V], transformers' own."""
        with torch.no_grad():
            return self.opened(self.policy)(**self.inputs()).logits

    def inputs(self, **more: Tensor) -> dict[str, Tensor]:
        return {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask.long(), **more}

    def opened(self, path: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trl_utils.add_fused_lm_head(model, outputs=FUSED)
        return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    base: Path = tmp_path_factory.mktemp("trl")
    paths = [tiny.write_model(base / str(seed), request.param, seed=seed, gain=1.5) for seed in (0, 1)]
    return Case(*paths, seed=2)


def trainer(**values: Any) -> SimpleNamespace:
    """What every loss of theirs reads of its trainer, most of it for metrics."""
    accelerator = SimpleNamespace(
        device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1, parallelism_config=None
    )
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        accelerator=accelerator, aux_loss_enabled=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1, **values
    )


def their_dpo(case: Case, loss: str, beta: float) -> Tensor:
    """The mean over pairs, by DPOTrainer."""
    policy, reference = case.opened(case.policy), case.opened(case.reference)
    stand_in = trainer(
        model=policy, ref_model=reference, ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=[loss], loss_weights=[1.0], beta=beta, use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = case.inputs(completion_mask=case.batch.loss_mask.long())
    return dpo_trainer.DPOTrainer._compute_loss(stand_in, policy, inputs, False).detach()


def their_cpo(chosen: Tensor, rejected: Tensor, loss: str, **values: float) -> Tensor:
    """One loss a pair, by CPOTrainer: on log-ratios to the reference its sigmoid and ipo are DPO's."""
    stand_in = trainer(alpha=0.0, loss_type=loss, **{"label_smoothing": 0.0, "simpo_gamma": 0.0} | values)
    return cpo_trainer.CPOTrainer.cpo_loss(stand_in, chosen, rejected)[0]


def test_the_sft_loss_is_theirs(case: Case) -> None:
    model = case.opened(case.policy)
    args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    stand_in = trainer(model=model, compute_loss_func=None, label_smoother=None, args=args)
    labels = case.batch.input_ids.masked_fill(~case.batch.loss_mask, -100)
    theirs = sft_trainer.SFTTrainer.compute_loss(stand_in, model, case.inputs(labels=labels)).detach()
    torch.testing.assert_close(-case.tokens[0].sum() / case.counts.sum(), theirs, **TOLERANCE)
    losses = lm_loss(case.logits(), case.batch.input_ids, case.batch.loss_mask)
    torch.testing.assert_close(losses.sum() / case.counts.sum(), theirs, **TOLERANCE)


def test_answer_log_probabilities_are_theirs(case: Case) -> None:
    labels, logits = case.batch.input_ids.masked_fill(~case.batch.loss_mask, -100), case.logits()
    sums = cpo_trainer.CPOTrainer.get_batch_logps(logits, labels)
    torch.testing.assert_close(torch.cat(case.answers()[:2]), sums, **TOLERANCE)
    means = cpo_trainer.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    torch.testing.assert_close(torch.cat(case.means()[:2]), means, **TOLERANCE)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_theirs(case: Case, beta: float) -> None:
    torch.testing.assert_close(dpo_loss(*case.answers(), beta).mean(), their_dpo(case, "sigmoid", beta), **TOLERANCE)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_conservative_dpo_is_theirs(case: Case, label_smoothing: float) -> None:
    """Their DPOTrainer has no label smoothing; CPOTrainer has."""
    chosen, rejected, ref_chosen, ref_rejected = case.answers()
    ratios = chosen - ref_chosen, rejected - ref_rejected
    theirs = their_cpo(*ratios, "sigmoid", beta=0.3, label_smoothing=label_smoothing)
    torch.testing.assert_close(dpo_loss(*case.answers(), 0.3, label_smoothing), theirs, **TOLERANCE)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_is_theirs(case: Case, beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = case.answers()
    theirs = their_cpo(chosen - ref_chosen, rejected - ref_rejected, "ipo", beta=beta)
    torch.testing.assert_close(dpo_loss(*case.answers(), beta, form="ipo"), theirs, **TOLERANCE)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_ipo_of_their_dpo_trainer_is_ours(case: Case, beta: float) -> None:
    """Both compare means per token; sums, `loss: ipo_sum`, are another loss."""
    theirs, batch = their_dpo(case, "ipo", beta), case.preference_batch()
    policy, reference = (tokens.sum(1) for tokens in case.tokens)
    means, sums = (
        DPOConfig.model_construct(loss=loss, beta=beta, label_smoothing=0.0)  # type: ignore[arg-type]
        for loss in ("ipo", "ipo_sum")
    )
    torch.testing.assert_close(prompt_losses(policy, reference, batch, means).mean(), theirs, **TOLERANCE)
    assert abs(float(prompt_losses(policy, reference, batch, sums).mean() - theirs)) > 0.1


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 0.0), (10.0, 5.0)])
def test_simpo_is_theirs(case: Case, beta: float, gamma: float) -> None:
    """Their `simpo_gamma` is the margin of the rewards, as our gamma is, not of the means."""
    chosen, rejected, *_ = case.means()
    theirs = their_cpo(chosen, rejected, "simpo", beta=beta, simpo_gamma=gamma)
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta, gamma), theirs, **TOLERANCE)

"""Responses are drawn from the policy's own distribution, row by row, whatever a row is sampled beside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from step1_sft.train import sft_step
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tristage import dist, engine
from tristage.batches import PromptBatch, Sequences
from tristage.config import BatchPlan, OptimizerSettings
from tristage.data.collate import collate_prompts, collate_sft
from tristage.data.tokenize import Example
from tristage.models.causal_lm import load_causal_lm
from tristage.models.rows import unknown_attention
from tristage.models.tokenizer import load_tokenizer
from tristage.rollout import (
    PaddedRollout,
    RolloutBackend,
    SampledBatch,
    SamplingConfig,
    SeededRequest,
    StaticRollout,
    row_uniforms,
)
from tristage.rollout import static as static_module
from tristage.rollout.sampling import InverseTransformSampler

ROWS, TOKENS = 24, 12
PROMPT_LENGTHS = [2 + 3 * row % 17 for row in range(ROWS)]
CPU = torch.device("cpu")
Backend = type[RolloutBackend]
WAYS = ("whole", "partitioned", "whole, static", "partitioned, static")  # of sampling at ZeRO-3
each_backend = pytest.mark.parametrize("backend", [PaddedRollout, StaticRollout], ids=lambda backend: backend.name)


# ---- the sampler ----------------------------------------------------------------------------------------------------


def filtered_law(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """softmax(logits / T) cut to the top_k likeliest, then to the fewest that hold top_p of what is left."""
    law = torch.softmax(logits.double() / temperature, -1)
    order = law.argsort(descending=True)
    kept = order[: top_k or len(order)]
    share = law[kept] / law[kept].sum()
    kept = kept[: int((share.cumsum(0) - share < top_p).sum())]
    result = torch.zeros_like(law)
    result[kept] = law[kept] / law[kept].sum()
    return result


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 0.8, 0), (1.0, 1.0, 5), (0.7, 0.6, 9)]
)
def test_sampled_frequencies_are_the_filtered_softmax(temperature: float, top_p: float, top_k: int) -> None:
    draws, vocabulary = 20_000, 30
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = row_uniforms(0, 1, torch.arange(draws), 2)
    sampler = InverseTransformSampler(uniforms, SamplingConfig(2, temperature, top_p, top_k))
    law = filtered_law(logits, temperature, top_p, top_k)
    for _ in range(2):  # two positions, each with its own numbers
        chosen = sampler(torch.zeros(draws, 1, dtype=torch.long), logits.expand(draws, -1)).argmax(-1)
        found = torch.bincount(chosen, minlength=vocabulary) / draws
        assert found[law == 0].sum() == 0
        often = law * draws > 10  # the rare ones together
        found, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (found, law))
        error = (expected * (1 - expected) / draws).sqrt() + 1e-4
        assert ((found - expected).abs() / error).max() < 4.5  # standard errors
        chi_square = (draws * (found - expected)[:-1] ** 2 / expected[:-1]).sum()
        freedom = int(often.sum())
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_extreme_uniform_numbers_never_choose_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for uniform, expected in ((0.0, 1), (1 - 2**-53, 2)):
        sampler = InverseTransformSampler(torch.tensor([[uniform]], dtype=torch.float64), SamplingConfig(1))
        assert sampler(torch.zeros(1, 1, dtype=torch.long), logits).argmax(-1).item() == expected


def test_a_rows_numbers_depend_on_seed_iteration_and_row_alone() -> None:
    numbers = row_uniforms(3, 5, torch.tensor([7, 0, -1]), 4)
    assert torch.equal(numbers[0], row_uniforms(3, 5, torch.tensor([7]), 4)[0])
    assert torch.equal(numbers[:, :2], row_uniforms(3, 5, torch.tensor([7, 0, -1]), 2))
    others = [row_uniforms(*key, 4)[0] for key in ((3, 5, torch.tensor([8])), (3, 6, torch.tensor([7])),
                                                    (4, 5, torch.tensor([7])))]  # fmt: skip
    assert all(not torch.equal(numbers[0], other) for other in others)


# ---- one rank -------------------------------------------------------------------------------------------------------


def make_engine(path: str, stage: int = 0) -> Any:
    template = json.loads(Path(tiny.deepspeed_json(stage)).read_text())
    if stage == 3:  # as with a large model: nothing stays whole because it is small or soon needed again
        template["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    config = engine.engine_config(template, "float32", BatchPlan.make(4 * dist.world_size(), 4, dist.world_size()))
    model = load_causal_lm(path, load_tokenizer(path), dtype=torch.float32, engine_config=config)
    settings = OptimizerSettings(learning_rate=1e-3, schedule="constant", eps=1e-5)
    return engine.train_engine(model, config, settings, total_steps=10)


def make_prompts(tokenizer: Any, rows: list[int] | None = None, width: int | None = None) -> PromptBatch:
    examples = tiny.random_examples([(n, 1) for n in PROMPT_LENGTHS], tokenizer, seed=4)
    rows = list(range(ROWS)) if rows is None else rows
    prompts = [Example(examples[row].ids[:-1], PROMPT_LENGTHS[row]) for row in rows]
    return collate_prompts(prompts, rows, tokenizer.pad_token_id, width)


def draw(rollout: RolloutBackend, prompts: PromptBatch, sampling: SamplingConfig | None = None) -> SampledBatch:
    sampling = sampling or SamplingConfig(TOKENS, 1.0, 1.0, 0)
    uniforms = row_uniforms(0, 1, prompts.draw_index, sampling.max_new_tokens)
    return rollout.generate(SeededRequest(prompts.input_ids, prompts.attention_mask, uniforms), sampling)


def to_sequences(batch: SampledBatch, rollout: RolloutBackend, prompts: PromptBatch) -> Sequences:
    return Sequences(batch.input_ids, batch.attention_mask, rollout.stop_ids, prompts.input_ids.shape[1])


def sample(rollout: RolloutBackend, prompts: PromptBatch, sampling: SamplingConfig | None = None) -> Sequences:
    return to_sequences(draw(rollout, prompts, sampling), rollout, prompts)


class Policy:
    """A one-rank engine on a model that has learned to end its answers."""

    def __init__(self, path: str):
        self.path, self.tokenizer, self.engine = path, load_tokenizer(path), make_engine(path)

    def rollout(
        self, rows_at_once: int = 64, backend: Backend = PaddedRollout, stops: list[int] | None = None
    ) -> RolloutBackend:
        return backend(self.engine, self.tokenizer, rows_at_once, stop_token_ids=stops)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """{pad is EOS: model folder}."""
    folder = tmp_path_factory.mktemp("rollout")
    rows = tiny.write_rows(folder / "rows")
    plain = tiny.teach(tiny.write_model(folder / "plain"), rows["sft"])
    return {False: plain, True: tiny.copy_with_pad_as_eos(plain, folder / "pad_is_eos")}


@pytest.fixture(scope="module")
def policies(taught: dict[bool, str]) -> Any:
    with tiny.one_rank():
        yield {pad_is_eos: Policy(path) for pad_is_eos, path in taught.items()}


@pytest.fixture(scope="module")
def policy(policies: dict[bool, Policy]) -> Policy:
    return policies[False]


@each_backend
@pytest.mark.parametrize("pad_is_eos", (False, True))
def test_responses_end_with_eos_inside_the_mask_and_padding_after_it(
    pad_is_eos: bool, backend: Backend, policies: dict[bool, Policy]
) -> None:
    policy = policies[pad_is_eos]
    tokenizer = policy.tokenizer
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is pad_is_eos
    prompts = make_prompts(tokenizer)
    sequences = sample(policy.rollout(backend=backend), prompts)
    assert sequences.responses.shape == (ROWS, TOKENS)
    assert torch.equal(sequences.input_ids[:, : sequences.prompt_columns], prompts.input_ids)
    assert torch.equal(sequences.prompt_mask, prompts.attention_mask)
    ended = 0
    for ids, mask in zip(sequences.responses.tolist(), sequences.response_mask.tolist(), strict=True):
        length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else TOKENS
        ended += tokenizer.eos_token_id in ids[:length]
        assert mask == [True] * length + [False] * (TOKENS - length)
        assert ids[length:] == [tokenizer.pad_token_id] * (TOKENS - length)
    assert sequences.response_mask.sum(dim=1).unique().numel() > 3 and 0 < ended
    assert sequences.ended.sum() == ended


@each_backend
@pytest.mark.parametrize("pad_is_eos", (False, True))
def test_a_stop_token_ends_a_response_as_eos_does_and_changes_nothing_before_it(
    pad_is_eos: bool, backend: Backend, policies: dict[bool, Policy]
) -> None:
    policy = policies[pad_is_eos]
    eos, pad, prompts = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id, make_prompts(policy.tokenizer)
    free = sample(policy.rollout(), prompts)
    kept = [ids[mask].tolist() for ids, mask in zip(free.responses, free.response_mask, strict=True)]
    counts = torch.tensor([id for row in kept for id in row if id != eos]).bincount()
    stops = counts.argsort(descending=True)[6:8].tolist()  # common, but not in every response
    found = sample(policy.rollout(5, backend, stops), prompts)
    stopped_by = set()
    for row, ids in enumerate(kept):
        ends = [place for place, id in enumerate(ids) if id in (eos, *stops)]
        length = ends[0] + 1 if ends else TOKENS
        stopped_by |= {ids[length - 1]} if ends else {None}
        assert found.responses[row].tolist() == ids[:length] + [pad] * (TOKENS - length)
        assert found.response_mask[row].tolist() == [True] * length + [False] * (TOKENS - length)
        assert bool(found.ended[row]) is bool(ends)
    assert stopped_by >= {eos, *stops}


def test_pad_that_is_eos_samples_the_same_tokens(policies: dict[bool, Policy]) -> None:
    found = [sample(policies[pad].rollout(), make_prompts(policies[pad].tokenizer)) for pad in (False, True)]
    assert torch.equal(found[0].response_mask, found[1].response_mask)
    mask = found[0].response_mask
    assert torch.equal(found[0].responses[mask], found[1].responses[mask])


@each_backend
def test_sampled_tokens_do_not_depend_on_chunks_order_or_padding(backend: Backend, policy: Policy) -> None:
    expected = sample(policy.rollout(), make_prompts(policy.tokenizer)).responses
    assert len({tuple(row) for row in expected.tolist()}) > ROWS // 2

    def again(rows_at_once: int, *which: Any, **options: Any) -> torch.Tensor:
        prompts = make_prompts(policy.tokenizer, *which, **options)
        return sample(policy.rollout(rows_at_once, backend), prompts).responses

    for rows_at_once in (1, 5, 7, ROWS - 1, 64):
        assert torch.equal(again(rows_at_once), expected)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(again(5, order), expected[order])
    assert torch.equal(again(5, width=60), expected)
    assert torch.equal(again(64, [3, 20]), expected[[3, 20]])


def test_prompt_columns_that_are_padding_in_every_row_of_a_call_are_cut(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    model = policy.engine.module.model
    generate = model.generate

    def spy(**arguments: Any) -> Any:
        seen.append(tuple(arguments["input_ids"].shape))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", spy)
    sample(policy.rollout(rows_at_once=8), make_prompts(policy.tokenizer, width=60))
    longest_first = sorted(PROMPT_LENGTHS, reverse=True)
    assert seen == [(8, longest_first[start]) for start in (0, 8, 16)]


def test_defaults_of_the_model_folder_do_not_leak_into_sampling(policy: Policy, tmp_path: Path) -> None:
    nasty = {
        "do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 5.0,
        "suppress_tokens": list(range(5, 100)), "no_repeat_ngram_size": 1, "min_new_tokens": 10, "max_length": 7,
        "eos_token_id": 9, "num_beams": 3, "bad_words_ids": [[6]], "forced_eos_token_id": 1,
    }  # fmt: skip
    path = tiny.copy_model(policy.path, tmp_path / "nasty")
    (Path(path) / "generation_config.json").write_text(json.dumps(nasty))
    other = PaddedRollout(make_engine(path), policy.tokenizer, rows_at_once=64)
    prompts = make_prompts(policy.tokenizer)
    for sampling in (SamplingConfig(TOKENS, 1.0, 1.0, 0), SamplingConfig(TOKENS, 0.7, 0.9, 0)):
        expected = sample(policy.rollout(), prompts, sampling).responses
        assert torch.equal(sample(other, prompts, sampling).responses, expected)


@each_backend
@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.7, 1.0, 0), (0.7, 0.8, 6)])
@pytest.mark.parametrize("pad_is_eos", (False, True))
def test_training_scores_the_tokens_with_the_probabilities_they_were_sampled_with(
    pad_is_eos: bool, temperature: float, top_p: float, top_k: int, backend: Backend, policies: dict[bool, Policy]
) -> None:
    policy = policies[pad_is_eos]
    prompts = make_prompts(policy.tokenizer)
    rollout = policy.rollout(7, backend)
    batch = draw(rollout, prompts, SamplingConfig(TOKENS, temperature, top_p, top_k))
    sequences = to_sequences(batch, rollout, prompts)
    policy.engine.train()
    with torch.no_grad():
        for rows in torch.arange(ROWS).split(5):
            micro = sequences.micro_batch(rows)
            scored = policy.engine(micro.ids, micro.mask, micro.score_mask, temperature, True)
            for found, expected in zip(scored, (batch.logprobs, batch.entropy), strict=True):
                torch.testing.assert_close(micro.align(found), expected[rows], rtol=0, atol=1e-5)


@each_backend
def test_a_rollout_leaves_the_engine_as_it_was(backend: Backend, policy: Policy) -> None:
    model = policy.engine.module.model
    config = model.generation_config
    for training in (True, False):
        policy.engine.module.train(training)
        sample(policy.rollout(backend=backend), make_prompts(policy.tokenizer))
        assert policy.engine.module.training is training
        assert model.generation_config is config


@each_backend
def test_a_batch_names_the_weights_that_sampled_it(backend: Backend, policy: Policy) -> None:
    rollout = policy.rollout(backend=backend)
    for version in (0, 3):
        rollout.sync_weights(version)
        assert draw(rollout, make_prompts(policy.tokenizer, [3])).weights_version == version


# ---- the static backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("opt", "gpt2", *tiny.FAMILIES))
def test_static_samples_what_generate_does_or_says_why_it_does_not_know_the_family(family: str, tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / family, family, gain=3.0)
    with tiny.one_rank():
        policy = Policy(path)
        prompts = make_prompts(policy.tokenizer)
        why = unknown_attention(policy.engine.module.model, 64)
        assert (why is not None) is (family in ("gemma2", "bloom"))
        if why is None:
            expected, found = (draw(policy.rollout(7, backend), prompts) for backend in (PaddedRollout, StaticRollout))
            assert torch.equal(found.input_ids, expected.input_ids)
            torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=5e-5)
            torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=5e-5)


def test_a_prompt_is_read_once_for_all_of_its_samples(policy: Policy) -> None:
    read: list[tuple[int, ...]] = []
    hook = policy.engine.module.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = [3, 3, 3, 20, 20, 8]
    prompts = make_prompts(policy.tokenizer, rows)
    prompts = dataclasses.replace(prompts, draw_index=torch.arange(len(rows)))  # samples of their own
    found = sample(policy.rollout(backend=StaticRollout), prompts).responses
    hook.remove()
    assert read[0] == (3, max(PROMPT_LENGTHS[row] for row in rows) - 1)
    assert all(shape[1] == 1 for shape in read[1:])
    assert torch.equal(found, sample(policy.rollout(), prompts).responses)
    assert len({tuple(row) for row in found[:3].tolist()}) > 1


def test_rows_that_have_ended_are_not_computed_on(policy: Policy) -> None:
    """With two slots a row enters as soon as one leaves; at the end the batch shrinks."""
    tokens = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        tokens += kwargs["input_ids"].numel()

    hook = policy.engine.module.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for slots in (2, 64):
        tokens = 0
        sequences = sample(policy.rollout(slots, StaticRollout), make_prompts(policy.tokenizer))
        decoded = int(sequences.response_mask.sum())
        longest = sorted(PROMPT_LENGTHS)[::-1]
        padding = slots * max(longest) - sum(longest[:slots]) if slots < ROWS else ROWS * max(longest) - sum(longest)
        assert decoded < 0.8 * ROWS * TOKENS
        assert tokens - decoded <= sum(length - 1 for length in longest) + padding
    hook.remove()


def test_looking_seldom_at_which_rows_have_ended_changes_no_token(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where each look waits for the device."""
    expected = draw(policy.rollout(5), make_prompts(policy.tokenizer))
    monkeypatch.setattr(static_module, "forwards_between_checks", lambda device: 5)
    found = draw(policy.rollout(5, StaticRollout), make_prompts(policy.tokenizer))
    assert torch.equal(found.input_ids, expected.input_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_forwards_that_are_captured_and_replayed_sample_the_same(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a stand-in for a CUDA graph: capturing runs nothing, and replaying does what the forward does."""
    captured, ran = [], []

    def capture(step: Any) -> Any:
        captured.append(step)
        return lambda: (ran.append(step), step())

    monkeypatch.setattr(static_module, "capture", capture)
    for slots in (5, 64):
        captured.clear()
        ran.clear()
        rollout = StaticRollout(policy.engine, policy.tokenizer, slots, cuda_graphs=True)
        found = sample(rollout, make_prompts(policy.tokenizer)).responses
        assert torch.equal(found, sample(policy.rollout(), make_prompts(policy.tokenizer)).responses)
        assert 0 < len(captured) < len(ran)


class NeverWaits(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: a number that goes to the host, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [SamplingConfig(TOKENS), SamplingConfig(TOKENS, 0.7, 0.9, 5)])
def test_the_device_part_of_a_decoding_step_never_waits(
    sampling: SamplingConfig, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = static_module._Loop._step

    def watched(self: Any, n: int, visible: int) -> None:
        with NeverWaits():
            step(self, n, visible)

    monkeypatch.setattr(static_module._Loop, "_step", watched)
    assert sample(policy.rollout(5, StaticRollout), make_prompts(policy.tokenizer), sampling).response_mask.any()
    with pytest.raises(AssertionError, match="local_scalar_dense"), NeverWaits():
        torch.ones(1).item()


def test_attention_that_takes_no_mask_is_replaced_for_the_rollout(policy: Policy) -> None:
    config = policy.engine.module.model.config
    expected, own = sample(policy.rollout(), make_prompts(policy.tokenizer)).responses, config._attn_implementation
    config._attn_implementation = "flash_attention_2"
    try:
        found = sample(policy.rollout(backend=StaticRollout), make_prompts(policy.tokenizer)).responses
        assert config._attn_implementation == "flash_attention_2"
    finally:
        config._attn_implementation = own
    assert torch.equal(found, expected)


# ---- two ranks, ZeRO-3 ----------------------------------------------------------------------------------------------


def rollouts_between_steps(rank: int, path: str, shares: list[list[int]]) -> dict[str, Any]:
    """Sample this rank's share of the rows and train, for each way of keeping the weights."""
    dist.init("cpu")
    tokenizer = load_tokenizer(path)
    rows = tiny.random_examples([(6, 5), (3, 9), (9, 2), (4, 14)], tokenizer, seed=rank)
    found: dict[str, Any] = {}
    for name, stage, gather, backend in (
        ("zero0", 0, "auto", PaddedRollout),
        ("whole", 3, "auto", PaddedRollout),
        ("partitioned", 3, "never", PaddedRollout),
        ("whole, static", 3, "auto", StaticRollout),
        ("partitioned, static", 3, "never", StaticRollout),
        ("without", 3, None, None),
        ("raised", 3, None, None),
    ):
        made = make_engine(path, stage)
        responses, losses, hooks, held = [], [], [], []
        for step in range(3):
            if backend is not None:
                rollout = backend(made, tokenizer, rows_at_once=5, gather=gather)
                with rollout.weights() as whole:
                    assert whole is (gather == "auto")
                sequences = sample(rollout, make_prompts(tokenizer, shares[rank]))
                responses.append(sequences.responses.numpy())
            if name == "raised" and step == 1:  # an error inside a rollout puts the hooks back, too
                with pytest.raises(ZeroDivisionError), engine.generation_mode(made):
                    raise ZeroDivisionError
            batch = collate_sft(rows, tokenizer.pad_token_id)
            losses.append(sft_step(made, [batch], CPU)[0]["sft/loss"])
            hooks.append(count_hooks(made))
            made.module.eval()
            with torch.no_grad():
                made(batch.input_ids, batch.attention_mask, batch.loss_mask)
            held.append(sum(parameter.numel() for parameter in made.module.parameters()))
        found[name] = {"responses": responses, "losses": losses, "hooks": hooks, "held": held}
    return found


def count_hooks(made: Any) -> list[int]:
    """Hooks of all modules, and the handles that DeepSpeed keeps of them under ZeRO-3."""
    offload = getattr(made.optimizer, "parameter_offload", None)
    kept = [len(offload.forward_hooks), len(offload.backward_hooks)] if offload else []
    modules = list(made.module.modules())
    return [sum(len(m._forward_pre_hooks) for m in modules), sum(len(m._forward_hooks) for m in modules), *kept]


@pytest.fixture(scope="module")
def shares(policy: Policy) -> list[list[int]]:
    """Rank 0's rows are those whose responses end first, so that the ranks stop decoding at different lengths."""
    lengths = sample(policy.rollout(), make_prompts(policy.tokenizer)).response_mask.sum(dim=1)
    order = lengths.argsort(stable=True).tolist()
    shares = [order[: ROWS // 2], order[ROWS // 2 :]]
    assert lengths[shares[0]].max() < lengths[shares[1]].max()
    return shares


@pytest.fixture(scope="module")
def two_ranks(taught: dict[bool, str], shares: list[list[int]]) -> list[dict[str, Any]]:
    return run_ranks(2, rollouts_between_steps, taught[False], shares, timeout=150)


@pytest.mark.parametrize("name", ["zero0", *WAYS])
def test_ranks_that_finish_at_different_lengths_sample_what_one_rank_does(
    name: str, two_ranks: list[dict[str, Any]], shares: list[list[int]], policy: Policy
) -> None:
    expected = sample(policy.rollout(), make_prompts(policy.tokenizer)).responses
    for rank, share in enumerate(shares):
        assert two_ranks[rank][name]["responses"][0].tolist() == expected[share].tolist()
        for step in (1, 2):  # the weights have moved; ZeRO stages still agree
            zero0, own = (two_ranks[rank][which]["responses"][step] for which in ("zero0", name))
            assert own.tolist() == zero0.tolist()


@pytest.mark.parametrize("name", ["zero0", *WAYS, "raised"])
def test_training_goes_on_after_a_rollout_as_if_there_had_been_none(
    name: str, two_ranks: list[dict[str, Any]]
) -> None:
    expected = two_ranks[0]["without"]["losses"]
    assert expected[2] < expected[0]
    assert two_ranks[0][name]["losses"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [*WAYS, "raised"])
def test_after_a_rollout_parameters_are_partitioned_again(name: str, two_ranks: list[dict[str, Any]]) -> None:
    """Without its hooks ZeRO-3 still trains rightly, for it gathers what it finds missing, but never lets go of it."""
    for own in two_ranks:
        assert own[name]["held"] == own["without"]["held"]
        assert max(own[name]["held"]) == 0 < max(own["zero0"]["held"])
        assert own[name]["hooks"] == own["without"]["hooks"]
        assert own[name]["hooks"][2] == own[name]["hooks"][0]  # no growth from rollout to rollout

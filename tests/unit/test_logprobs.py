"""tristage.algo.logprobs: hand-worked numbers, the slow twins, and the chunked form against the whole one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import oracles
from tristage.algo.logprobs import entropy, linear_token_logprobs, token_logprobs

B, T, V, H = 3, 5, 11, 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [B,T,H], weight [V,H], bias [V], ids [B,T]"""
    g = generator(seed)
    hidden, weight, bias = (torch.randn(s, generator=g) for s in ((B, T, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (B, T), generator=g)


def test_token_logprobs_on_a_four_token_vocabulary() -> None:
    # Weights 1, 2, 4, 1 of 8: probabilities 1/8, 1/4, 1/2, 1/8.
    logits = torch.tensor([1.0, 2.0, 4.0, 1.0]).log().expand(3, 4)
    result = token_logprobs(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(result, torch.tensor([math.log(1 / 8), math.log(1 / 4), math.log(1 / 2)]))


def test_entropy_on_a_four_token_vocabulary() -> None:
    # In bits: 1/8 * 3 + 1/4 * 2 + 1/2 * 1 + 1/8 * 3 = 1.75
    logits = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()
    assert entropy(logits).item() == pytest.approx(1.75 * math.log(2))


def test_entropy_is_log_v_when_uniform_and_zero_when_certain() -> None:
    assert entropy(torch.zeros(7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([0.0, 500.0, 0.0])).item() == 0


def test_a_token_that_cannot_be_sampled_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    result = entropy(logits)
    result.backward()
    assert result.item() == pytest.approx(math.log(2))
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_entropy_gradient_is_finite_when_a_probability_underflows() -> None:
    logits = torch.tensor([0.0, 300.0, 299.0], requires_grad=True)
    entropy(logits).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_logprobs_and_entropy_ignore_a_constant_added_to_all_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    ids = torch.tensor([2])
    torch.testing.assert_close(
        token_logprobs(logits + 512, ids), token_logprobs(logits, ids), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(entropy(logits + 512), entropy(logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_token_logprobs_and_entropy_match_the_oracle(scale: float) -> None:
    logits = torch.randn(B, T, V, generator=generator(0)) * scale
    ids = torch.randint(0, V, (B, T), generator=generator(1))
    expected = torch.tensor(oracles.token_logprobs(logits, ids))
    torch.testing.assert_close(token_logprobs(logits, ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy(logits), torch.tensor(oracles.entropy(logits)), atol=1e-5, rtol=1e-5)


def test_bfloat16_logits_are_upcast_before_the_softmax() -> None:
    logits = torch.randn(B, T, V, generator=generator(0)).bfloat16()
    ids = torch.randint(0, V, (B, T), generator=generator(1))
    assert token_logprobs(logits, ids).dtype == entropy(logits).dtype == torch.float32
    assert torch.equal(token_logprobs(logits, ids), token_logprobs(logits.float(), ids))
    assert torch.equal(entropy(logits), entropy(logits.float()))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_linear_token_logprobs_match_the_oracle(temperature: float) -> None:
    hidden, weight, bias, ids = linear_case(0)
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, bias, temperature, chunk_tokens=4)
    logits = torch.tensor(oracles.linear_logits(hidden, weight, bias, temperature))
    expected = torch.tensor(oracles.token_logprobs(logits, ids))
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, torch.tensor(oracles.entropy(logits)), atol=1e-5, rtol=1e-5)


def test_temperature_two_halves_the_logits() -> None:
    # hidden 1, weights 0 and 2 ln 3: logits 0 and ln 3 at temperature 2, so probabilities 1/4 and 3/4.
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [2 * math.log(3)]])
    logprobs, _ = linear_token_logprobs(hidden, weight, torch.tensor([1]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(3 / 4))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 15, 16, 1000])  # there are 15 rows
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_linear_token_logprobs_equal_the_whole_form_in_value_and_gradient(
    chunk_tokens: int, with_bias: bool, entropy_grad: bool
) -> None:
    hidden, weight, bias, ids = linear_case(1)
    upstream = torch.randn(2, B, T, generator=generator(2))
    results = []
    for chunked in (False, True):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        if chunked:
            logprobs, entropies = linear_token_logprobs(
                h, w, ids, b if with_bias else None, 0.7, chunk_tokens, entropy_grad
            )
        else:
            logits = (h @ w.T + (b if with_bias else 0)) / 0.7
            logprobs, entropies = token_logprobs(logits, ids), entropy(logits)
        loss = (logprobs * upstream[0]).sum()
        if entropy_grad:
            loss = loss + (entropies * upstream[1]).sum()
        leaves = (h, w, b) if with_bias else (h, w)
        results.append([logprobs, entropies, *torch.autograd.grad(loss, leaves)])
    for whole, chunk in zip(*results, strict=True):
        torch.testing.assert_close(chunk, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_entropy_carries_a_gradient_only_when_asked(chunk_tokens: int) -> None:
    hidden, weight, _, ids = linear_case(1)
    hidden.requires_grad_()
    for wanted in (False, True):
        logprobs, entropies = linear_token_logprobs(
            hidden, weight, ids, chunk_tokens=chunk_tokens, entropy_grad=wanted
        )
        assert logprobs.requires_grad
        assert entropies.requires_grad is wanted


@pytest.mark.parametrize("shape", [(0,), (0, T), (B, 0)])
def test_no_rows_give_no_logprobs_and_a_zero_gradient(shape: tuple[int, ...]) -> None:
    hidden = torch.zeros(*shape, H, requires_grad=True)
    weight = torch.randn(V, H, generator=generator(0), requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.long)
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, chunk_tokens=4)
    assert logprobs.shape == entropies.shape == shape
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and torch.all(weight.grad == 0)


def test_a_single_token_needs_no_leading_dimension() -> None:
    hidden, weight, _, ids = linear_case(3)
    alone, _ = linear_token_logprobs(hidden[0, 0], weight, ids[0, 0])
    assert alone.shape == ()
    torch.testing.assert_close(alone, linear_token_logprobs(hidden, weight, ids)[0][0, 0])


def test_bfloat16_hidden_and_weight_give_float32_and_bfloat16_gradients() -> None:
    hidden, weight, _, ids = linear_case(4)
    h, w = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    logprobs, entropies = linear_token_logprobs(h, w, ids, chunk_tokens=4)
    assert logprobs.dtype == entropies.dtype == torch.float32
    # The product is rounded to bfloat16, then everything is float32.
    torch.testing.assert_close(logprobs, token_logprobs(h @ w.T, ids))
    logprobs.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.bfloat16
    assert w.grad is not None and w.grad.dtype == torch.bfloat16


def test_inputs_are_left_alone() -> None:
    inputs = linear_case(5)
    before = [x.clone() for x in inputs]
    hidden, weight, bias, ids = inputs
    linear_token_logprobs(hidden, weight, ids, bias, 0.5, chunk_tokens=4)
    token_logprobs(hidden @ weight.T, ids)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation gives, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_the_vocabulary_is_never_held_for_more_than_one_chunk() -> None:
    rows, vocabulary, chunk = 256, 500, 16
    hidden = torch.randn(rows, H, generator=generator(0), requires_grad=True)
    weight = torch.randn(vocabulary, H, generator=generator(1), requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator(2))
    with LargestTensor() as whole:
        token_logprobs(hidden @ weight.T, ids).sum().backward()
    assert whole.numel == rows * vocabulary  # the recorder sees what it should
    with LargestTensor() as chunked:
        logprobs, entropies = linear_token_logprobs(
            hidden, weight, ids, chunk_tokens=chunk, entropy_grad=True
        )
        (logprobs + entropies).sum().backward()
    assert chunked.numel == chunk * vocabulary


def test_no_chunk_keeps_its_logits_for_backward() -> None:
    rows, vocabulary, chunk = 64, 500, 16
    hidden = torch.randn(rows, H, generator=generator(0), requires_grad=True)
    weight = torch.randn(vocabulary, H, generator=generator(1), requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator(2))
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_token_logprobs(hidden, weight, ids, chunk_tokens=chunk)
    assert not saved or max(saved) <= weight.numel()


def test_the_weight_is_used_as_it_is_and_never_copied() -> None:
    hidden, weight, _, ids = linear_case(6)
    weight = torch.nn.Parameter(weight)
    pointers: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for x in args:
                if isinstance(x, Tensor) and x.shape in ((V, H), (H, V)):
                    pointers.add(x.untyped_storage().data_ptr())
            return func(*args, **(kwargs or {}))

    with Watch():  # chunks of 3, so that no chunk of logits has the shape of the weight
        linear_token_logprobs(hidden, weight, ids, chunk_tokens=3)
    assert pointers == {weight.untyped_storage().data_ptr()}

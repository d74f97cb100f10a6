"""tristage.algo.logprobs: hand-worked numbers, the slow twins, and the chunked form against the whole one."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import oracles
from tristage.algo import logprobs as module
from tristage.algo.logprobs import LogitLimits, chunk_rows, entropy, linear_token_logprobs, token_logprobs

B, T, V, H = 3, 5, 11, 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_at_a_time(chunk: int, block: int = 2, vocabulary: int = V) -> LogitLimits:
    """Limits for float32 logits."""
    return LogitLimits(chunk * vocabulary * 4, block * vocabulary * 4)


def linear_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [B,T,H], weight [V,H], bias [V], ids [B,T]"""
    g = generator(seed)
    hidden, weight, bias = (torch.randn(s, generator=g) for s in ((B, T, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (B, T), generator=g)


class Shapes(TorchDispatchMode):
    """Records name and shape of what each operation gives, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.found.append((func.overloadpacket.__name__, tuple(result.shape)))
        return result


class LiveLogits(TorchDispatchMode):
    """Bytes of tensors [.,V] that an operation gave and that are still referred to: now, and the most at one time."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.peak = vocabulary, 0
        self.tensors: list[weakref.ref[Tensor]] = []

    def now(self) -> int:
        tensors = [x for ref in self.tensors if (x := ref()) is not None]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] == self.vocabulary:
            self.tensors.append(weakref.ref(result))
            self.peak = max(self.peak, self.now())
        return result


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
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, bias, temperature, limits=rows_at_a_time(4))
    logits = torch.tensor(oracles.linear_logits(hidden, weight, bias, temperature))
    expected = torch.tensor(oracles.token_logprobs(logits, ids))
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, torch.tensor(oracles.entropy(logits)), atol=1e-5, rtol=1e-5)


def test_temperature_two_halves_the_logits() -> None:
    # hidden 1, weights 0 and 2 ln 3: logits 0 and ln 3 at temperature 2, so probabilities 1/4 and 3/4.
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [2 * math.log(3)]])
    logprobs, _ = linear_token_logprobs(hidden, weight, torch.tensor([1]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(3 / 4))


@pytest.mark.parametrize("chunk", [1, 2, 4, 15, 16, 1000])  # there are 15 rows
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy_in_loss", [False, True])
def test_linear_token_logprobs_equal_the_whole_form_in_value_and_gradient(
    chunk: int, with_bias: bool, entropy_in_loss: bool
) -> None:
    hidden, weight, bias, ids = linear_case(1)
    upstream = torch.randn(2, B, T, generator=generator(2))
    results = []
    for chunked in (False, True):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        if chunked:
            logprobs, entropies = linear_token_logprobs(
                h, w, ids, b if with_bias else None, 0.7, limits=rows_at_a_time(chunk)
            )
        else:
            logits = (h @ w.T + (b if with_bias else 0)) / 0.7
            logprobs, entropies = token_logprobs(logits, ids), entropy(logits)
        loss = (logprobs * upstream[0]).sum()
        if entropy_in_loss:
            loss = loss + (entropies * upstream[1]).sum()
        leaves = (h, w, b) if with_bias else (h, w)
        results.append([logprobs, entropies, *torch.autograd.grad(loss, leaves)])
    for whole, chunk_by_chunk in zip(*results, strict=True):
        torch.testing.assert_close(chunk_by_chunk, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk", [2, 6])
def test_the_gradient_is_that_of_finite_differences(temperature: float, with_entropy: bool, chunk: int) -> None:
    hidden, weight, bias, ids = (x.double() if x.is_floating_point() else x for x in linear_case(7))
    limits = LogitLimits(chunk * V * 8, V * 4)

    def scores(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = module._LinearTokenLogprobs.apply(*leaves, ids.flatten()[:6], temperature, with_entropy, limits, True)
        return found if with_entropy else found[:1]

    leaves = [x.requires_grad_() for x in (hidden.view(-1, H)[:6].clone(), weight, bias)]
    assert torch.autograd.gradcheck(scores, leaves)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_second_backward_gives_the_same_gradient(chunk: int) -> None:
    """The first overwrites the logits that were kept."""
    hidden, weight, _, ids = linear_case(1)
    weight.requires_grad_()
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, limits=rows_at_a_time(chunk))
    first, second = (torch.autograd.grad((logprobs + entropies).sum(), weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_entropy_alone_has_its_gradient() -> None:
    hidden, weight, _, ids = linear_case(1)
    hidden.requires_grad_()
    (found,) = torch.autograd.grad(linear_token_logprobs(hidden, weight, ids)[1].sum(), hidden)
    (expected,) = torch.autograd.grad(entropy(hidden @ weight.T).sum(), hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_without_entropy_nan_is_in_its_place_and_carries_no_gradient() -> None:
    hidden, weight, _, ids = linear_case(1)
    logprobs, entropies = linear_token_logprobs(hidden.requires_grad_(), weight, ids, with_entropy=False)
    assert entropies.isnan().all() and not entropies.requires_grad
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_bias_that_forbids_a_token_gives_finite_gradients(chunk: int) -> None:
    hidden, weight, bias, ids = linear_case(1)
    bias[0], ids = -torch.inf, ids.clamp(min=1)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, bias, limits=rows_at_a_time(chunk))
    expected = torch.tensor(oracles.entropy((hidden[..., None, :] * weight[1:]).sum(-1) + bias[1:]))
    torch.testing.assert_close(entropies, expected, atol=1e-5, rtol=1e-5)
    for gradient in torch.autograd.grad((logprobs - 1000 * entropies).sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, _, ids = linear_case(1)
    leaves = {"hidden": hidden, "weight": weight}
    trained = leaves["weight" if frozen == "hidden" else "hidden"].requires_grad_()
    with Shapes() as shapes:
        linear_token_logprobs(hidden, weight, ids)[0].sum().backward()
    assert trained.grad is not None and leaves[frozen].grad is None
    products = [shape for name, shape in shapes.found if name in ("mm", "addmm_")]
    # the logits, and the gradient of what is trained
    assert products == [(B * T, V), (V, H) if frozen == "hidden" else (B * T, H)]


@pytest.mark.parametrize("rows, row_bytes, limit, expected", [
    (15, 44, 44 * 15, 15), (15, 44, 44 * 15 - 1, 8), (15, 44, 44 * 4, 4), (15, 44, 1, 1), (0, 44, 100, 1), (9, 1, 4, 3),
])  # fmt: skip
def test_chunks_are_as_few_as_the_limit_allows_and_of_one_size(
    rows: int, row_bytes: int, limit: int, expected: int
) -> None:
    assert chunk_rows(rows, row_bytes, limit) == expected


@pytest.mark.parametrize("chunk, products", [(15, 1), (8, 2 + 1), (5, 3 + 2)])
def test_logits_of_the_last_chunk_are_computed_once_and_those_of_the_others_twice(chunk: int, products: int) -> None:
    hidden, weight, _, ids = linear_case(1)
    hidden.requires_grad_()
    with Shapes() as shapes:
        linear_token_logprobs(hidden, weight, ids, limits=rows_at_a_time(chunk))[0].sum().backward()
    assert sum(name == "mm" and shape[1] == V for name, shape in shapes.found) == products


@pytest.mark.parametrize("shape", [(0,), (0, T), (B, 0)])
def test_no_rows_give_no_logprobs_and_a_zero_gradient(shape: tuple[int, ...]) -> None:
    hidden = torch.zeros(*shape, H, requires_grad=True)
    weight = torch.randn(V, H, generator=generator(0), requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.long)
    logprobs, entropies = linear_token_logprobs(hidden, weight, ids, limits=rows_at_a_time(4))
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
    logprobs, entropies = linear_token_logprobs(h, w, ids, limits=rows_at_a_time(2))
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
    linear_token_logprobs(hidden, weight, ids, bias, 0.5, limits=rows_at_a_time(4))
    token_logprobs(hidden @ weight.T, ids)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [16, 256])
def test_memory_is_a_chunk_of_logits_and_three_blocks(chunk: int, dtype: torch.dtype) -> None:
    rows, vocabulary = 256, 500
    hidden = torch.randn(rows, H, generator=generator(0)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, H, generator=generator(1)).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary, (rows,), generator=generator(2))
    with LiveLogits(vocabulary) as live:
        token_logprobs(hidden @ weight.T, ids).sum().backward()
    assert live.peak > 2 * rows * vocabulary * dtype.itemsize  # the recorder sees what it should
    limits = LogitLimits(chunk * vocabulary * dtype.itemsize, 2 * vocabulary * 4)
    with LiveLogits(vocabulary) as live:
        logprobs, entropies = linear_token_logprobs(hidden, weight, ids, temperature=0.7, limits=limits)
        kept = live.now()
        (logprobs + entropies).sum().backward()
    assert kept == limits.chunk  # the last chunk's
    assert limits.chunk < live.peak <= limits.chunk + 3 * limits.block
    assert live.now() == 0
    with torch.no_grad(), LiveLogits(vocabulary) as live:
        linear_token_logprobs(hidden, weight, ids, limits=limits)
        assert live.now() == 0
    assert limits.chunk < live.peak <= limits.chunk + 3 * limits.block


RESIDENT = """
import torch
from tristage.algo.logprobs import linear_token_logprobs
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def run(rows, vocabulary):
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    sum(linear_token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.long))).sum().backward()
run(1, 100)
before = peak()
run(1024, 16384)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_blocks_leave_no_holes_that_the_heap_grows_around() -> None:
    """Resident memory of a process, which the tensors above do not show: 64 MiB of logits, and three blocks of 1."""
    found = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert 2**26 < int(found.stdout) < 1.5 * 2**26


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
        linear_token_logprobs(hidden, weight, ids, limits=rows_at_a_time(3))
    assert pointers == {weight.untyped_storage().data_ptr()}

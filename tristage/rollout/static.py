"""The default backend: a decoding loop of our own on a cache that is written in place.

A rollout has `rows_at_once` slots. A prompt enters a free slot by one forward over its tokens (once for all of its
samples); then every forward decodes one token of each slot. A row that has ended leaves its slot to the next prompt,
and when none waits, to the last slot's row: no forward computes rows that have ended, beyond an eighth of the slots.

With `cuda_graphs` a forward that comes again (as many slots, as many columns) is captured and replayed; then slots are
given up by halves, so that few forwards differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.rollout import SamplingConfig

from tristage import dist
from tristage.dist import progress
from tristage.rollout.base import RolloutBackend, SampledBatch, SeededRequest
from tristage.rollout.cache import SlotCache
from tristage.rollout.sampling import choose

COLUMNS = 64  # attention looks at a multiple of this many columns: fewer shapes, and no copy as the cache grows
PREFILL_TOKENS = 4096  # of one forward over prompts, padding included: it bounds the memory of activations


def forwards_between_checks(device: torch.device) -> int:
    """Forwards between two checks of which rows have ended: on a GPU each check waits for the device."""
    return 1 if device.type == "cpu" else 8


class StaticRollout(RolloutBackend):
    """Samples with the training weights in place; under ZeRO-3 with `gather: never` ranks decode in step."""

    name = "static"

    def __init__(self, *arguments: Any, cuda_graphs: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cuda_graphs = cuda_graphs

    @torch.no_grad()
    def generate(self, request: SeededRequest, sampling: SamplingConfig) -> SampledBatch:
        model = self.engine.module.model
        with self.weights() as whole, additive_mask_attention(model):
            loop = _Loop(model, request, sampling, self.stop_ids, self.rows_at_once, self.cuda_graphs and whole)
            if whole:
                loop.run()
            else:
                loop.run_in_step()
        keep = sampling.max_new_tokens  # without the column that takes what is not kept
        return self.batch(request, *(x[:, :keep] for x in (loop.tokens, loop.logprobs, loop.entropy)))


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A function that does on the GPU what `step` would, without its Python. Capturing does not run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def additive_mask_attention(model: Any) -> Iterator[None]:
    """Attention that takes a [b,1,T,L] mask which is added: eager where the model has it, else sdpa."""
    config, own = model.config, model.config._attn_implementation
    config._attn_implementation = own if own in ("eager", "sdpa") else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = own


class _Loop:
    """One request. B rows in S slots, of which the first n decode; R tokens at most."""

    def __init__(
        self,
        model: Any,
        request: SeededRequest,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        rows_at_once: int,
        replays: bool,
    ) -> None:
        self.model, self.sampling, self.limit = model, sampling, sampling.max_new_tokens
        ids, mask = request.prompt_ids, request.prompt_attention_mask.bool()
        device, rows = ids.device, len(ids)
        self.ids, self.uniforms, self.stop_ids = ids, request.uniforms.to(device), torch.tensor(stop_ids, device=device)
        self.lengths: list[int] = mask.sum(dim=1).tolist()
        columns = -(-(max(self.lengths) + self.limit) // COLUMNS) * COLUMNS
        self.slots = min(rows_at_once, rows)
        self.cache = SlotCache(self.slots, columns)
        self.columns = torch.arange(columns, device=device)
        # Long prompts first, samples of a prompt together.
        prompts = [tuple(row[-length:]) for row, length in zip(ids.tolist(), self.lengths, strict=True)]
        self.prompts = prompts
        self.waiting = sorted(range(rows), key=lambda row: (-self.lengths[row], prompts[row], row))[::-1]
        # The last column takes what rows sample that have ended already.
        self.tokens = torch.zeros(rows, self.limit + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, self.limit + 1, device=device)
        self.entropy = torch.zeros(rows, self.limit + 1, device=device)
        # Of each slot: its row, the token to read next, that token's column, tokens sampled, whether it goes on.
        self.row, self.token, self.position, self.count = torch.zeros(4, self.slots, dtype=torch.long, device=device)
        self.alive = torch.zeros(self.slots, dtype=torch.bool, device=device)
        # What the host knows of them, for it decides which rows leave and enter.
        self.host_alive, self.host_position = [False] * self.slots, [0] * self.slots
        self.forwards, self.check_every, self.replays = 0, forwards_between_checks(device), replays
        # Of a forward by (slots, columns): None once it has run, then what replays it.
        self.captured: dict[tuple[int, int], Callable[[], None] | None] = {}

    def run(self) -> None:
        """Decode until every row has ended, each slot on its own."""
        while True:
            free = [slot for slot, alive in enumerate(self.host_alive) if not alive]
            if self.waiting and len(free) >= max(1, self.slots // 8):
                self._enter(free[: len(self.waiting)])
            elif not self.waiting and free:
                self._close_gaps()
            if not any(self.host_alive):
                return
            self._decode(len(self.host_alive))

    def run_in_step(self) -> None:
        """The same number of forwards on every rank: slots are filled together, and decode until all ranks' have
        ended.
        """
        while self.waiting:
            taken = min(self.slots, len(self.waiting))
            self._enter(list(range(taken)), one_forward=True)
            while True:
                going = {"going": float(any(self.host_alive))}
                if dist.sum_over_ranks(going, self.ids.device)["going"] == 0:
                    break
                self._decode(taken)

    def _enter(self, slots: list[int], one_forward: bool = False) -> None:
        """Waiting rows enter the slots: all but the last token of each prompt go into the cache, once per prompt."""
        rows = [self.waiting.pop() for _ in slots]
        distinct = list(dict.fromkeys(self.prompts[row] for row in rows))
        per_forward = len(distinct) if one_forward else max(1, PREFILL_TOKENS // max(map(len, distinct)))
        for start in range(0, len(distinct), per_forward):
            number = {prompt: i for i, prompt in enumerate(distinct[start : start + per_forward])}
            pairs = zip(slots, rows, strict=True)
            taken = [(slot, number[self.prompts[row]]) for slot, row in pairs if self.prompts[row] in number]
            self._prefill(list(number), taken, one_forward)
        device, place = self.ids.device, torch.tensor(slots, device=self.ids.device)
        self.row[place] = torch.tensor(rows, device=device)
        self.token[place] = torch.tensor([self.prompts[row][-1] for row in rows], device=device)
        self.position[place] = torch.tensor([self.lengths[row] - 1 for row in rows], device=device)
        self.count[place], self.alive[place] = 0, True
        for slot, row in zip(slots, rows, strict=True):
            self.host_alive[slot], self.host_position[slot] = True, self.lengths[row] - 1

    def _prefill(self, prompts: list[tuple[int, ...]], taken: list[tuple[int, int]], always: bool) -> None:
        """prompts -> the cache; `taken` has (slot, prompt) of every row."""
        width = max(len(prompt) for prompt in prompts) - 1
        if width == 0 and not always:
            return
        width, device = max(width, 1), self.ids.device
        # Right padded: under the causal mask no token sees the padding, and decoding overwrites it.
        ids = torch.tensor([(*prompt[:-1], *[prompt[-1]] * width)[:width] for prompt in prompts], device=device)
        slots, sources = torch.tensor(taken, device=device).unbind(1)
        self.cache.prefill(slots, sources)
        look = self.columns[:width]
        mask = self._mask(look[None] <= look[:, None])
        self.model.base_model(
            input_ids=ids,
            position_ids=look.expand(len(prompts), -1),
            attention_mask=mask[None, None].expand(len(prompts), 1, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )

    def _decode(self, n: int) -> None:
        """One token of each of the first n slots."""
        going = [place for place, alive in zip(self.host_position, self.host_alive, strict=True) if alive]
        visible = -(-(max(going, default=0) + 1) // COLUMNS) * COLUMNS
        self._run_or_replay(n, visible)
        progress.made_progress()
        self.forwards += 1
        for slot in range(n):
            self.host_position[slot] += 1
        if self.forwards % self.check_every == 0:
            self.host_alive[:n] = self.alive[:n].tolist()

    def _run_or_replay(self, n: int, visible: int) -> None:
        """The first of equal forwards runs, the second is captured before it is replayed."""
        if not self.replays:
            return self._step(n, visible)
        if (n, visible) not in self.captured:
            self.captured[n, visible] = None
            return self._step(n, visible)
        replay = self.captured[n, visible]
        if replay is None:
            replay = self.captured[n, visible] = capture(lambda: self._step(n, visible))
        replay()

    def _step(self, n: int, visible: int) -> None:
        """The device's part of a decoding step: nothing here waits for it."""
        row, position, count, alive = self.row[:n], self.position[:n], self.count[:n], self.alive[:n]
        self.cache.decode(position, visible)
        logits = self.model(
            input_ids=self.token[:n, None],
            position_ids=position[:, None],
            attention_mask=self._mask(self.columns[:visible] <= position[:, None])[:, None, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        choice = choose(logits, self.uniforms[row, count.clamp(max=self.limit - 1)], self.sampling)
        place = torch.where(alive, count, self.limit)
        for kept, found in zip((self.tokens, self.logprobs, self.entropy), choice, strict=True):
            kept[row, place] = found
        self.token[:n] = choice.tokens
        count += alive
        position += alive
        alive &= ~torch.isin(choice.tokens, self.stop_ids) & (count < self.limit)

    def _close_gaps(self) -> None:
        """The rows that go on move to the first slots; the others are given up."""
        going = sum(self.host_alive)
        if self.replays and going > len(self.host_alive) // 2:
            return
        source = [slot for slot in range(going, len(self.host_alive)) if self.host_alive[slot]]
        target = [slot for slot in range(going) if not self.host_alive[slot]]
        if source:
            place, of = (torch.tensor(slots, device=self.ids.device) for slots in (target, source))
            self.cache.move(of, place, max(self.host_position[slot] for slot in source))
            for state in (self.row, self.token, self.position, self.count, self.alive):
                state[place] = state[of]
            for to, come_from in zip(target, source, strict=True):
                self.host_alive[to], self.host_position[to] = True, self.host_position[come_from]
        self.host_alive, self.host_position = self.host_alive[:going], self.host_position[:going]

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to attention's scores: 0 where a token may look."""
        dtype = self.model.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

"""What one engine of a run holds in memory, and when: arithmetic on counts, with its sources.

P parameters, T of them trained, N ranks, b bytes of a number in the run's precision (4 or 2). Of one engine:

    weights      b P             whole at ZeRO 0 to 2, an N-th at ZeRO 3
    master       4 T / N         float32 copy that Adam steps (ZeRO 0: 4 T, and none in float32)
    Adam         8 T / N         two float32 moments (ZeRO 0: 8 T)
    gradients    b T or b T / N  whole until the step at ZeRO 0 and 1, partitions at 2 and 3; in the step 4 T / N more

after Rajbhandari et al. 2020 ("ZeRO", section 3, whose 2 + 2 + 12 bytes per parameter this is), and what DeepSpeed
0.19 adds: buckets in which gradients are reduced, and at ZeRO 3 the parameters that are gathered at one time.
Offloaded states are the host's. Activations follow Korthikanti et al. 2022 ("Reducing activation recomputation",
section 4.1): 34 h bytes per token and layer, less the 2 of their dropout masks and less the attention matrix, which
fused attention does not keep, with the terms that other blocks have (layer_bytes). Logits exist for a chunk of
tokens at a time, in float32 for a block of these (algo/logprobs.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tristage.algo.logprobs import ON_CPU, ON_GPU
from tristage.models.sizes import ModelShape

GIB = 2**30
ALLREDUCE_CHUNK = 500_000_000  # numbers that DeepSpeed flattens at a time, where no bucket says otherwise
BLOCKS = 3  # of float32 logits, next to a chunk: at the temperature, their log-softmax and its exp
# Bytes per logit of a head that is not in chunks, measured: forward and backward, the same with the entropy, and
# forwards without gradients.
LOGIT_TRAIN, LOGIT_ENTROPY, LOGIT_SCORE, LOGIT_SCORE_ENTROPY = 16, 24, 8, 20
SAMPLED_LOGIT = 16  # the sampler's logits, their exponentials, and what the entropy adds up, in float32
NF4 = 4.5 / 8  # bytes of a weight in 4 bits with a float32 scale for every 64

Bill = dict[str, float]  # what memory is for -> bytes


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed JSON counts here; the defaults are DeepSpeed's."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    buffers: int = 1  # reduce buckets: two where communication overlaps
    copies: bool = False  # ZeRO 2 reduces a copy of its bucket: `reduce_scatter`, which engine_config leaves out
    bucket: float = 5e8  # numbers in one
    max_live: float = 1e9  # numbers that ZeRO 3 gathers at most, unless one module needs more
    sub_group: float = 1e9  # numbers that ZeRO 3 steps at a time

    @classmethod
    def of(cls, config: dict[str, Any]) -> Zero:
        """From the values of a DeepSpeed JSON."""
        zero = config.get("zero_optimization", {})

        def offloads(what: str) -> bool:
            return bool((zero.get(what) or {}).get("device", "none") != "none")

        return cls(
            stage=zero.get("stage", 0),
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            buffers=2 if zero.get("overlap_comm", False) and zero.get("stage") == 2 else 1,
            copies=bool(zero.get("reduce_scatter", False)),
            bucket=float(zero.get("reduce_bucket_size", cls.bucket)),
            max_live=float(zero.get("stage3_max_live_parameters", cls.max_live)),
            sub_group=float(zero.get("sub_group_size", cls.sub_group)),
        )

    @property
    def parts(self) -> str:
        offloaded = [name for name in ("optimizer", "param") if getattr(self, f"offload_{name}")]
        return f"{self.stage}" + (f", {' and '.join(offloaded)} on the host" if offloaded else "")


@dataclass(frozen=True)
class Machine:
    """What a run runs on."""

    ranks: int
    ranks_per_node: int
    gpu_memory: float  # bytes
    host_memory: float | None  # bytes of a node; None: not judged
    cpu: bool = False  # ranks are processes without GPUs


@dataclass(frozen=True)
class Engine:
    """One model of the run, and what is done with it."""

    name: str
    shape: ModelShape
    zero: Zero
    bytes: int  # of a number
    frozen: bool = False
    adapters: bool = False  # only they are trained, and a scalar head if there is one
    quantized: bool = False
    scalar_head: bool = False
    extra: int = 0  # a value head on a policy
    checkpointing: bool = False
    rows: int = 1  # of a forward
    tokens: int = 1  # of a row
    scored: int = 1  # tokens of a row whose logits are asked for
    entropy: bool = False  # in the loss
    accumulation: int = 1  # backwards in one optimizer step

    @property
    def parameters(self) -> int:
        return self.shape.parameters + self.shape.adapters + self.extra

    @property
    def trained(self) -> int:
        if self.frozen:
            return 0
        head = self.shape.head if self.scalar_head else 0
        return self.shape.adapters + head + self.extra if self.adapters else self.parameters

    @property
    def weights(self) -> float:
        """Bytes of all parameters."""
        packed = self.shape.linear if self.quantized else 0
        return self.bytes * (self.parameters - packed) + NF4 * packed

    @property
    def gathered(self) -> float:
        """Bytes that ZeRO 3 holds whole during a forward or backward: the output projection throughout."""
        if self.zero.stage != 3:
            return 0.0
        live = max(self.zero.max_live, self.shape.head + self.shape.largest)
        return min(self.weights, self.bytes * live)


def total(bill: Bill) -> float:
    return sum(bill.values())


def resident(engine: Engine, machine: Machine) -> tuple[Bill, Bill]:
    """What an engine holds all the time: (on the GPU, on the host)."""
    zero, ranks, trained = engine.zero, machine.ranks, engine.trained
    share = ranks if zero.stage else 1
    weights = engine.weights / (ranks if zero.stage == 3 else 1)
    cloned = engine.bytes < 4 or zero.stage > 0  # ZeRO clones its partition even in float32
    states: Bill = {"master": 4 * trained / share if cloned else 0.0, "Adam": 8 * trained / share}
    kept = engine.bytes * trained / ranks if zero.stage == 3 else 0.0
    bucket = engine.bytes * _bucket(engine, machine) if zero.stage == 3 and trained else 0.0
    gpu: Bill = {"weights": weights}
    host: Bill = {}
    if zero.stage == 3 and zero.offload_param:
        gpu, host = {"weights": 0.0}, {"weights": weights}
    if zero.offload_optimizer and zero.stage:
        # float32 gradients next to the states, and at ZeRO 1 and 2 a buffer for the new weights
        buffer = 0.0 if zero.stage == 3 else engine.bytes * trained / share
        host |= states | {"gradients": kept + 4 * trained / share + buffer}
        return gpu | {"buckets": bucket}, host
    return gpu | states | {"gradients": kept, "buckets": bucket}, host


def kept_gradients(engine: Engine, machine: Machine) -> float:
    """Bytes of gradients between a backward and the step, beyond what is resident."""
    if engine.zero.stage == 3 or (engine.zero.offload_optimizer and engine.zero.stage == 2):
        return 0.0
    return engine.bytes * engine.trained / (machine.ranks if engine.zero.stage == 2 else 1)


def backward(engine: Engine, machine: Machine) -> Bill:
    """What a forward and backward of one micro-batch add, its gradients included."""
    early = engine.zero.bucket < engine.trained  # a bucket is full, and reduced, while activations are still there
    return {
        "gradients": kept_gradients(engine, machine) if early else _earlier_gradients(engine, machine),
        "buckets": _reduce_buckets(engine, machine, flat=early),
        "gathered": engine.gathered,
        "activations": activation_bytes(engine),
        "logits": logit_bytes(engine, machine, LOGIT_ENTROPY if engine.entropy else LOGIT_TRAIN),
    }


def reduction(engine: Engine, machine: Machine) -> Bill:
    """What the end of a backward adds, when the last bucket is reduced."""
    return {
        "gradients": _earlier_gradients(engine, machine),
        "buckets": _reduce_buckets(engine, machine, flat=True),
        "gathered": engine.gathered,
    }


def _earlier_gradients(engine: Engine, machine: Machine) -> float:
    """Bytes of gradients apart from a bucket with the new ones: at ZeRO 2 the partitions of earlier micro-batches."""
    return 0.0 if engine.zero.stage == 2 and engine.accumulation == 1 else kept_gradients(engine, machine)


def _reduce_buckets(engine: Engine, machine: Machine, flat: bool) -> float:
    """Bytes of the buckets that ZeRO 2 copies gradients into (ZeRO 3's is resident), and of the copy that is reduced.

    ZeRO 1 makes its bucket for a backward and fills it in the step.
    """
    if engine.zero.stage < 2:
        return engine.bytes * engine.zero.bucket if engine.zero.stage and engine.trained and not machine.cpu else 0.0
    buffers, flattened = engine.zero.bucket * engine.zero.buffers, min(engine.zero.bucket, engine.trained)
    if machine.cpu:  # memory is there once it is touched, on a GPU from the start
        buffers = min(buffers, engine.trained)
    if not flat or (engine.zero.stage == 2 and not engine.zero.copies):
        flattened = 0.0
    return engine.bytes * ((buffers if engine.zero.stage == 2 else 0.0) + flattened)


def forward(engine: Engine, machine: Machine, entropy: bool = False) -> Bill:
    """What a forward without gradients adds: one layer's activations."""
    shape = engine.shape
    widths = 4 * shape.hidden + min(shape.inner_kept, 3) * shape.inner
    matrix = shape.heads * engine.tokens * 4 if shape.attention_matrix else 0
    return {
        "gathered": engine.gathered,
        "activations": engine.rows * engine.tokens * (engine.bytes * widths + matrix),
        "logits": logit_bytes(engine, machine, LOGIT_SCORE_ENTROPY if entropy else LOGIT_SCORE),
    }


def step(engine: Engine, machine: Machine) -> Bill:
    """What the optimizer's step adds to gradients that wait for it."""
    zero, ranks, trained = engine.zero, machine.ranks, engine.trained
    if zero.offload_optimizer and zero.stage:
        return {}
    part = min(trained / ranks, zero.sub_group) if zero.stage == 3 else trained / (ranks if zero.stage else 1)
    low = engine.bytes < 4
    if zero.stage == 0:
        reduce = engine.bytes * min(trained, ALLREDUCE_CHUNK) if ranks > 1 else 0.0
        bill = {"reduction": reduce, "float32 gradients": 4 * part if low else 0.0}
        bill = {max(bill, key=lambda name: bill[name]): max(bill.values())}  # one after the other
    else:
        flat = engine.bytes * part if zero.stage == 3 and low else 0.0
        bill = {"float32 gradients": 4 * part + flat}
        if zero.stage == 1:  # copied to partitions while the whole ones are there
            bill["partition"] = engine.bytes * part
            bill["buckets"] = engine.bytes * _bucket(engine, machine)
    return bill


def _bucket(engine: Engine, machine: Machine) -> float:
    """Numbers in one reduce bucket."""
    return min(engine.zero.bucket, engine.trained) if machine.cpu else engine.zero.bucket


def activation_bytes(engine: Engine) -> float:
    """What autograd keeps of one micro-batch, and the gradients that pass through one layer."""
    shape, tokens = engine.shape, engine.rows * engine.tokens
    layer = layer_bytes(shape, engine.bytes, engine.tokens)
    kept = shape.layers * engine.bytes * shape.hidden + layer if engine.checkpointing else shape.layers * layer
    ends = _norm_bytes(shape, engine.bytes, shape.hidden) + engine.bytes * 2 * shape.hidden
    passing = engine.bytes * (2 * shape.inner + 2 * shape.hidden)
    return tokens * (kept + ends + passing)


def layer_bytes(shape: ModelShape, number: int, tokens: int) -> float:
    """Bytes per token that autograd keeps of one layer.

    Korthikanti et al.'s 16 h numbers for a GPT block are here 2 x (norm: input, output) + q, k, v + attention's output
    = 8 h, and the MLP's 2 x 4 h. RMSNorm keeps a float32 copy and the normalised input.
    """
    norms = 2 * _norm_bytes(shape, number, shape.hidden)
    if shape.query_norm:
        norms += _norm_bytes(shape, number, shape.query + shape.key_value) - number * (shape.query + shape.key_value)
    attention = number * (2 * shape.query + 2 * shape.key_value)
    # softmax is in float32; in lower precision it is cast
    matrix = shape.heads * tokens * (4 + (number if number < 4 else 0)) if shape.attention_matrix else 0
    return norms + attention + matrix + number * shape.inner_kept * shape.inner


def _norm_bytes(shape: ModelShape, number: int, width: int) -> float:
    if not shape.rms_norm:
        return 2 * number * width
    return (3 * number if number == 4 else 4 + 2 * number) * width


def logit_bytes(engine: Engine, machine: Machine, bytes_each: int) -> float:
    """Of the logits that exist at one time, `bytes_each` for those of a head that is not in chunks; a scalar head has
    none.
    """
    tokens, vocabulary = engine.rows * engine.scored, engine.shape.vocabulary
    if engine.scalar_head:
        return 0.0
    if not engine.shape.plain_head:
        return float(bytes_each * tokens * vocabulary)
    limits = ON_CPU if machine.cpu else ON_GPU
    chunk = min(tokens, max(limits.chunk // (engine.bytes * vocabulary), 1))
    block = min(chunk, max(limits.block // (4 * vocabulary), 1))
    return float(vocabulary * (engine.bytes * chunk + BLOCKS * 4 * block))


def kv_cache_bytes(engine: Engine, rows: int, tokens: int) -> float:
    """Keys and values of rows that are being decoded."""
    return engine.bytes * rows * tokens * 2 * engine.shape.key_value * engine.shape.layers

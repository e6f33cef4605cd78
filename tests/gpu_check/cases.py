"""What the check runs: each case is inputs, an operation, and the implementation that it is held against."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import swiglu, swiglu_packed
from kernels.attention import attention
from kernels.convolution import causal_conv1d
from kernels.documents import Documents
from kernels.linear_attention import delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention
from kernels.losses.distillation import distillation_kl
from kernels.losses.linear_cross_entropy import IGNORE_LABEL, linear_cross_entropy
from kernels.losses.token_log_probs import token_log_probs
from kernels.moe import dense_to_sparse_gate, grouped_linear, permute, top_k_gate, unpermute
from kernels.norms import gated_rms_norm, l2_norm, rms_norm
from kernels.quantization import Noise, dequantize, noise_key, quantize
from kernels.rotary import apply_rotary, rotary_tables
from kernels.spiking import spike

# ‖a − b‖ / ‖b‖ of every output and gradient: what rounding costs where products take bfloat16, or three of tf32.
LIMITS = {torch.bfloat16: 8e-3, torch.float32: 2e-5}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Run = Callable[[dict[str, Tensor], str], dict[str, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Inputs by name, and the operation on them under a backend; gradients are taken of those that require them."""

    inputs: dict[str, Tensor]
    run: Run
    against: str = "torch"
    backend: str = "triton"


@dataclass(frozen=True)
class Case:
    """One line of the table. `kind` says what is done with the problem: "numbers", "nan", "training" or "time"."""

    name: str
    group: str
    kind: str
    priority: int
    dtype: torch.dtype
    build: Callable[[torch.device], Problem] | None = None
    # Of a "nan" case: the input that gets one, at `NAN_TOKEN`.
    poisoned: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        """Whether the kernels' plan, and with it its switches, has a part in it."""
        return self.group in RECURRENCES and self.group != "hgrn"


@dataclass(frozen=True)
class Sizes:
    """The tiles of real models on a device; for the interpreter the smallest that take every branch."""

    time: int = 4099
    long: int = 32768
    packed: int = 8192
    heads: int = 16
    wide_batch: int = 2
    wide_heads: int = 40  # with two rows and V = 128 more programs than any GPU has multiprocessors
    dims: tuple[tuple[int, int], ...] = ((128, 128), (64, 64), (96, 96), (256, 256), (64, 128))
    model: int = 2048
    vocabulary: int = 32768
    experts: int = 64
    tokens: int = 8192


REAL = Sizes()
TINY = Sizes(
    time=4,
    long=5,
    packed=3,
    heads=2,
    wide_heads=4,
    dims=((24, 20),),
    model=16,
    vocabulary=33,
    experts=4,
    tokens=8,
)

NAN_TOKEN = 3


class _Draw:
    """Random tensors of one seed on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(dtype or self.dtype).requires_grad_()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape, dtype=torch.float32).detach(), dim=-1).to(self.dtype).requires_grad_()


def documents(time: int) -> list[int]:
    """Bounds of packed documents: of one token, of less and more than a chunk, and long ones."""
    return sorted({0, 1, 2, min(67, time // 4), time // 3, time // 2, time})


def _recurrence_inputs(
    op: str, draw: _Draw, batch: int, time: int, heads: tuple[int, int], dims: tuple[int, int], sequences: int
) -> dict[str, Tensor]:
    """By name; `heads` are those of q and k, and of all else."""
    (few, many), (key, value) = heads, dims
    if op == "hgrn":
        x = {"x": draw.normal(batch, time, many * key)}
        x["log_decay"] = (-0.5 * draw.uniform(batch, time, many * key)).requires_grad_()
        return x | {"initial_state": draw.normal(sequences, many * key, dtype=torch.float32)}
    inputs = {"q": draw.unit(batch, time, few, key)}
    if op != "hgrn2":
        inputs["k"] = draw.unit(batch, time, few, key)
    inputs["v"] = draw.normal(batch, time, many, value)
    shape = {"retention": (many,), "gated_delta_rule": (batch, time, many)}.get(op, (batch, time, many, key))
    if op != "delta_rule":
        decay = -0.1 * draw.uniform(*shape)
        inputs["log_decay"] = decay if op == "retention" else decay.requires_grad_()
    if op.endswith("delta_rule"):
        inputs["beta"] = draw.uniform(batch, time, many).requires_grad_()
    inputs["initial_state"] = draw.normal(sequences, many, key, value, dtype=torch.float32)
    return inputs


# The operation under each name; Kimi's is the gated delta rule with a decay for every channel.
RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "gated_delta_rule": gated_delta_rule,
    "kimi_delta_rule": gated_delta_rule,
    "gla": gla,
    "delta_rule": delta_rule,
    "retention": retention,
    "hgrn2": hgrn2,
    "hgrn": hgrn,
}


def recurrence(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    time: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    packed: bool = False,
) -> Problem:
    """The problem of one recurrence, from an initial state to a final one."""
    packing = Documents(tuple(documents(time))) if packed else None
    sequences = batch if packing is None else len(packing)
    inputs = _recurrence_inputs(op, _Draw(device, dtype), batch, time, heads, dims, sequences)

    def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        rest = dict(given)
        state = rest.pop("initial_state")
        options = {"initial_state": state, "output_final_state": True, "documents": packing, "backend": backend}
        o, final = RECURRENCES[op](**rest, **options)
        assert final is not None
        return {"o": o, "final": final}

    return Problem(inputs, run)


def _recurrence_cases(sizes: Sizes) -> list[Case]:
    found = []

    def add(op: str, label: str, dtype: str, priority: int, **shape: Any) -> None:
        def build(device: torch.device) -> Problem:
            return recurrence(op, device, DTYPES[dtype], **shape)

        (few, many), (key, value) = shape["heads"], shape["dims"]
        what = f"{shape.get('batch', 1)}x{shape['time']} H{many if few == many else f'{few}/{many}'}"
        name = f"{op} {dtype} K{key} V{value} {what} {label}".strip()
        found.append(Case(name, op, "numbers", priority, DTYPES[dtype], build))

    for op in RECURRENCES:
        for dtype in DTYPES:
            for index, dims in enumerate(sizes.dims):
                heads = sizes.heads if max(dims) <= 128 else max(sizes.heads // 2, 1)
                priority = (0 if dtype == "bf16" else 2) + (index > 0)
                add(op, "", dtype, priority, time=sizes.time, heads=(heads, heads), dims=dims)
            # As in models whose values have more heads than their keys; HGRN2's decay is its key.
            few = sizes.heads if op in ("hgrn", "hgrn2") else max(sizes.heads // 2, 1)
            add(op, "packed", dtype, 1, time=sizes.packed, heads=(few, sizes.heads), dims=sizes.dims[0], packed=True)
        wide = {"batch": sizes.wide_batch, "heads": (sizes.wide_heads,) * 2, "dims": sizes.dims[0]}
        add(op, "many programs", "bf16", 1, time=sizes.time // 4, **wide)
        few = max(sizes.heads // 4, 1)
        add(op, "long", "bf16", 3, time=sizes.long, heads=(few, few), dims=sizes.dims[0])
        for poisoned in {"hgrn": ("x", "log_decay"), "hgrn2": ("q", "v", "log_decay")}.get(
            op, ("q", "k", "v", *(() if op == "delta_rule" else ("log_decay",)), *_beta(op))
        ):
            if (op, poisoned) != ("retention", "log_decay"):
                found.append(_nan_case(op, poisoned, sizes))
    return found


def _beta(op: str) -> tuple[str, ...]:
    return ("beta",) if op.endswith("delta_rule") else ()


def _nan_case(op: str, poisoned: str, sizes: Sizes) -> Case:
    def build(device: torch.device) -> Problem:
        heads, time = (max(sizes.heads // 2, 1),) * 2, min(sizes.time, 70)
        return recurrence(op, device, torch.bfloat16, batch=2, time=time, heads=heads, dims=sizes.dims[0])

    return Case(f"{op} NaN in {poisoned}", op, "nan", 1, torch.bfloat16, build, poisoned)


def _convolution(sizes: Sizes, device: torch.device, dtype: torch.dtype, packed: bool) -> Problem:
    draw, width = _Draw(device, dtype), 4
    batch, time = (1, sizes.packed) if packed else (2, sizes.time)
    packing = Documents(tuple(documents(time))) if packed else None
    sequences = batch if packing is None else len(packing)
    inputs = {
        "x": draw.normal(batch, time, sizes.model),
        "weight": draw.normal(sizes.model, width, dtype=torch.float32),
        "initial_state": draw.normal(sequences, sizes.model, width - 1),
    }

    def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        y, final = causal_conv1d(**given, output_final_state=True, documents=packing, backend=backend)
        assert final is not None
        return {"y": y, "final": final}

    return Problem(inputs, run)


def _rows(sizes: Sizes, device: torch.device, dtype: torch.dtype, op: str) -> Problem:
    """What works on rows alone: the norms, the activations and the rotation."""
    draw, head = _Draw(device, dtype), sizes.dims[0][0]
    x = draw.normal(sizes.tokens, sizes.model)
    heads = draw.normal(2, sizes.tokens // 4, sizes.heads, head)
    if op == "rms_norm":
        weight = draw.normal(sizes.model, dtype=torch.float32)
        return Problem(
            {"x": x, "weight": weight}, lambda given, backend: {"y": rms_norm(**given, eps=1e-6, backend=backend)}
        )
    if op == "gated_rms_norm":
        inputs = {"x": heads, "gate": draw.normal(*heads.shape), "weight": draw.normal(head, dtype=torch.float32)}
        return Problem(
            inputs,
            lambda given, backend: {"y": gated_rms_norm(**given, eps=1e-6, activation="silu", backend=backend)},
        )
    if op == "l2_norm":
        return Problem({"x": heads}, lambda given, backend: {"y": l2_norm(**given, backend=backend)})
    if op == "swiglu":
        inputs = {"gate": x, "up": draw.normal(*x.shape)}
        return Problem(inputs, lambda given, backend: {"y": swiglu(**given, backend=backend)})
    if op == "swiglu_packed":
        return Problem({"gate_up": x}, lambda given, backend: {"y": swiglu_packed(**given, backend=backend)})
    if op == "spike":
        # Magnitudes 3/4 and 5/4, whose mean is 1 in any order: of random ones, counts beside a half may differ.
        x = (x.detach().sign() * (1 + 0.25 * (torch.arange(sizes.model, device=device) % 2 * 2 - 1))).to(dtype)
        k = torch.full((sizes.model,), 2.25, device=device).requires_grad_()
        options = {"gradient": "surrogate", "count_range": (-7, 7)}
        return Problem(
            {"x": x.requires_grad_(), "k": k}, lambda given, backend: {"y": spike(**given, **options, backend=backend)}
        )
    if op == "spike of given thresholds":
        thresholds = (0.1 + draw.uniform(sizes.model)).requires_grad_()
        return Problem(
            {"x": x, "threshold": thresholds},
            lambda given, backend: {"y": spike(**given, gradient="clipped", count_range=(-7, 7), backend=backend)},
        )
    cos, sin = rotary_tables(torch.arange(heads.shape[1], device=device), head, 10000.0)
    return Problem({"x": heads}, lambda given, backend: {"y": apply_rotary(**given, cos=cos, sin=sin, backend=backend)})


def _quantization(sizes: Sizes, device: torch.device, dtype: torch.dtype, bits: int) -> Problem:
    """Codes and what comes back; x in one dtype for both sides, since a grid has the digits of its dtype."""
    x = _Draw(device, dtype).normal(sizes.tokens, sizes.model).detach()
    options = {"bits": bits, "group": sizes.dims[0][0], "noise": Noise(noise_key(0, 0, "x", 0))}

    def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        q = quantize(given["x"].to(dtype), **options, backend=backend)
        return {"codes": q.codes.float(), "y": dequantize(q, backend=backend)}

    return Problem({"x": x}, run)


def _loss(sizes: Sizes, device: torch.device, dtype: torch.dtype, op: str) -> Problem:
    draw = _Draw(device, dtype)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=draw.generator, device=device)
    labels[::7] = IGNORE_LABEL
    weights = draw.uniform(sizes.tokens)
    hidden = draw.normal(sizes.tokens, sizes.model)
    table = (0.05 * draw.normal(sizes.vocabulary, sizes.model).detach()).requires_grad_()
    teacher = draw.normal(sizes.tokens, sizes.model).detach(), table.detach().flip(0)

    def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        if op.endswith("distillation_kl"):
            direction = "reverse" if op.startswith("reverse") else "forward"
            options = {"direction": direction, "temperature": 0.8, "backend": backend}
            loss, kl = distillation_kl(given["hidden"], given["weight"], *teacher, weights, **options)
            return {"loss": loss, "kl": kl}
        if op == "token_log_probs":
            options = {"temperature": 0.8, "vocab_size": sizes.vocabulary - 1}
            ids = labels.clamp(max=sizes.vocabulary - 2)
            log_probs, entropies = token_log_probs(given["hidden"], given["weight"], ids, **options, backend=backend)
            assert entropies is not None
            return {"log_probs": log_probs, "entropies": entropies}
        loss, nll = linear_cross_entropy(given["hidden"], given["weight"], labels, weights, backend=backend)
        return {"loss": loss, "nll": nll}

    return Problem({"hidden": hidden, "weight": table}, run)


def _gate(sizes: Sizes, device: torch.device, dtype: torch.dtype, op: str) -> Problem:
    draw = _Draw(device, dtype)
    logits = draw.normal(sizes.tokens, sizes.experts)
    bias = 0.1 * draw.uniform(sizes.experts)

    def run(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        if op == "top_k_gate":
            options = {"score": "sigmoid", "normalize": "after", "num_groups": 2, "group_top_k": 1, "bias_E": bias}
            probs, gates, chosen = top_k_gate(given["logits"], 2, **options, backend=backend)
        else:
            probs, gates, chosen = dense_to_sparse_gate(given["logits"], 0.7, 0.02, max_experts=3, backend=backend)
        return {"probs": probs, "gates": gates, "chosen": chosen}

    return Problem({"logits": logits}, run)


def _experts(sizes: Sizes, device: torch.device, dtype: torch.dtype, op: str) -> Problem:
    draw = _Draw(device, dtype)
    share = 2 / sizes.experts
    routing_map = draw.uniform(sizes.tokens, sizes.experts) < share
    routing_map[:, 1] = False  # an expert without tokens
    probs = draw.uniform(sizes.tokens, sizes.experts).requires_grad_()
    if op == "permute":
        num_rows = int(routing_map.sum())

        def copy(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
            rows, row_probs, tokens, counts = permute(
                given["x"], routing_map, given["probs"], num_rows=num_rows, backend=backend
            )
            assert row_probs is not None
            return {"rows": rows, "row_probs": row_probs, "tokens": tokens, "counts": counts}

        return Problem({"x": draw.normal(sizes.tokens, sizes.model), "probs": probs}, copy)
    counts = routing_map.sum(0)
    tokens = routing_map.T.nonzero()[:, 1]
    rows = draw.normal(len(tokens), sizes.model)
    if op == "unpermute":
        inputs = {"rows": rows, "row_probs": draw.uniform(len(tokens)).requires_grad_()}

        def add_up(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
            return {"x": unpermute(given["rows"], tokens, sizes.tokens, given["row_probs"], backend=backend)}

        return Problem(inputs, add_up)
    weight = draw.normal(sizes.experts, sizes.model // 2, sizes.model)

    def multiply(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        return {"y": grouped_linear(given["rows"], given["weight"], counts, backend=backend)}

    # On a GPU torch's own takes bfloat16 alone.
    return Problem({"rows": rows, "weight": weight}, multiply, against="reference")


def _attention(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, backend: str, window: int | None, packed: bool
) -> Problem:
    draw, head = _Draw(device, dtype), min(sizes.dims[0][0], 128)
    time = min(sizes.time, 2048)
    packing = Documents(tuple(documents(time))) if packed else None
    q = draw.normal(1, time, sizes.heads, head)
    k, v = (draw.normal(1, time, max(sizes.heads // 4, 1), head) for _ in range(2))

    def run(given: dict[str, Tensor], choice: str) -> dict[str, Tensor]:
        return {"o": attention(**given, window=window, documents=packing, backend=choice)}

    return Problem({"q": q, "k": k, "v": v}, run, against="reference", backend=backend)


def _other_cases(sizes: Sizes) -> list[Case]:
    found = []

    def add(group: str, name: str, problem: Callable[..., Problem], *arguments: Any) -> None:
        for dtype in DTYPES:

            def build(device: torch.device, dtype: str = dtype) -> Problem:
                return problem(sizes, device, DTYPES[dtype], *arguments)

            found.append(Case(f"{name} {dtype}", group, "numbers", 0 if dtype == "bf16" else 2, DTYPES[dtype], build))

    for packed in (False, True):
        add("convolution", f"causal_conv1d {'packed' if packed else 'batch'}", _convolution, packed)
    for op in ("rms_norm", "gated_rms_norm", "l2_norm"):
        add("norms", op, _rows, op)
    for op in ("swiglu", "swiglu_packed"):
        add("activations", op, _rows, op)
    for op in ("spike", "spike of given thresholds"):
        add("spiking", op, _rows, op)
    for bits in (8, 4):
        add("quantization", f"quantize in {bits} bits", _quantization, bits)
    add("rotary", "apply_rotary", _rows, "apply_rotary")
    for op in ("linear_cross_entropy", "token_log_probs", "distillation_kl", "reverse distillation_kl"):
        add("losses", op, _loss, op)
    for op in ("top_k_gate", "dense_to_sparse_gate"):
        add("routing", op, _gate, op)
    for op in ("permute", "unpermute", "grouped_linear"):
        add("experts", op, _experts, op)
    for backend, window in (("sdpa", None), ("banded", None), ("banded", 9)):
        for packed in (False, True):
            name = f"attention {backend}{f' window {window}' if window else ''}{' packed' if packed else ''}"
            add("attention", name, _attention, backend, window, packed)
    return found


def _flash_cases(sizes: Sizes) -> list[Case]:
    """flash-attn takes bfloat16 on a GPU."""
    found = []
    for window in (None, 100):
        for packed in (False, True):

            def build(device: torch.device, window: int | None = window, packed: bool = packed) -> Problem:
                return _attention(sizes, device, torch.bfloat16, "flash", window, packed)

            name = f"attention flash{f' window {window}' if window else ''}{' packed' if packed else ''} bf16"
            found.append(Case(name, "attention", "numbers", 0, torch.bfloat16, build))
    return found


def all_cases(sizes: Sizes, *, flash: bool) -> list[Case]:
    """The most important first: bfloat16 before float32, usual sizes before others, times at the end."""
    cases = _recurrence_cases(sizes) + _other_cases(sizes) + (_flash_cases(sizes) if flash else [])
    for engine, name in ((False, "plain PyTorch"), (True, "Megatron engine")):
        name = f"training: hybrid MoE, {name}"
        cases.append(Case(name, "training", "training", 0, torch.bfloat16, options={"engine": engine}))
    for op in RECURRENCES:
        few = (sizes.heads,) * 2
        shape = {"time": sizes.long, "heads": few, "dims": sizes.dims[0]}

        def build(device: torch.device, op: str = op, shape: dict[str, Any] = shape) -> Problem:
            return recurrence(op, device, torch.bfloat16, **shape)

        name = f"time: {op} bf16 K{shape['dims'][0]} 1x{sizes.long} H{few[0]}"
        cases.append(Case(name, op, "time", 9, torch.bfloat16, build, options={"op": op}))
    return sorted(cases, key=lambda case: case.priority)

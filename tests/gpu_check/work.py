"""One case on the device: its numbers, its NaN, its training or its times, as a line of JSON."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.triton.chunked import PLAN_VARIABLE
from tests.gpu_check.cases import LIMITS, NAN_TOKEN, Case, Problem
from tests.gpu_check.peers import fla_call
from tests.gpu_check.training import train

Result = dict[str, Any]


def run_case(case: Case, device: torch.device, switch: str = "") -> Result:
    """What the case found: its state ("ok", "wrong", "failed", "skipped"), figures, and a message where not ok."""
    started = time.perf_counter()
    action = {"numbers": _numbers, "nan": _nan, "training": _training, "time": _times}[case.kind]
    try:
        with _switched(switch):
            found = action(case, device)
    # Whatever the compiler or the device says is the case's result; the next case runs all the same.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = {"state": "failed", "message": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
    gc.collect()
    return {"case": case.name, "group": case.group, **found, "seconds": round(time.perf_counter() - started, 2)}


@contextmanager
def _switched(switch: str) -> Iterator[None]:
    """The plan's switches beside those of the environment, and the environment as it was afterwards."""
    before = os.environ.get(PLAN_VARIABLE, "")
    os.environ[PLAN_VARIABLE] = ",".join(part for part in (before, switch) if part)
    try:
        yield
    finally:
        os.environ[PLAN_VARIABLE] = before


def outputs_and_gradients(problem: Problem, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """What the operation returns and, named with a d, the gradients of a random linear loss of all of it.

    The loss's weights are rounded as the narrow outputs are, so that both sides take the same numbers.
    """
    leaves = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    outputs = problem.run(leaves, backend)
    differentiable = {name: x for name, x in outputs.items() if x.requires_grad}
    weights = []
    for seed, x in enumerate(differentiable.values()):
        generator = torch.Generator(x.device).manual_seed(1000 + seed)
        drawn = torch.randn(x.shape, generator=generator, device=x.device)
        weights.append(drawn.to(torch.bfloat16).to(x.dtype))
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    # What is stored has no gradient: then there are none to take.
    gradients = torch.autograd.grad(list(differentiable.values()), list(wanted.values()), weights) if wanted else ()
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {f"d{name}": x for name, x in zip(wanted, gradients)}


def _error(actual: Tensor, expected: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where a is not finite or of another shape."""
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    a, b = actual.double(), expected.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _numbers(case: Case, device: torch.device) -> Result:
    problem = _build(case, device)
    before = _start_counting(device)
    first = outputs_and_gradients(problem, problem.inputs, problem.backend)
    peak = _peak(device, before)
    second = outputs_and_gradients(problem, problem.inputs, problem.backend)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    del second
    wide = {name: x.detach().float().requires_grad_(x.requires_grad) for name, x in problem.inputs.items()}
    expected = outputs_and_gradients(problem, wide, problem.against)
    errors = {name: _error(first[name], expected[name]) for name in expected}
    limit = LIMITS[case.dtype]
    beyond = [f"{name} is off by {error:.1e} of {limit:.0e}" for name, error in errors.items() if not error <= limit]
    # Where NaN are equal to nothing, two runs differ too.
    beyond += [f"two runs differ in {', '.join(differing)}"] if differing else []
    worst = max(errors, key=lambda name: errors[name])
    return {
        "state": "wrong" if beyond else "ok",
        "message": "; ".join(beyond),
        "worst": worst,
        "error": errors[worst],
        "limit": limit,
        "errors": errors,
        "bitwise": not differing,
        "peak_bytes": peak,
    }


def _build(case: Case, device: torch.device) -> Problem:
    assert case.build is not None
    return case.build(device)


def _nan(case: Case, device: torch.device) -> Result:
    """A NaN at one token of the first row reaches that token's output, and no other row."""
    problem = _build(case, device)
    inputs = {name: x.detach().clone() for name, x in problem.inputs.items()}
    inputs[case.poisoned][0, NAN_TOKEN] = float("nan")
    found = next(iter(problem.run(inputs, problem.backend).values()))
    lost = not bool(found[0, NAN_TOKEN].isnan().all())
    spread = not bool(found[1].isfinite().all())
    faults = [*(["a NaN input gives a finite output"] if lost else []), *(["it reaches another row"] if spread else [])]
    return {"state": "wrong" if faults else "ok", "message": "; ".join(faults)}


def _training(case: Case, device: torch.device) -> Result:
    return train(device, by_engine=case.options["engine"])


def _start_counting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> int | None:
    """Bytes beyond the inputs, None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of ten runs after two that warm up; of the interpreter, which nobody times, one."""
    warm, repeats = (2, 10) if device.type == "cuda" else (0, 1)
    taken = []
    for index in range(warm + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= warm:
            taken.append(time.perf_counter() - started)
    return 1e3 * sorted(taken)[len(taken) // 2]


def _forward_backward(call: Callable[[], Tensor], inputs: list[Tensor], device: torch.device) -> dict[str, float]:
    o = call()
    weight = torch.ones_like(o)
    forward = _milliseconds(call, device)
    backward = _milliseconds(lambda: torch.autograd.grad(o, inputs, weight, retain_graph=True), device)
    return {"forward_ms": forward, "backward_ms": backward}


def _times(case: Case, device: torch.device) -> Result:
    """Milliseconds of ours and, where fla-core can be imported, of its function on the same inputs."""
    problem = _build(case, device)
    inputs = {name: x for name, x in problem.inputs.items() if name != "initial_state"}
    leaves = [x for x in inputs.values() if x.requires_grad]
    state = {"initial_state": problem.inputs["initial_state"].detach().zero_()}
    ours = _forward_backward(lambda: problem.run(inputs | state, problem.backend)["o"], leaves, device)
    theirs: dict[str, Any] = {}
    peer = fla_call(case.options["op"])
    if peer is not None:
        try:
            theirs = {f"fla_{key}": x for key, x in _forward_backward(lambda: peer(inputs), leaves, device).items()}
        # The peer may refuse this device or compiler, as it does where it knows a fault: no failing of ours.
        except Exception as error:
            theirs = {"fla_message": f"{type(error).__name__}: {error}"[:200]}
    return {"state": "ok", "message": "", **ours, **theirs}

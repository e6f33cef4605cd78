"""Spikes: activations as integer spike counts, and codings of counts into time steps."""

from kernels.spiking.coding import (
    CODINGS,
    Coding,
    SpikeTrain,
    count_range,
    decode,
    encode,
    event_linear,
    integrate_and_fire,
    spiking_linear,
    step_weights,
)
from kernels.spiking.neuron import spike, spike_counts, spike_reference

__all__ = [
    "CODINGS",
    "Coding",
    "SpikeTrain",
    "count_range",
    "decode",
    "encode",
    "event_linear",
    "integrate_and_fire",
    "spike",
    "spike_counts",
    "spike_reference",
    "spiking_linear",
    "step_weights",
]

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
from kernels.spiking.delta import delta_changes, delta_levels, delta_spike
from kernels.spiking.neuron import float_counts, spike, spike_counts, spike_reference

__all__ = [
    "CODINGS",
    "Coding",
    "SpikeTrain",
    "count_range",
    "decode",
    "delta_changes",
    "delta_levels",
    "delta_spike",
    "encode",
    "event_linear",
    "float_counts",
    "integrate_and_fire",
    "spike",
    "spike_counts",
    "spike_reference",
    "spiking_linear",
    "step_weights",
]

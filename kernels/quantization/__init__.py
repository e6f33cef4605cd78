"""Quantization: stored activations in 8 or 4 bits, ReLU masks in one bit, and int8 of spiking models (int8.py)."""

from kernels.noise import Noise, noise_key
from kernels.quantization.quantizer import (
    Bounds,
    Quantized,
    dequantize,
    dequantize_reference,
    group_bounds,
    quantize,
    quantize_reference,
    quantized_bytes,
)
from kernels.quantization.signs import pack_signs, unpack_signs

__all__ = [
    "Bounds",
    "Noise",
    "Quantized",
    "dequantize",
    "dequantize_reference",
    "group_bounds",
    "noise_key",
    "pack_signs",
    "quantize",
    "quantize_reference",
    "quantized_bytes",
    "unpack_signs",
]

"""Linear attention: one file per recurrence, each with a token-by-token reference and a chunked form."""

from kernels.linear_attention.delta_rule import delta_rule, delta_rule_reference
from kernels.linear_attention.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from kernels.linear_attention.gla import gla, gla_reference
from kernels.linear_attention.hgrn import hgrn, hgrn_reference
from kernels.linear_attention.hgrn2 import hgrn2, hgrn2_reference
from kernels.linear_attention.retention import retention, retention_reference

__all__ = [
    "delta_rule",
    "delta_rule_reference",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gla",
    "gla_reference",
    "hgrn",
    "hgrn2",
    "hgrn2_reference",
    "hgrn_reference",
    "retention",
    "retention_reference",
]

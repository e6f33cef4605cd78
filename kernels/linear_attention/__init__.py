"""Linear attention: one file per recurrence, each with a token-by-token reference and a chunked form."""

from kernels.linear_attention.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from kernels.linear_attention.gla import gla, gla_reference

__all__ = ["gated_delta_rule", "gated_delta_rule_reference", "gla", "gla_reference"]

"""config.json files with wrong values: one line that names them, never another error. Imports no torch."""

import subprocess
import sys

import pytest

from models.hub.registry import ADAPTERS, from_hub, to_hub
from models.hub.values import pattern_of
from tests.trainer.conftest import ROOT

SHARED = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "hidden_act": "silu"}
SOFTMAX = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 500.0, "layer_types": None}
SOFTMAX |= {"rope_parameters": None, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
NEXT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NEXT |= {"shared_expert_intermediate_size": 48, "full_attention_interval": 2, "linear_conv_kernel_dim": 4}
FLA = {"attn": {"layers": [1], "num_heads": 4}, "num_heads": 2, "hidden_ratio": 4, "norm_eps": 1e-6}
GROUPED = {"num_v_heads": 2, "head_dim": 8, "expand_v": 1.0, "conv_size": 4, "allow_neg_eigval": False}
CONFIGS = {
    "llama": SOFTMAX,
    "qwen2": SOFTMAX | {"max_window_layers": 1},
    "qwen3": SOFTMAX | {"max_window_layers": 1},
    "mistral": SOFTMAX,
    "mixtral": SOFTMAX | EXPERTS,
    "qwen3_moe": SOFTMAX | EXPERTS,
    "qwen3_next": SOFTMAX | EXPERTS | NEXT | {"partial_rotary_factor": 0.5},
    "gla": FLA | {"expand_k": 0.5, "expand_v": 1.0},
    "retnet": FLA | {"expand_k": 1.0, "expand_v": 2.0},
    "hgrn": FLA | {"expand_ratio": 1},
    "hgrn2": FLA | {"expand_ratio": 16},
    "delta_net": FLA | {"expand_k": 0.5, "expand_v": 1.0, "conv_size": 4, "use_gate": False},
    "gated_deltanet": FLA | GROUPED,
    "kda": FLA | GROUPED | {"lower_bound": -5.0, "safe_gate": True},
    "gla_swa": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "auto_map": {}},
}
WRONG = [None, "x", "", -1, 0, 7, 2.5, float("nan"), float("inf"), True, [], [9], ["x"], {}, {"layers": 1}, {"x": "y"}]
WRONG += [{"rope_type": 3}, {"rope_type": "yarn", "factor": "x"}, [{"layers": [0], "num_heads": 0}], {"factor": [1]}]


def test_every_adapter_is_tried():
    assert CONFIGS.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_values_are_refused_in_one_line(kind):
    config = {"model_type": kind} | SHARED | CONFIGS[kind]
    assert to_hub(from_hub(config), 50, "float32", 64)["model_type"] in (kind, "llama", "mistral")
    messages = [outcome(kind, config | {key: value}) for key in config for value in WRONG]
    assert not any("\n" in message for message in messages)
    assert sum(map(bool, messages)) > 5 * len(config)


def outcome(kind, config):
    """The message of a refusal; empty if the configuration is accepted."""
    try:
        assert from_hub(config).num_layers > 0
        ADAPTERS[kind].left_out(config)
    except (ValueError, KeyError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mixers", "pattern"),
    [
        (["a"] * 5, "a"),
        (["a", "b", "a", "b"], "a, b"),
        (["a", "b", "a"], "a, b"),
        (["a", "a", "a", "b"] * 2, "a*3, b"),
        (["b", "a", "a"], "b, a*2"),
    ],
)
def test_the_shortest_pattern(mixers, pattern):
    assert pattern_of(mixers) == pattern


def test_configurations_need_no_torch():
    program = "import sys, models.hub.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

"""Model shapes: which mixer each layer has, and what every wrong value is answered with."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import (
    LINEAR_MIXERS,
    MIXERS,
    SOFTMAX_MIXERS,
    AttentionConfig,
    DeltaNetConfig,
    DenseToSparseConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    HGRN2Config,
    KimiDeltaAttentionConfig,
    MixerLayoutConfig,
    ModelConfig,
    MoEConfig,
    RetentionConfig,
    RouterConfig,
    SpikingBrainGLAConfig,
    branches,
    parse_pattern,
)
from trainer.cli import from_mapping

GDN, GLA, FULL, SLIDING = "gated_delta_net", "gated_linear_attention", "full_attention", "sliding_window_attention"


def test_every_mixer_has_a_kind():
    assert {FULL, SLIDING} == set(SOFTMAX_MIXERS)
    others = {"retention", "hgrn", "hgrn2", "delta_net", "kimi_delta_attention"}
    assert {GDN, GLA, "spikingbrain_gla", "spikingbrain_tied_gla"} | others == set(LINEAR_MIXERS)
    assert set(MIXERS) == set(SOFTMAX_MIXERS) | set(LINEAR_MIXERS)
    assert [name for name, mixer in MIXERS.items() if mixer.lower_bounded] == ["hgrn", "hgrn2"]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("full_attention", [FULL]),
        ("gated_delta_net*3, full_attention", [GDN, GDN, GDN, FULL]),
        (" gated_delta_net * 2,sliding_window_attention,gated_linear_attention*1 ", [GDN, GDN, SLIDING, GLA]),
    ],
)
def test_pattern(pattern, expanded):
    assert parse_pattern(pattern) == expanded


def test_branches_in_a_pattern():
    """A layer's name tells its mixers, however it was spaced; a count repeats the layer."""
    expanded = parse_pattern(f"{GLA}+{SLIDING} *2, {GDN}, {GLA}  +  {FULL}")
    assert expanded == [f"{GLA} + {SLIDING}", f"{GLA} + {SLIDING}", GDN, f"{GLA} + {FULL}"]
    assert [branches(layer) for layer in expanded] == [[GLA, SLIDING], [GLA, SLIDING], [GDN], [GLA, FULL]]


spaces = st.sampled_from(["", " ", "  "])
names = st.sampled_from(list(MIXERS))
layers = names | st.lists(names, min_size=2, max_size=3).map(" + ".join)
entries = st.tuples(layers, st.integers(1, 12) | st.none())


@settings(deadline=None)
@given(st.lists(entries, min_size=1, max_size=6), st.data())
def test_pattern_reads_what_was_rendered(parts, data):
    def render(name, count):
        before, between, after = (data.draw(spaces) for _ in range(3))
        return f"{before}{name}{after}" if count is None else f"{before}{name}{between}*{between}{count}{after}"

    pattern = ",".join(render(name, count) for name, count in parts)
    assert parse_pattern(pattern) == [name for name, count in parts for _ in range(count or 1)]


@settings(deadline=None)
@given(st.text("*,+ 019", max_size=8).map(lambda text: text.replace("9", FULL)))
def test_pattern_is_read_or_refused(pattern):
    readable = rf" *{FULL}( *\+ *{FULL})* *(\* *0*[1-9][0-9]* *)?"
    if all(re.fullmatch(readable, part) for part in pattern.split(",")):
        assert {name for layer in parse_pattern(pattern) for name in branches(layer)} == {FULL}
    else:
        with pytest.raises(ValueError, match=r"^model\.mixers\.pattern: "):
            parse_pattern(pattern)


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
def test_ratios_count_different_things(ratio):
    """With r linear layers per softmax layer the period is r + 1; with every N-th layer a softmax layer it is N."""
    per_full = MixerLayoutConfig(linear_per_full=ratio).period()
    every = MixerLayoutConfig(full_attention_every=ratio).period()
    assert per_full == [GDN] * ratio + [FULL]
    assert every == [GDN] * (ratio - 1) + [FULL]
    assert MixerLayoutConfig(full_attention_every=ratio + 1).period() == per_full


def test_ratios_take_the_mixers_they_are_given():
    layout = MixerLayoutConfig(linear_per_full=2, linear=GLA, softmax=SLIDING)
    assert layout.period() == [GLA, GLA, SLIDING]
    assert MixerLayoutConfig(full_attention_every=2, linear=GLA, softmax=SLIDING).period() == [GLA, SLIDING]


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(MIXERS)), min_size=1, max_size=5), st.integers(1, 20))
def test_the_period_is_repeated_and_cut(period, num_layers):
    config = ModelConfig(num_layers=num_layers, mixers=MixerLayoutConfig(pattern=", ".join(period)))
    assert config.layer_mixers() == (period * num_layers)[:num_layers]


def test_full_attention_where_nothing_was_asked_for():
    assert ModelConfig(num_layers=3).layer_mixers() == [FULL] * 3


def test_resolved_defaults():
    assert ModelConfig(hidden_size=64).attention_head_dim == 16
    assert ModelConfig(attention=AttentionConfig(head_dim=10)).attention_head_dim == 10
    assert GatedDeltaNetConfig(num_heads=3).value_heads == 3
    gdn = GatedDeltaNetConfig(num_heads=2, num_v_heads=6, head_dim=8, expand_v=1.5)
    assert (gdn.value_heads, gdn.head_v_dim) == (6, 12)
    kda = KimiDeltaAttentionConfig(num_heads=2, head_dim=8, expand_v=2.0)
    assert (kda.value_heads, kda.head_v_dim) == (2, 16)
    assert DeltaNetConfig(head_dim=8, expand_v=0.5).head_v_dim == 4


@pytest.mark.parametrize(
    ("mixer", "shape"),
    [
        ("gated_delta_net", (6, 8, 12)),
        ("gated_linear_attention", (4, 32, 64)),
        ("retention", (4, 64, 128)),
        ("hgrn", (1, 1, 256)),
        ("hgrn2", (4, 64, 64)),
        ("delta_net", (3, 16, 8)),
        ("kimi_delta_attention", (4, 64, 64)),
        ("spikingbrain_gla", (8, 40, 40)),
        ("spikingbrain_tied_gla", (8, 40, 40)),
    ],
)
def test_shapes_of_states(mixer, shape):
    config = ModelConfig(
        hidden_size=256,
        gated_delta_net=GatedDeltaNetConfig(num_heads=2, num_v_heads=6, head_dim=8, expand_v=1.5),
        hgrn2=HGRN2Config(head_dim=64),
        delta_net=DeltaNetConfig(num_heads=3, head_dim=16, expand_v=0.5),
        spikingbrain_gla=SpikingBrainGLAConfig(num_heads=8, num_kv_heads=2, head_dim=40),
    )
    assert config.state_shape(mixer) == shape


def pattern(text):
    return lambda: MixerLayoutConfig(pattern=text)


def model(**values):
    return lambda: ModelConfig(**values)


TURNING = RetentionConfig(rope_theta=500.0)
_SPARSE = "model.moe.router.dense_to_sparse"
WRONG_EXPERTS = [
    ({"num_experts": -1}, "model.moe.num_experts is -1: it must not be negative"),
    ({"shared_experts": -1}, "model.moe.shared_experts is -1: it must not be negative"),
    ({"expert_hidden_size": 0}, "model.moe.expert_hidden_size is 0: it must be positive"),
    ({"capacity_factor": 0.0}, "model.moe.capacity_factor is 0.0: it must be positive"),
    ({"pad_to_capacity": True}, "model.moe.pad_to_capacity needs a capacity; set model.moe.capacity_factor"),
    ({"replicated_experts": -1}, "model.moe.replicated_experts is -1: it must not be negative"),
    ({"replicated_experts": 5}, "model.moe.replicated_experts=5 exceeds model.moe.num_experts=4"),
    ({"replicate_above": 0.5}, "model.moe.replicate_above is 0.5: it must be at least 1, the mean load"),
    ({"spawn_step": 0}, "model.moe.spawn_step is 0: it must be at least 1, or null for all experts from the start"),
    ({"spawn_diversify": 1.0}, "model.moe.spawn_diversify is 1.0: it must be in [0, 1)"),
    ({"router": {"top_k": 5}}, "model.moe.router.top_k=5 exceeds model.moe.num_experts=4"),
    ({"router": {"top_k": 0}}, "model.moe.router.top_k is 0: it must be positive"),
    ({"router": {"num_groups": 3}}, "model.moe.router.num_groups=3 must divide num_experts=4 into groups"),
    ({"router": {"num_groups": 4}}, "of which group_top_k=1 hold top_k=2 experts"),
    ({"router": {"group_top_k": 2}}, "model.moe.router.group_top_k=2 must be at most num_groups=1"),
    ({"router": {"bias_update_rate": -1.0}}, "model.moe.router.bias_update_rate=-1.0 must not be negative"),
    *(
        (
            {"router": {"gate": "dense_to_sparse", name: value}},
            f"model.moe.router.{name}={value} is for gate=top_k; leave",
        )
        for name, value in (("bias_update_rate", 0.1), ("num_groups", 2), ("score", "sigmoid"))
    ),
    *(
        ({"router": {"dense_to_sparse": {name: 0}}}, f"{_SPARSE}.{name} is 0: it must be")
        for name in ("decay_steps", "max_experts_start", "max_experts_end")
    ),
    *(
        ({"router": {"dense_to_sparse": {name: 0.0}}}, f"{_SPARSE}.{name} is 0.0: it must be positive")
        for name in ("temperature_start", "temperature_end")
    ),
    ({"router": {"dense_to_sparse": {"threshold": 1.0}}}, f"{_SPARSE}.threshold is 1.0: it must be in [0, 1)"),
    ({"router": {"dense_to_sparse": {"plateau_steps": -1}}}, f"{_SPARSE}.plateau_steps is -1: it must not be negative"),
    ({"losses": {"balance": -1.0}}, "model.moe.losses.balance is -1.0: it must not be negative"),
    ({"losses": {"z": -1.0}}, "model.moe.losses.z is -1.0: it must not be negative"),
]

WRONG = [
    (pattern(""), "model.mixers.pattern: cannot read ''; write NAME or NAME*COUNT, comma-separated"),
    (pattern("full_attention,"), "model.mixers.pattern: cannot read ''; write NAME or NAME*COUNT, comma-separated"),
    (pattern("full_attention*"), "cannot read 'full_attention*'; write NAME or NAME*COUNT"),
    (pattern("3*full_attention"), "cannot read '3*full_attention'; write NAME or NAME*COUNT"),
    (pattern("full_attention*-1"), "cannot read 'full_attention*-1'"),
    (pattern("mamba"), f"model.mixers.pattern: no mixer 'mamba'; choose from {', '.join(MIXERS)}"),
    (pattern("full_attention*0"), "model.mixers.pattern: 'full_attention*0' repeats zero times"),
    (
        pattern("full_attention +"),
        "cannot read 'full_attention +'; write NAME or NAME*COUNT, comma-separated, and NAME +",
    ),
    (pattern("hgrn*2 + full_attention"), "model.mixers.pattern: cannot read 'hgrn*2 + full_attention'"),
    (pattern("hgrn + mamba"), "model.mixers.pattern: no mixer 'mamba'; choose from"),
    (
        model(hidden_size=64, mixers=MixerLayoutConfig(pattern="retention + full_attention, hgrn"), retention=TURNING),
        "model.mixers: 'retention + full_attention' rotates by different (channels, base, scaling), "
        "(16, 10000.0, None) and (16, 500.0, None); make them alike, or model.attention.rope_theta null",
    ),
    (
        model(hidden_size=192, mixers=MixerLayoutConfig(pattern="full_attention + hgrn2")),
        "model.hgrn2.head_dim=128 does not divide model.hidden_size=192",
    ),
    (
        lambda: MixerLayoutConfig(pattern=FULL, linear_per_full=1),
        "model.mixers: pattern and linear_per_full are both set; keep one and set the others to null",
    ),
    (
        lambda: MixerLayoutConfig(linear_per_full=1, full_attention_every=1),
        "linear_per_full and full_attention_every are both set",
    ),
    (lambda: MixerLayoutConfig(linear_per_full=0), "model.mixers.linear_per_full is 0: it must be at least 1"),
    (
        lambda: MixerLayoutConfig(full_attention_every=-2),
        "model.mixers.full_attention_every is -2: it must be at least 1",
    ),
    (lambda: AttentionConfig(num_heads=0), "model.attention.num_heads is 0: it must be positive"),
    (lambda: AttentionConfig(num_kv_heads=0), "model.attention.num_kv_heads is 0: it must be positive"),
    (lambda: AttentionConfig(window=0), "model.attention.window is 0: it must be positive"),
    (
        lambda: AttentionConfig(num_heads=4, num_kv_heads=3),
        "model.attention.num_kv_heads=3 does not divide num_heads=4",
    ),
    (
        lambda: AttentionConfig(rope_theta=0.0),
        "model.attention.rope_theta is 0.0: it must be positive, or null for NoPE",
    ),
    (lambda: AttentionConfig(head_dim=0), "model.attention.head_dim is 0: it must be positive"),
    (lambda: AttentionConfig(head_dim=7), "model.attention.head_dim=7 must be even (rotary pairs)"),
    (lambda: GatedDeltaNetConfig(num_heads=0), "model.gated_delta_net.num_heads is 0: it must be positive"),
    (lambda: GatedDeltaNetConfig(head_dim=-8), "model.gated_delta_net.head_dim is -8: it must be positive"),
    (lambda: GatedDeltaNetConfig(expand_v=0.0), "model.gated_delta_net.expand_v is 0.0: it must be positive"),
    (lambda: GatedDeltaNetConfig(conv_size=0), "model.gated_delta_net.conv_size is 0: it must be positive"),
    (
        lambda: GatedDeltaNetConfig(num_heads=2, num_v_heads=3),
        "model.gated_delta_net.num_v_heads=3 must be a multiple of num_heads=2",
    ),
    (lambda: GatedDeltaNetConfig(num_v_heads=0), "model.gated_delta_net.num_v_heads=0 must be a multiple"),
    (
        lambda: GatedDeltaNetConfig(head_dim=9, expand_v=1.5),
        "model.gated_delta_net: head_dim=9 times expand_v=1.5 is not a whole number",
    ),
    *(
        (
            lambda name=name: GatedLinearAttentionConfig(**{name: 0}),
            f"model.gated_linear_attention.{name} is 0: it must be positive",
        )
        for name in ("num_heads", "expand_k", "expand_v", "gate_low_rank", "gate_normalizer")
    ),
    *(
        (lambda name=name: RetentionConfig(**{name: 0}), f"model.retention.{name} is 0: it must be positive")
        for name in ("num_heads", "expand_k", "expand_v", "rope_theta")
    ),
    (lambda: HGRN2Config(head_dim=0), "model.hgrn2.head_dim is 0: it must be positive"),
    *(
        (lambda name=name: DeltaNetConfig(**{name: 0}), f"model.delta_net.{name} is 0: it must be positive")
        for name in ("num_heads", "head_dim", "expand_v", "conv_size")
    ),
    (
        lambda: DeltaNetConfig(head_dim=9, expand_v=1.5),
        "model.delta_net: head_dim=9 times expand_v=1.5 is not a whole number",
    ),
    *(
        (
            lambda name=name: KimiDeltaAttentionConfig(**{name: 0}),
            f"model.kimi_delta_attention.{name} is 0: it must be positive",
        )
        for name in ("num_heads", "head_dim", "expand_v", "conv_size")
    ),
    (
        lambda: KimiDeltaAttentionConfig(num_heads=2, num_v_heads=3),
        "model.kimi_delta_attention.num_v_heads=3 must be a multiple of num_heads=2",
    ),
    (
        lambda: KimiDeltaAttentionConfig(head_dim=9, expand_v=1.5),
        "model.kimi_delta_attention: head_dim=9 times expand_v=1.5 is not a whole number",
    ),
    (
        lambda: KimiDeltaAttentionConfig(gate="hard"),
        "model.kimi_delta_attention.gate='hard' must be softplus or bounded",
    ),
    (
        lambda: KimiDeltaAttentionConfig(min_log_decay=0.0),
        "model.kimi_delta_attention.min_log_decay is 0.0: it must be negative",
    ),
    *(
        (
            lambda name=name: SpikingBrainGLAConfig(**{name: 0}),
            f"model.spikingbrain_gla.{name} is 0: it must be positive",
        )
        for name in ("num_heads", "num_kv_heads", "head_dim", "gate_low_rank", "gate_normalizer")
    ),
    (
        lambda: SpikingBrainGLAConfig(num_heads=4, num_kv_heads=3),
        "model.spikingbrain_gla.num_kv_heads=3 does not divide num_heads=4",
    ),
    (
        model(hidden_size=30, mixers=MixerLayoutConfig(pattern="retention")),
        "model.retention.expand_k=1.0 times model.hidden_size=30 does not divide over num_heads=4",
    ),
    (
        model(hidden_size=36, mixers=MixerLayoutConfig(pattern="retention")),
        "model.retention: expand_k=1.0 times model.hidden_size=36 over num_heads=4 gives an odd head size, 9 "
        "(rotary pairs)",
    ),
    (
        model(hidden_size=192, mixers=MixerLayoutConfig(pattern="hgrn2")),
        "model.hgrn2.head_dim=128 does not divide model.hidden_size=192",
    ),
    (
        lambda: ModelConfig().state_shape("full_attention"),
        f"'full_attention' carries no state; choose from {', '.join(LINEAR_MIXERS)}",
    ),
    *(
        (model(**{name: 0}), f"model.{name} is 0: it must be positive")
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_multiple", "norm_eps", "init_std")
    ),
    (model(vocab_size=0), "model.vocab_size=0 must be positive"),
    (
        model(hidden_size=36),
        "model.hidden_size=36 gives no even head size over model.attention.num_heads=4; set model.attention.head_dim",
    ),
    (
        model(hidden_size=30, mixers=MixerLayoutConfig(pattern=GLA)),
        "model.gated_linear_attention.expand_k=0.5 times model.hidden_size=30 does not divide over num_heads=4",
    ),
    (
        model(
            hidden_size=32,
            mixers=MixerLayoutConfig(pattern=GLA),
            gated_linear_attention=GatedLinearAttentionConfig(expand_v=0.3),
        ),
        "model.gated_linear_attention.expand_v=0.3 times model.hidden_size=32 does not divide over num_heads=4",
    ),
    *(
        (lambda values=values: from_mapping(MoEConfig, {"num_experts": 4} | values), message)
        for values, message in WRONG_EXPERTS
    ),
    *(
        (model(moe=MoEConfig(num_experts=2, dense_layers=layers)), f"model.moe.dense_layers={layers} must be some, not")
        for layers in ([8], [-1], list(range(8)))
    ),
    (
        lambda: ModelConfig(vocab_size=99).padded_vocab_size(100),
        "model.vocab_size=99 is smaller than the tokenizer's 100; raise it or set it to null",
    ),
]


@pytest.mark.parametrize(("build", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_values_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_sizes_are_checked_only_where_a_layer_uses_them():
    ModelConfig(hidden_size=30, mixers=MixerLayoutConfig(pattern=GDN))
    ModelConfig(hidden_size=36, attention=AttentionConfig(head_dim=8))
    # Of two that would rotate differently only one does.
    ModelConfig(
        hidden_size=64,
        mixers=MixerLayoutConfig(pattern="retention + full_attention"),
        attention=AttentionConfig(rope_theta=None),
        retention=TURNING,
    )
    # The pattern names both, but the only layer is the first of them.
    ModelConfig(num_layers=1, hidden_size=32, mixers=MixerLayoutConfig(pattern=f"{FULL}, {GLA}"))


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(1, 200), st.integers(0, 500))
def test_vocabulary_is_padded_to_the_next_multiple(tokenizer_size, multiple, spare):
    for wanted, config in (
        (tokenizer_size, ModelConfig(vocab_multiple=multiple)),
        (tokenizer_size + spare, ModelConfig(vocab_multiple=multiple, vocab_size=tokenizer_size + spare)),
    ):
        padded = config.padded_vocab_size(tokenizer_size)
        assert padded % multiple == 0 and wanted <= padded < wanted + multiple


def test_which_layers_have_experts():
    config = ModelConfig(num_layers=4, ffn_hidden_size=96, moe=MoEConfig(num_experts=2, dense_layers=[0, 2]))
    assert config.moe_layers() == [1, 3] and config.expert_hidden_size == 96
    assert ModelConfig(moe=MoEConfig(dense_layers=[99])).moe_layers() == [], "without experts nothing is checked"


SPARSE = DenseToSparseConfig(temperature_start=2.0, temperature_end=0.5, plateau_steps=10, decay_steps=20)


@pytest.mark.parametrize(("schedule", "half"), [("linear", 1.25), ("exponential", 1.0), ("cosine", 1.25)])
def test_temperature_by_schedule(schedule, half):
    sparse = replace(SPARSE, schedule=schedule)
    at = {step: sparse.temperature(step) for step in (0, 10, 20, 30, 10**6, None)}
    assert at == pytest.approx({0: 2.0, 10: 2.0, 20: half, 30: 0.5, 10**6: 0.5, None: 0.5})
    steps = [sparse.temperature(step) for step in range(10, 31)]
    assert steps == sorted(steps, reverse=True)


def test_the_number_of_experts_shrinks_until_it_is_hard():
    router = RouterConfig(gate="dense_to_sparse", top_k=1, dense_to_sparse=replace(SPARSE, hard_top_k_after=25))
    moe = MoEConfig(num_experts=8, router=router)
    assert [moe.experts_at(step) for step in (0, 10, 20, 24, 25, None)] == [8, 8, 4, 3, 1, 1]
    sparse = replace(SPARSE, max_experts_start=6, max_experts_end=3)
    moe = MoEConfig(num_experts=8, router=replace(router, dense_to_sparse=sparse))
    assert [moe.experts_at(step) for step in (0, 20, 30, None)] == [6, 4, 3, 3]
    assert MoEConfig(num_experts=8, router=RouterConfig(top_k=2)).experts_at(0) == 2


def test_a_learned_temperature_wants_an_activation_that_fixes_its_scale():
    for activation in ("none", "relu", "sigmoid", "tanh", "gelu", "silu"):
        warning = DenseToSparseConfig(activation=activation, schedule="learned").warning()
        assert (warning is None) == (activation not in ("none", "relu"))
        assert DenseToSparseConfig(activation=activation).warning() is None

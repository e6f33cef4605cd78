"""Experts from a dense model: what they hold, that they compute what it computed, and that runs start from them."""

import pytest
import torch
from safetensors.torch import load_file

from models.config import DenseToSparseConfig, MoEConfig, RouterConfig
from models.decoder import Decoder, initialize, shapes
from models.moe.statistics import begin_step, routers
from tests.helpers import VOCABULARY, draw_tokens, rows, tiny_model_config
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.opening import open_weights
from trainer.stored.upcycle import expected_gates, upcycle

DENSE = tiny_model_config("gated_delta_net, full_attention, full_attention", num_layers=3)
PAPER = MoEConfig(num_experts=16, shared_experts=1, dense_layers=[0], router=RouterConfig(top_k=1))
SPARSE = RouterConfig(gate="dense_to_sparse", top_k=1)


def dense_weights(folder, model=None):
    """Weights of a dense model, drawn here unless it is given; returns the model."""
    if model is None:
        model = Decoder(DENSE, VOCABULARY)
        initialize(model, 0)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name])

    meta = shapes(DENSE, VOCABULARY)
    weights.write(folder, meta, read, tokenizer=None, max_file_bytes=1e9, report=lambda line: None)
    return model


def upcycled(folder, moe, name="moe", **changes):
    """The model that the dense weights in `folder` become; written beside them."""
    options = {"router_std": 1e-3, "diversify": 0.0, "seed": 0, "precision": "fp32", "max_file_bytes": 1e9}
    upcycle(folder / "dense", folder / name, moe, report=lambda line: None, **options | changes)
    opened = open_weights(folder / name)
    model = Decoder(opened.model, opened.vocab_size)
    weights.fill(model, opened)
    return model


def noisy(**changes):
    sparse = DenseToSparseConfig(gumbel_noise=True, max_experts_start=4, **changes)
    return RouterConfig(gate="dense_to_sparse", top_k=1, dense_to_sparse=sparse)


@pytest.mark.parametrize(
    ("router", "gates"),
    [
        (RouterConfig(top_k=1), 1 / 8),
        (RouterConfig(top_k=2, normalize="none"), 2 / 8),
        (RouterConfig(top_k=2, normalize="after"), 1),
        (RouterConfig(top_k=2, num_groups=4, group_top_k=2, bias_update_rate=0.1), 2 / 8),
        (RouterConfig(top_k=2, score="sigmoid"), 2 / 8),
        (RouterConfig(top_k=3, score="sigmoid", normalize="none"), 3 / 2),
        (RouterConfig(top_k=3, score="sigmoid", normalize="after"), 1),
        (SPARSE, 1),
        (RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(max_experts_start=4)), 1 / 2),
        (RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(threshold=0.2)), 1 / 8),
        (RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(hard_top_k_after=0)), 2 / 8),
    ],
)
def test_what_gates_add_up_to(router, gates):
    moe = MoEConfig(num_experts=8, router=router, capacity_factor=1.0)
    assert expected_gates(moe) == pytest.approx(gates, rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_what_gates_with_noise_add_up_to(schedule):
    """At temperature 1 softmax(noise) are reciprocals of exponential numbers, over their sum."""
    drawn = 1 / torch.empty(100_000, 8, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    largest = (drawn / drawn.sum(-1, keepdim=True)).topk(4).values.sum(-1).mean().item()
    with torch.no_grad():
        found = expected_gates(MoEConfig(num_experts=8, router=noisy(schedule=schedule)))
    assert found == pytest.approx(largest, rel=0.01)


def test_every_expert_is_a_scaled_copy(tmp_path):
    dense = dict(dense_weights(tmp_path / "dense").named_parameters())
    model = upcycled(
        tmp_path, MoEConfig(num_experts=4, shared_experts=3, dense_layers=[0], router=RouterConfig(top_k=2))
    )
    alpha = (3 + 2 / 4) ** (-1 / 3)
    kept = dict(model.named_parameters())
    for layer in (1, 2):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            copy = alpha * dense[f"layers.{layer}.ffn.{matrix}.weight"]
            experts = kept.pop(f"layers.{layer}.ffn.experts.{matrix}.weight")
            shared = kept.pop(f"layers.{layer}.ffn.shared_experts.{matrix}.weight")
            assert all(torch.allclose(expert, copy, rtol=1e-6) for expert in experts)
            chunks = shared.chunk(3, 1 if matrix == "down_proj" else 0)
            assert all(torch.allclose(chunk, copy, rtol=1e-6) for chunk in chunks)
        router = kept.pop(f"layers.{layer}.ffn.router.weight")
        assert router.std().item() == pytest.approx(1e-3, rel=0.3)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in kept.items()), "the rest is as it was"
    assert torch.equal(routers([model])[1].load, torch.full((4,), 1 / 4))


def test_the_paper_s_scale(tmp_path):
    dense_weights(tmp_path / "dense")
    lines = []
    options = {"router_std": 1e-3, "diversify": 0.0, "seed": 0, "precision": "bf16", "max_file_bytes": 1e9}
    upcycle(tmp_path / "dense", tmp_path / "moe", PAPER, report=lines.append, **options)
    assert lines[0] == "gates add up to 0.0625: the experts' matrices are 0.98 of the dense ones"
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items() if "layers.1.ffn" in name}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        "layers.1.ffn.router.weight",
        "layers.1.ffn.router.load",
    }


def test_routers_and_zeros_are_drawn_by_seed_and_name(tmp_path):
    dense = dict(dense_weights(tmp_path / "dense").named_parameters())
    moe = MoEConfig(num_experts=4, shared_experts=1, router=SPARSE)
    one, same, other = (
        dict(upcycled(tmp_path, moe, name, diversify=0.25, seed=seed).named_parameters())
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.ffn.router.weight"], other["layers.0.ffn.router.weight"])
    assert not torch.equal(one["layers.0.ffn.router.weight"], one["layers.1.ffn.router.weight"])
    experts = one["layers.1.ffn.experts.up_proj.weight"]
    zeros = experts == 0
    assert zeros.float().mean() == pytest.approx(0.25, abs=0.02)
    assert len({tuple(mask.flatten().tolist()) for mask in zeros}) == 4, "each copy lacks others"
    assert not torch.equal(zeros, other["layers.1.ffn.experts.up_proj.weight"] == 0)
    alpha = (1 + expected_gates(moe)) ** (-1 / 3)
    whole = alpha / 0.75 * dense["layers.1.ffn.up_proj.weight"].expand_as(experts)
    torch.testing.assert_close(experts[~zeros], whole[~zeros])
    assert (one["layers.1.ffn.shared_experts.up_proj.weight"] != 0).all(), "shared experts stay whole"


@pytest.fixture(scope="module")
def trained():
    """A dense model that has learned something."""
    model = Decoder(DENSE, VOCABULARY)
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        loss = loss_of(model, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def loss_of(model, seed):
    """Nats per token of sequences x_{t+1} = 3 x_t + 1 or 3 x_t + 2, at random."""
    tokens = draw_tokens(16, 1, seed=seed)
    noise = draw_tokens(16, 32, seed=seed + 10_000) % 2
    for t in range(32):
        tokens = torch.cat([tokens, (3 * tokens[:, -1:] + 1 + noise[:, t : t + 1]) % VOCABULARY], 1)
    inputs, positions = rows(tokens[:, :-1])
    total, _ = model(inputs, positions, labels=tokens[:, 1:])
    return total / inputs.numel()


@pytest.mark.parametrize(
    "moe",
    [
        PAPER,
        MoEConfig(num_experts=8, router=SPARSE),
        MoEConfig(num_experts=4, router=RouterConfig(normalize="after")),
        MoEConfig(num_experts=4, shared_experts=1, router=RouterConfig(score="sigmoid", normalize="none")),
        MoEConfig(num_experts=8, shared_experts=1, router=noisy()),
    ],
    ids=["paper", "dense-to-sparse", "normalised", "sigmoid", "noise"],
)
def test_the_loss_is_the_dense_model_s(trained, tmp_path, moe):
    dense_weights(tmp_path / "dense", trained)
    model = upcycled(tmp_path, moe)
    begin_step([model], step=0)
    before, after = loss_of(trained, 500).item(), loss_of(model, 500).item()
    assert before < 2.0, "at first it was 3.9 nats"
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (MoEConfig(num_experts=2, expert_hidden_size=24), "moe.expert_hidden_size is 24, and the feed-forward of "),
        (MoEConfig(num_experts=2, dense_layers=[3]), "dense_layers=[3] must be some, not all, of the layers 0 to 2"),
    ],
)
def test_experts_that_cannot_be_copies(tmp_path, moe, message):
    dense_weights(tmp_path / "dense")
    with pytest.raises(ConfigError) as error:
        upcycled(tmp_path, moe)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_experts_are_made_of_a_dense_model(tmp_path):
    dense_weights(tmp_path / "dense")
    upcycled(tmp_path, PAPER, "moe")
    (tmp_path / "dense").rename(tmp_path / "old")
    (tmp_path / "moe").rename(tmp_path / "dense")
    with pytest.raises(ConfigError, match="has experts already; name a dense model"):
        upcycled(tmp_path, PAPER, "twice")

"""The files in configs/models: each builds, and has the number of parameters that its name and its comment give."""

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml

from models.config import MixerLayoutConfig, ModelConfig
from models.decoder import Decoder
from trainer.cli import from_mapping

FILES = sorted((Path(__file__).resolve().parents[2] / "configs/models").glob("*.yaml"))
STUDY = [path for path in FILES if path.stem.startswith("study-")]
LINEAR = {
    "retention": "retention",
    "gla": "gated_linear_attention",
    "hgrn": "hgrn",
    "hgrn2": "hgrn2",
    "delta-net": "delta_net",
    "gated-delta-net": "gated_delta_net",
}
FULL = "full_attention"


@lru_cache
def load(path: Path) -> ModelConfig:
    return from_mapping(ModelConfig, yaml.safe_load(path.read_text()))


def load_with(path: Path, **mixers) -> ModelConfig:
    """The file's configuration with another layout of mixers."""
    return replace(load(path), mixers=MixerLayoutConfig(**mixers))


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Decoder(config, config.padded_vocab_size(4096))
    return sum(parameter.numel() for parameter in model.parameters())


def variant(path: Path) -> str:
    return LINEAR[re.fullmatch(r"study-(?:340m|1\.3b)-(.*)", path.stem)[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_builds(path):
    assert parameters(load(path)) > 0


def test_the_study_is_whole():
    """Two sizes of six variants."""
    assert {path.stem for path in STUDY} == {f"study-{size}-{name}" for size in ("340m", "1.3b") for name in LINEAR}


def spikingbrain(size: str) -> Path:
    return next(path for path in FILES if path.stem == f"spikingbrain-{size}")


# Qwen2.5-7B by its published sizes: embedding and head; a layer's attention, with biases on q, k and v; a feed-forward.
D, D_FFN = 3584, 18944
EMBEDDINGS = 2 * 152064 * D
ATTENTION = 2 * D * D + D + 2 * (D * 512 + 512)
FFN = 3 * D * D_FFN


def test_spikingbrain_7b():
    """The base model, and what its conversion adds to 14 layers: a gate of rank 16 and a norm of a head of 128."""
    path = spikingbrain("7b")
    config = load(path)
    assert config.layer_mixers() == ["spikingbrain_gla", "sliding_window_attention"] * 14
    base = EMBEDDINGS + 28 * (ATTENTION + FFN + 2 * D) + D
    count = base + 14 * (D * 16 + 16 * 512 + 512 + 128)
    assert parameters(config) == count
    assert re.findall(r"[\d,]{9,}", path.read_text().split("\n#\n")[0]) == [f"{count:,}", f"{base:,}"]


def test_spikingbrain_76b():
    """Two attentions with a norm each and their weights in every layer; 17 experts in 21, of which a token uses two."""
    path = spikingbrain("76b")
    config = load(path)
    layers = config.layer_mixers()
    assert [i for i, layer in enumerate(layers) if layer == f"spikingbrain_tied_gla + {FULL}"] == [6, 13, 20, 27]
    assert layers.count("spikingbrain_tied_gla + sliding_window_attention") == 24
    mixer = 2 * ATTENTION + 128 + 2 * D + 2
    dense = EMBEDDINGS + 128 * D + 28 * (mixer + 2 * D) + 7 * FFN + 21 * (FFN + 16 * D) + D
    count, active = dense + 21 * 16 * FFN, dense + 21 * FFN
    assert parameters(config) == count
    assert re.findall(r"[\d,]{9,}", path.read_text().split("\n#\n")[0]) == [f"{count:,}", f"{active:,}"]


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_sizes_of_the_study(path):
    linear = variant(path)
    hybrid, pure = parameters(load(path)), parameters(load_with(path, pattern=linear))
    nominal = 340e6 if "340m" in path.stem else 1.3e9
    for count in (hybrid, pure):
        # The names are rounded and leave embeddings out: 399.5 M is the largest of "340M", 1.47 B of "1.3B".
        assert 0.95 * nominal < count < 1.18 * nominal
    header = path.read_text().split("\n", 1)[0]
    assert re.findall(r"[\d,]{9,}", header) == [f"{hybrid:,}", f"{pure:,}"]


def test_the_released_gated_delta_net_has_this_many_parameters():
    """m-a-p/1.3B-100B-GatedDeltaNet-pure: hidden 2048, 8 heads of 256, expand_v 1, d_ff 5632, vocabulary 32000."""
    path = next(path for path in STUDY if path.stem == "study-1.3b-gated-delta-net")
    config = load_with(path, pattern="gated_delta_net")
    assert parameters(config) == 1_466_343_808
    assert config.gated_delta_net.num_heads * config.gated_delta_net.head_dim == config.hidden_size == 2048


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_ratios_of_the_study(path):
    """The two readings of r:1 that the comment tells apart, over 24 layers."""
    linear = variant(path)
    assert load(path).layer_mixers() == ([linear] * 3 + [FULL]) * 6
    for ratio, per_full, every in ((24, 0, 1), (12, 1, 2), (6, 3, 4), (3, 6, 8)):
        layers = load_with(path, linear=linear, linear_per_full=ratio).layer_mixers()
        assert (len(layers), layers.count(FULL), layers.count(linear)) == (24, per_full, 24 - per_full)
        layers = load_with(path, linear=linear, full_attention_every=ratio).layer_mixers()
        assert (len(layers), layers.count(FULL), layers.count(linear)) == (24, every, 24 - every)
    assert load_with(path, pattern=linear).layer_mixers() == [linear] * 24

"""Choosing bits by measurement: the limits hold, the section says what was chosen, and a run uses it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compression import Compression, Rule
from tests.trainer.conftest import in_process_config
from trainer.cli import from_mapping
from trainer.compression_choice import BITS, Chooser, Place, as_settings, choose
from trainer.config import CompressionConfig
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["0", "mixer.0", "mixer.branches.0.mixer.0", "ffn.1", "ffn.experts.1"]
PLACES = st.builds(Place, st.integers(0, 3), st.sampled_from(NAMES))


@st.composite
def measurements(draw):
    """Bytes and errors by place: fewer bits have fewer bytes and more error."""
    sizes, errors = {}, {}
    for place in draw(st.lists(PLACES, min_size=1, max_size=8, unique=True)):
        whole = draw(st.integers(100, 10_000))
        sizes[place] = {16: whole, 8: whole // 2 + 3, 4: whole // 4 + 3}
        eight = draw(st.floats(1e-8, 1e-3))
        errors[place] = {16: 0.0, 8: eight, 4: eight * draw(st.floats(1.1, 1000))}
    return sizes, errors


@given(measurements(), st.floats(0, 0.1))
def test_the_error_stays_within_its_limit(given_, limit):
    sizes, errors = given_
    bits = choose(sizes, errors, error=limit)
    total = sum(errors[place][chosen] for place, chosen in bits.items())
    assert total <= limit and set(bits) == set(sizes)
    # What is left would go beyond it.
    for place, chosen in bits.items():
        if chosen == 16:
            assert total + errors[place][4] > limit
    assert choose(sizes, errors, error=1e9) == dict.fromkeys(sizes, 4)
    assert choose(sizes, errors, error=0.0) == dict.fromkeys(sizes, 16)


@given(measurements(), st.floats(0, 1))
def test_bytes_come_within_their_limit(given_, share):
    sizes, errors = given_
    least, most = (sum(of[bits] for of in sizes.values()) for bits in (4, 16))
    size = least + share * (most - least)
    bits = choose(sizes, errors, size=size)
    assert sum(sizes[place][chosen] for place, chosen in bits.items()) <= size
    assert choose(sizes, errors, size=most) == dict.fromkeys(sizes, 16)


def test_the_place_that_costs_least_is_stored_in_fewest_bits():
    cheap, dear = Place(0, "a"), Place(1, "a")
    sizes = {place: {16: 100, 8: 50, 4: 25} for place in (cheap, dear)}
    errors = {cheap: {16: 0.0, 8: 1e-4, 4: 2e-4}, dear: {16: 0.0, 8: 1e-3, 4: 1.0}}
    assert choose(sizes, errors, size=75) == {cheap: 4, dear: 8}
    assert choose(sizes, errors, error=0.01) == {cheap: 4, dear: 8}


@settings(deadline=None)
@given(st.dictionaries(PLACES, st.sampled_from(BITS), min_size=1))
def test_the_section_says_what_was_chosen(bits):
    section = as_settings(bits, CompressionConfig(bits=16, group=32))
    assert section.group == 32
    rules = tuple(Rule(pattern, rule.bits) for pattern, rule in section.modules.items())
    stored = Compression(bits=section.bits, rules=rules)
    assert {place: stored.settings_of(place.path)[0] for place in bits} == bits


@pytest.fixture
def chooser(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run")
    config.train.compression = CompressionConfig(bits=8, group=16, min_bytes=0)
    return Chooser(config)


def test_a_cosine_is_reached_with_fewer_bytes_than_8_bits_take(chooser):
    eight = chooser.configured()
    assert set(eight.bits.values()) == {8} and eight.cosine > 0.9999
    choice = chooser.for_cosine(0.9995)
    assert choice.cosine >= 0.9995 and choice.kept < eight.kept < choice.saved
    assert {4, 8} <= set(choice.bits.values())
    # Layers' errors are measured one by one, and are those of independent noise.
    together = 1 / choice.cosine**2 - 1
    assert sum(error**2 for _, _, error in choice.layers.values()) == pytest.approx(together, rel=0.5)
    assert sum(kept for _, kept, _ in choice.layers.values()) == choice.kept


def test_bytes_are_kept_to(chooser):
    eight, most = chooser.configured(), chooser.for_bytes(1e12)
    assert set(most.bits.values()) == {16} and most.cosine == pytest.approx(1, abs=1e-6)
    choice = chooser.for_bytes(0.9 * eight.kept)
    assert choice.kept <= 0.9 * eight.kept and choice.cosine > 0.9
    with pytest.raises(ConfigError, match="at 4 bits everywhere the layers keep"):
        chooser.for_bytes(1000)


def test_frozen_parameters_do_not_count(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run", trainable=["layers.1.*"])
    config.train.compression = CompressionConfig(bits=4, group=16, min_bytes=0)
    found = Chooser(config).configured()
    # Nothing before layer 1 has a gradient: nothing is saved there.
    assert found.layers[0][2] == 0 < found.layers[1][2]


def command(*arguments):
    run = [sys.executable, "-m", "launch.main", "compression", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_writes_a_section_that_a_run_takes(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(asdict(config)))
    output, figures = tmp_path / "chosen.yaml", tmp_path / "chosen.json"
    common = ("--config", recipe, "--train.compression.min_bytes", 0, "--train.compression.bits", 8)
    done = command(*common, "--cosine", 0.99, "--output", output, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert f"written: {output}" in done.stdout and "cosine of the gradients 0.99" in done.stdout
    section = yaml.safe_load(output.read_text())
    assert from_mapping(CompressionConfig, section).min_bytes == 0
    values = json.loads(figures.read_text())
    assert values["cosine"] >= 0.99 and values["kept"] < values["saved"]
    checked = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config", recipe, "--train.compression", output, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    again = command(*common, "--cosine", 0.99, "--output", output)
    assert again.returncode == 2 and "exists; name another file" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cosine", "0.9", "--megabytes", "1"), "two goals"),
        (("--cosine", "1.5"), "between 0 and 1"),
        (("--megabytes", "-1"), "positive"),
        ((), "nothing to measure"),
        (("--train.compression.bits", "8", "--output", "x.yaml"), "holds a choice"),
        (("--cosine", "0.9", "--output", "nowhere/x.yaml"), "does not exist"),
    ],
)
def test_bad_input(options, message):
    done = command("--config", "configs/pretrain/laptop.yaml", *options)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1

"""From the `data` section of a configuration to what a run reads."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.trainer.conftest import in_process_config
from trainer.config import DataConfig
from trainer.data.indexed import TokenFile, write_index
from trainer.data.sources import find_sources
from trainer.errors import ConfigError


@pytest.fixture
def configure(tiny_data, tmp_path):
    base = in_process_config(tiny_data, tmp_path / "run")
    return lambda **data: replace(base, data=DataConfig(**data))


@pytest.fixture
def bare(tmp_path):
    """A Megatron pair with nothing beside it."""
    folder = tmp_path / "bare"
    folder.mkdir()
    tokens = np.arange(1, 401, dtype=np.uint16) % 500
    tokens[99::100] = 0
    tokens.tofile(folder / "text_document.bin")
    write_index(folder / "text_document.idx", np.array([100] * 4), tokens.dtype)
    return folder / "text_document"


def test_a_prepared_directory_brings_everything(configure, tiny_data):
    sources = find_sources(configure(path=str(tiny_data)))
    assert sources.tokenizer is not None
    assert (sources.vocab_size, sources.eod_id) == (512, sources.tokenizer.eod_id)
    assert sources.validation == str(tiny_data)


def test_bare_megatron_data_needs_a_vocabulary_and_an_end_of_document(configure, bare, tiny_data):
    config = configure(path=str(bare), document_mask=False)
    with pytest.raises(ConfigError, match=r"set data.tokenizer, or model.vocab_size"):
        find_sources(config)
    sized = replace(config, model=replace(config.model, vocab_size=512))
    sources = find_sources(sized)
    assert sources.tokenizer is None and sources.validation is None and sources.vocab_size == 512
    assert sources.open_training(sized).micro_batches(0, 2)[0].documents is None
    masked = replace(sized, data=replace(config.data, document_mask=True))
    with pytest.raises(ConfigError, match="end-of-document"):
        find_sources(masked).open_training(masked)
    named = replace(masked, data=replace(masked.data, tokenizer=str(tiny_data)))
    assert find_sources(named).eod_id is not None


def test_a_blend_draws_by_weight(configure, tiny_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    config = configure(blend={str(tiny_data): 3.0, str(other): 1.0})
    sampler = find_sources(config).open_training(config)
    drawn = [source for step in range(100) for source, _ in sampler.sample_indices(step)]
    assert drawn.count(0) == 300 and drawn.count(1) == 100


def test_a_named_validation_set(configure, tiny_data, bare):
    sources = find_sources(configure(path=str(tiny_data), validation_path=str(bare)))
    assert sources.validation == str(bare)
    assert len(TokenFile(sources.validation).tokens) == 400


@pytest.mark.parametrize("data", [{"path": "nowhere"}, {"blend": {"nowhere": 1.0}}])
def test_missing_data_is_refused_when_it_is_configured(data):
    with pytest.raises(ConfigError, match=r"nowhere.*prepare it with"):
        DataConfig(**data)

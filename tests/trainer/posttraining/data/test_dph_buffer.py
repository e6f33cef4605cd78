"""Buffers of DPH-RL: tensors are converted, and pickles of programs are refused unopened."""

import pickle

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError
from trainer.posttraining.data.dph_buffer import REFERENCE, convert_buffer
from trainer.posttraining.data.sequences import load_sequences

# Two answers: prompts of 1 and 2 tokens padded on the left to 2, answers of 3 and 1 padded on the right to 3.
BUFFER = {
    "input_ids": torch.tensor([[0, 5, 6, 7, 8], [1, 2, 3, 0, 0]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "responses": torch.tensor([[6, 7, 8], [3, 0, 0]]),
    "old_log_probs": torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("content", [BUFFER, {"batch": BUFFER, "meta_info": {}}])
def test_a_buffer_of_tensors_is_converted(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert convert_buffer(tmp_path / "a.pt", tmp_path / "a.safetensors") == 2
    first, second = load_sequences(tmp_path / "a.safetensors")
    assert first.tokens.tolist() == [5, 6, 7, 8] and second.tokens.tolist() == [1, 2, 3]
    assert first.loss_mask.tolist() == [0, 1, 1, 1] and second.loss_mask.tolist() == [0, 0, 1]
    assert first.extra[REFERENCE].tolist() == [0, -1, -2, -3] and second.extra[REFERENCE].tolist() == [0, 0, -4]
    assert first.extra[REFERENCE].dtype == np.float32


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_anything_but_tensors_is_refused_unopened(tmp_path, save):
    sprung = tmp_path / "sprung"
    save({"batch": Trap(str(sprung))}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"holds more than tensors.*dict\(data.batch\)") as raised:
        convert_buffer(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert "\n" not in str(raised.value) and not sprung.exists()


def test_incomplete_buffers_are_refused(tmp_path):
    for content, message in (
        ({key: value for key, value in BUFFER.items() if key != "responses"}, "has no tensor responses"),
        ([1], "has no tensor input_ids, attention_mask"),
        ({key: value[:0] for key, value in BUFFER.items()}, "has no answers"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ConfigError, match=message):
            convert_buffer(tmp_path / "a.pt", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        convert_buffer(tmp_path / "no.pt", tmp_path / "a.safetensors")

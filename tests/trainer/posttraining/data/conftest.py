"""A byte-level tokenizer with special tokens, and chat templates for it."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trainer.data.tokenizer import HuggingFaceTokenizer

# SmolLM2-Instruct's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def make_tokenizer(tmp_path):
    """A tokenizer with a token per byte, whose files include this chat template."""

    def make(template=CHATML):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        backend.add_special_tokens([AddedToken(name, special=True) for name in names])
        directory = tmp_path / "tokenizer"
        directory.mkdir(exist_ok=True)
        backend.save(str(directory / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "spiketrain_eod": "<|endoftext|>", "chat_template": template}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return HuggingFaceTokenizer(directory / "tokenizer.json")

    return make

"""GGUF files: written here as llama.cpp's converter writes them, read as the model that they were made from."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from models.decoder import Decoder, initialize
from models.hub.llama_family import stored_name
from models.hub.tensors import everything
from tests.helpers import tiny_model_config
from tests.models.hub.test_files import TRICKY, backend
from tests.models.hub.test_llama_family import loaded
from trainer.data.tokenizer import Tokenizer, learn_sentencepiece
from trainer.errors import ConfigError
from trainer.stored.export import import_weights
from trainer.stored.inference import load_model
from trainer.stored.opening import open_weights

ROWS = 300
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight, heads):
    """llama.cpp's order of the rows of queries and keys (convert_hf_to_gguf.py, permute)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}.{kind}"


def write_gguf(path, kind="llama", types=None, fields=None, extra=None, vocabulary=None, **changes):
    """Write a model that is drawn here; returns it with the numbers that the file's types keep."""
    heads = {"q_proj": 4, "k_proj": 2}
    attention = {"attention__qkv_bias": kind == "qwen2", "attention__qk_norm": kind == "qwen3"}
    config = tiny_model_config("full_attention", hidden_size=64, ffn_hidden_size=96, **attention, **changes)
    model = Decoder(config, ROWS).eval()
    initialize(model, 0)
    writer = GGUFWriter(path, kind)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    for name, value in (fields or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{kind}.{name}", value)
    if vocabulary is not None:
        vocabulary(writer)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().normal_(std=0.2, generator=torch.Generator().manual_seed(len(name))).numpy()
        module = name.split(".")[-2]
        own = numbers if kind != "llama" or module not in heads else permuted(numbers, heads[module])
        dtype = GGMLQuantizationType.F32 if own.ndim == 1 else (types or {}).get(module, GGMLQuantizationType.F32)
        data = quantize(np.ascontiguousarray(own), dtype)
        writer.add_tensor(gguf_name(stored_name(name)), data, raw_dtype=dtype)
        kept = dequantize(data, dtype)
        if own is not numbers:
            size = len(kept) // heads[module]
            kept = kept.reshape(heads[module], size // 2, 2, -1).swapaxes(1, 2).reshape(kept.shape)
        parameter.data = torch.from_numpy(np.array(kept, np.float32))
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


TYPES = {
    "q_proj": GGMLQuantizationType.Q8_0,
    "k_proj": GGMLQuantizationType.Q4_0,
    "v_proj": GGMLQuantizationType.F16,
    "down_proj": GGMLQuantizationType.Q4_1,
    "embedding": GGMLQuantizationType.BF16,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_file_is_the_model_that_it_was_made_from(tmp_path, kind, tied):
    types = TYPES if kind == "llama" else {}
    model = write_gguf(tmp_path / "model.gguf", kind, types, tie_embeddings=tied)
    lines = []
    import_weights(tmp_path / "model.gguf", tmp_path / "weights", "fp32", 1e9, lines.append)
    parameters = dict(model.named_parameters())
    for path in (tmp_path / "weights", tmp_path / "model.gguf"):
        again = dict(loaded(path).named_parameters())
        assert again.keys() == parameters.keys()
        different = [name for name in again if not torch.equal(again[name], parameters[name])]
        assert not different
    assert open_weights(tmp_path / "weights").max_positions == 128
    if kind == "llama":
        assert {"2 tensors from Q8_0 to float32, dequantised", "2 tensors from F16 to float32, exactly"} <= {*lines}


def test_rows_are_read_without_the_others(tmp_path):
    model = write_gguf(tmp_path / "model.gguf", types=TYPES)
    stored = open_weights(tmp_path / "model.gguf").tensors
    for name in ("q_proj", "k_proj", "o_proj"):
        weight = dict(model.named_parameters())[f"layers.1.mixer.{name}.weight"]
        tensor = stored[f"model.layers.1.self_attn.{name}.weight"]
        assert torch.equal(tensor.read(), weight)
        assert torch.equal(tensor.read((slice(5, 9), slice(3, 40))), weight[5:9, 3:40])
        assert torch.equal(tensor.read(everything(weight.shape)), weight)


def llama3_factors(factor=8.0, size=16):
    from kernels.rotary import frequencies
    from kernels.rotary_scaling import RotaryScaling

    scaled = frequencies(size, 10000.0, RotaryScaling("llama3", factor, 8192, 1.0, 4.0))
    return (frequencies(size, 10000.0) / scaled).numpy()


def test_scaled_rotations_are_understood(tmp_path):
    write_gguf(tmp_path / "three.gguf", extra={"rope_freqs.weight": llama3_factors()})
    scaling = open_weights(tmp_path / "three.gguf").model.attention.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("llama3", 8.0, 8192)
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    write_gguf(tmp_path / "yarn.gguf", "qwen2", fields=fields)
    scaling = open_weights(tmp_path / "yarn.gguf").model.attention.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("yarn", 4.0, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}}, "another way than Llama 3's rule"),
        ({"fields": {"expert_count": 8}}, "num_local_experts=8 is not supported"),
        ({"fields": {"attention.sliding_window": 16}}, "sliding_window=16 is not supported"),
        ({"fields": {"rope.dimension_count": 8}}, "partial_rotary_factor=0.5 is not supported"),
        ({"fields": {"logit_scale": 0.5}}, "logit_scale=0.5 is not supported"),
        ({"fields": {"rope.scaling.type": "longrope"}}, "rope_type='longrope' is not supported"),
        ({"vocabulary": lambda writer: writer.add_tokenizer_model("bert")}, "tokenizer.ggml.model='bert' is not"),
    ],
)
def test_what_models_here_do_not_compute_is_refused(tmp_path, options, message):
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ConfigError) as error:
        open_weights(tmp_path / "model.gguf")
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_what_is_unknown_is_said(tmp_path):
    write_gguf(tmp_path / "model.gguf", fields={"mystery": 3})
    lines = []
    import_weights(tmp_path / "model.gguf", tmp_path / "weights", "bf16", 1e9, lines.append)
    assert any("llama.mystery=3" in line for line in lines)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, b"not a file of this kind at all......."])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.gguf is not a whole GGUF file"):
        open_weights(tmp_path / "model.gguf")


def test_another_architecture_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"general.architecture='gemma3' is not supported; llama, qwen2, qwen3 are"):
        open_weights(tmp_path / "model.gguf")


# Tokenizers


def byte_level(made, pre):
    """Fields of a byte-level BPE; its first three tokens are special."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")

    return add


@pytest.mark.parametrize(("pre", "digits"), [("smollm", True), ("gpt-2", False)])
def test_a_byte_level_tokenizer_comes_along(tmp_path, pre, digits):
    made = backend(digits=digits)
    write_gguf(tmp_path / "model.gguf", vocabulary=byte_level(made, pre))
    import_weights(tmp_path / "model.gguf", tmp_path / "weights", "fp32", 1e9, print)
    tokenizer = load_model(tmp_path / "model.gguf", torch.device("cpu")).require_tokenizer()
    assert tokenizer.encode(TRICKY) == Tokenizer.load(tmp_path / "weights").encode(TRICKY)
    assert tokenizer.encode(TRICKY) == made.encode(TRICKY, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(TRICKY)) == TRICKY and tokenizer.eod == "<|im_end|>"
    settings = json.loads((tmp_path / "weights" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["bos_token"] == "<|im_start|>"
    assert json.loads((tmp_path / "weights" / "generation_config.json").read_text())["eos_token_id"] == 2
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "weights")
    assert theirs.encode(TRICKY) == [1, *tokenizer.encode(TRICKY)]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_known_ways_to_split_text(tmp_path, pre):
    """Digits in threes or one by one; words with the space before them."""
    write_gguf(tmp_path / "model.gguf", vocabulary=byte_level(backend(), pre))
    tokenizer = load_model(tmp_path / "model.gguf", torch.device("cpu")).require_tokenizer()
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str("don't 12345 x")
    expected = ["don", "'t", "Ġ", "123", "45", "Ġx"] if pre == "llama-bpe" else ["don", "'t", "Ġ", *"12345", "Ġx"]
    assert [piece for piece, _ in split] == expected


def test_an_unknown_way_to_split_text_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", vocabulary=byte_level(backend(), "tekken"))
    with pytest.raises(ConfigError, match=r"tokenizer.ggml.pre='tekken' is not supported; default, gpt-2, smollm"):
        open_weights(tmp_path / "model.gguf")


def test_a_sentencepiece_model_comes_along(tmp_path):
    learned = learn_sentencepiece([TRICKY * 3, "def f(x): return x + 12345"] * 5, "bpe", ROWS)
    processor = learned._processor
    kinds = [("is_unknown", 2), ("is_control", 3), ("is_byte", 6), ("is_unused", 5)]

    def add(writer):
        ids = range(processor.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([processor.id_to_piece(i) for i in ids])
        writer.add_token_scores([processor.get_score(i) for i in ids])
        types = [next((kind for name, kind in kinds if getattr(processor, name)(i)), 1) for i in ids]
        writer.add_token_types(types)
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(processor.unk_id())
        writer.add_bos_token_id(processor.bos_id() if processor.bos_id() >= 0 else processor.eos_id())
        writer.add_eos_token_id(processor.eos_id())

    write_gguf(tmp_path / "model.gguf", vocabulary=add)
    tokenizer = load_model(tmp_path / "model.gguf", torch.device("cpu")).require_tokenizer()
    for text in ("def f(x): return x + 12345", "return  é \U0001f600 x"):
        assert tokenizer.encode(text) == learned.encode(text)
    assert tokenizer.eod_id == learned.eod_id and tokenizer.vocab_size == learned.vocab_size

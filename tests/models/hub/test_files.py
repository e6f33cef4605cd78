"""What goes in and out beside a model's shape: tokenizers, special tokens, tensors that are stored twice, types."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from models.hub.llama_family import stored_name
from models.hub.registry import ADAPTERS, to_hub
from tests.helpers import tiny_decoder, tiny_model_config
from trainer.data.tokenizer import Tokenizer, learn_sentencepiece
from trainer.errors import ConfigError
from trainer.stored.export import import_weights
from trainer.stored.hub_files import hub_files, imported_files

EOD = "<|endoftext|>"
TRICKY = "\ttab\r lone\r\n\n\n    indent  x 12345 don't \U0001f600 e\u0301 \ufeff  end "


def hub_model(folder, tied=True, changes=None, extra=None, dtype=torch.float32):
    """A Llama as others wrote it, with the tensors and keys that are given; returns its tensors."""
    folder.mkdir()
    decoder = tiny_decoder("full_attention", tie_embeddings=tied)
    tensors = {stored_name(name): tensor.detach().to(dtype) for name, tensor in decoder.named_parameters()}
    config = to_hub(tiny_model_config("full_attention", tie_embeddings=tied), 50, "float32", 64)
    (folder / "config.json").write_text(json.dumps(config | (changes or {})))
    save_file(tensors | (extra(tensors) if extra else {}), folder / "model.safetensors")
    return tensors


def imported(folder, precision="fp32"):
    lines = []
    import_weights(folder, folder.parent / "weights", precision, 1e9, lines.append)
    return "\n".join(lines), load_file(folder.parent / "weights" / "model.safetensors")


def frequencies(theta):
    return {"model.layers.1.self_attn.rotary_emb.inv_freq": theta ** (-torch.arange(0, 8, 2).float() / 8)}


def test_what_is_stored_twice_and_agrees_is_left_out_and_said(tmp_path):
    def extra(tensors):
        return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} | frequencies(1e4)

    hub_model(tmp_path / "hub", extra=extra)
    lines, stored = imported(tmp_path / "hub")
    assert "left out, for they are redundant: lm_head.weight, model.layers.1.self_attn.rotary_emb" in lines
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-3},
            "lm_head.weight differs from",
        ),
        (lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"][:-1].clone()}, "differs from"),
        (lambda tensors: frequencies(2e4), "inv_freq holds other rotary frequencies than rope_theta=10000 gives"),
        (lambda tensors: {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "holds model.layers.0.self_attn.q"),
    ],
)
def test_what_the_configuration_does_not_say_is_refused(tmp_path, extra, message):
    hub_model(tmp_path / "hub", extra=extra)
    with pytest.raises(ConfigError) as error:
        imported(tmp_path / "hub")
    assert message in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_an_untied_head_is_its_own(tmp_path):
    tensors = hub_model(tmp_path / "hub", tied=False)
    assert torch.equal(imported(tmp_path / "hub")[1]["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("dtype", "precision", "line"),
    [
        (torch.float16, "bf16", "from F16 to bfloat16, rounded"),
        (torch.float16, "fp32", "from F16 to float32, exactly"),
        (torch.float64, "fp32", "from F64 to float32, rounded"),
        (torch.bfloat16, "bf16", ""),
    ],
)
def test_changes_of_type_are_said(tmp_path, dtype, precision, line):
    hub_model(tmp_path / "hub", dtype=dtype)
    lines = imported(tmp_path / "hub", precision)[0]
    assert line in lines and ("tensors from" in lines) == bool(line)


def test_values_beyond_the_type_are_refused(tmp_path):
    hub_model(
        tmp_path / "hub",
        dtype=torch.float64,
        extra=lambda tensors: {"model.norm.weight": torch.full((32,), 1e300, dtype=torch.float64)},
    )
    with pytest.raises(ConfigError, match=r"model.norm.weight has values beyond the range of torch.float32"):
        imported(tmp_path / "hub")


def test_keys_and_files_that_are_not_taken_are_listed(tmp_path):
    hub_model(tmp_path / "hub", changes={"mystery": 3, "attention_dropout": 0.1, "use_cache": True})
    save_file({"x": torch.zeros(1)}, tmp_path / "hub" / "consolidated.safetensors")
    lines = imported(tmp_path / "hub")[0]
    assert "config.json: left out, for models here have nothing of the kind: attention_dropout=0.1, mystery=3" in lines
    assert "not read: consolidated.safetensors" in lines and "has no tokenizer.json or tokenizer.model" in lines


def test_an_adapter_and_two_sets_of_weights_are_refused(tmp_path):
    tensors = hub_model(tmp_path / "hub")
    save_file(tensors, tmp_path / "hub" / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"holds both model.safetensors and model.safetensors.index.json"):
        imported(tmp_path / "hub")
    (tmp_path / "hub" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has an adapter"):
        imported(tmp_path / "hub")


def test_a_key_given_twice_is_refused(tmp_path):
    hub_model(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(path.read_text().replace("{", '{"rms_norm_eps": 1e-3, ', 1))
    with pytest.raises(ConfigError, match="rms_norm_eps is given twice"):
        imported(tmp_path / "hub")


# Tokenizers


def backend(digits=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), *steps] if digits else steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [EOD, "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        [TRICKY * 3], trainers.BpeTrainer(vocab_size=270, special_tokens=specials, initial_alphabet=alphabet)
    )
    return made


def write_tokenizer(folder, **config):
    folder.mkdir(exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    for name, content in {
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": EOD} | config),
        "special_tokens_map.json": '{"eos_token":  "<|im_end|>"}',
        "chat_template.jinja": "{{ messages }}\r\n",
        "generation_config.json": '{"eos_token_id": [2, 0],  "temperature": 0.7}',
    }.items():
        (folder / name).write_text(content, newline="")


def contents(folder):
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return {name: (folder / name).read_bytes() for name in (*kept, "generation_config.json")}


def test_a_tokenizer_comes_in_and_goes_through_runs_byte_for_byte(tmp_path):
    hub_model(tmp_path / "hub")
    write_tokenizer(tmp_path / "hub", tokenizer_class="PreTrainedTokenizerFast")
    imported(tmp_path / "hub")
    assert contents(tmp_path / "weights") == contents(tmp_path / "hub")
    (tmp_path / "checkpoint").mkdir()
    Tokenizer.load(tmp_path / "weights").save(tmp_path / "checkpoint")
    assert contents(tmp_path / "checkpoint") == contents(tmp_path / "hub")
    out = hub_files(tmp_path / "checkpoint", "qwen3", 270)
    assert out == ({"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": None}, {}, [])


def test_another_end_of_documents_survives_beside_that_of_chats(tmp_path):
    write_tokenizer(tmp_path / "hub", chat="kept")
    (tmp_path / "hub" / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 20}')
    (tmp_path / "saved").mkdir()
    Tokenizer.load(tmp_path / "hub", EOD).save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").eod_id == 0
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == {"content": "<|im_end|>"} and config["chat"] == "kept"
    out = hub_files(tmp_path / "saved", "llama", 270)
    assert out.ids["eos_token_id"] == [2, 0]
    assert json.loads(out.files["generation_config.json"]) == {"eos_token_id": [2, 0], "top_k": 20, "bos_token_id": 0}
    assert out.notes == ["generation_config.json: eos_token_id 2 becomes [2, 0], which ended documents"]


def test_a_sentencepiece_model_remembers_a_named_end_of_documents(tmp_path):
    learned = learn_sentencepiece([TRICKY * 3, "def f(x): return x"] * 5, "bpe", 300)
    folders = [tmp_path / name for name in ("plain", "named")]
    for folder in folders:
        folder.mkdir()
    path = learned.save(folders[0])
    piece = learned._processor.id_to_piece(280)
    Tokenizer.load(path, piece).save(folders[1])
    assert [Tokenizer.load(folder).eod_id for folder in folders] == [0, 280]
    assert (folders[0] / "tokenizer.model").read_bytes() == (folders[1] / "tokenizer.model").read_bytes()


def test_ids_that_only_config_json_has_are_kept(tmp_path):
    files = imported_files(tmp_path, {"eos_token_id": 7, "bos_token_id": None, "pad_token_id": 5})
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 7, "pad_token_id": 5}
    (tmp_path / "generation_config.json").write_text("{}")
    assert imported_files(tmp_path, {"eos_token_id": 7}) == {}


def test_without_a_tokenizer_nothing_ends_a_text(tmp_path):
    config = to_hub(tiny_model_config("full_attention"), 50, "float32", 64) | hub_files(None, "llama", 50).ids
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.eos_token_id, read.bos_token_id) == (None, None), "transformers' own are 2 and 1"


def exported(folder, kind):
    """A folder as an export writes it, but for the tensors; returns the notes."""
    out = hub_files(folder, kind, 270)
    adapter = ADAPTERS[kind]
    model = tiny_model_config("full_attention", attention__qkv_bias=kind == "qwen2")
    config = adapter.to_hub(model, 270, "float32", 64, None) | out.ids
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in out.files.items():
        (folder / name).write_bytes(content)
    return out.notes


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "qwen3_next"])
def test_auto_tokenizer_gives_our_tokens_or_the_export_says_otherwise(tmp_path, kind):
    (tmp_path / "hub").mkdir()
    backend().save(str(tmp_path / "hub" / "tokenizer.json"))
    notes = exported(tmp_path / "hub", kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    same = theirs.encode(TRICKY, add_special_tokens=False) == Tokenizer.load(tmp_path / "hub").encode(TRICKY)
    assert (theirs.eos_token, theirs.eos_token_id) == (EOD, 0), "which tokenizer.json alone does not say"
    said = any("PreTrainedTokenizerFast.from_pretrained" in note for note in notes)
    assert (same, said) == (kind != "qwen2", kind == "qwen2")
    assert GenerationConfig.from_pretrained(tmp_path / "hub").eos_token_id == 0
    assert AutoConfig.from_pretrained(tmp_path / "hub").eos_token_id == 0


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_file_beside_a_tokenizer_is_named(tmp_path, name, content):
    learn_sentencepiece([TRICKY * 3, "def f(x): return x"] * 5, "bpe", 300).save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/{name} (cannot be read|is not a JSON object)"):
        hub_files(tmp_path, "qwen2", 300)


def test_qwen2_s_own_tokenizer_needs_no_word(tmp_path):
    from transformers import Qwen2Tokenizer

    made = json.loads(backend(digits=False).to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=made["vocab"], merges=[tuple(pair) for pair in made["merges"]])
    (tmp_path / "hub").mkdir()
    theirs.backend_tokenizer.save(str(tmp_path / "hub" / "tokenizer.json"))
    notes = exported(tmp_path / "hub", "qwen2")
    assert not any("AutoTokenizer" in note for note in notes)
    again = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert again.encode(TRICKY, add_special_tokens=False) == Tokenizer.load(tmp_path / "hub").encode(TRICKY)

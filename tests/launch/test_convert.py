"""The command that takes weights out of checkpoints, and Hugging Face models in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hub.dense import hub_name, to_hub
from tests.helpers import VOCABULARY, tiny_decoder, tiny_model_config
from trainer.data.tokenizer import Tokenizer
from trainer.stored.inference import load_model

UPCYCLE = ("upcycle", "--source", "RUN", "--moe.num_experts", "4")


def test_an_export_is_the_checkpoint_and_its_tokenizer(launch, trained, tmp_path):
    checkpoint = trained / "checkpoints" / "step_00000003"
    arguments = ("export", "--checkpoint", str(checkpoint), "--output", "deep/weights", "--max_file_gb", "5e-5")
    code, out, errors, imported = launch("convert", *arguments)
    assert code == 0, errors
    assert out.strip() == f"deep/weights: the parameters of {checkpoint}"
    assert "model-00001-of-00003.safetensors (1 of 3): 1 tensors, 0.000 GB" in errors
    assert imported == ["torch"], "neither megatron nor deepspeed is needed"
    weights = tmp_path / "deep" / "weights"
    stored = {name: tensor for file in weights.glob("*.safetensors") for name, tensor in load_file(file).items()}
    loaded = load_model(checkpoint, torch.device("cpu"))
    parameters = dict(loaded.model.named_parameters())
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], parameters[name]) for name in stored)
    assert Tokenizer.load(weights).encode("import json") == loaded.require_tokenizer().encode("import json")
    code, _, errors, imported = launch("convert", *arguments)
    assert code == 2 and "output: deep/weights exists and is not an empty directory; name another" in errors
    assert imported == []


def test_bfloat16_on_request_keeps_decays(launch, trained, tmp_path):
    (tmp_path / "weights").mkdir()
    arguments = ("--checkpoint", str(trained), "--output", "weights", "--dtype", "bf16")
    code, _, errors, _ = launch("convert", "export", *arguments, forked=True)
    assert code == 0, errors
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    parameters = dict(load_model(trained, torch.device("cpu")).model.named_parameters())
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
        assert torch.equal(tensor, parameters[name].to(tensor.dtype)), name


def test_a_hugging_face_model_becomes_weights(launch, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    config = to_hub(tiny_model_config("full_attention"), VOCABULARY, "float32", 64)
    (hub / "config.json").write_text(json.dumps(config))
    parameters = {name: tensor.detach() for name, tensor in tiny_decoder("full_attention").named_parameters()}
    save_file({hub_name(name): tensor for name, tensor in parameters.items()}, hub / "model.safetensors")
    code, out, errors, imported = launch("convert", "import", "--source", "hub", "--output", "weights", forked=True)
    assert code == 0 and out.strip() == "weights: the parameters of hub", errors
    assert imported == ["torch"]
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in parameters.items())


def test_a_dense_run_becomes_experts_that_a_run_starts_from(launch, trained, tmp_path):
    (tmp_path / "experts.yaml").write_text("num_experts: 4\nshared_experts: 1\nrouter: {top_k: 1}\n")
    arguments = ("--source", str(trained), "--output", "weights", "--moe", "experts.yaml", "--max_file_gb", "5e-5")
    code, out, errors, imported = launch("convert", "upcycle", *arguments, forked=True)
    assert code == 0, errors
    assert out.strip() == f"weights: {trained / 'checkpoints/step_00000006'} with 4 + 1 experts a layer"
    assert "gates add up to 0.25: the experts' matrices are 0.9283 of the dense ones" in errors
    assert imported == ["torch"]
    run = ("--config", str(trained / "config.yaml"), "--run.dir", "run", "--model.moe", "experts.yaml")
    code, _, errors, _ = launch("pretrain", *run, "--checkpoint.init", "weights", "--check", forked=True)
    assert code == 0, errors


def test_a_hybrid_has_no_hugging_face_layout(launch, trained, tmp_path):
    arguments = ("export", "--checkpoint", str(trained), "--output", "hub", "--layout", "hf")
    code, _, errors, _ = launch("convert", *arguments, forked=True)
    assert code == 2 and "layers with gated_delta_net have no Hugging Face layout; only full_attention has" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exports",), "no command 'exports'; choose from export, import, upcycle"),
        (("export", "--checkpoint", "nowhere"), "checkpoint: nowhere does not exist; give a run directory"),
        (("export", "--checkpoint", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("export", "--checkpoint", "RUN", "--max_file_gb", "0"), "max_file_gb is 0.0: it must be positive"),
        (("export", "--checkpoint", "RUN", "--dtype", "fp8"), "dtype: "),
        (("export", "--outptu", "x"), "did you mean 'output'"),
        (("import", "--source", "nowhere"), "source: nowhere is not a directory; download the model"),
        (("import", "--source", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("upcycle", "--source", "nowhere"), "source: nowhere does not exist; give weights or a run directory"),
        (("upcycle", "--source", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("upcycle", "--source", "RUN"), "moe.num_experts is 0: say how many experts each layer gets"),
        ((*UPCYCLE, "--moe.activation", "geglu"), "moe.activation is geglu: the dense feed-forward is swiglu; leave"),
        ((*UPCYCLE, "--moe.spawn_step", "5"), "moe.spawn_step is 5: upcycling spawns them all; leave it out"),
        ((*UPCYCLE, "--router_std", "0"), "router_std is 0.0: it must be positive, or all experts stay alike"),
        ((*UPCYCLE, "--diversify", "1"), "diversify is 1.0: it must be in [0, 1)"),
        ((*UPCYCLE, "--moe.router.top_k", "5"), "model.moe.router.top_k=5 exceeds model.moe.num_experts=4"),
        ((*UPCYCLE, "--moe.num_expert", "5"), "did you mean 'moe.num_experts'"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, arguments, message):
    code, _, errors, imported = launch("convert", *(str(trained) if word == "RUN" else word for word in arguments))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and message in errors
    assert imported == []


def test_help_lists_the_commands(launch):
    code, out, _, imported = launch("convert", "--help")
    assert code == 0 and "export     Write the parameters of a checkpoint as safetensors." in out
    assert imported == []

"""Sampling from a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from trainer.data.tokenizer import learn_sentencepiece


def test_samples_continue_the_prompt_and_depend_on_the_seed_alone(launch, trained):
    common = ("--checkpoint", str(trained), "--prompt", "import json", "--max_new_tokens", "20")
    code, first, errors, imported = launch("generate", *common)
    assert code == 0, errors
    assert first.startswith("import json")
    assert len(first) > len("import json\n")
    assert "checkpoint: " in errors and "step_00000006" in errors
    assert imported == ["torch"], "neither megatron nor deepspeed is needed"
    assert launch("generate", *common, forked=True)[1] == first
    assert launch("generate", *common, "--seed", "5", forked=True)[1] != first


def test_greedy_ignores_the_seed_and_several_samples_are_several(launch, trained):
    common = ("--checkpoint", str(trained / "checkpoints" / "step_00000003"), "--max_new_tokens", "8")
    greedy = [launch("generate", *common, "--temperature", "0", "--seed", seed, forked=True)[1] for seed in ("1", "2")]
    assert greedy[0] == greedy[1]
    code, _, errors, _ = launch("generate", *common, "--samples", "3", forked=True)
    assert code == 0
    assert errors.count("--- sample") == 3


def test_a_prompt_is_read_to_the_last_byte(trained, tmp_path, capsys):
    from launch.generate import GenerateConfig, main

    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfif x:\r\n\tpass\r")
    main(GenerateConfig(str(trained), prompt_file=str(tmp_path / "prompt.txt"), max_new_tokens=1, device="cpu"))
    assert capsys.readouterr().out.startswith("\ufeffif x:\r\n\tpass\r")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "nowhere"), "nowhere does not exist"),
        (("--checkpoint", "RUN", "--top_p", "0"), "top_p is 0.0: it must be in (0, 1]"),
        (("--checkpoint", "RUN", "--temperature=-1"), "temperature is -1.0"),
        (("--checkpoint", "RUN", "--samples", "0"), "samples is 0"),
        (("--checkpoint", "RUN", "--prompt_file", "gone.txt"), "gone.txt does not exist"),
        (("--checkpoint", "RUN", "--prompt_file", "latin.txt"), "latin.txt is not UTF-8 (byte 0xE9 at offset 3)"),
        (("--checkpoint", "RUN", "--prompt_file", "latin.txt", "--prompt", "a"), "are both given; leave one of them"),
        (("--checkpoint", "RUN", "--prompt", "caf\udce9"), "prompt is not UTF-8"),
        (("--checkpoint", "RUN", "--max_tokens", "3"), "did you mean 'max_new_tokens'"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    code, _, errors, imported = launch("generate", *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert imported == []


def test_a_directory_without_a_usable_checkpoint(launch, trained, tmp_path):
    run_dir = tmp_path / "copy"
    shutil.copytree(trained, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        (path / "config.yaml").write_text("damaged")
    code, _, errors, _ = launch("generate", "--checkpoint", str(run_dir), forked=True)
    assert code == 2
    assert "holds no usable checkpoint" in errors and "config.yaml does not match its checksum" in errors
    damaged = run_dir / "checkpoints" / "step_00000006"
    code, _, errors, _ = launch("generate", "--checkpoint", str(damaged), forked=True)
    assert code == 2
    assert "is damaged (config.yaml does not match its checksum); choose another checkpoint" in errors


def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(launch, trained, tmp_path):
    sources = [path.read_text() for path in Path(json.__file__).parent.glob("*.py")]
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "tokenizer.model").write_bytes(learn_sentencepiece(sources, "bpe", 700).model)
    for name in ("generate", "evaluate"):
        data = () if name == "generate" else ("--data", json.__file__)
        arguments = ("--checkpoint", str(trained), "--tokenizer", "larger", *data)
        code, _, errors, _ = launch(name, *arguments, forked=True)
        assert code == 2 and len(errors.splitlines()) == 1, errors
        assert "tokenizer: larger has 700 ids and the model of " in errors

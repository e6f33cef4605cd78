"""Sampling from a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from trainer.data.tokenizer import learn_sentencepiece
from trainer.errors import ConfigError


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


def completions(path):
    return {record["index"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_a_file_of_prompts_is_completed_into_a_file_and_continued(trained, tmp_path, capsys):
    from launch.generate import GenerateConfig, main

    prompts = ["import json", "def f(x):", "class A:", "for i in"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    output = tmp_path / "out.jsonl"

    def complete(**options):
        main(GenerateConfig(str(trained), prompts=str(tmp_path / "prompts.txt"), output=str(output), **options))
        return capsys.readouterr()

    options = {"max_new_tokens": 9, "samples": 2, "slots": 3, "device": "cpu", "deterministic": True}
    errors = complete(**options).err
    assert "4 of 4 prompts" in errors
    whole = completions(output)
    assert [whole[number]["prompt"] for number in range(4)] == prompts
    for record in whole.values():
        assert len(record["samples"]) == 2
        assert all(set(sample) == {"text", "finish", "tokens"} for sample in record["samples"])
    assert complete(**options).err.startswith(f"{output} has all completions already")
    # A run that was killed while it wrote a line.
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[2] + lines[0] + lines[1][:-9])
    assert complete(**options).err.count(" of 4 prompts") == 2
    assert completions(output) == whole
    # A single prompt has the same text, alone on the terminal.
    main(GenerateConfig(str(trained), prompt=prompts[1], **options | {"samples": 1}))
    assert capsys.readouterr().out == f"{prompts[1]}{whole[1]['samples'][0]['text']}\n"
    output.write_text(json.dumps({"index": 1, "prompt": "other", "samples": []}) + "\n")
    with pytest.raises(ConfigError, match=r"line 1 of .* completes another prompt than number 1"):
        complete(**options)


def test_several_samples_are_printed_one_after_another_as_they_are_alone(trained, capsys):
    from launch.generate import GenerateConfig, main

    common = {"prompt": "import", "max_new_tokens": 12, "device": "cpu", "deterministic": True}
    main(GenerateConfig(str(trained), samples=3, **common))
    together = capsys.readouterr().out
    main(GenerateConfig(str(trained), samples=3, slots=1, **common))
    assert capsys.readouterr().out == together and together.count("import") >= 3


def test_a_stop_string_ends_a_sample_and_is_left_out(trained, tmp_path, capsys):
    from launch.generate import GenerateConfig, main

    common = {"max_new_tokens": 60, "device": "cpu"}
    main(GenerateConfig(str(trained), prompt="import json", **common))
    text = capsys.readouterr().out.removeprefix("import json").removesuffix("\n")
    stop = text[7:9]
    main(GenerateConfig(str(trained), prompt="import json", stop=[stop, "never there"], **common))
    assert capsys.readouterr().out == f"import json{text[: text.index(stop)]}\n"
    one, output = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    one.write_text(json.dumps({"prompt": "import json"}))
    main(GenerateConfig(str(trained), prompts=str(one), output=str(output), stop=[stop], **common))
    (sample,) = completions(output)[0]["samples"]
    assert sample["text"] == text[: text.index(stop)] and sample["finish"] == "stop" and sample["tokens"] < 60


def test_a_conversation_needs_a_template(trained, tmp_path, capsys):
    from launch.generate import GenerateConfig, main
    from trainer.data.tokenizer import Tokenizer

    common = {"max_new_tokens": 5, "device": "cpu"}
    with pytest.raises(ConfigError, match="has no chat template"):
        main(GenerateConfig(str(trained), prompt="hello", chat=True, **common))
    chatting = tmp_path / "chatting"
    chatting.mkdir()
    Tokenizer.load(next(trained.rglob("tokenizer.model"))).save(chatting)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[a]"
    (chatting / "chat_template.jinja").write_text(template)
    common["tokenizer"] = str(chatting)
    main(GenerateConfig(str(trained), prompt="hello", chat=True, **common))
    reply = capsys.readouterr().out
    main(GenerateConfig(str(trained), prompt="[user] hello\n[a]", **common))
    assert capsys.readouterr().out == f"[user] hello\n[a]{reply}"
    talk, output = tmp_path / "talk.jsonl", tmp_path / "out.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    main(GenerateConfig(str(trained), prompts=str(talk), output=str(output), **common))
    assert completions(output)[0]["samples"][0]["text"] == reply.removesuffix("\n")


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
        (("--checkpoint", "RUN", "--top_k=-1"), "top_k is -1"),
        (("--checkpoint", "RUN", "--min_p", "2"), "min_p is 2.0"),
        (("--checkpoint", "RUN", "--repetition_penalty", "0"), "repetition_penalty is 0.0"),
        (("--checkpoint", "RUN", "--stop", '[""]'), "stop has an empty text"),
        (("--checkpoint", "RUN", "--output", "out.jsonl"), "output is for the completions of prompts"),
        (("--checkpoint", "RUN", "--prompts", "gone.jsonl"), "prompts: gone.jsonl does not exist"),
        (("--checkpoint", "RUN", "--prompts", "empty.txt"), "prompts: empty.txt has no prompts"),
        (("--checkpoint", "RUN", "--prompts", "bad.jsonl"), 'line 2 of bad.jsonl has neither "prompt"'),
        (("--checkpoint", "RUN", "--prompts", "latin.txt", "--prompt", "a"), "prompt and prompts are both given"),
        (("--checkpoint", "RUN", "--prompts", "bad.jsonl", "--output", "no/x"), "output: there is no directory"),
        (("--checkpoint", "RUN", "--max_tokens", "3"), "did you mean 'max_new_tokens'"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
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

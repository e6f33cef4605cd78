"""What the study of post-training does with torch: the model that begins, and answers to held-out prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig
from models.decoder import Decoder, initialize
from models.generation import Engine
from trainer.data.chat import stop_tokens
from trainer.durable import write_atomically
from trainer.posttraining.data.rows import read_rows
from trainer.posttraining.rewards.base import Answer
from trainer.posttraining.rewards.registry import RewardConfig, build
from trainer.posttraining.rollouts import Policy, Prompt
from trainer.stored import weights
from trainer.stored.inference import load_model

# Added to the study's seed: other draws than those of training.
_SEED = 4_000_037
_SLOTS = 512


def draw(tokenizer: Path, output: Path, layers: int, width: int, seed: int) -> None:
    """Write a model of random weights with its tokenizer."""
    from trainer.data.tokenizer import Tokenizer

    heads = width // 16
    model_config = ModelConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        mixers=MixerLayoutConfig(pattern="full_attention"),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=16),
        init_std=0.1,
    )
    rows = model_config.padded_vocab_size(Tokenizer.load(tokenizer).vocab_size)
    model = Decoder(model_config, rows)
    initialize(model, seed)
    drawn = dict(model.named_parameters())

    def read(tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(drawn[name])

    weights.write(output, model, read, tokenizer=tokenizer, max_file_bytes=1e9, report=print)


def evaluate(checkpoint: Path, rows: Path, check: str, samples: int, max_new_tokens: int, output: Path) -> None:
    """Answer every prompt and write how many answers are right, and how many different ones of these there are.

    Args:
        checkpoint: A run or weights.
        rows: File of rows with a `level` each.
        check: The reward.
        samples: Answers to each prompt.
        max_new_tokens: Longest answer.
        output: The JSON file.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    loaded = load_model(checkpoint, torch.device("cpu"))
    tokenizer, questions = loaded.tokenizer, list(read_rows([str(rows)]))
    assert tokenizer is not None
    score = build(RewardConfig(check))
    policy = Policy(samples, max_new_tokens, 1.0, _SEED, tuple(stop_tokens(tokenizer)))
    engine = Engine(loaded.model, slots=_SLOTS, vocab_size=tokenizer.vocab_size)
    requests = [
        policy.request(Prompt(number, row, tuple(tokenizer.encode(str(row.prompt)))))
        for number, row in enumerate(questions)
    ]
    with torch.inference_mode():
        completions = engine.generate(requests)
    found = []
    for row, answers in zip(questions, completions, strict=True):
        texts = [tokenizer.decode(list(answer.content)) for answer in answers if answer.finish == "stop"]
        known = {text: score(Answer(str(row.prompt), text, ground_truth=row.ground_truth)) for text in set(texts)}
        right: Sequence[str] = [text for text in texts if known[text] == 1]
        found.append({"level": row.extra["level"], "right": len(right), "different": len(set(right))})
    values = {"samples": samples, "seconds": time.perf_counter() - start, "prompts": found}
    write_atomically(output, (json.dumps(values) + "\n").encode())

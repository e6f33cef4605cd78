"""A step of GRPO against TRL's GRPOTrainer: answers to prompts, rewards, scores and one update, same weights.

TRL's own loop runs, with transformers.generate, and each of its steps follows one of ours. Both sides draw at
temperature 1, every answer has the same number of tokens because nothing ends it, and micro-batches have as many
sequences. One function in this process scores both sides' answers. Nothing is padded, since all sequences have one
length, and TRL recomputes no activations.
"""

import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from models.config import AttentionConfig, ModelConfig
from trainer.benchmarks.report import Comparison, report, say
from trainer.config import OptimConfig, RunConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.posttraining.config import PosttrainConfig, RlConfig
from trainer.posttraining.rewards.base import Answer, Score

if TYPE_CHECKING:
    from models.decoder import Decoder
    from trainer.posttraining.data.row import Row

DESCRIPTION = "A GRPO step (answers, rewards, scores, one update) against TRL's GRPOTrainer, by phase."

# Ours and TRL's alike: drawing answers, judging them, what lies between these and the update, and the update.
PHASES = ("generation", "rewards", "scoring", "update")
_EOD = "<|endoftext|>"


@dataclass
class Config:
    """Model, prompts and answers.

    Attributes:
        json: Write the comparisons to this file.
        prompts: Prompts of a step.
        samples: Answers to each prompt.
        prompt: Tokens of a prompt.
        new_tokens: Tokens of an answer.
        micro_batch: Sequences of a micro-batch.
        kl: Coefficient of the KL divergence from the initial model; 0 leaves that model out.
        precision: Data type of the weights. In bf16 ours keeps float32 main parameters, and TRL trains the bfloat16
            parameters alone.
        layers: Number of layers.
        hidden_size: Width of the model, a multiple of 64.
        vocab_size: Size of the vocabulary.
        rounds: Number of rounds, in which the sides alternate.
        warmup: Untimed rounds before them.
        threads: CPU threads of both sides; 0 takes all.
        clock: wall, or cpu: processor time, which other processes disturb less; with one thread only.
    """

    json: str | None = None
    prompts: int = 8
    samples: int = 8
    prompt: int = 128
    new_tokens: int = 128
    micro_batch: int = 16
    kl: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    layers: int = 4
    hidden_size: int = 256
    vocab_size: int = 4096
    rounds: int = 3
    warmup: int = 1
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt", "new_tokens", "micro_batch", "layers", "hidden_size", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.samples < 2:
            raise ConfigError(f"samples is {self.samples}: a group has at least 2 answers")
        if self.sequences % self.micro_batch:
            raise ConfigError(f"micro_batch is {self.micro_batch}: it must divide prompts * samples={self.sequences}")
        if self.hidden_size % 64:
            raise ConfigError(f"hidden_size is {self.hidden_size}: it must be a multiple of 64, the size of a head")
        if self.vocab_size < 16:
            raise ConfigError(f"vocab_size is {self.vocab_size}: it must be at least 16")
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time, waiting included; use it with --threads 1")
        if importlib.util.find_spec("trl") is None:
            raise ConfigError("the peer is Hugging Face TRL: pip install 'trl>=1.16,<1.17'")

    @property
    def sequences(self) -> int:
        """Answers of a step."""
        return self.prompts * self.samples

    def run(self, directory: Path) -> PosttrainConfig:
        """The run that takes our steps."""
        heads = self.hidden_size // 64
        return PosttrainConfig(
            model=ModelConfig(
                num_layers=self.layers,
                hidden_size=self.hidden_size,
                ffn_hidden_size=3 * self.hidden_size,
                attention=AttentionConfig(num_heads=heads, num_kv_heads=max(heads // 2, 1), qkv_bias=True),
                tie_embeddings=True,
            ),
            stage="rl",
            rl=RlConfig(
                samples=self.samples,
                prompts=self.prompts,
                max_new_tokens=self.new_tokens,
                kl=self.kl,
                # TRL corrects nothing where transformers.generate draws.
                correction="none",
                slots=self.sequences,
            ),
            run=RunConfig(dir=str(directory / "run")),
            train=TrainConfig(
                precision=self.precision,
                seq_len=self.prompt + self.new_tokens,
                micro_batch_size=self.micro_batch,
                global_batch_size=self.sequences,
            ),
            optim=OptimConfig(lr=1e-6, weight_decay=0.0),
        )


class Stopwatch:
    """Sums up what phases take by themselves, without the phases inside of them.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._phase, self._since = clock, "", clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens in this context for the phase."""
        before = self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def watch(self, owner: object, method: str, name: str) -> None:
        """Count every call of an object's method for the phase."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, watched)

    def _enter(self, name: str) -> str:
        now = self._clock()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, name, now
        return before

    def take(self) -> dict[str, float]:
        """Return the seconds since the last time."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken


def main(config: Config) -> None:
    """Measure and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"
    keep_freed_memory()
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    sides = {name: Stopwatch(clock) for name in ("ours", "TRL")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="posttrain-step-") as directory:
        folder = Path(directory)
        _write_tokenizer(config, folder / "tokenizer")
        rows = _rows(config)
        our_step, model = _our_side(config, folder, rows, sides["ours"])

        def before() -> None:
            our_step()
            sides["TRL"].take()

        def after() -> None:
            taken = {name: stopwatch.take() for name, stopwatch in sides.items()}
            for name, seconds in taken.items():
                found[name].append(seconds)
            say(f"round {len(found['ours']) - config.warmup}: {_totals(taken)}")

        train = _trl_side(config, folder, model, rows, sides["TRL"], before, after)
        threads = configure_threads(config.threads)
        train()
    _report(config, {name: rounds[config.warmup :] for name, rounds in found.items()}, threads)


def _totals(taken: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {sum(seconds.values()):.2f} s" for name, seconds in taken.items())


def _report(config: Config, found: dict[str, list[dict[str, float]]], threads: int) -> None:
    """Compare the medians of the steps and of their phases."""
    case = (
        f"{config.prompts} x {config.samples} answers of {config.new_tokens} tokens to {config.prompt}, "
        f"{config.precision}, kl {config.kl:g}"
    )
    medians = {
        name: {phase: statistics.median(seconds[phase] for seconds in rounds) for phase in PHASES}
        | {"step": statistics.median(sum(seconds.values()) for seconds in rounds)}
        for name, rounds in found.items()
    }
    lines = []
    for phase in ("step", *PHASES):
        ours, peer = medians["ours"][phase], medians["TRL"][phase]
        note = f"median of {config.rounds}"
        if phase == "step":
            drawn = config.sequences * config.new_tokens
            note += f"; {drawn / ours:.0f} and {drawn / peer:.0f} drawn tokens a second"
        lines.append(Comparison(f"{case}: {phase}", ours, peer, peer / ours, "s", note))
    report(f"GRPO step against TRL, {config.clock} time, {threads} threads", lines, config.json)


def _write_tokenizer(config: Config, folder: Path) -> None:
    """A word for each row of the embedding, so that both sides turn tokens into the same text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {_EOD: 0, **{f"w{number}": number for number in range(1, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_EOD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def _rows(config: Config) -> list[tuple["Row", list[int]]]:
    import numpy as np

    from trainer.posttraining.data.row import Row

    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (config.prompts, config.prompt)).tolist()
    return [(Row(" ".join(f"w{token}" for token in own), id=str(number)), own) for number, own in enumerate(tokens)]


def _worth(answer: str) -> float:
    """The reward: about half of all answers get it, whatever the model writes."""
    return float(answer.count("1") % 2)


class _InProcess:
    """Scores answers in this process, as TRL does: a pool's processes would not count for processor time."""

    def submit(self, answers: Sequence[Answer]) -> "_InProcess":
        self._answers = answers
        return self

    def result(self) -> list[Score]:
        return [Score(_worth(answer.completion)) for answer in self._answers]


def _our_side(
    config: Config, folder: Path, rows: list[tuple["Row", list[int]]], stopwatch: Stopwatch
) -> tuple[Callable[[], None], "Decoder"]:
    """Returns what takes a step, and the initial model."""
    import torch

    from models.decoder import build
    from trainer.data.tokenizer import Tokenizer
    from trainer.engines.frozen import FrozenSpec
    from trainer.engines.megatron import MegatronEngine
    from trainer.engines.spec import EngineSpec
    from trainer.posttraining.data.packing import Packing
    from trainer.posttraining.data.sampler import PromptSampler
    from trainer.posttraining.reinforcement import Reinforcement
    from trainer.posttraining.rollouts import Policy, Sampler
    from trainer.posttraining.scoring import Scorer

    run = config.run(folder)
    rl, seed = run.rl, run.train.seed
    spec = EngineSpec.of(run, config.vocab_size)
    engine = MegatronEngine(spec, torch.device("cpu"))
    reference = None
    if config.kl:
        reference = engine.freeze(FrozenSpec(run.model, config.vocab_size, spec.fill, config.precision))
    sampler = Sampler(engine, Tokenizer.load(folder / "tokenizer", eod=_EOD), cast(Any, _InProcess()), rl.slots)
    scorer = Scorer(engine, reference, rl.temperature, seed)
    source = Reinforcement(
        run,
        PromptSampler([rows], seed=seed, prompts_per_step=config.prompts),
        sampler,
        scorer,
        Policy(rl.samples, rl.max_new_tokens, rl.temperature, seed, stop_tokens=()),
        Packing(run.train.seq_len, share=run.shared_tokens),
        lambda row: None,
    )
    objective = source.objective()
    stopwatch.watch(sampler, "begin", "generation")
    stopwatch.watch(sampler, "finish", "rewards")
    steps = iter(range(config.warmup + config.rounds))

    def step() -> None:
        number = next(steps)
        with stopwatch.phase("scoring"):
            batches = source.micro_batches(number, config.micro_batch)
        with stopwatch.phase("update"):
            engine.train_step(batches, objective, run.optim.lr, number)

    model = build(run.model, config.vocab_size, dtype=engine.model.head_weight.dtype)
    spec.fill(model)
    return step, model


def _trl_side(
    config: Config,
    folder: Path,
    model: "Decoder",
    rows: list[tuple["Row", list[int]]],
    stopwatch: Stopwatch,
    before: Callable[[], None],
    after: Callable[[], None],
) -> Callable[[], object]:
    """Returns what takes all steps; `before` and `after` are called around each."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trainer.benchmarks.transformers_peer import build_generating_peer

    peer, optim = build_generating_peer(model, config.vocab_size), OptimConfig(weight_decay=0.0)
    peer.save_pretrained(folder / "peer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer/tokenizer.json"), eos_token=_EOD, pad_token=_EOD, unk_token=_EOD
    )
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if config.precision == "bf16" else "float32"},
        max_steps=config.warmup + config.rounds,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.sequences // config.micro_batch,
        num_generations=config.samples,
        max_completion_length=config.new_tokens,
        beta=config.kl,
        use_bias_correction_kl=False,
        learning_rate=1e-6,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.clip_grad,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
    )

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            before()
            self.phase = stopwatch.phase("update")
            self.phase.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.phase.__exit__(None, None, None)
            after()

    trainer = GRPOTrainer(
        str(folder / "peer"),
        lambda completions, **_: list(map(_worth, completions)),
        arguments,
        Dataset.from_list([{"prompt": row.prompt} for row, _ in rows]),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer.remove_callback(PrinterCallback)
    # No token ends an answer, on either side.
    trainer.generation_config.eos_token_id = None
    trainer.eos_token_ids = [-1]
    stopwatch.watch(trainer, "_generate", "generation")
    stopwatch.watch(trainer, "_calculate_rewards", "rewards")
    stopwatch.watch(trainer, "_generate_and_score_completions", "scoring")
    return trainer.train

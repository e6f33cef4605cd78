"""Validation in bits per byte, text samples, and a comparison with general-purpose compressors."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import spiking_statistics
from models.generation import Engine, Request, Sampling
from trainer import raster
from trainer.callbacks.base import Callback
from trainer.data.compressors import bits_per_byte_of_compressors
from trainer.data.dataset import EvaluationStream
from trainer.evaluation import EvaluationSums, chunks
from trainer.objectives.language_model import LanguageModel
from trainer.run_directory import checkpoint_path

if TYPE_CHECKING:
    from trainer.data.sources import DataSources
    from trainer.loop import Trainer

_LOGGER = logging.getLogger("spiketrain")


def validated(path: Path, step: int) -> bool:
    """Whether a metrics file contains a validation of this step."""
    with path.open() as lines:
        return any(json.loads(line)["step"] == step for line in lines if '"split"' in line)


# Number of micro-batches between two checks for a stop request.
_CHUNK = 8


class Evaluator(Callback):
    """Validates every `evaluation.every` steps on a part of the split, and after the last step on the whole split.

    A stop request aborts a validation. Its step has been saved before, and the resumed run repeats the validation from
    the beginning.

    Args:
        sources: Data sources that include a validation split.
    """

    phase = "validate"

    def __init__(self, sources: DataSources) -> None:
        assert sources.validation is not None
        self.path, self.eod_id, self.vocab_size = sources.validation, sources.eod_id, sources.vocab_size
        # Computed once: bits per byte need the bytes of every label.
        self.token_bytes = None if sources.tokenizer is None else sources.tokenizer.token_bytes()
        self._streams: dict[int | None, EvaluationStream] = {}
        self._phase = 0

    def on_start(self, trainer: Trainer) -> None:
        """Log that there will be no text samples, if no rank has the whole model."""
        engine = trainer.engine
        if engine.rank == 0 and trainer.config.evaluation.samples and not engine.model_is_whole:
            _LOGGER.info(
                "no text samples on the way: no rank has the whole model; spiketrain generate reads checkpoints"
            )

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Validate if a validation is due."""
        self._validate_if_due(trainer)

    def on_resume(self, trainer: Trainer) -> None:
        """Run a validation that was due after the last step and that the previous start missed or did not finish."""
        step = trainer.progress.step
        # A fresh directory that resumes from another run's checkpoint owes no validation.
        is_ours = trainer.engine.rank == 0 and checkpoint_path(trainer.run_dir, step).is_dir()
        missing = is_ours and not validated(trainer.run_dir / "metrics.jsonl", step)
        if trainer.engine.collectives.broadcast(missing):
            self._validate_if_due(trainer)

    def _validate_if_due(self, trainer: Trainer) -> None:
        evaluation = trainer.config.evaluation
        if trainer.finished:
            if trainer.engine.rank == 0:
                _LOGGER.info("validating on the whole split: %d micro-batches", len(self._stream(trainer, None)))
            trainer.cut_short = not self._validate(trainer, None)
            if trainer.cut_short:
                return
            trainer.enter("end")
            if evaluation.compare_compressors and trainer.tokenizer and trainer.engine.rank == 0:
                self._compare(trainer)
        elif evaluation.every and trainer.progress.step % evaluation.every == 0:
            self._validate(trainer, evaluation.batches or None)

    def _stream(self, trainer: Trainer, limit: int | None) -> EvaluationStream:
        # Another phase may have another sequence length and micro-batch size.
        if trainer.phase.number != self._phase:
            self._phase, self._streams = trainer.phase.number, {}
        if limit not in self._streams:
            config, engine = trainer.phase.config, trainer.engine
            micro = config.train.micro_batch_size
            self._streams[limit] = EvaluationStream(
                self.path,
                config.evaluation.seq_len or config.train.seq_len,
                micro_batch_size=micro,
                eod_id=self.eod_id,
                stride=config.evaluation.stride,
                document_mask=config.data.document_mask,
                limit=None if limit is None else limit * micro,
                rank=engine.data_parallel_rank,
                world=engine.data_parallel_size,
                vocab_size=self.vocab_size,
            )
        return self._streams[limit]

    def _validate(self, trainer: Trainer, limit: int | None) -> bool:
        """Return whether the validation finished. False if a stop request aborted it."""
        engine, stages = trainer.engine, trainer.config.parallel.pipeline
        # Keep the pipeline bubble small: each chunk needs several micro-batches per stage.
        chunk = stages * max(_CHUNK // stages, 4 if stages > 1 else 1)
        own, start = EvaluationSums(), time.perf_counter()
        for batches in chunks(self._stream(trainer, limit), chunk):
            if trainer.agreed_to_stop():
                if engine.rank == 0:
                    _LOGGER.info("the validation of step %d is left to the next start", trainer.progress.step)
                return False
            trainer.enter(self.phase)
            nll = engine.evaluate(batches, LanguageModel())[0]
            own += EvaluationSums.of(batches, nll, self.token_bytes)
        seconds = time.perf_counter() - start
        sums = EvaluationSums(*engine.collectives.sum_over_data(astuple(own)))
        if engine.rank == 0:
            trainer.samples, trainer.rasters = self._samples(trainer), self._rasters(trainer, limit)
        trainer.report_evaluation("validation", sums, seconds)
        return True

    def _samples(self, trainer: Trainer) -> list[str]:
        evaluation, tokenizer = trainer.config.evaluation, trainer.tokenizer
        if tokenizer is None or not evaluation.samples or not trainer.engine.model_is_whole:
            return []
        # Without a prompt, start as after the end of a document.
        ids = tuple(tokenizer.encode(evaluation.prompt) or [tokenizer.eod_id])
        sampling = Sampling(
            evaluation.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=trainer.config.train.seed,
            stop_tokens=(tokenizer.eod_id,),
        )
        generator = Engine(trainer.engine.model, slots=evaluation.samples, vocab_size=tokenizer.vocab_size)
        (samples,) = generator.generate([Request(ids, sampling, evaluation.samples)])
        return [tokenizer.decode([*ids, *sample.content]) for sample in samples]

    def _rasters(self, trainer: Trainer, limit: int | None) -> dict[str, np.ndarray]:
        """Spikes of the first micro-batch, the same in every validation; none of a model without, or of many ranks."""
        engine = trainer.engine
        if not engine.model_is_whole or not trainer.config.model.spiking.layers:
            return {}
        batch = next(iter(self._stream(trainer, limit))).to(engine.device)
        counts = spiking_statistics.record(engine.model, batch.tokens, batch.positions, batch.documents)
        return spiking_statistics.rasters(counts, raster.CHANNELS, raster.TOKENS)

    def _compare(self, trainer: Trainer) -> None:
        assert trainer.tokenizer is not None, "on_step asks only where there is one"
        stream = self._stream(trainer, None)
        ratios = bits_per_byte_of_compressors(trainer.tokenizer.decode(stream.file.tokens.tolist()).encode())
        for name, value in ratios.items():
            _LOGGER.info("%s reaches %.4f bits per byte on the same files, concatenated", name, value)
        for text in trainer.samples:
            _LOGGER.info("sample:\n%s", text)

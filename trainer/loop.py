"""The training loop: batches in, steps through the engine, callbacks around them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

from models.decoder import flops_per_token, shapes
from trainer.callbacks.base import Callback
from trainer.callbacks.health import TrainingDiverged
from trainer.checkpoint import Progress, RunState
from trainer.config import PretrainConfig
from trainer.data.tokenizer import Tokenizer
from trainer.device import peak_memory_bytes
from trainer.engines.base import Engine
from trainer.engines.timing import PHASES
from trainer.evaluation import EvaluationSums
from trainer.events import EventLog
from trainer.objectives.base import Objective
from trainer.objectives.language_model import LanguageModel
from trainer.optim import learning_rate
from trainer.phases import Phase, PhasedSampler, expand, phase_at
from trainer.watchdog import Watchdog

_LOGGER = logging.getLogger("spiketrain")


class Outcome(Enum):
    """How the loop ended."""

    DONE = "done"
    STOPPED = "stopped"


class Trainer:
    """State of a run that callbacks see.

    Args:
        config: The run.
        config_yaml: The same, as it is written down.
        engine: Steps.
        sampler: Batches as a function of the step.
        tokenizer: For text samples and checkpoints; None where the data came without one.
        callbacks: In the order in which they are called.
        progress: Where to continue; step 0 for a new run.
        peak_flops: Matrix-multiplication peak of all ranks together, None if unknown.
        watchdog: Told how far this rank has come; None where nobody watches.
        events: What happens is written there; None to write nothing.
        objective: What is minimised; None for the next token's negative log-likelihood.

    Attributes:
        stop_requested: Set by anyone, on any rank, to stop after the current step.
        stop_reason: Why, in a few words, by whoever set it.
        save_requested: Likewise, to save after the step.
        agreed_to_save: Whether a save was asked for before this step, on any rank.
        seconds_in_checkpoints: That training has waited for saves since the last step.
        cut_short: Set on all ranks by a callback that a stop kept from finishing its work of the last step.
        samples: The newest text samples.
        phases: Of the run, in order; one where the configuration has none.
    """

    def __init__(
        self,
        config: PretrainConfig,
        config_yaml: str,
        engine: Engine,
        sampler: PhasedSampler,
        tokenizer: Tokenizer | None,
        callbacks: Sequence[Callback],
        progress: Progress,
        peak_flops: float | None,
        watchdog: Watchdog | None = None,
        events: EventLog | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.config, self.config_yaml = config, config_yaml
        self.engine, self.sampler, self.tokenizer = engine, sampler, tokenizer
        self.callbacks = list(callbacks)
        self.objective = LanguageModel() if objective is None else objective
        self.progress = progress
        self.resumed = progress.step > 0
        self.run_dir = Path(config.run.dir)
        self.stop_requested = self.cut_short = False
        self.stop_reason = ""
        self.save_requested = self.agreed_to_save = False
        self.samples: list[str] = []
        self._peak_flops, self._peak_was_raised = peak_flops, False
        self._watchdog, self._events = watchdog, events
        self._stops = False
        self.seconds_in_checkpoints = 0.0
        # Kernels are compiled and buffers allocated in the first step.
        self._phase_of_step = "start"
        self.phases = expand(config)
        self._count_flops(phase_at(self.phases, progress.step).config)

    def _count_flops(self, config: PretrainConfig) -> None:
        whole = shapes(config.model, self.engine.model.vocab_size)
        self._flops_per_token = flops_per_token(whole, config.train.seq_len)
        self._flops_per_expert = 0.0
        if config.model.moe.num_experts:
            more = config.model.moe.experts_at(None) + 1
            self._flops_per_expert = flops_per_token(whole, config.train.seq_len, more) - self._flops_per_token

    @property
    def phase(self) -> Phase:
        """That of the last step taken, before the first step that of it."""
        return phase_at(self.phases, max(self.progress.step - 1, 0))

    def state(self) -> RunState:
        """What a checkpoint holds of the run beside the engine's state, as it is now."""
        return RunState(self.progress, self.config_yaml, self.tokenizer, RunState.of_callbacks(self.callbacks))

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.progress.step >= self.config.train.steps

    def fit(self) -> Outcome:
        """Train to the last step, or until a stop is asked for."""
        self._call("on_start")
        try:
            outcome = self._take_steps()
        except BaseException as error:
            if isinstance(error, TrainingDiverged):
                # On all ranks alike: what they have begun together they can finish.
                self.enter("save")
                self._call_after_failure("on_give_up")
            self._call_after_failure("on_end")
            raise
        self.enter("end")
        for callback in reversed(self.callbacks):
            callback.on_end(self)
        return outcome

    def _take_steps(self) -> Outcome:
        self.engine.begin_phase(self.phase.config.model, self.phase.config.train.trainable)
        if self.resumed:
            self._call("on_resume")
        while not self.finished:
            if self.agreed_to_stop():
                self._call("on_stop")
                return Outcome.STOPPED
            if self.progress.step in {phase.first for phase in self.phases[1:]}:
                self._begin_phase(phase_at(self.phases, self.progress.step))
            self.enter(self._phase_of_step)
            metrics = self._step()
            self._phase_of_step = "train"
            self._call("on_step", metrics)
        return Outcome.STOPPED if self.cut_short else Outcome.DONE

    def _begin_phase(self, phase: Phase) -> None:
        """Other shapes are to be compiled and allocated anew."""
        self._phase_of_step = "start"
        self._count_flops(phase.config)
        self.engine.begin_phase(phase.config.model, phase.config.train.trainable)
        self.record("phase", number=phase.number)
        if self.engine.rank == 0:
            _LOGGER.info("%s", phase)

    def _call_after_failure(self, hook: str) -> None:
        """What fails there must not hide what failed before (files on a full disk cannot be closed)."""
        for callback in reversed(self.callbacks):
            try:
                getattr(callback, hook)(self)
            except Exception as error:
                _LOGGER.warning("%s could not end: %s", type(callback).__name__, error)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            self.enter(callback.phase)
            getattr(callback, hook)(self, *arguments)

    def enter(self, phase: str) -> None:
        """Note that this rank has come this far: `start`, `train`, `validate`, `save` or `end`.

        Every rank calls it as often as the others.
        """
        if self._watchdog is not None:
            self._watchdog.enter(phase, self.progress.step)

    def record(self, kind: str, **fields: Any) -> None:
        """Write an event of now to events.jsonl, on rank 0."""
        if self._events is not None and self.engine.rank == 0:
            self._events.record(kind, self.progress.step, **fields)

    def agreed_to_stop(self) -> bool:
        """Whether any rank was asked to stop; every rank calls it. Requests to save go into `agreed_to_save`."""
        collectives = self.engine.collectives
        asked, self.save_requested = self.save_requested, False
        stop, save = collectives.any_rank([self.stop_requested, asked])
        self.agreed_to_save |= save
        if stop and not self._stops:
            self._stops = True
            # The rank that was asked need not be the one that writes.
            reasons = filter(None, collectives.gather(self.stop_reason))
            self.record("stop", why=next(reasons, "asked to"))
        return stop

    def _step(self) -> dict[str, Any]:
        step = self.progress.step
        config = phase_at(self.phases, step).config
        if config.model.moe.spawns_at(step):
            self.record("spawn", experts=config.model.moe.num_experts)
        start = time.perf_counter()
        batches = self.sampler.micro_batches(
            step,
            config.train.micro_batch_size,
            rank=self.engine.data_parallel_rank,
            world=self.engine.data_parallel_size,
        )
        data_seconds = time.perf_counter() - start
        lr = learning_rate(config.optim, step, config.train.steps)
        result = self.engine.train_step(batches, self.objective, lr, step)
        seconds = time.perf_counter() - start
        checkpoint_seconds, self.seconds_in_checkpoints = self.seconds_in_checkpoints, 0.0
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + result.tokens,
            skipped=self.progress.skipped + result.skipped,
        )
        # Before the gates are sparse a token goes to more experts than in the end.
        nominal = config.model.moe.experts_at(None)
        more = result.metrics.get("moe/experts_per_token", nominal) - nominal
        flops = (self._flops_per_token + more * self._flops_per_expert) * result.tokens / seconds
        return {
            "step": self.progress.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.progress.tokens,
            "tokens_per_second": result.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            **{f"{phase}_seconds": result.seconds.get(phase, 0.0) for phase in PHASES},
            "checkpoint_seconds": checkpoint_seconds,
            "model_flops_utilization": self._utilization(flops),
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
            "skipped": result.skipped,
            "skipped_total": self.progress.skipped,
            **result.metrics,
        }

    def _utilization(self, flops: float) -> float | None:
        """Share of the peak; a step that exceeds it is the peak from then on, for then it was measured too low."""
        if self._peak_flops is None:
            return None
        if flops > self._peak_flops:
            if self.engine.rank == 0 and not self._peak_was_raised:
                _LOGGER.info(
                    "a step ran at %.0f GFLOP/s, above the measured peak of %.0f: what the fastest step reaches is "
                    "taken for the peak from here on",
                    flops / 1e9,
                    self._peak_flops / 1e9,
                )
            self._peak_flops, self._peak_was_raised = flops, True
        return flops / self._peak_flops

    def report_evaluation(self, split: str, sums: EvaluationSums, seconds: float) -> None:
        """Tell the callbacks of a validation, by its sums over all ranks and how long it took."""
        step = self.progress.step
        metrics = {"step": step, "split": split, "loss": sums.loss, "bits_per_byte": sums.bits_per_byte}
        self._call("on_evaluation", metrics)
        self.record("evaluation", split=split, loss=sums.loss, bits_per_byte=sums.bits_per_byte, seconds=seconds)

    def hyper_parameters(self) -> dict[str, bool | int | float | str]:
        """The configuration, flat, for TensorBoard."""
        flat: dict[str, bool | int | float | str] = {}

        def visit(prefix: str, values: dict[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, dict):
                    visit(f"{prefix}{name}.", value)
                else:
                    flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)

        visit(
            "", {name: asdict(getattr(self.config, name)) for name in ("model", "data", "train", "optim", "parallel")}
        )
        return flat

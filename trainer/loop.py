"""The training loop: batches, engine steps, and callbacks around them."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.decoder import flops_per_token, shapes
from trainer.callbacks.base import Callback
from trainer.callbacks.health import TrainingDiverged
from trainer.config import PretrainConfig
from trainer.data.batch import Batch
from trainer.data.tokenizer import Tokenizer
from trainer.device import peak_memory_bytes
from trainer.engines.base import Engine
from trainer.engines.timing import PHASES
from trainer.evaluation import EvaluationSums
from trainer.events import EventLog
from trainer.objectives.alignment import AnyObjective
from trainer.objectives.language_model import LanguageModel
from trainer.optim import learning_rate
from trainer.phases import Phase, expand, phase_at
from trainer.stored.checkpoint import Progress, RunState
from trainer.trainable import trained
from trainer.watchdog import Watchdog

_LOGGER = logging.getLogger("spiketrain")


class Outcome(Enum):
    """How the loop ended."""

    DONE = "done"
    STOPPED = "stopped"


class Source(Protocol):
    """Returns the micro-batches of each step."""

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """Return the micro-batches of data-parallel rank `rank` of `world` in a step: equally many on every rank."""

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the entries of the last step's line in metrics.jsonl beside the loop's own, given the engine's."""


class Trainer:
    """The state of a run, as callbacks see it.

    Args:
        config: The run's configuration.
        config_yaml: The same as YAML text.
        engine: Takes the steps.
        source: Returns the batches of each step.
        tokenizer: For text samples and checkpoints. None if the data came without one.
        callbacks: Callbacks, in calling order.
        progress: The position to continue from. Step 0 for a new run.
        peak_flops: Peak matrix-multiplication FLOP/s of all ranks together, None if unknown.
        watchdog: Receives this rank's position. None for an unwatched run.
        events: The log of events. None writes none.
        objective_of: Returns the objective of a phase, given its configuration; called before each of its steps. By
            default next-token negative log-likelihood.

    Attributes:
        stop_requested: Set it on any rank to stop after the current step.
        stop_reason: A few words on the reason, set together with stop_requested.
        save_requested: Set it on any rank to save after the current step.
        agreed_to_save: Whether any rank requested a save before this step.
        seconds_in_checkpoints: Time that training has waited for saves since the last step.
        cut_short: A callback sets it on all ranks if a stop interrupted its work after the last step.
        samples: The newest text samples.
        tables: Tables of the validation that is being reported, in markdown, by name.
        rasters: Spike counts [channels, T] of some of the model's inputs in the newest validation, by name.
        phases: The phases of the run, in order. A run without configured phases has one.
    """

    def __init__(
        self,
        config: PretrainConfig,
        config_yaml: str,
        engine: Engine,
        source: Source,
        tokenizer: Tokenizer | None,
        callbacks: Sequence[Callback],
        progress: Progress,
        peak_flops: float | None,
        watchdog: Watchdog | None = None,
        events: EventLog | None = None,
        objective_of: Callable[[PretrainConfig], AnyObjective] = lambda _: LanguageModel(),
    ) -> None:
        self.config, self.config_yaml = config, config_yaml
        self.engine, self.source, self.tokenizer = engine, source, tokenizer
        self.callbacks = list(callbacks)
        self._objective_of = objective_of
        self.progress = progress
        self.resumed = progress.step > 0
        self.run_dir = Path(config.run.dir)
        self.stop_requested = self.cut_short = False
        self.stop_reason = ""
        self.save_requested = self.agreed_to_save = False
        self.samples: list[str] = []
        self.tables: dict[str, str] = {}
        self.rasters: dict[str, np.ndarray] = {}
        self._peak_flops, self._peak_was_raised = peak_flops, False
        self._watchdog, self._events = watchdog, events
        self._stops = False
        self.seconds_in_checkpoints = 0.0
        # The first step is slower: it compiles kernels and allocates buffers.
        self._phase_of_step = "start"
        self.phases = expand(config)
        self._count_flops(phase_at(self.phases, progress.step).config)

    def _count_flops(self, config: PretrainConfig) -> None:
        whole = shapes(config.model, self.engine.model.vocab_size)
        self._runs_whole_model = config.train.objective.name != "align"
        self._flops_per_token = flops_per_token(whole, config.train.seq_len)
        # Early in a dense-to-sparse schedule a token activates more experts. FLOPs are linear in their number.
        self._flops_per_expert = 0.0
        if config.model.moe.num_experts:
            more = config.model.moe.experts_at(None) + 1
            self._flops_per_expert = flops_per_token(whole, config.train.seq_len, more) - self._flops_per_token

    @property
    def phase(self) -> Phase:
        """The phase of the last step taken. Before the first step, the phase of the next."""
        return phase_at(self.phases, max(self.progress.step - 1, 0))

    def state(self) -> RunState:
        """Return the run's current state that a checkpoint stores beside the engine's state."""
        return RunState(self.progress, self.config_yaml, self.tokenizer, RunState.of_callbacks(self.callbacks))

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.progress.step >= self.config.train.steps

    def fit(self) -> Outcome:
        """Train to the last step, or until a stop is requested."""
        self._call("on_start")
        try:
            outcome = self._take_steps()
        except BaseException as error:
            if isinstance(error, TrainingDiverged):
                # All ranks raise this together, so they can still finish collective work that they have started.
                self.enter("save")
                self._call_after_failure("on_give_up")
            self._call_after_failure("on_end")
            raise
        self.enter("end")
        # Torn down in reverse order of setup.
        for callback in reversed(self.callbacks):
            callback.on_end(self)
        return outcome

    def _take_steps(self) -> Outcome:
        # A validation that is due needs the model of the last step; what is trained is a matter of the next.
        following = phase_at(self.phases, self.progress.step).config
        self.engine.begin_phase(self.phase.config.model, trained(following))
        if self.resumed:
            self._call("on_resume")
        while not self.finished:
            if self.agreed_to_stop():
                self._call("on_stop")
                return Outcome.STOPPED
            # Also when a run resumes exactly at the boundary: `self.phase` is still that of its last step.
            if self.progress.step in {phase.first for phase in self.phases[1:]}:
                self._begin_phase(phase_at(self.phases, self.progress.step))
            self.enter(self._phase_of_step)
            metrics = self._step()
            self._phase_of_step = "train"
            self._call("on_step", metrics)
        return Outcome.STOPPED if self.cut_short else Outcome.DONE

    def _begin_phase(self, phase: Phase) -> None:
        """Start a phase. Its new shapes cause compilation and allocation, as the first step does."""
        self._phase_of_step = "start"
        self._count_flops(phase.config)
        self.engine.begin_phase(phase.config.model, trained(phase.config))
        self.record("phase", number=phase.number)
        if self.engine.rank == 0:
            _LOGGER.info("%s", phase)

    def _call_after_failure(self, hook: str) -> None:
        """Call a hook of every callback after a failure. Later errors are logged only and must not hide the first.

        For example, files on a full disk cannot be closed.
        """
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
        """Tell the watchdog that this rank has entered a phase: `start`, `train`, `validate`, `save` or `end`.

        Every rank must call this equally often.
        """
        if self._watchdog is not None:
            self._watchdog.enter(phase, self.progress.step)

    def record(self, kind: str, **fields: Any) -> None:
        """Append an event with the current time to events.jsonl, on rank 0."""
        if self._events is not None and self.engine.rank == 0:
            self._events.record(kind, self.progress.step, **fields)

    def agreed_to_stop(self) -> bool:
        """Return whether any rank was asked to stop. Every rank calls this. Save requests set `agreed_to_save`."""
        collectives = self.engine.collectives
        # Reset before the collective: a signal that arrives during it counts for the next step.
        asked, self.save_requested = self.save_requested, False
        stop, save = collectives.any_rank([self.stop_requested, asked])
        self.agreed_to_save |= save
        if stop and not self._stops:
            # Recorded once, although the loop and validations ask repeatedly.
            self._stops = True
            # Rank 0 writes the event, but another rank may have received the request.
            reasons = filter(None, collectives.gather(self.stop_reason))
            self.record("stop", why=next(reasons, "asked to"))
        return stop

    def _step(self) -> dict[str, Any]:
        step = self.progress.step
        config = phase_at(self.phases, step).config
        if config.model.moe.spawns_at(step):
            self.record("spawn", experts=config.model.moe.num_experts)
        # A phase's first step builds its teacher here, which is not the step's time.
        objective = self._objective_of(config)
        start = time.perf_counter()
        batches = self.source.micro_batches(
            step,
            config.train.micro_batch_size,
            rank=self.engine.data_parallel_rank,
            world=self.engine.data_parallel_size,
        )
        data_seconds = time.perf_counter() - start
        lr = learning_rate(config.optim, step, config.train.steps)
        result = self.engine.train_step(batches, objective, lr, step)
        # The engine has synchronised the device, so this covers the whole step.
        seconds = time.perf_counter() - start
        checkpoint_seconds, self.seconds_in_checkpoints = self.seconds_in_checkpoints, 0.0
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + result.tokens,
            skipped=self.progress.skipped + result.skipped,
        )
        # During a dense-to-sparse schedule a token activates more experts than at its end.
        nominal = config.model.moe.experts_at(None)
        more = result.metrics.get("moe/experts_per_token", nominal) - nominal
        flops = (self._flops_per_token + more * self._flops_per_expert) * result.tokens / seconds
        # Alignment runs some mixers only.
        utilization = self._utilization(flops) if self._runs_whole_model else None
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
            "model_flops_utilization": utilization,
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
            "skipped": result.skipped,
            "skipped_total": self.progress.skipped,
            **self.source.metrics(result.metrics),
        }

    def _utilization(self, flops: float) -> float | None:
        """Return the utilisation of the peak. A faster step raises the peak, because the measured one was too low."""
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
        """Report a validation to the callbacks, with its sums over all ranks and its duration in seconds."""
        self.report_figures(split, {"loss": sums.loss, "bits_per_byte": sums.bits_per_byte}, seconds)

    def report_figures(self, split: str, figures: Mapping[str, float | None], seconds: float) -> None:
        """Report a validation to the callbacks, with its figures by name and its duration in seconds."""
        self._call("on_evaluation", {"step": self.progress.step, "split": split, **figures})
        self.record("evaluation", split=split, **figures, seconds=seconds)

    def hyper_parameters(self) -> dict[str, bool | int | float | str]:
        """Return the configuration, flattened, for TensorBoard."""
        flat: dict[str, bool | int | float | str] = {}

        def visit(prefix: str, values: dict[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, dict):
                    visit(f"{prefix}{name}.", value)
                else:
                    # TensorBoard accepts only these types.
                    flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)

        visit(
            "", {name: asdict(getattr(self.config, name)) for name in ("model", "data", "train", "optim", "parallel")}
        )
        return flat

"""What the teacher of a run (train.objective) takes of a rank: memory, and operations of its forward pass."""

import torch

from trainer.config import PretrainConfig
from trainer.planning.dry_run import Cut, DryRun
from trainer.stored.teacher import layout_of, open_teacher


class TeacherPlan:
    """A teacher on the ranks of the run that it teaches.

    Args:
        path: Directory of its weights.
        dtype: Data type of its parameters and activations.
    """

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        found = open_teacher(path)
        self.model, self._vocab_size = found.model, found.vocab_size
        self._run = DryRun(found.model, found.vocab_size, dtype)

    def _chunks(self, config: PretrainConfig, stage: int) -> list[range]:
        parallel = layout_of(config)
        return parallel.stage_layers(self.model.num_layers)[stage :: parallel.pipeline]

    def aligned(self, config: PretrainConfig) -> frozenset[int]:
        """The layers whose mixers train.objective.name=align trains."""
        return frozenset(config.model.differing_mixers(self.model))

    def memory(self, config: PretrainConfig, stage: int, cut_to: Cut, tokens: int, micro_batches: int) -> float:
        """Bytes of a stage's parameters, and of what it keeps for the objective.

        For distill these are the hidden states, on the last stage; for align what its layers have read and written.

        Args:
            config: The run, in the phase that the teacher teaches.
            stage: Number of the pipeline stage.
            cut_to: The parallel sizes.
            tokens: Tokens of a row on this rank.
            micro_batches: Micro-batches of a rank in a step. Megatron's engine runs the teacher on all of them first.
        """
        chunks = self._chunks(config, stage)
        specs = [spec for layers in chunks for spec in self._run.parameters(layers, cut_to)]
        parameters = float(sum(spec.numel * spec.itemsize for spec in specs))
        if config.train.objective.name == "align":
            layers = self.aligned(config).intersection(layer for layers in chunks for layer in layers)
            return parameters + 2 * len(layers) * config.train.micro_batch_size * self._run.residual(tokens, cut_to)
        if chunks[-1].stop < self.model.num_layers:
            return parameters
        at_once = micro_batches if config.engine.name == "megatron" else 1
        return parameters + at_once * config.train.micro_batch_size * self._run.residual(tokens, cut_to)

    def operations(self, config: PretrainConfig, stage: int) -> float:
        """Operations of the forward pass of a stage, per row, over the ranks that share it."""
        chunks, seq_len = self._chunks(config, stage), config.train.seq_len
        of_both_passes = sum(
            sum(self._run.flops(self._run.kinds[layer], seq_len)) for layers in chunks for layer in layers
        )
        if chunks[-1].stop == self.model.num_layers:
            of_both_passes += 6.0 * self._vocab_size * self.model.hidden_size
        # Forward is a third of the operations of both passes.
        return of_both_passes * seq_len / (3 * config.parallel.tensor * config.parallel.context)

"""Evaluation: loss and bits per byte of data, tasks of recall, and tasks of the lm-eval harness."""

from trainer.evaluation.sums import EvaluationSums, chunks

__all__ = ["EvaluationSums", "chunks"]

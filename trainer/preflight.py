"""Checks a run's files before a model is built. `--check` and every start run this code.

Imports neither torch nor megatron. The checks compare index files with token files, documents with their
end-of-document token, ids with the vocabulary, and tokenizers with each other. Of large files they read a sample, and
say so (`trainer.data.indexed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config import PretrainConfig
from trainer.data.indexed import CHECKED_BYTES, TokenFile
from trainer.data.layout import NO_END, info_of_prefix, resolve_prefix, tokenizer_sha256
from trainer.data.sources import DataSources, find_sources
from trainer.errors import ConfigError
from trainer.optim import learning_rate
from trainer.phases import Phase, expand
from trainer.run_directory import checkpoint_steps, starts_anew
from trainer.stored import teacher, weights

# Up to about four epochs, repeated text is worth nearly as much as new (Muennighoff et al. 2023, arXiv:2305.16264).
_MANY_EPOCHS = 4.0


@dataclass
class Findings:
    """Results of the checks that do not stop a run.

    Attributes:
        notes: Facts, one line each.
        warnings: Settings that are accepted but seldom intended, one line each.
    """

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(config: PretrainConfig, sources: Sequence[DataSources] | None = None) -> Findings:
    """Check a run's data, tokenizers and vocabulary against each other.

    Args:
        config: The run's configuration.
        sources: The data sources of each phase, if already known. Otherwise they are located, without preparing any.

    Raises:
        ConfigError: the run cannot start, or would differ from its configuration.
    """
    phases = expand(config)
    sources = sources or [find_sources(phase.config, prepare=False) for phase in phases]
    findings = Findings()
    for phase, own in zip(phases, sources, strict=True):
        if phase.number:
            _check_same_tokens(phase, own, sources[0])
            findings.notes.append(_describe(phase, phases[phase.number - 1]))
        _check_phase(phase, own, findings)
    _check_teachers(config, sources[0])
    _check_validation(config, sources[0], findings)
    if sources[0].tokenizer is None and not sources[0].unprepared:
        findings.notes.append(
            "no tokenizer is known, so no bits per byte and no text samples: data.tokenizer names the one that made "
            "the data"
        )
    return findings


def _describe(phase: Phase, before: Phase) -> str:
    """Describe in a line how a phase differs from the previous one, apart from its data."""
    train, steps = phase.config.train, phase.config.train.steps
    last = learning_rate(before.config.optim, phase.first - 1, steps)
    following = learning_rate(phase.config.optim, phase.first, steps)
    return (
        f"{phase}: {train.global_batch_size} sequences of {train.seq_len} tokens a step, {train.micro_batch_size} at a "
        f"time; the learning rate goes from {last:.2e} to {following:.2e}"
    )


def _check_same_tokens(phase: Phase, own: DataSources, first: DataSources) -> None:
    """Refuse a phase whose data have other token ids than those of the run's first phase."""
    paths = [sources.tokenizer_path for sources in (first, own)]
    digests = [None if path is None else tokenizer_sha256(path) for path in paths]
    # Without tokenizers, vocabulary size and end-of-document token have to do.
    if own.vocab_size != first.vocab_size or own.eod_id != first.eod_id or digests[0] != digests[1]:
        raise ConfigError(
            f"phases: the data of phase {phase.number} ({', '.join(own.paths)}) have another tokenizer than those that "
            "the run begins with; prepare them with the same one (spiketrain prepare_data --tokenizer.path)"
        )


def _check_teachers(config: PretrainConfig, sources: DataSources) -> None:
    """Refuse teachers that do not fit the run, or that read other token ids."""
    teacher.check(config, config.model.padded_vocab_size(sources.vocab_size))
    for phase in teacher.taught_phases(config):
        found, own = teacher.open_teacher(phase.config.train.objective.teacher or ""), sources.tokenizer_path
        path = found.tokenizer
        if own is not None and path is not None and tokenizer_sha256(own) != tokenizer_sha256(path):
            raise ConfigError(
                f"train.objective.teacher: {found.path} and the data have different tokenizers; prepare the data with "
                f"the teacher's (spiketrain prepare_data --tokenizer.path {path})"
            )


def _check_phase(phase: Phase, sources: DataSources, findings: Findings) -> None:
    config = phase.config
    _check_tokenizers(config, sources)
    _check_vocabulary(config, sources)
    # Preparation will add an end-of-document token.
    known = sources.eod_id is not None or bool(sources.unprepared)
    if config.data.document_mask and not known:
        raise ConfigError(NO_END)
    if sources.validation is not None and not known:
        raise ConfigError("validation needs the end-of-document token: set data.tokenizer or data.eod_id")
    _check_training(phase, sources, findings)


def _check_tokenizers(config: PretrainConfig, sources: DataSources) -> None:
    """Refuse different tokenizers. An id means other text, or nothing, to another tokenizer."""
    first: tuple[str, str] | None = None
    for name, digest in _tokenizers(config, sources):
        first = first or (name, digest)
        if digest != first[1]:
            raise ConfigError(
                f"{first[0]} and {name} are of different tokenizers (SHA-256 {first[1][:12]} and {digest[:12]}): "
                "prepare the data with the same one (spiketrain prepare_data --tokenizer.path), or name what belongs "
                "together"
            )


def _tokenizers(config: PretrainConfig, sources: DataSources) -> Iterator[tuple[str, str]]:
    """Yield (origin, SHA-256) of every tokenizer that a run involves."""
    prefixes = [("the training data", path, "train") for path in sources.paths if path not in sources.unprepared]
    if sources.validation is not None:
        prefixes.append(("the validation data", sources.validation, "validation"))
    for what, path, split in prefixes:
        digest = (info_of_prefix(resolve_prefix(path, split)) or {}).get("tokenizer_sha256")
        if digest is not None:
            yield f"{what} {path}", digest
    if sources.tokenizer_path is not None:
        name = "data.tokenizer" if config.data.tokenizer else "the tokenizer"
        yield f"{name} {sources.tokenizer_path}", tokenizer_sha256(sources.tokenizer_path)
    directory = _tokenizer_of_checkpoint(config)
    if directory is not None:
        yield f"the checkpoint's {directory}", tokenizer_sha256(directory)


def _tokenizer_of_checkpoint(config: PretrainConfig) -> Path | None:
    """Find the tokenizer directory of the checkpoint or weights that a run starts from. None if there is none."""
    checkpoint, run_dir = config.checkpoint, Path(config.run.dir)
    if not starts_anew(config):
        # The newest checkpoint that has a tokenizer.
        steps = [f"checkpoints/step_{step:08d}" for step in reversed(checkpoint_steps(run_dir))]
        named = checkpoint.resume not in ("auto", "never")
        places = [Path(checkpoint.resume)] if named else [run_dir / step for step in steps]
        directories = [place / "tokenizer" for place in places]
    else:
        # Beside weights, or within a checkpoint.
        init = Path(checkpoint.init or "")
        directories = [init, init / "tokenizer"] if checkpoint.init is not None else []
    return next(filter(_has_tokenizer, directories), None)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / model).is_file() for model in ("tokenizer.model", "tokenizer.json"))


def _check_vocabulary(config: PretrainConfig, sources: DataSources) -> None:
    try:
        rows = config.model.padded_vocab_size(sources.vocab_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    weights.check_vocabulary(config, rows)
    if sources.eod_id is not None and sources.eod_id >= sources.vocab_size:
        raise ConfigError(
            f"the end-of-document token {sources.eod_id} lies outside the vocabulary of {sources.vocab_size}: correct "
            "data.eod_id, or name the tokenizer that made the data"
        )


def _open(config: PretrainConfig, sources: DataSources, prefix: Path, findings: Findings) -> TokenFile:
    """Open a pair of token and index files, and check its index, document ends and ids, at least in a sample."""
    file = TokenFile(prefix, sampled=True)
    if config.data.document_mask:
        assert sources.eod_id is not None
        file.check_ends(sources.eod_id)
    # The preparation records the largest id, which saves reading the file.
    recorded = (info_of_prefix(prefix) or {}).get("max_id")
    low, high, whole = file.id_range() if recorded is None else (0, recorded, True)
    if low < 0 or high >= sources.vocab_size:
        of = f"the tokenizer {sources.tokenizer_path}" if sources.tokenizer else "model.vocab_size"
        raise ConfigError(
            f"{prefix} holds the token id {low if low < 0 else high}, and {of} has 0 to {sources.vocab_size - 1}: "
            "name the tokenizer that made the data (data.tokenizer), or set a larger model.vocab_size"
        )
    if not whole or (config.data.document_mask and file.tokens.nbytes > CHECKED_BYTES):
        looked_at = "ids and ends of documents" if not whole else "ends of documents"
        findings.notes.append(
            f"{prefix} has {file.tokens.nbytes / 1e9:,.1f} GB: {looked_at} were checked in a sample, first, last and "
            "spread between"
        )
    return file


def _check_training(phase: Phase, sources: DataSources, findings: Findings) -> None:
    config, train, steps = phase.config, phase.config.train, phase.last - phase.first
    read, shares = steps * train.global_batch_size * train.seq_len, sum(sources.paths.values())
    reader = "the run" if steps == train.steps else f"phase {phase.number}"
    for path, share in sources.paths.items():
        if path in sources.unprepared:
            findings.notes.append(f"data: {path} is prepared from the standard library's source when the run starts")
            continue
        file = _open(config, sources, resolve_prefix(path), findings)
        tokens, documents = len(file.tokens), len(file.borders) - 1
        # A blend reads each source in proportion to its share.
        of_it = read * share / shares
        epochs = of_it / tokens
        name = f"data: {path}" + (f" (share {share / shares:.3g})" if len(sources.paths) > 1 else "")
        findings.notes.append(
            f"{name}: {_millions(tokens)} tokens in {documents:,} documents; {reader} reads {_millions(of_it)} tokens, "
            f"{epochs:.2f} epochs"
        )
        if tokens < train.seq_len:
            findings.warnings.append(
                f"{path} has {tokens:,} tokens, fewer than train.seq_len={train.seq_len}: each sample repeats it"
            )
        elif epochs > _MANY_EPOCHS:
            findings.warnings.append(
                f"{reader} reads every token of {path} {epochs:.1f} times: use more data, or fewer train.steps than "
                f"{steps} ({_MANY_EPOCHS:g} epochs are {int(steps * _MANY_EPOCHS / epochs):,})"
            )


def _check_validation(config: PretrainConfig, sources: DataSources, findings: Findings) -> None:
    if sources.validation is None:
        # Data that are not prepared yet may still bring a split.
        if not sources.unprepared:
            findings.notes.append("validation: none, for no validation split is there; data.validation_path names one")
        return
    prefix = resolve_prefix(sources.validation, "validation")
    file = _open(config, sources, prefix, findings)
    tokens, window = len(file.tokens), config.evaluation.seq_len or config.train.seq_len
    findings.notes.append(f"validation: {prefix}: {_millions(tokens)} tokens in {len(file.borders) - 1:,} documents")
    if tokens < window:
        findings.warnings.append(
            f"{prefix} has {tokens:,} tokens, fewer than a window of {window}: validation is on one window that is "
            "not full"
        )


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f} M" if tokens >= 1e5 else f"{tokens:,.0f}"

"""Measure what compressed activations cost a run's gradient, and choose their bits by place.

spiketrain compression --config configs/pretrain/laptop.yaml --train.compression.bits 8
spiketrain compression --config configs/pretrain/laptop.yaml --cosine 0.999 --output laptop-compression.yaml
spiketrain compression --config configs/pretrain/laptop.yaml --megabytes 8 --output laptop-compression.yaml
spiketrain pretrain --config configs/pretrain/laptop.yaml --train.compression laptop-compression.yaml

It runs one micro-batch of the run's data, once for every place and number of bits, on one process. With --cosine it
takes the fewest bytes at which the gradient has this cosine with the exact one; with --megabytes the least error within
so many MB of a micro-batch; with neither it measures train.compression as configured.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.cli import fail, make_parser, parse
from trainer.config import CompressionConfig, PretrainConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.compression_choice import Choice


def main() -> None:
    """Parse, measure, print the table, and write the choice."""
    parser = make_parser(PretrainConfig, "Measure compressed activations of a run, and choose their bits by place.")
    parser.add_argument(
        "--cosine", type=float, default=None, help="least cosine with the exact gradient, such as 0.999"
    )
    parser.add_argument("--megabytes", type=float, default=None, help="most MB that a micro-batch's layers may keep")
    parser.add_argument(
        "--output", default=None, help="write the choice to this YAML file, a train.compression section"
    )
    parser.add_argument("--json", default=None, help="write the figures to this file, too")
    try:
        config, given = parse(PretrainConfig, parser, sys.argv[1:])
        _check(config, given)
        # Imported late: it loads torch, which invalid input need not wait for.
        from trainer import compression_choice

        compression_choice.check(config)
        chooser = compression_choice.Chooser(config)
        if given.cosine is not None:
            choice = chooser.for_cosine(given.cosine)
        elif given.megabytes is not None:
            choice = chooser.for_bytes(given.megabytes * 1e6)
        else:
            choice = chooser.configured()
    except ValueError as error:
        fail(str(error))
    print(describe(choice))
    if given.output is not None:
        section = _changed(choice.settings)
        Path(given.output).write_text(yaml.safe_dump(section, sort_keys=False))
        print(f"written: {given.output}; use it with --train.compression {given.output}")
    if given.json is not None:
        Path(given.json).write_text(json.dumps(as_values(choice), indent=1) + "\n")


def _check(config: PretrainConfig, given: Any) -> None:
    if given.cosine is not None and given.megabytes is not None:
        raise ConfigError("--cosine and --megabytes are two goals; give one of them")
    if given.cosine is not None and not 0 < given.cosine < 1:
        raise ConfigError(f"--cosine {given.cosine:g} must lie between 0 and 1, such as 0.999")
    if given.megabytes is not None and given.megabytes <= 0:
        raise ConfigError(f"--megabytes {given.megabytes:g} must be positive")
    chooses = given.cosine is not None or given.megabytes is not None
    if not chooses and not config.train.compression.bits:
        raise ConfigError("nothing to measure: give --cosine, --megabytes or --train.compression.bits")
    for name in ("output", "json"):
        path = getattr(given, name)
        if path is None:
            continue
        setattr(given, name, str(Path(path).expanduser()))
        if not Path(path).expanduser().absolute().parent.is_dir():
            raise ConfigError(f"--{name}: the directory of {path} does not exist; make it first")
    if given.output is not None and not chooses:
        raise ConfigError("--output holds a choice: give --cosine or --megabytes")
    if given.output is not None and Path(given.output).exists():
        raise ConfigError(f"--output: {given.output} exists; name another file, or remove it")


def _changed(settings: CompressionConfig) -> dict[str, Any]:
    """The fields of the section that differ from their defaults, and the bits."""
    default = asdict(CompressionConfig())
    chosen = {name: value for name, value in asdict(settings).items() if value != default[name] or name == "bits"}
    if "modules" in chosen:
        chosen["modules"] = {pattern: {"bits": rule["bits"]} for pattern, rule in chosen["modules"].items()}
    return chosen


def describe(choice: "Choice") -> str:
    """The tables by place and by layer, and the totals."""
    from trainer.compression_choice import by_name
    from trainer.planning.report import table

    places = [
        [name, *(str(counted.get(bits, "")) for bits in (16, 8, 4))]
        for name, counted in by_name(choice.bits.items()).items()
    ]
    layers = [
        [str(layer), f"{saved / 1e6:.3g}", f"{kept / 1e6:.3g}", f"{100 * (1 - kept / saved):.1f}", f"{100 * error:.3g}"]
        for layer, (saved, kept, error) in choice.layers.items()
    ]
    saved = 1 - choice.kept / choice.saved
    return "\n".join(
        [
            table(["place", "layers as they are", "at 8 bits", "at 4 bits"], places),
            "",
            table(["layer", "MB of a micro-batch", "kept", "saved, %", "gradient error, %"], layers),
            "",
            f"keeps {choice.kept / 1e6:.4g} of {choice.saved / 1e6:.4g} MB, {saved:.1%} saved; "
            f"cosine of the gradients {choice.cosine:.6f}",
        ]
    )


def as_values(choice: "Choice") -> dict[str, Any]:
    """The figures as JSON values."""
    return {
        "bits": {place.path: bits for place, bits in choice.bits.items()},
        "kept": choice.kept,
        "saved": choice.saved,
        "cosine": choice.cosine,
        "layers": {
            str(layer): dict(zip(("saved", "kept", "error"), row, strict=True)) for layer, row in choice.layers.items()
        },
    }


if __name__ == "__main__":
    main()

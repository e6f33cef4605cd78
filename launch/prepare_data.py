"""Prepare token files.

spiketrain prepare_data --source stdlib --output data/stdlib
spiketrain prepare_data --source 'corpus/**/*.jsonl.gz' --text_key content --output data/mine
"""

import signal
import sys

from trainer.cli import entry
from trainer.data.prepare_config import PrepareConfig, finished
from trainer.runtime import EXIT_STOPPED


def main(config: PrepareConfig) -> int | None:
    """Prepare the data, or report that it is complete."""
    if finished(config.output, config.settings()):
        print(f"{config.output} is complete", file=sys.stderr)
        return None
    from trainer.data.prepare import prepare

    # A scheduler's SIGTERM acts like Ctrl-C: finished shards are kept, and the same command continues.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(config)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {config.output}", file=sys.stderr)
        return EXIT_STOPPED
    return None


if __name__ == "__main__":
    entry(main, PrepareConfig, "Turn documents into token files.")

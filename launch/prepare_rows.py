"""Generate rows of a task whose answers a program can check.

spiketrain prepare_rows --task sums --output data/sums
spiketrain prepare_rows --task reasoning_gym:basic_arithmetic --output data/arithmetic --train 2000
"""

from trainer.cli import entry
from trainer.posttraining.prepare_rows import PrepareRowsConfig, prepare


def main(config: PrepareRowsConfig) -> None:
    """Write the files and name them."""
    for path in prepare(config):
        print(path)


if __name__ == "__main__":
    entry(main, PrepareRowsConfig, "Generate rows of a task whose answers a program can check.")

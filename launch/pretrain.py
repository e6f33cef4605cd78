"""Pre-train a language model.

spiketrain pretrain --config configs/pretrain/laptop.yaml
spiketrain pretrain --ranks 2 --config configs/pretrain/laptop.yaml --run.dir runs/two-ranks
torchrun --standalone --nproc-per-node 2 launch/pretrain.py --config configs/pretrain/laptop.yaml
spiketrain pretrain --config configs/pretrain/laptop.yaml --check --world-size 2
spiketrain pretrain --init weights/qwen --data.path data/web --run.dir runs/qwen
"""

import sys

from trainer import preflight
from trainer.config import PretrainConfig
from trainer.peers import PeerWatch
from trainer.start import start


def main() -> int:
    """Parse, refuse an invalid run, then train."""
    return start(PretrainConfig, "Pre-train a language model.", preflight.check, _run)


def _run(config: PretrainConfig, config_yaml: str, peers: PeerWatch) -> int:
    # Slow to import, and not needed to refuse a run.
    from trainer.pretrain import run

    return run(config, config_yaml, peers)


if __name__ == "__main__":
    sys.exit(main())

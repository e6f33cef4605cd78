"""Post-train a language model: supervised fine-tuning, or reinforcement learning from verifiable rewards.

spiketrain posttrain --config configs/posttrain/sft.yaml --init weights/base
spiketrain posttrain --config configs/posttrain/grpo.yaml --init runs/sft
torchrun --standalone --nproc-per-node 2 launch/posttrain.py --config configs/posttrain/grpo.yaml --init weights/base
spiketrain posttrain --config configs/posttrain/grpo.yaml --init weights/base --check
"""

import sys

from trainer.peers import PeerWatch
from trainer.posttraining.config import PosttrainConfig
from trainer.posttraining.preflight import check
from trainer.start import start


def main() -> int:
    """Parse, refuse an invalid run, then train."""
    return start(PosttrainConfig, "Post-train a language model.", check, _run)


def _run(config: PosttrainConfig, config_yaml: str, peers: PeerWatch) -> int:
    # Slow to import, and not needed to refuse a run.
    from trainer.posttraining.run import train
    from trainer.pretrain import run

    return run(config, config_yaml, peers, train)


if __name__ == "__main__":
    sys.exit(main())

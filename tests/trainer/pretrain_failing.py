"""launch/pretrain.py in which rank 1 fails in its third step."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))


def arm():
    """Raise what a full or broken disk would."""
    from trainer.loop import Trainer

    step = Trainer._step

    def failing_step(self):
        if self.progress.step == 2 and os.environ["RANK"] == "1":
            raise OSError("the disk is gone")
        return step(self)

    Trainer._step = failing_step


if __name__ == "__main__":
    arm()
    import pretrain

    sys.exit(pretrain.main())

"""launch/pretrain.py that waits for a signal: in set-up, or before the step after the N-th.

Arguments: `set-up` or N, then those of launch/pretrain.py. However fast the machine is, the signal comes in time.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))


def arm(where):
    """Have the run wait there."""
    from trainer import pretrain
    from trainer.loop import Trainer

    step = Trainer._step

    def waiting_step(self):
        # The ranks have agreed to take this step.
        if self.progress.step == int(where):
            (self.run_dir / "waiting").touch()
        while self.progress.step == int(where) and not self.resumed and not self.stop_requested:
            time.sleep(0.01)
        return step(self)

    def wait_for_ever(config):
        while True:
            time.sleep(0.01)

    if where == "set-up":
        pretrain.find_sources = wait_for_ever
    else:
        Trainer._step = waiting_step


if __name__ == "__main__":
    arm(sys.argv.pop(1))
    import pretrain

    sys.exit(pretrain.main())

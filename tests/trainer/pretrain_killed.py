"""launch/pretrain.py in which rank RANK is killed (SIGKILL) at point WHERE of the N-th save.

Arguments: WHERE RANK N, then those of launch/pretrain.py. WHERE is `writing` (parameters half written), `sealing` (all
written, no checksums yet) or `publishing` (sealed, not yet renamed).
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))


def arm(where, rank, number):
    """Kill this process the `number`-th time it gets there."""
    from torch.distributed.checkpoint import filesystem

    from trainer.stored import checkpoint

    owner, name = {
        "writing": (filesystem, "_write_item"),
        "sealing": (checkpoint, "_seal"),
        "publishing": (checkpoint.os, "replace"),
    }[where]
    original = getattr(owner, name)
    seen = {"saves": 0, "step": None}

    def killing(*args, **kwargs):
        directories = sorted(Path.cwd().glob("**/.saving_*"))
        current = directories[-1].name if directories else None
        if current is not None and current != seen["step"]:
            seen["saves"], seen["step"] = seen["saves"] + 1, current
        if current is not None and seen["saves"] == number and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


if __name__ == "__main__":
    place, victim, nth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    del sys.argv[1:4]
    arm(place, victim, nth)
    import pretrain

    sys.exit(pretrain.main())

"""Three ranks, of which the last two share the work of a data-parallel one: what each hears.

python -m tests.trainer.collectives_ranks
"""

import math

import torch
import torch.distributed as dist

from trainer.engines import groups
from trainer.engines.common import Collectives

CPU = torch.device("cpu")

if __name__ == "__main__":
    groups.initialize(CPU, 60.0)
    rank = dist.get_rank()
    collectives = Collectives(CPU, counts=rank != 2)
    assert collectives.sum_over_data([0.7 if rank == 0 else 0.1, 1.0]) == [0.7 + 0.1, 2.0]
    assert math.isnan(collectives.sum_over_data([math.inf if rank == 2 else 0.0])[0]), "heard of from every rank"
    assert collectives.sum_over_ranks([float(rank), 1.0]) == [3.0, 3.0]
    # What one rank alone knows, also one that does not count.
    assert collectives.any_rank([rank == 2, False, rank == 0]) == [True, False, True]
    assert collectives.broadcast({"rank": rank}) == {"rank": 0}
    collectives.barrier()
    dist.destroy_process_group()

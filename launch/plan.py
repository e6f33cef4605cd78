"""Plan a run on a cluster: memory, messages and time, without starting it and without any device.

spiketrain plan --config configs/pretrain/laptop.yaml --cluster configs/cluster/laptop.yaml
spiketrain plan --config configs/pretrain/laptop.yaml --cluster configs/cluster/laptop.yaml --search

Exit code 0: the run fits; 1: it does not, and the last line names the shortage; 2: invalid input.
"""

import json
import sys
from pathlib import Path

from trainer.cli import fail, make_parser, parse
from trainer.errors import ConfigError
from trainer.planning.config import PlanConfig

# Number of plans that --search prints.
BEST = 5


def main() -> int:
    """Parse, refuse an invalid configuration, then plan."""
    parser = make_parser(PlanConfig, "Plan a pre-training run on a cluster.")
    parser.add_argument("--search", action="store_true", help="compare all layouts and print the best that fit")
    parser.add_argument("--json", default=None, help="write the plans to this file, too")
    try:
        config, namespace = parse(PlanConfig, parser, sys.argv[1:])
        # A search tries other layouts, so the configured one need not fit.
        if not namespace.search:
            config.validate_layout(config.cluster.ranks)
        json_file = Path(namespace.json).expanduser() if namespace.json else None
        if json_file is not None and not json_file.parent.is_dir():
            raise ConfigError(f"--json: {json_file.parent} is no directory; make it, or name another file")
        # Imported late: it loads torch, which invalid input need not wait for.
        from trainer.planning.run import run

        plans = run(config, namespace.search)
    except ValueError as error:
        fail(str(error))
    from trainer.planning import report

    if json_file is not None:
        json_file.write_text(json.dumps([report.as_values(plan) for plan in plans], indent=1) + "\n")
    print(report.compare(plans[:BEST], config) if namespace.search else report.describe_phases(config, plans))
    return 0 if plans and all(plan.fits for plan in plans) else 1


if __name__ == "__main__":
    sys.exit(main())

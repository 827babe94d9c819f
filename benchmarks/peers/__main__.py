"""Installs the peers and converts the demo model for them; what is there is left alone.

python -m benchmarks.peers
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.peers import environments, models


def main() -> int:
    """Makes everything; the exit code is 1 where a step failed, whose own words stand above."""
    try:
        for environment in environments.ALL:
            if not environment.is_ready():
                print(f"installing {', '.join(environment.packages)} ...", flush=True)
                environment.make()
        models.make_all()
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    print(f"the peers are ready in {environments.PEERS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

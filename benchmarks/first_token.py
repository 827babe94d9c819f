"""From `git clone` to the first token, and from the second `make up` to the first token.

    make bench-start

Clones the repository into an empty folder, with an empty model cache and an environment of its own,
and does what the README tells a newcomer to do. What is measured includes downloading and
installing every dependency and the model, so the first figure depends on the network.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST_TOKEN_MARK = "mesh> "
TIMEOUT_S = 1800.0


def first_token_s(checkout: Path, environment: dict[str, str]) -> float:
    """Seconds from `make up` to the first text of its greeting. Stops the mesh again."""
    started = time.perf_counter()
    with subprocess.Popen(
        ["make", "up"],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        seen = b""
        while FIRST_TOKEN_MARK.encode() not in seen:
            piece = process.stdout.read1(4096)
            if not piece or time.perf_counter() - started > TIMEOUT_S:
                os.killpg(process.pid, signal.SIGKILL)
                raise RuntimeError(f"make up gave no answer:\n{seen.decode(errors='replace')}")
            seen += piece
        took_s = time.perf_counter() - started
        os.killpg(process.pid, signal.SIGINT)
        while process.stdout.read1(4096):
            pass
    return took_s


def main() -> int:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(prefix="meshserve-start-") as folder:
        checkout = Path(folder) / "meshserve"
        environment = {
            **os.environ,
            "MESHSERVE_CACHE": str(Path(folder) / "cache"),
            "MESHSERVE_STATE": str(Path(folder) / "state"),
        }
        started = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        clone_s = time.perf_counter() - started
        print(f"clone to first token: {clone_s + first_token_s(checkout, environment):.1f} s")
        print(f"second start to first token: {first_token_s(checkout, environment):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

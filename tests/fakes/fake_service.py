"""A process that answers PING like a healthy server, and misbehaves as its flags say."""

from __future__ import annotations

import argparse
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--runs", type=Path, help="gets a line with the pid at each start")
    parser.add_argument("--ends", type=Path, help="gets a line with the name after SIGTERM")
    parser.add_argument("--name", default="fake")
    parser.add_argument("--exit-at-once", type=int, help="exit with this code, never healthy")
    parser.add_argument("--exit-after-s", type=float)
    parser.add_argument("--never-listen", action="store_true")
    parser.add_argument("--stop-answering-after-s", type=float)
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--grandchild", type=Path, help="gets the pid of a child of this process")
    flags = parser.parse_args()
    if flags.runs:
        with flags.runs.open("a") as runs:
            runs.write(f"{os.getpid()}\n")
    sys.stderr.write(f"{flags.name} starts\n")
    if flags.exit_at_once is not None:
        sys.stderr.write(f"{flags.name} cannot go on: the disk is on fire\n")
        sys.exit(flags.exit_at_once)

    def on_sigterm(*_: object) -> None:
        if flags.ends:
            with flags.ends.open("a") as ends:
                ends.write(f"{flags.name}\n")
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if flags.ignore_sigterm else on_sigterm)
    if flags.grandchild:
        # It outlives its parent unless somebody ends the whole group.
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import signal, time; "
                "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
            ]
        )
        flags.grandchild.write_text(str(child.pid))
    if flags.exit_after_s is not None:
        threading.Timer(flags.exit_after_s, lambda: os._exit(7)).start()
    if flags.never_listen:
        time.sleep(600)
    started = time.monotonic()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            limit_s = flags.stop_answering_after_s
            if limit_s is not None and time.monotonic() - started > limit_s:
                time.sleep(600)
            self.wfile.write(b"+PONG\r\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", flags.port), Handler) as server:
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()

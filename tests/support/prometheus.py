"""A real Prometheus with the project's own configuration, beside a mesh on this machine."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.support.ports import free_ports
from tests.support.programs import require_program

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
START_TIMEOUT_S = 60.0


class Prometheus:
    """Scrapes the replicas given by the name of their service, each second."""

    def __init__(self, directory: Path, targets: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._program = require_program("prometheus")
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        configuration = yaml.safe_load(CONFIGURATION.read_text())
        configuration["global"] = {
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "evaluation_interval": "1s",
        }
        configuration["rule_files"] = [
            str(CONFIGURATION.parent / files) for files in configuration["rule_files"]
        ]
        jobs = [job for job in configuration["scrape_configs"] if job["job_name"] != "collector"]
        configuration["scrape_configs"] = jobs
        for job in jobs:
            # In place of the names that compose resolves.
            if job.pop("dns_sd_configs", None):
                job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
            else:
                job["static_configs"] = [{"targets": [self.address]}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))

    def __enter__(self) -> Prometheus:
        log = (self._directory / "prometheus.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._directory / 'data'}",
                    f"--web.listen-address={self.address}",
                    "--enable-feature=exemplar-storage",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=1).close()
            except OSError:
                assert self._process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return (self._directory / "prometheus.log").read_text(errors="replace")

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API. Raises AssertionError with what it says."""
        query = urllib.parse.urlencode(
            {name.replace("match", "match[]"): value for name, value in parameters.items()}
        )
        url = f"http://{self.address}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def last(self, expression: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The series of an expression over the last seconds, one point a second."""
        now = time.time()
        found: list[dict[str, Any]] = self.get(
            "query_range", query=expression, start=str(now - seconds), end=str(now), step="1"
        )["result"]
        return found

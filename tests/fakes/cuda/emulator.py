"""The CUDA kernels on a CPU: their very sources, compiled by g++ against the emulator beside this.

`Emulator().library` has the entries of the compiled kernels, for tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.build import find_compiler
from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.build import SOURCES
from services.engine.core.kernels.cuda.library import CudaError, Library

HERE = Path(__file__).parent
OBJECTS = HERE.parents[2] / "build" / "cuda-emulator"
# Variables that are never set hold a pattern, so that what depends on one is seen to be wrong.
FLAGS = (
    *("-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable"),
    *("-Wno-unused-but-set-variable", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    *("-ftrivial-auto-var-init=pattern", f"-I{HERE / 'include'}", f"-I{SOURCES}"),
)
PAGE = mmap.PAGESIZE


class Emulator:
    """The kernels of some sources, run by the emulator."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self.library = Library(_compile(sources))
        loaded = self.library._loaded
        self._schedule = loaded.emulator_schedule
        self._schedule.argtypes = (ctypes.c_uint32,)
        self._bank_conflicts = loaded.emulator_bank_conflicts
        self._bank_conflicts.restype = ctypes.c_uint64
        self._launch_on = loaded.emulator_device
        self._launch_on.argtypes = (ctypes.c_int32,)
        self._run_devices = loaded.emulator_run_devices
        self._run_devices.restype = ctypes.c_int32
        self._written_before = loaded.emulator_written_before
        self._written_before.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
        self._message = loaded.emulator_message
        self._message.restype = ctypes.c_char_p

    @property
    def message(self) -> str:
        """What the last kernel that failed did wrong."""
        text: bytes = self._message()
        return text.decode()

    @property
    def bank_conflicts(self) -> int:
        """Rows that ldmatrix had to load after others so far: they lie in the same banks."""
        return int(self._bank_conflicts())

    @contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """Have threads and blocks take turns in another order than their own."""
        self._schedule(seed)
        try:
            yield
        finally:
            self._schedule(0)

    @contextmanager
    def device(self, number: int) -> Iterator[None]:
        """Launch kernels on one of several devices, where they wait for `run_devices`."""
        self._launch_on(number)
        try:
            yield
        finally:
            self._launch_on(-1)

    def run_devices(self) -> None:
        """Run what was launched on all devices: at the same time, in turns that a seed decides.

        Raises:
            CudaError: a kernel has ended all of them.
        """
        if error := self._run_devices():
            raise CudaError("of a device", self.library._error_name(error).decode())

    def written_before(self, tensor: Tensor, values: Tensor) -> None:
        """Have the kernel before the next one write values into a tensor: until the next one waits
        for it, they are not there. Both are contiguous."""
        assert tensor.is_contiguous()
        assert values.is_contiguous()
        assert tensor.nbytes == values.nbytes
        self._written_before(tensor.data_ptr(), values.data_ptr(), tensor.nbytes)

    @contextmanager
    def fails(self, name: str, why: str) -> Iterator[None]:
        """Expect a kernel to end with the error of that name, for a reason that says `why`."""
        with pytest.raises(CudaError) as raised:
            yield
        assert raised.value.name == name, f"{raised.value}: {self.message}"
        assert why in self.message


@cache
def kernels() -> Emulator:
    """The kernels of the engine; the test is skipped on a machine that cannot run the emulator."""
    return of(*sorted(SOURCES.glob("*.cu")))


@cache
def of(*sources: Path) -> Emulator:
    """The kernels of other sources."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator of CUDA switches between threads in assembly of x86-64")
    return Emulator(sources)


@contextmanager
def in_use() -> Iterator[Emulator]:
    """Have the ops of kernels/cuda compute on the CPU by the emulator."""
    emulator = kernels()
    library.use(emulator.library)
    try:
        yield emulator
    finally:
        library.use(None)


def guarded(tensor: Tensor) -> Tensor:
    """A copy that ends, but for less than 16 bytes, where no memory may be touched.

    A kernel that reads or writes beyond it fails with cudaErrorIllegalAddress.
    """
    used = tensor.numel() * tensor.element_size()
    pages = -(-max(used, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(address + pages * PAGE)
    start = (pages * PAGE - used) // 16 * 16
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=used or 1, offset=start)[:used]
    raw.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return raw.view(tensor.dtype).view(tensor.shape)


def _protect(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def _compile(sources: Sequence[Path]) -> Path:
    OBJECTS.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler().command
    headers = [*SOURCES.glob("*.h"), *(HERE / "include").glob("*.h")]
    shared = b"".join(path.read_bytes() for path in sorted(headers))

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(repr(FLAGS).encode() + shared + source.read_bytes()).hexdigest()[:16]
        target = OBJECTS / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.partial")
            command = [*compiler, *FLAGS, "-c", "-x", "c++", str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "emulator.cpp"]))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    target = OBJECTS / f"emulated-{key}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [*compiler, "-shared", *map(str, objects), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(target)
    return target

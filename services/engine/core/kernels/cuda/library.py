"""Loads the compiled CUDA kernels and calls them.

`activate` is called once, when an engine starts on a GPU. `why_not()` is the probe of what
registers: it says why there are no kernels in use.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.core.compiling import BuildError
from services.engine.core.kernels.cuda.build import (
    PACKAGE,
    Recipe,
    build,
    find_compiler,
    recipe_for,
)
from services.engine.core.kernels.registry import Op
from services.runtime.modelfiles import default_cache_dir

logger = logging.getLogger(__name__)

# `enum class Format` of src/numbers.h.
FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}

_active: Library | None = None
_reason = "no engine has been started on a GPU"


class CudaError(Exception):
    """A kernel could not be launched; `name` is CUDA's own of the error."""

    def __init__(self, kernel: str, name: str) -> None:
        super().__init__(f"the CUDA kernel {kernel} could not be launched: {name}")
        self.name = name


class UnavailableError(Exception):
    """The kernels cannot be used. `way_out` says what would change that."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}; {way_out}")
        self.problem = problem
        self.way_out = way_out


class Library:
    """The compiled kernels. Each entry takes the address of its arguments, and a stream."""

    def __init__(self, path: Path) -> None:
        try:
            self._loaded = ctypes.CDLL(str(path))
            self._error_name = self._loaded.meshserve_error_name
        except (OSError, AttributeError) as error:
            raise UnavailableError(
                f"{path} cannot be loaded: {error}", "remove it to have it compiled again"
            ) from None
        self._error_name.restype = ctypes.c_char_p
        self._error_name.argtypes = (ctypes.c_int32,)
        self._entries: dict[str, Any] = {}

    def call(self, name: str, arguments: ctypes.Structure, stream: int) -> None:
        """Launch the kernels of an entry on a stream.

        Raises:
            CudaError: they could not be launched.
        """
        entry = self._entries.get(name) or self._find(name)
        if error := entry(ctypes.byref(arguments), stream):
            raise CudaError(name, self._error_name(error).decode())

    def _find(self, name: str) -> Any:
        entry = getattr(self._loaded, f"meshserve_{name}")
        entry.restype = ctypes.c_int32
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._entries[name] = entry
        return entry


def activate(device: torch.device, cache_dir: Path | None = None) -> Library | None:
    """Choose the kernels that this process uses, compiling them where that has not been done.

    What was chosen, or what is missed and how to get it, is logged in one line. Never raises.
    """
    if device.type != "cuda":
        use(None, f"the device is a {device.type}, no GPU of NVIDIA's")
        return None
    try:
        path = find_or_build(torch.cuda.get_device_capability(device), cache_dir)
        use(Library(path))
        logger.info("CUDA kernels: %s", path)
    except UnavailableError as error:
        use(None, error.problem)
        logger.warning("CUDA kernels: none, going without: %s; %s", error.problem, error.way_out)
    return _active


def use(library: Library | None, reason: str = "no engine has been started on a GPU") -> None:
    """Have all ops use these kernels, or none for the reason given."""
    global _active, _reason
    _active, _reason = library, reason


def find_or_build(capability: tuple[int, int] | None, cache_dir: Path | None = None) -> Path:
    """Return the library of the present sources for cards of a compute capability: the installed
    or the cached one, or one compiled now.

    Raises:
        UnavailableError: there is none and it cannot be compiled, or the card is too old.
    """
    if capability is not None and capability < (8, 0):
        raise UnavailableError(
            f"the kernels need compute capability 8.0, and the card has "
            f"{capability[0]}.{capability[1]}",
            "nothing is to be done about it",
        )
    recipe = recipe_for(capability)
    cached = (cache_dir or default_cache_dir()) / "kernels"
    for path in (*recipe.find(PACKAGE), *recipe.find(cached)):
        return path
    try:
        compiler = find_compiler()
        logger.info("CUDA kernels: compiling them into %s, once, for a minute or two", cached)
        return build(cached, recipe, compiler)
    except BuildError as error:
        # An image has them for the usual cards, whose code others run too.
        for path in Recipe().find(PACKAGE):
            return path
        raise UnavailableError(error.problem, error.way_out) from None


def active() -> Library | None:
    """Return the kernels in use, or None while there are none."""
    return _active


def why_not() -> str | None:
    """Return why there are no kernels in use, or None if there are: a probe for the op registry."""
    return None if _active is not None else _reason


def call(name: str, arguments: ctypes.Structure, on: Tensor) -> None:
    """Launch the kernels of an entry on the present stream of the device of `on`.

    Raises:
        CudaError: they could not be launched.
    """
    assert _active is not None, _reason
    stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0
    _active.call(name, arguments, stream)


def beneath(op: Op[Any, Any]) -> Callable[..., Any]:
    """What computes an op where these kernels do not serve its arguments: the next best.

    That is the implementation registered last of the others that can run and are not excluded, or
    the reference.
    """
    known = op.implementations.get("cuda", [])
    others = [each for each in known if each.name != "cuda" and each.name not in op.excluded]
    usable = [each.run for each in others if each.unavailable() is None]
    return usable[-1] if usable else op.reference


def is_aligned(*tensors: Tensor) -> bool:
    """Whether rows of the tensors can be read 16 bytes at a time."""
    return all(
        each.data_ptr() % 16 == 0
        and each.stride(-1) == 1
        and all(stride * each.element_size() % 16 == 0 for stride in each.stride()[:-1])
        for each in tensors
    )

# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ sources of this package to loaded kernels: NVRTC through cuda.core, cached on disk and in the process.

    source text + -D macros + architecture + NVRTC version  ->  sha256  ->  <cache>/<sha256>.cubin

The cache is `$NVFP4_EXPERTS_CACHE`, else `$XDG_CACHE_HOME/nvfp4-experts`, else `~/.cache/nvfp4-experts`. Compiling
takes about a second and happens once per machine and configuration, before the first call: `Backend.prepare` does it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ...errors import UnsupportedError

ARCHITECTURE = "sm_90a"
_COMPILERS = 16
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def cache_directory() -> Path:
    """Where compiled kernels are kept; need not exist yet."""
    chosen = os.environ.get("NVFP4_EXPERTS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvfp4-experts"


def source_of(name: str) -> str:
    """The text of a source file beside this module, with the files beside it that it includes."""
    text = (resources.files(__package__) / name).read_text()
    return _INCLUDE.sub(lambda found: source_of(found[1]), text)


def compile_cubin(source: str, macros: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """Machine code for a source with macros defined, from the cache or from NVRTC; needs no GPU.

    Cost: about a second where the cache has nothing; the file is written beside and renamed.
    """
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((source, macros, arch, version)).encode()).hexdigest()
    cached = cache_directory() / f"{key}.cubin"
    if cached.exists():
        return cached.read_bytes()
    defined = [(name, str(value)) for name, value in macros] or None  # an empty list is refused
    options = ProgramOptions(std="c++17", arch=arch, define_macro=defined)
    code = bytes(Program(source, "c++", options).compile("cubin").code)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as beside:
        beside.write(code)
    os.replace(beside.name, cached)
    return code


def compile_all(kernels: Iterable[tuple[str, tuple[tuple[str, int], ...]]]) -> None:
    """Have (file, macros) of each kernel in the cache, compiling several at a time; loading them is then quick."""
    from cuda.core import Program  # noqa: F401  first imported by several threads at once, it may not be found

    jobs = sorted(set(kernels))
    with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: compile_cubin(source_of(job[0]), job[1], ARCHITECTURE), jobs))


def load_kernel(
    name: str, file: str, macros: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int = 0
) -> Any:
    """The kernel `name` of `file` on a device, allowed `shared_bytes` of dynamic shared memory; loaded once.

    Raises:
        UnsupportedError: the device refuses that much shared memory.
    """
    return _load(
        name, file, macros, torch.cuda.current_device() if device.index is None else device.index, shared_bytes
    )


@functools.cache
def _load(name: str, file: str, macros: tuple[tuple[str, int], ...], device: int, shared_bytes: int) -> Any:
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(device).set_current()
    kernel = ObjectCode.from_cubin(compile_cubin(source_of(file), macros, ARCHITECTURE)).get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, device)
    if status != driver.CUresult.CUDA_SUCCESS:
        rule = f"must be allowed {shared_bytes} bytes of shared memory"
        raise UnsupportedError(name, rule, status, "use another backend on this device")
    return kernel


def launch_kernel(kernel: Any, grid: tuple[int, ...], threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
    """Launch on the current stream of the tensors' device; tensors pass as their address, None as a null pointer.

    The kernel may begin before the one in front of it has ended, and must wait for it itself (`griddepcontrol.wait`).
    """
    from cuda.core import LaunchConfig, launch

    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments]
    config = LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes, programmatic_stream_serialization=True)
    launch(current_stream(device), config, kernel, *passed)


def launch_structure(
    kernel: Any,
    blocks: int,
    threads: int,
    shared_bytes: int,
    arguments: bytes,
    device: torch.device,
    *,
    cluster: int = 1,
    together: bool = False,
) -> None:
    """Launch with one argument, a structure; early, as `launch_kernel` does.

    Args:
        cluster: blocks of a cluster.
        together: all blocks resident or none, for those that wait for each other.
    """
    from cuda.bindings import driver

    launch, kinds = driver.CUlaunchConfig(), driver.CUlaunchAttributeID
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = blocks, 1, 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
    launch.sharedMemBytes, launch.hStream = shared_bytes, torch.cuda.current_stream(device).cuda_stream
    early, grouping = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    if together:
        grouping.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        grouping.value.cooperative = 1
    else:
        grouping.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        grouping.value.clusterDim.x, grouping.value.clusterDim.y, grouping.value.clusterDim.z = cluster, 1, 1
    launch.attrs, launch.numAttrs = [early, grouping], 2
    structure = ctypes.create_string_buffer(arguments, len(arguments))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
    (status,) = driver.cuLaunchKernelEx(launch, driver.CUfunction(int(kernel.handle)), ctypes.addressof(pointers), 0)
    check_status(status, "cuLaunchKernelEx")


def check_status(status: Any, what: str) -> None:
    """Raise UnsupportedError unless the driver says that it is well."""
    if int(status):
        raise UnsupportedError(what, "must succeed", status, "report it, and use backend='torch' meanwhile")


def current_stream(device: torch.device) -> Any:
    """torch's current stream of a device, as cuda.core wants it."""
    return _stream(torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=1024)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)

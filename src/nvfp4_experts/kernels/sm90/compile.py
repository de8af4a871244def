# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ sources of this package to loaded kernels: NVRTC through cuda.core, cached on disk and in the process.

    source text + -D macros + architecture + NVRTC version  ->  sha256  ->  <cache>/<sha256>.cubin

The cache is `$NVFP4_EXPERTS_CACHE`, else `$XDG_CACHE_HOME/nvfp4-experts`, else `~/.cache/nvfp4-experts`. Compiling takes
about a second and happens once per machine and configuration, before the first call: `Backend.prepare` does it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError

ARCHITECTURE = "sm_90a"


def cache_directory() -> Path:
    """Where compiled kernels are kept; need not exist yet."""
    chosen = os.environ.get("NVFP4_EXPERTS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvfp4-experts"


def source_of(name: str) -> str:
    """The text of a source file beside this module."""
    return (resources.files(__package__) / name).read_text()


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
    options = ProgramOptions(std="c++17", arch=arch, define_macro=[(name, str(value)) for name, value in macros])
    code = bytes(Program(source, "c++", options).compile("cubin").code)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as beside:
        beside.write(code)
    os.replace(beside.name, cached)
    return code


@functools.cache
def load_kernel(name: str, file: str, macros: tuple[tuple[str, int], ...], shared_bytes: int, device: int) -> Any:
    """The kernel `name` of `file` on a device, allowed `shared_bytes` of dynamic shared memory.

    Raises:
        UnsupportedError: the device refuses that much shared memory.
    """
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

# SPDX-License-Identifier: Apache-2.0
"""Every Hopper kernel compiles, wherever there is a CUDA compiler: all that `prepare` loads, and other dtypes of x."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from nvfp4_experts.diagnostics.bench.work import SHAPES
from nvfp4_experts.kernels.dispatch import ACTIVATIONS, Problem
from nvfp4_experts.kernels.sm90 import backend, fp8, gemm, grouped, routed, routed_decode, routed_fp8
from nvfp4_experts.kernels.sm90.compile import ARCHITECTURE, source_of
from nvfp4_experts.kernels.target import Target
from nvfp4_experts.layouts.fragments import ROWS

pytestmark = pytest.mark.slow

HOPPER = Target("cuda", "a Hopper", (9, 0), 132)
RAGGED = (144, 80)
BF16, STATIC, E4M3 = 0, 1, 4  # ACTIVATIONS of decode.cu and routed_decode.cu
MODES = ("bf16", "static", "dynamic", "fp8")
WORKERS = 2


@dataclass(frozen=True)
class Kernel:
    """One entry point of one source file, and the macros it is compiled with."""

    name: str
    file: str
    macros: tuple[tuple[str, int], ...]

    def is_for(self, **macros: int) -> bool:
        return macros.items() <= dict(self.macros).items()

    def having(self, **changed: int) -> Kernel:
        return Kernel(self.name, self.file, tuple({**dict(self.macros), **changed}.items()))


@dataclass(frozen=True)
class Built:
    """What a compiler made of a kernel: PTX, machine code, and what it and ptxas -v said; or the error."""

    ptx: str
    cubin: bytes
    log: str
    error: str | None


def prepare(hidden: int, intermediate: int, calls: dict[str, Callable[..., None]]) -> None:
    """`Backend.prepare` of every activation format, with `calls` in the place of what needs a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (backend, gemm, fp8, grouped, routed_decode):
            patch.setattr(module, "load_kernel", calls["load_kernel"])
        for module, name in (
            (backend, "compile_all"),
            (gemm, "compile_all"),
            (backend, "reserve"),
            (backend, "mailboxes"),
            (grouped, "compile_all"),
            (routed_decode, "compile_all"),
            (routed, "reserve"),
            (routed_decode, "mailboxes"),
        ):
            patch.setattr(module, name, calls.get(name, lambda *_: mock.MagicMock()))
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(backend, "_compiler_problem", lambda: None)
        patch.setattr(routed_decode, "target_of", lambda _: HOPPER)
        routed_decode._tiles.cache_clear()
        patch.setattr(torch.cuda, "synchronize", calls.get("synchronize", lambda *_: None))
        for activations in ACTIVATIONS:
            problem = Problem(hidden, intermediate, activations, HOPPER)
            kernels = routed_fp8.ROUTED if activations == "fp8" else routed.ROUTED
            kernels.one.prepare(problem, torch.device("cpu"), 8192)
            experts = Problem(hidden, intermediate, activations, HOPPER, experts=256, top_k=6)
            kernels.prepare(experts, torch.device("cpu"), 8192)
            for of_shared in ACTIVATIONS:  # a format of its own, or the routed ones'
                kernels.prepare_moe(replace(problem, activations=of_shared), torch.device("cpu"), 8192)


@functools.cache
def kernels_of(hidden: int, intermediate: int) -> frozenset[Kernel]:
    """What the backend loads before its first call with a layer of that size, in any activation format."""
    found: set[Kernel] = set()

    def record(name: str, file: str, macros: tuple[tuple[str, int], ...], *_: object) -> None:
        found.add(Kernel(name, file, macros))

    prepare(hidden, intermediate, {"load_kernel": record})
    return frozenset(found)


def decode_of(shape: str, activations: int) -> Kernel:
    """The decode kernel of a named shape with bf16 hidden states."""
    candidates = [k for k in kernels_of(*SHAPES[shape]) if k.file == "decode.cu"]
    (kernel,) = [k for k in candidates if k.is_for(ACTIVATIONS=activations, RESULT=0)]
    return kernel


def routed_decode_of(shape: str, mode: str) -> Kernel:
    """That of a named shape with bf16 hidden states and 64-bit indices."""
    hidden, intermediate = SHAPES[shape]
    tiles = -(-hidden // (ROWS * min(HOPPER.multiprocessors, intermediate // 8)))
    kinds = torch.bfloat16, torch.bfloat16, torch.int64
    macros = routed_decode.macros_of(hidden, intermediate, mode, *kinds, tiles)
    return Kernel("routed_experts_decode", "routed_decode.cu", macros)


def wanted() -> set[Kernel]:
    """Every kernel of a small layer, x in every dtype; of the big ones those of few tokens, and gemm.cu of two."""
    small = kernels_of(*RAGGED)
    elements = {k.having(ELEMENT=e, RESULT=e) for k in small if k.file == "decode.cu" for e in (0, 1, 2)}
    big = {decode_of(shape, activations) for shape in SHAPES for activations in (BF16, STATIC, E4M3)}
    routed = {routed_decode_of(shape, mode) for shape in SHAPES for mode in MODES}
    return small | elements | big | gemms() | routed


def gemms() -> set[Kernel]:
    """Of gemm.cu: all that V4-Pro and V4-Flash load."""
    return {k for shape in ("V4-Pro", "V4-Flash") for k in kernels_of(*SHAPES[shape]) if k.file == "gemm.cu"}


def with_nvcc(folder: Path, kernel: Kernel) -> Built:
    folder.mkdir()
    source = folder / "kernel.cu"
    source.write_text(source_of(kernel.file))
    target = f"-gencode=arch={ARCHITECTURE.replace('sm', 'compute')},code={ARCHITECTURE}"
    command = ["nvcc", target, "-std=c++17", "-Xptxas", "-v", "-cubin", "-keep", "-keep-dir", str(folder)]
    command += [f"-D{name}={value}" for name, value in kernel.macros]
    done = subprocess.run([*command, str(source)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return Built("", b"", "", done.stdout + done.stderr)
    (cubin,) = folder.glob("*.cubin")
    return Built((folder / "kernel.ptx").read_text(), cubin.read_bytes(), done.stdout + done.stderr, None)


def with_nvrtc(folder: Path, kernel: Kernel) -> Built:
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"--define-macro={name}={value}" for name, value in kernel.macros]
    _, program = nvrtc.nvrtcCreateProgram(source_of(kernel.file).encode(), b"kernel.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if int(status):
        return Built("", b"", "", log)
    ptx = text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    return Built(ptx, bytes_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log, None)


def bytes_of(size: Callable, get: Callable, program: object) -> bytes:
    made = b" " * size(program)[1]
    get(program, made)
    return made


def text_of(size: Callable, get: Callable, program: object) -> str:
    return bytes_of(size, get, program).decode(errors="replace")


@functools.cache
def compiler() -> Callable[[Path, Kernel], Built] | None:
    if shutil.which("nvcc"):
        return with_nvcc
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):  # no package, or no library behind it
        return None
    return with_nvrtc


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, Built]:
    compile_one = compiler()
    if compile_one is None:
        pytest.skip("needs nvcc on PATH, or cuda.bindings and NVRTC")
    kernels, folder = sorted(wanted(), key=repr), tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(WORKERS) as pool:
        made = pool.map(compile_one, [folder / str(i) for i in range(len(kernels))], kernels)
        return dict(zip(kernels, made, strict=True))


def test_building_a_layer_waits_for_the_device_last() -> None:
    """Launches read weights before they wait for what runs in front of them, so packing must have ended."""
    order: list[str] = []
    names = ("load_kernel", "compile_all", "reserve", "mailboxes", "synchronize")
    prepare(*RAGGED, {name: lambda *_, name=name: order.append(name) or mock.MagicMock() for name in names})
    assert order.count("synchronize") == 2 * len(ACTIVATIONS)  # once a shared expert of each format, and routed ones
    assert all(
        after != "synchronize" or before in ("reserve", "mailboxes") for before, after in itertools.pairwise(order)
    )


def test_every_kernel_compiles(built: dict[Kernel, Built]) -> None:
    decodes = [dict(k.macros) for k in built if k.file == "decode.cu"]
    small = {(m["ACTIVATIONS"], m["ELEMENT"]) for m in decodes if (m["HIDDEN"], m["INTERMEDIATE"]) == RAGGED}
    assert small == {(activations, element) for activations in range(5) for element in range(3)}
    assert {(m["HIDDEN"], m["INTERMEDIATE"]) for m in decodes} == {RAGGED, *SHAPES.values()}
    routed = [dict(k.macros) for k in built if k.file == "routed_decode.cu" and k.is_for(HIDDEN=RAGGED[0])]
    assert {m["ACTIVATIONS"] for m in routed} == {0, 1, 2, 3, 4}
    failed = {kernel: made.error for kernel, made in built.items() if made.error}
    assert not failed
    for kernel, made in built.items():
        assert f".entry {kernel.name}(" in made.ptx and f"'{kernel.name}'" in made.log, kernel


def test_gemm_decodes_while_the_tensor_cores_multiply(built: dict[Kernel, Built]) -> None:
    """No spill in the loop, and no wgmma that ptxas had to run one by one (C7510 and its like)."""
    for kernel in gemms():
        assert (
            "wgmma" in built[kernel].ptx and "wgmma.mma_async instructions are serialized" not in built[kernel].log
        ), kernel
        (stores, loads) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", built[kernel].log)[0]
        assert int(stores) <= 16 and int(loads) <= 32, kernel


def test_nothing_of_a_tile_is_worked_out_again_in_each_stage(built: dict[Kernel, Built], tmp_path: Path) -> None:
    """No division in gemm.cu's loops over stages: ptxas moves one there, from in front of them, to save a register.

    FP8: the others divide nothing in front of them.
    """
    if disassembler() is None:
        pytest.skip("needs nvdisasm, of CUDA or of Triton")
    for kernel in (k for k in gemms() if k.is_for(FP8=1)):
        loops = [loop for loop in innermost_loops(built[kernel].cubin, tmp_path) if "QGMMA" in loop]
        assert loops and not any(re.search(r"MUFU|FCHK|CALL", loop) for loop in loops), kernel


def innermost_loops(cubin: bytes, folder: Path) -> list[str]:
    """SASS from a label to a branch back to it, with no other such branch between."""
    (file := folder / "kernel.cubin").write_bytes(cubin)
    listed = subprocess.run([disassembler(), "-c", str(file)], capture_output=True, text=True, check=True).stdout
    labels, found, behind = {}, [], 0
    for match in re.finditer(r"^(\.L_x_\d+):|\bBRA.*?\((\.L_x_\d+)\)", listed, re.MULTILINE):
        label, target = match.groups()
        if label:
            labels[label] = match.end()
        elif target in labels:
            if labels[target] >= behind:
                found.append(listed[labels[target] : match.start()])
            behind = match.end()
    return found


def test_decode_of_v4_flash_spills_no_register(built: dict[Kernel, Built]) -> None:
    for kernel in (
        decode_of("V4-Flash", BF16),
        *(routed_decode_of("V4-Flash", mode) for mode in MODES),
    ):
        log = built[kernel].log
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spills == [("0", "0")], log


@dataclass(frozen=True)
class Instruction:
    """One of SASS: what it says, the scoreboard that it sets when its result is there, and those it waits for."""

    text: str
    sets: int | None
    waits: frozenset[int]


def instructions(cubin: bytes, folder: Path) -> list[Instruction]:
    """Those of a cubin. Bits 105 and up of the 128 control an instruction: .. 3 bits of what it sets, 3, 6 of waits."""
    (file := folder / "kernel.cubin").write_bytes(cubin)
    listed = subprocess.run([disassembler(), "-hex", "-c", str(file)], capture_output=True, text=True, check=True)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);.*\n.*?/\* 0x([0-9a-f]{16}) \*/", listed.stdout)
    made = []
    for text, upper in found:
        control = int(upper, 16) >> 41
        sets, waits = control >> 5 & 7, control >> 11 & 63
        made.append(Instruction(text, None if sets == 7 else sets, frozenset(i for i in range(6) if waits >> i & 1)))
    return made


@functools.cache
def disassembler() -> str | None:
    """nvdisasm, of the toolkit or of Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec and spec.origin else None
    return str(inside) if inside and inside.exists() else None


def test_a_slot_of_the_ring_is_given_back_when_what_was_loaded_is_there(
    built: dict[Kernel, Built], tmp_path: Path
) -> None:
    """No arrival at a barrier while a load in front of the last branch, the wait for the next slot, may be under way.

    The assembler lets an arrival pass loads that are under way, but not leave its block. Loads behind the branch are of
    the next slot; that it is the slot before which is given back is seen by the emulator (a mutant says so).
    """
    if disassembler() is None:
        pytest.skip("needs nvdisasm, of CUDA or of Triton")
    for kernel in of_few_tokens():
        arrivals, under_way, before = 0, {}, {}  # loads by scoreboard, of this block and of those before
        for one in instructions(built[kernel].cubin, tmp_path):
            for scoreboard in one.waits:
                under_way.pop(scoreboard, None), before.pop(scoreboard, None)
            if re.search(r"\bLDS\.(U16|64|128)\b", one.text):
                under_way[one.sets] = one.text
            elif re.match(r"(BRA|EXIT|RET)\b", one.text):
                under_way, before = {}, {}  # what follows is come to from elsewhere
            elif re.search(r"\bBRA\b", one.text):
                under_way, before = {}, before | under_way
            elif "SYNCS.ARRIVE.TRANS64.A1T0" in one.text:
                arrivals += 1
                assert not before, (kernel, one.text, before)
        assert arrivals > 10


def of_few_tokens() -> list[Kernel]:
    """decode.cu and routed_decode.cu of every named shape."""
    decodes = [decode_of(shape, activations) for shape in SHAPES for activations in (BF16, STATIC, E4M3)]
    return decodes + [routed_decode_of(shape, mode) for shape in SHAPES for mode in MODES]


def test_decode_multiplies_on_tensor_cores_and_copies_in_bulk(built: dict[Kernel, Built]) -> None:
    for kernel in of_few_tokens():
        ptx, operands = built[kernel].ptx, "f16" if kernel.is_for(ACTIVATIONS=E4M3) else "bf16"
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{operands}.{operands}.f32" in ptx
        assert "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" in ptx

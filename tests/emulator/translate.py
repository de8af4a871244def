# SPDX-License-Identifier: Apache-2.0
"""A kernel's CUDA C++ as C++ for instructions.hpp, built and loaded: `build` takes the kernel's name, its file and its
macros, and gives a library whose `launch` runs it.

Every asm statement becomes a call of the function that instructions.hpp names after its instruction, outputs first.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path

from nvfp4_experts.kernels.sm90.compile import source_of

_HERE = Path(__file__).resolve().parent
_KERNEL = r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s*'
_SHAPES = "#define MMA_OPERAND_HIGH"  # from here to the end of async.cuh: wgmma of each width
_ANY_SHAPE = """
template <int N>
void mma_async_bf16(float (&sums)[N / 2], const u32 (&a)[4], u32 b) { ptx::wgmma<N, 2>(sums, a, b); }
template <int N>
void mma_async_e4m3(float (&sums)[N / 2], const u32 (&a)[4], u32 b) { ptx::wgmma<N, 1>(sums, a, b); }
"""
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]


def translate(name: str, file: str) -> str:
    """The C++ of a kernel in a file of kernels/sm90; its parameters are taken as one structure."""
    shapes = "".join(source_of("async.cuh").partition(_SHAPES)[1:])
    source = _with_shared_variables(_calls(_with_kernels_of_macros(source_of(file)).replace(shapes, _ANY_SHAPE)))
    (parameters,) = re.findall(rf"{_KERNEL}{name}\((.*?)\) {{", source, re.S)
    source = re.sub(_KERNEL, "static void ", source, flags=re.S)
    declared = [re.fullmatch(r"(.*?)(\w+)", one.strip(), re.S).groups() for one in parameters.split(",")]
    fields = " ".join(f"{kind} {field};" for kind, field in declared)
    passed = ", ".join(f"given.{field}" for _, field in declared)
    return f"""#include "instructions.hpp"
{source}
struct Given {{ {fields} }};
static void body(const void* arguments) {{ const Given& given = *(const Given*)arguments; {name}({passed}); }}
extern "C" int launch(const void* arguments, unsigned x, unsigned y, int threads, int shared_bytes, int cluster,
                      unsigned long long seed) {{
    return machine::run(body, arguments, {{x, y, 1}}, threads, shared_bytes, cluster, seed);
}}
"""


def build(name: str, file: str, macros: tuple[tuple[str, int], ...], folder: Path) -> ctypes.CDLL:
    """The kernel as a library with `launch(arguments, x, y, threads, shared_bytes, cluster, seed)`; 1 if it ended.

    folder: where files that nobody needs again may lie.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    source, library = own / "kernel.cpp", own / "kernel.so"
    source.write_text(translate(name, file))
    defined = [f"-D{macro}={value}" for macro, value in macros]
    subprocess.run(["c++", *_FLAGS, f"-I{_HERE}", *defined, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _with_kernels_of_macros(source: str) -> str:
    """Kernels that a macro makes, one for each type of element, written out."""
    for name, parameters, body in re.findall(r"#define (\w+)\(([\w, ]+)\)\s*\\\n((?:.*\\\n)*.*\n)", source):
        if "__global__" not in body:
            continue

        def kernel(call: re.Match[str], parameters: str = parameters, body: str = body) -> str:
            text = body.replace("\\\n", "\n")
            for parameter, given in zip(parameters.split(", "), call[1].split(", "), strict=True):
                text = re.sub(rf"\b{parameter}\b", given, text)
            return text

        source = re.sub(rf"^{name}\((.*)\)$", kernel, source, flags=re.M)
    return source


def _with_shared_variables(source: str) -> str:
    """What is declared __shared__ as references into the block's memory."""
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(machine::self->home->shared);",
        source,
    )
    return re.sub(r"__shared__ (\w+) (\w+)\[(.*?)\];", r"auto& \2 = machine::variable<\1[\3]>(__LINE__);", source)


def _calls(source: str) -> str:
    made, at = [], 0
    for found in re.finditer(r"\basm(?: volatile)?\s*\(", source):
        end = _closing(source, found.end() - 1)
        made += [source[at : found.start()], _call(source[found.end() : end])]
        at = end + 1
    return "".join([*made, source[at:]])


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` closes; brackets in strings do not count."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        quoted ^= text[i] == '"'
        depth += not quoted and (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("a bracket stays open")


def _call(statement: str) -> str:
    statement = statement.replace("\\n", " ")
    template, _, operands = re.fullmatch(r'((?:\s*"[^"]*")*)(\s*:)?(.*)', statement, re.S).groups()
    names = re.findall(r"(?<![.\w])[a-z]\w*(?:\.[\w:]+)+", template.replace("mov.b32", ""))
    if not names:
        return "(void)0"
    name = re.sub(r"\W+", "_", names[-1])
    if name == "mul_rn_bf16x2":
        name += "_low" if "{l, l}" in template else "_high"
    given = []
    for operand in re.finditer(r'"[+=]?\w"\s*\(', operands):
        given.append(operands[operand.end() : _closing(operands, operand.end() - 1)])
    return f"ptx::{name}({', '.join(given)})"

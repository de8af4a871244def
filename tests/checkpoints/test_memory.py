# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a conversion: a constant, whatever the size of the tensors; of loading routed experts: that of one,
beside the packed ones. `python -m tests.checkpoints.test_memory` prints the measurements that docs/measured.md has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest

# Converts a small checkpoint first, so that what any conversion needs once (code, allocator, threads) is not counted.
CHILD = """
import re, sys
from pathlib import Path
from nvfp4_experts.checkpoints import convert

def peak():
    # Not getrusage: its maximum is that of the parent if the parent was larger when it forked.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

kind, small, large, target = sys.argv[1:]
convert(small, target + "-small")
before = peak()
convert(large, target + "-large")
print(peak() - before)
"""

# Loads one expert first, for the same reason. What is left of it is counted from, and not its peak, which is as high as
# that of any other one. On a CPU the packed experts lie in host memory too.
LOADING_CHILD = """
import re, sys
from pathlib import Path
from nvfp4_experts import load_routed_experts

def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

options = {"backend": "torch", "activations": "bf16", "top_k": 1}
load_routed_experts(sys.argv[1], 0, experts=range(1), **options)
before = status("VmRSS")
loaded = load_routed_experts(sys.argv[1], 0, **options)
print(status("VmHWM") - before, loaded.resident_bytes)
"""

CONSTANT = 24 << 20
FP8_ROW = 16 * 128
PER_TENSOR = 2 << 10
"""What docs/checkpoints.md promises beyond an idle interpreter with the package loaded: the constant; for FP8, so many
bytes per column, since a band is at least one row of blocks of 128; and the metadata of each tensor."""

KINDS = ("BF16", "FP8", "MXFP4")


def sparse_checkpoint(path: Path, kind: str, rows: int, columns: int, others: int = 0, experts: int = 0) -> int:
    """A checkpoint whose weights repeat one block of bytes, and `others` tiny tensors; returns its largest tensor's.

    Its experts are one shared expert, or so many routed ones.
    """
    path.mkdir()
    (path / "config.json").write_text('{"swiglu_limit": 10.0}')
    specs: list[tuple[str, str, list[int], int, bytes]] = [
        ("passed.through", "U8", [rows, columns], rows * columns, b"\0")
    ]
    prefixes = [f"layers.0.ffn.experts.{e}" for e in range(experts)] or ["layers.0.ffn.shared_experts"]
    for prefix, (word, n, k) in product(
        prefixes, (("w1", rows, columns), ("w3", rows, columns), ("w2", columns, rows))
    ):
        name = f"{prefix}.{word}"
        if kind == "BF16":
            specs.append((f"{name}.weight", "BF16", [n, k], 2 * n * k, b"\x12\x3c\x81\xbd"))
        elif kind == "FP8":
            specs.append((f"{name}.weight", "F8_E4M3", [n, k], n * k, b"\x12\x3c\x81\xbd"))
            specs.append(
                (f"{name}.scale", "F8_E8M0", [-(-n // 128), -(-k // 128)], -(-n // 128) * -(-k // 128), b"\x70")
            )
        else:
            specs.append((f"{name}.weight", "I8", [n, k // 2], n * k // 2, b"\x12\x3c\x81\xbd"))
            specs.append((f"{name}.scale", "F8_E8M0", [n, k // 32], n * k // 32, b"\x75\x76"))
    specs += [(f"model.layers.{i}.some_other_norm.weight", "BF16", [4], 8, b"\x12\x3c") for i in range(others)]
    header, end = {}, 0
    for name, dtype, shape, size, _ in specs:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, size, pattern in specs:
            block = pattern * ((1 << 20) // len(pattern))
            for start in range(0, size, len(block)):
                file.write(block[: min(len(block), size - start)])
    return max(size for *_, size, _ in specs)


def measure(folder: Path, kind: str, rows: int, columns: int, others: int = 0) -> tuple[int, int]:
    """(bytes of the largest tensor, bytes by which the peak rose while converting)."""
    sparse_checkpoint(folder / f"{kind}-small", kind, 256, 128)
    largest = sparse_checkpoint(folder / f"{kind}-large", kind, rows, columns, others)
    return largest, _run(CHILD, kind, *(str(folder / f"{kind}-{s}") for s in ("small", "large", "out")))[0]


def measure_loading(folder: Path, kind: str, experts: int, rows: int, columns: int) -> tuple[int, int]:
    """(bytes by which the peak rose while loading that many routed experts, bytes of the packed ones)."""
    sparse_checkpoint(folder / f"{kind}-routed", kind, rows, columns, experts=experts)
    rise, packed = _run(LOADING_CHILD, str(folder / f"{kind}-routed"))
    return rise, packed


def _run(child: str, *arguments: str) -> list[int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", child, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory_does_not_grow_with_the_tensor(tmp_path: Path, kind: str) -> None:
    largest, rise = measure(tmp_path, kind, 8192, 8192)
    promised = CONSTANT + (FP8_ROW * 8192 if kind == "FP8" else 0)
    assert largest > promised
    assert 0 < rise < promised


def test_peak_memory_grows_by_metadata_alone_with_the_number_of_tensors(tmp_path: Path) -> None:
    _, rise = measure(tmp_path, "BF16", 256, 128, others=20_000)
    assert 0 < rise < CONSTANT + PER_TENSOR * 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_routed_experts_are_loaded_one_at_a_time(tmp_path: Path, kind: str) -> None:
    """Their peak is the packed ones and what one takes on its way."""
    rise, packed = measure_loading(tmp_path, kind, experts=32, rows=1024, columns=1024)
    assert packed == pytest.approx(32 * 3 * 1024 * 1024 * 0.5625, rel=1e-3)
    assert packed < rise < packed + CONSTANT


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for source in KINDS:
            risen, resident = measure_loading(Path(scratch), source, 32, 2048, 2048)
            over = (risen - resident) / (1 << 20)
            print(f"{source:6} 32 routed experts, {resident >> 20} MiB packed   peak rose by that and {over:5.1f} MiB")
        for source in KINDS:
            for size in (8192, 16384):
                (Path(scratch) / f"{source}{size}").mkdir()
                biggest, risen = measure(Path(scratch) / f"{source}{size}", source, size, 8192)
                print(f"{source:6} largest tensor {biggest >> 20:4} MiB   peak rose by {risen / (1 << 20):5.1f} MiB")
        for count in (20_000, 100_000):
            (Path(scratch) / f"{count}").mkdir()
            _, risen = measure(Path(scratch) / f"{count}", "BF16", 256, 128, others=count)
            print(f"{count:6} tiny tensors             peak rose by {risen / (1 << 20):5.1f} MiB")

# SPDX-License-Identifier: Apache-2.0
"""The trained checkpoint against its conversion: figures of the right size, and damage that shows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_experts.checkpoints import convert
from nvfp4_experts.diagnostics.verify import VerificationReport, exact_expert, verify_checkpoint
from nvfp4_experts.errors import CheckpointError, InputError
from tests.checkpoints import factory

SHARED = "model.layers.2.ffn.shared_experts"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="session")
def report(tiny_nvfp4: Path, tiny_checkpoint: Path) -> VerificationReport:
    return verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), recipe="modelopt")


@pytest.fixture
def damaged(tiny_nvfp4: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], str]:
    """A copy of the converted checkpoint after an edit of its tensors."""

    def make(edit: Callable[[dict[str, Tensor]], object]) -> str:
        path = tmp_path / "damaged"
        shutil.copytree(tiny_nvfp4, path)
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
        return str(path)

    return make


def decode(tensors: dict[str, Tensor], module: str) -> Tensor:
    """NVFP4 from its definition, with none of the package's code."""
    codes = tensors[f"{module}.weight"].long()
    values = E2M1[torch.stack((codes % 16, codes // 16), -1).flatten(-2)]
    scales = tensors[f"{module}.weight_scale"].float().repeat_interleave(16, -1)
    return values * scales * tensors[f"{module}.weight_scale_2"]


def test_an_honest_conversion_passes(report: VerificationReport) -> None:
    assert report.passed and report.offenders == []
    assert [(e.layer, e.kind, e.index) for e in report.experts] == [(n, "shared", None) for n in range(4)]
    for expert in report.experts:
        assert expert.hints == []
        assert [(check.promise, check.mismatch) for check in expert.bits] == [("requantised by modelopt", None)] * 3
        for weight in expert.weights:
            assert (weight.format, weight.original_format, weight.shape) == ("nvfp4", "bf16", (256, 256))
            assert 0.09 < weight.error.rel_l2 < 0.1
            assert weight.error.sqnr_db == pytest.approx(-20 * math.log10(weight.error.rel_l2))


def test_activation_errors_are_told_apart_from_weight_errors(report: VerificationReport) -> None:
    for expert in report.experts:
        found = {output.label: output for output in expert.outputs}
        assert list(found) == ["bf16", "fp8", "nvfp4 static", "nvfp4 dynamic", "nvfp4 per_token"]
        alone = {label: output.against_own_weights.rel_l2 for label, output in found.items()}
        assert alone["bf16"] < 0.004 < 0.02 < alone["fp8"] < 0.07
        assert all(0.08 < alone[label] < 0.2 for label in alone if label.startswith("nvfp4"))
        # weight error and activation error are nearly independent: they add in quadrature
        for label, output in found.items():
            together = math.hypot(expert.exact.rel_l2, alone[label])
            assert output.against_original.rel_l2 == pytest.approx(together, rel=0.1)
        assert expert.bound_figure is found["bf16"].against_original


def test_figures_against_arithmetic_of_our_own(
    report: VerificationReport, tiny_nvfp4: Path, tiny_checkpoint: Path
) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (tiny_nvfp4, tiny_checkpoint))
    words = {"gate": "w1", "up": "w3", "down": "w2"}
    own = {name: decode(ours, f"{SHARED}.{word}").double() for name, word in words.items()}
    true = {name: theirs[f"{SHARED}.{word}.weight"].double() for name, word in words.items()}
    for weight in report.experts[2].weights:
        difference = own[weight.projection] - true[weight.projection]
        assert weight.error.rel_l2 == pytest.approx(float(difference.norm() / true[weight.projection].norm()), rel=1e-6)
        assert weight.error.max_error == pytest.approx(float(difference.abs().max()), rel=1e-6)

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()

    def layer(w: dict[str, Tensor]) -> Tensor:
        gate, up = (x @ w["gate"].T).clamp(max=10), (x @ w["up"].T).clamp(-10, 10)
        return (torch.nn.functional.silu(gate) * up) @ w["down"].T

    error = float((layer(own) - layer(true)).norm() / layer(true).norm())
    assert report.experts[2].exact.rel_l2 == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_exact_expert_clamps_before_silu(limit: float) -> None:
    x = torch.randn(5, 16)
    w = {name: torch.randn(16, 16) for name in ("gate", "up", "down")}
    gate, up = x.double() @ w["gate"].double().T, x.double() @ w["up"].double().T
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    expected = (gate / (1 + torch.exp(-gate)) * up) @ w["down"].double().T
    assert torch.allclose(exact_expert(x, w, limit).double(), expected, rtol=1e-5, atol=1e-5)


def test_gate_and_up_exchanged_show_hugely(damaged: Callable, tiny_checkpoint: Path) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            gate, up = f"{SHARED}.w1.{suffix}", f"{SHARED}.w3.{suffix}"
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    report = verify_checkpoint(damaged(exchange), str(tiny_checkpoint))
    assert [expert.name for expert in report.offenders] == ["layer 2 shared"]
    assert report.experts[2].bound_figure.rel_l2 > 0.5  # silu(g) u and silu(u) g are not unrelated
    (hint,) = report.experts[2].hints
    assert hint.startswith("gate and up look exchanged: error drops from 1.4")
    assert report.experts[1].hints == []


def test_nibbles_exchanged_show_hugely(damaged: Callable, tiny_checkpoint: Path) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"{SHARED}.w2.weight"]
        tensors[f"{SHARED}.w2.weight"] = (codes << 4) | (codes >> 4)

    report = verify_checkpoint(damaged(exchange), str(tiny_checkpoint))
    assert [expert.name for expert in report.offenders] == ["layer 2 shared"]
    assert "odd k in the low nibble" in report.experts[2].hints[0]


def test_a_five_per_cent_scale_error_gets_a_hint(damaged: Callable, tiny_checkpoint: Path) -> None:
    report = verify_checkpoint(damaged(lambda t: t[f"{SHARED}.w2.weight_scale_2"].mul_(1.05)), str(tiny_checkpoint))
    assert report.passed  # within the bound, yet named
    assert report.experts[2].hints[0].startswith("down: off by a constant factor")


def test_one_changed_bit_breaks_the_promise(damaged: Callable, tiny_checkpoint: Path) -> None:
    path = damaged(lambda tensors: tensors[f"{SHARED}.w2.weight"][10, 20].bitwise_xor_(1))
    assert verify_checkpoint(path, str(tiny_checkpoint)).passed
    report = verify_checkpoint(path, str(tiny_checkpoint), recipe="modelopt")
    assert [expert.name for expert in report.offenders] == ["layer 2 shared"]
    (check,) = report.offenders[0].broken_promises
    assert (check.projection, check.mismatch.part, check.mismatch.row, check.mismatch.column) == (
        "down",
        "codes",
        10,
        40,
    )


def test_nan_never_passes(damaged: Callable, tiny_checkpoint: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{SHARED}.w1.weight_scale"].view(torch.uint8)[0, 0] = 0x7F

    report = verify_checkpoint(damaged(spoil), str(tiny_checkpoint), max_error=math.inf)
    assert [expert.name for expert in report.offenders] == ["layer 2 shared"]
    assert math.isnan(report.experts[2].bound_figure.rel_l2)


def test_between_dialects_everything_passes_through(tiny_nvfp4: Path, tmp_path: Path) -> None:
    convert(tiny_nvfp4, tmp_path / "ct", dialect="compressed-tensors")
    report = verify_checkpoint(str(tmp_path / "ct"), str(tiny_nvfp4), experts="all", max_error=0.01)
    assert report.passed and len(report.experts) == 36
    assert {check.promise for expert in report.experts for check in expert.bits} == {"passed through"}
    routed = next(expert for expert in report.experts if expert.kind == "routed")
    assert routed.outputs == [] and routed.bound_figure.rel_l2 == 0.0


def test_mxfp4_is_cast_exactly(tmp_path: Path) -> None:
    source = factory.write(tmp_path / "mxfp4", factory.model(factory.mxfp4())[0])
    convert(source, tmp_path / "nvfp4")
    report = verify_checkpoint(str(tmp_path / "nvfp4"), str(source), max_error=0.01)
    assert report.passed
    for expert in report.experts:
        assert [check.promise for check in expert.bits] == ["exact cast"] * 3
        assert [weight.error.rel_l2 for weight in expert.weights] == [0.0] * 3


def test_bound_is_the_bf16_figure(report: VerificationReport, tiny_nvfp4: Path, tiny_checkpoint: Path) -> None:
    figures = sorted(expert.bound_figure.rel_l2 for expert in report.experts)
    tight = verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), max_error=figures[1])
    assert len(tight.offenders) == 2


def test_layers_experts_and_sample_choose(tiny_checkpoint: Path) -> None:
    path = str(tiny_checkpoint)
    report = verify_checkpoint(path, path, layers=[1, 3], experts="routed", sample=2)
    assert [(e.layer, e.index) for e in report.experts] == [(1, 0), (1, 4), (3, 0), (3, 4)]
    assert report.experts[0].name == "layer 1 routed 0"


def test_given_hidden_states_are_used(tiny_nvfp4: Path, tiny_checkpoint: Path) -> None:
    x = 3 * torch.randn(2, 3, 256)
    report = verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), layers=[0], hidden_states=x)
    again = verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), layers=[0], hidden_states=x.flatten(0, 1))
    assert report.tokens == 6
    assert report.experts == again.experts


def test_progress_counts_experts(tiny_checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = str(tiny_checkpoint)
    verify_checkpoint(path, path, tokens=1, progress=lambda done, total, label: seen.append((done, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_report_is_plain_data(report: VerificationReport) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passed"] is True and data["offenders"] == []
    expert = data["experts"][3]
    assert expert["bound_figure"] == report.experts[3].bound_figure.rel_l2
    assert expert["outputs"][0]["against_original"]["rel_l2"] == expert["bound_figure"]
    assert [check["kept"] for check in expert["bits"]] == [True] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": [7]}, "must select at least one expert"),
        ({"hidden_states": torch.zeros(2, 128)}, r"must be \(..., 256\)"),
    ],
)
def test_what_does_not_fit_raises(tiny_nvfp4: Path, tiny_checkpoint: Path, options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        verify_checkpoint(str(tiny_nvfp4), str(tiny_checkpoint), **options)


def test_an_original_without_the_expert_or_of_another_shape_raises(tiny_nvfp4: Path, tmp_path: Path) -> None:
    small = factory.write(tmp_path / "small", factory.model(factory.plain())[0])
    with pytest.raises(CheckpointError, match="must have the original's shape"):
        verify_checkpoint(str(tiny_nvfp4), str(small), layers=[0])
    with pytest.raises(CheckpointError, match="must hold the original of"):
        verify_checkpoint(str(tiny_nvfp4), str(small), layers=[3])

# SPDX-License-Identifier: Apache-2.0
"""The dialects as tables: how experts are named, and which tensors make up a weight in each format.

    name   = <prefix> . <projection> . <suffix>     model.layers.3.mlp.shared_experts . up_proj . weight_scale
    layout = roles -> (suffix, dtypes, shapes)      {"block_scales": ("weight_scale", F8_E4M3, (N, K/16)), ...}

In go tensor names with dtypes and shapes, out come projections in a known format; the same tables give the
names, dtypes and shapes of an output. A format is told by the tensors that are there and by their dtypes, never
by a config alone.

    dialect             format     tensors of a weight (N, K)
    plain               bf16 ...   weight (N, K)
    deepseek            fp8_block  weight e4m3 (N, K); scale e8m0|f32 or weight_scale_inv f32 (ceil N/b0, ceil K/b1)
    deepseek            mxfp4      weight i8|u8 (N, K/2); scale e8m0|u8 (N, K/32)
    modelopt            nvfp4      weight u8 (N, K/2); weight_scale e4m3 (N, K/16); weight_scale_2 f32 [];
                                   input_scale f32 [], may be absent
    compressed-tensors  nvfp4      weight_packed u8 (N, K/2); weight_scale e4m3 (N, K/16);
                                   weight_global_scale f32 [1]; input_global_scale f32 [1], may be absent

ModelOpt's scalars multiply to decode (amax / 2688), compressed-tensors' divide (2688 / amax).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    ConfigMismatchError,
    ExtraTensorError,
    MissingTensorError,
    UnknownFormatError,
    WrongDtypeError,
    WrongShapeError,
)
from .safetensors_file import TensorInfo, TensorSpec

Shape = tuple[int, ...]
Block = tuple[int, int]

# --- names ------------------------------------------------------------------------------------------------

NUMBER = r"(0|[1-9][0-9]{0,8})"  # longer ones are no layer and no expert


@dataclass(frozen=True)
class Naming:
    """One way to name experts: a prefix that tells layer and expert, and the words for gate, up and down."""

    name: str
    prefix: re.Pattern[str]
    projections: Mapping[str, str]


NAMINGS = (
    Naming(
        "official",
        re.compile(rf"(?:model\.)?layers\.{NUMBER}\.ffn\.(?:shared_experts|experts\.{NUMBER})(?=\.)"),
        {"w1": "gate", "w3": "up", "w2": "down"},
    ),
    Naming(
        "transformers",
        re.compile(
            rf"(?:model\.)?(?:language_model\.)?layers\.{NUMBER}\.mlp"
            rf"\.(?:shared_experts?|experts\.{NUMBER})(?=\.)"
        ),
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    ),
)
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertName:
    """A tensor name taken apart: the expert's prefix, layer and index (None: shared), projection, word, suffix."""

    prefix: str
    layer: int
    index: int | None
    projection: str
    word: str
    suffix: str


def parse_name(name: str) -> ExpertName | None:
    """The parts of an expert tensor's name; None for every other tensor (`mtp.*`, attention, fused experts)."""
    for naming in NAMINGS:
        match = naming.prefix.match(name)
        if match is None:
            continue
        word, _, suffix = name[match.end() + 1 :].partition(".")
        if word in naming.projections and suffix:
            index = None if match[2] is None else int(match[2])
            return ExpertName(match[0], int(match[1]), index, naming.projections[word], word, suffix)
    return None


_MTP = re.compile(rf"(?:model\.)?mtp\.{NUMBER}(?=\.)")


def parse_mtp_name(name: str) -> ExpertName | None:
    """As `parse_name`, of `mtp.N.`: the parts of `layers.N.`, under the tensor's own prefix; None for other tensors."""
    match = _MTP.match(name)
    parts = parse_name(f"layers.{match[1]}{name[match.end() :]}") if match else None
    if match is None or parts is None:
        return None
    return replace(parts, prefix=match[0] + parts.prefix.removeprefix(f"layers.{match[1]}"))


_ROUTER = re.compile(rf"(?:model\.)?(?:language_model\.)?layers\.{NUMBER}\.(?:ffn|mlp)\.gate\.(\w+)")
_INTEGERS, _FLOATING = ("I64", "I32"), ("F32", "BF16", "F16")


@dataclass(frozen=True)
class RouterRole:
    """One tensor of a router: what it is, the suffixes it goes by, and the dtypes it may have."""

    name: str
    suffixes: tuple[str, ...]
    dtypes: tuple[str, ...]


ROUTER_ROLES = (
    RouterRole("weight", ("weight",), _FLOATING),
    RouterRole("bias", ("bias", "e_score_correction_bias"), _FLOATING),
    RouterRole("tid2eid", ("tid2eid",), _INTEGERS),
)


def parse_router_name(name: str) -> tuple[int, RouterRole] | None:
    """(layer, role) of a router's tensor; None for every other tensor."""
    match = _ROUTER.fullmatch(name)
    roles = [role for role in ROUTER_ROLES if match is not None and match[2] in role.suffixes]
    return (int(match[1]), roles[0]) if match is not None and roles else None


# --- formats ----------------------------------------------------------------------------------------------

FP8_BLOCKS: tuple[Block, ...] = ((128, 128), (32, 32))


def _ceil_blocks(shape: Shape, block: Block) -> Shape:
    return tuple(-(-size // b) for size, b in zip(shape, block, strict=True))


ShapeRule = Callable[
    [int, int, tuple[Block, ...]], tuple[Shape, ...]
]  # (N, K, blocks) -> allowed, the first is written


def _values(n: int, k: int, _: tuple[Block, ...]) -> tuple[Shape, ...]:
    return ((n, k),)


def _per(values: int) -> ShapeRule:
    return lambda n, k, _: ((n, k // values),) if k % values == 0 else ()


def _fp8_blocks(n: int, k: int, blocks: tuple[Block, ...]) -> tuple[Shape, ...]:
    return tuple(_ceil_blocks((n, k), block) for block in blocks)


def _scalar(n: int, k: int, _: tuple[Block, ...]) -> tuple[Shape, ...]:
    return ((), (1,))


def _one(n: int, k: int, _: tuple[Block, ...]) -> tuple[Shape, ...]:
    return ((1,), ())


@dataclass(frozen=True)
class Role:
    """One tensor of a weight: its suffix, the dtypes it may have (the first is written) and its shapes."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: ShapeRule
    required: bool = True


@dataclass(frozen=True)
class Layout:
    """The tensors that make up one weight. The first role is the weight itself; it tells N and K.

    `reciprocal`: the global and input scales are stored as 1 / (decode direction).
    """

    format: str
    dialect: str
    roles: Mapping[str, Role]
    values_per_byte: int = 1
    reciprocal: bool = False

    @property
    def weight(self) -> Role:
        return next(iter(self.roles.values()))


_E4M3, _F32 = ("F8_E4M3",), ("F32",)
LAYOUTS = (
    *(
        Layout(name, "plain", {"values": Role("weight", (dtype,), _values)})
        for name, dtype in (("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32"))
    ),
    Layout(
        "fp8_block",
        "deepseek",
        {"values": Role("weight", _E4M3, _values), "scales": Role("scale", ("F8_E8M0", "F32"), _fp8_blocks)},
    ),
    Layout(
        "fp8_block",
        "deepseek",
        {"values": Role("weight", _E4M3, _values), "scales": Role("weight_scale_inv", _F32, _fp8_blocks)},
    ),
    Layout(
        "mxfp4",
        "deepseek",
        {
            "codes": Role("weight", ("I8", "U8"), _per(2)),
            "scales": Role("scale", ("F8_E8M0", "U8"), _per(32)),
        },
        values_per_byte=2,
    ),
    Layout(
        "nvfp4",
        "modelopt",
        {
            "codes": Role("weight", ("U8",), _per(2)),
            "block_scales": Role("weight_scale", _E4M3, _per(16)),
            "global_scale": Role("weight_scale_2", _F32, _scalar),
            "input_scale": Role("input_scale", _F32, _scalar, required=False),
        },
        values_per_byte=2,
    ),
    Layout(
        "nvfp4",
        "compressed-tensors",
        {
            "codes": Role("weight_packed", ("U8",), _per(2)),
            "block_scales": Role("weight_scale", _E4M3, _per(16)),
            "global_scale": Role("weight_global_scale", _F32, _one),
            "input_scale": Role("input_global_scale", _F32, _one, required=False),
        },
        values_per_byte=2,
        reciprocal=True,
    ),
)
NVFP4_LAYOUTS = {layout.dialect: layout for layout in LAYOUTS if layout.format == "nvfp4"}
OUTPUT_DIALECTS = tuple(NVFP4_LAYOUTS)


def output_specs(dialect: str, prefix: str, shape: tuple[int, int], input_scale: bool) -> dict[str, TensorSpec]:
    """The tensors, by role, of an NVFP4 weight (N, K) named `prefix` in a dialect.

    Raises:
        WrongShapeError: K is not a multiple of 16.
    """
    specs = {}
    for name, role in NVFP4_LAYOUTS[dialect].roles.items():
        shapes = role.shapes(*shape, ())
        if not shapes:
            rule = "K of an NVFP4 weight (N, K) must be a multiple of 16"
            raise WrongShapeError(prefix, rule, shape, "leave this model unquantised")
        if role.required or input_scale:
            specs[name] = TensorSpec(f"{prefix}.{role.suffix}", role.dtypes[0], shapes[0])
    return specs


# --- recognition ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """One weight matrix of an expert: `names` maps each role of `layout` that is there to a tensor name.

    shape: logical (N, K). block: the FP8 block, None for other formats.
    """

    prefix: str
    format: str
    names: dict[str, str]
    shape: tuple[int, int]
    layout: Layout = field(repr=False)
    block: Block | None = None

    @property
    def dialect(self) -> str:
        return self.layout.dialect


def fp8_block(prefix: str, shape: Shape, scales: Shape, declared: Block | None) -> Block:
    """The block of an FP8 weight, from the shape of its scales: block b fits when scales == ceil(shape / b).

    A block that the config declares must fit. Without one, 128x128 and 32x32 are tried in this order; both fit only
    where each axis on which they differ is at most 32 long, and there they decode alike.
    """
    if declared is not None:
        if _ceil_blocks(shape, declared) != scales:
            fits = list(_ceil_blocks(shape, declared))
            rule = f"weight_block_size {list(declared)} of the config makes scales {fits}"
            raise ConfigMismatchError(prefix, rule, list(scales), "correct weight_block_size in config.json")
        return declared
    for block in FP8_BLOCKS:
        if _ceil_blocks(shape, block) == scales:
            return block
    expected = " or ".join(str(list(_ceil_blocks(shape, block))) for block in FP8_BLOCKS)
    way_out = "state weight_block_size in config.json if the blocks are neither 128x128 nor 32x32"
    raise WrongShapeError(prefix, f"scales of a weight {list(shape)} must be {expected}", list(scales), way_out)


def _faults(
    prefix: str, layout: Layout, found: Mapping[str, TensorInfo], shape: tuple[int, int]
) -> list[CheckpointError]:
    """What keeps `found` (suffix -> tensor) from being a weight of this layout, extra tensors aside."""
    faults: list[CheckpointError] = []
    for role_name, role in layout.roles.items():
        info = found.get(role.suffix)
        name, kind = f"{prefix}.{role.suffix}", f"{role_name} of {layout.dialect} {layout.format}"
        if info is None:
            if role.required:
                rule = f"the {kind} must be there"
                faults.append(MissingTensorError(name, rule, sorted(found), "fetch the shard that holds it again"))
        elif info.dtype not in role.dtypes:
            rule = f"the {kind} must be {' or '.join(role.dtypes)}"
            faults.append(WrongDtypeError(name, rule, info.dtype, "export the checkpoint again"))
        elif role.shapes is not _fp8_blocks:  # those are derived, with the block, once the layout is known
            allowed = role.shapes(*shape, ())
            if info.shape not in allowed:
                expected = list(allowed[0]) if allowed else "over a K divisible by the block"
                rule = f"the {kind} must be {expected} for (N, K) {shape}"
                way_out = "unswizzle or re-export it if the rows or columns are padded; else the shard is damaged"
                faults.append(WrongShapeError(name, rule, list(info.shape), way_out))
    return faults


def _misfit(faults: list[CheckpointError], layout: Layout, found: Mapping[str, TensorInfo]) -> int:
    """How badly tensors fit a layout: its faults, and the tensors it does not know."""
    return len(faults) + len(found.keys() - {role.suffix for role in layout.roles.values()})


def recognize(prefix: str, found: Mapping[str, TensorInfo], declared_block: Block | None = None) -> Projection:
    """The projection that the tensors `found` (suffix -> tensor, all of one module) make up.

    Raises:
        MissingTensorError, WrongDtypeError, WrongShapeError: judged by the layout that fits best.
        UnknownFormatError: no layout has a weight of this dtype.
        AmbiguousCheckpointError: the tensors of two layouts are complete.
        ExtraTensorError: a tensor the format does not have; ignoring it would change what the weight means.
        ConfigMismatchError: an FP8 block other than `declared_block`.
    """
    anchored = [layout for layout in LAYOUTS if layout.weight.suffix in found]
    if not anchored:
        suffixes = sorted({layout.weight.suffix for layout in LAYOUTS})
        raise MissingTensorError(
            prefix, f"a weight ({' or '.join(suffixes)}) must be there", sorted(found), "fetch it again"
        )
    typed = [layout for layout in anchored if found[layout.weight.suffix].dtype in layout.weight.dtypes]
    if not typed:
        info = found[anchored[0].weight.suffix]
        known = sorted({dtype for layout in LAYOUTS for dtype in layout.weight.dtypes})
        raise UnknownFormatError(
            info.name, f"a weight must be {', '.join(known)}", info.dtype, "export it in one of these"
        )
    judged = []
    for layout in typed:
        info = found[layout.weight.suffix]
        if len(info.shape) != 2 or 0 in info.shape:
            rule = "a weight must be a matrix (N, K) with values in it"
            raise WrongShapeError(info.name, rule, list(info.shape), "split fused experts; export empty ones again")
        shape = (info.shape[0], info.shape[1] * layout.values_per_byte)
        judged.append((_faults(prefix, layout, found, shape), layout, shape))
    complete = [(layout, shape) for faults, layout, shape in judged if not faults]
    if len(complete) > 1:
        rule, got = (
            "must be one format",
            " and ".join(f"{layout.dialect} {layout.format}" for layout, _ in complete),
        )
        raise AmbiguousCheckpointError(prefix, rule, f"the tensors of {got}", "remove the tensors of one")
    if not complete:
        raise min(judged, key=lambda judgement: _misfit(judgement[0], judgement[1], found))[0][0]
    layout, shape = complete[0]
    names = {role: found[spec.suffix].name for role, spec in layout.roles.items() if spec.suffix in found}
    extra = sorted(info.name for info in found.values() if info.name not in names.values())
    if extra:
        rule = f"{layout.dialect} {layout.format} has no such tensor"
        raise ExtraTensorError(
            extra[0], rule, f"{len(extra)} extra", "remove it, or export in one of the known formats"
        )
    block = None
    if layout.format == "fp8_block":
        block = fp8_block(prefix, shape, found[layout.roles["scales"].suffix].shape, declared_block)
    return Projection(prefix, layout.format, names, shape, layout, block)

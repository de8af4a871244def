# SPDX-License-Identifier: Apache-2.0
"""One named error per way a checkpoint can fail; each carries what · rule · got · way out.

file        a .safetensors file whose header or bytes cannot be trusted
directory   index, shards, paths and config.json that do not fit together
module      tensors that are not a well-formed weight of one dialect
output      a conversion that must not, or cannot, be written
"""

from __future__ import annotations

from ..errors import CheckpointError

# --- file -------------------------------------------------------------------------------------------------


class TruncatedFileError(CheckpointError):
    """The file ends before the bytes its header promises."""


class HeaderTooLargeError(CheckpointError):
    """The header (or the index, or config.json) is larger than any sane one; it is not read."""


class InvalidHeaderError(CheckpointError):
    """The header is not the JSON object the safetensors format describes."""


class DuplicateTensorError(CheckpointError):
    """One tensor name is claimed twice, in one header or by two shards."""


class UnknownDtypeError(CheckpointError):
    """A tensor's dtype is not one of the safetensors format, or not one torch can hold."""


class TensorSizeError(CheckpointError):
    """A tensor's byte range does not hold exactly shape x dtype."""


class OverlappingTensorsError(CheckpointError):
    """Two tensors of a file share bytes."""


class UnusedBytesError(CheckpointError):
    """A file holds bytes that belong to no tensor."""


# --- directory --------------------------------------------------------------------------------------------


class NotACheckpointError(CheckpointError):
    """The path holds no safetensors checkpoint."""


class HubError(CheckpointError):
    """A hub id that could not be downloaded."""


class UnsafePathError(CheckpointError):
    """A file name in the index, or a link, that leads out of the checkpoint's directory."""


class InvalidIndexError(CheckpointError):
    """The index is not a JSON object with a `weight_map` of tensor name -> file name."""


class MissingShardError(CheckpointError):
    """The index names a file that is not there."""


class IndexMismatchError(CheckpointError):
    """The index and the headers of the shards disagree about which file holds a tensor."""


class InvalidConfigError(CheckpointError):
    """config.json (or hf_quant_config.json) is not JSON, or holds a value of the wrong kind."""


class MissingConfigError(CheckpointError):
    """A setting that only config.json can tell (the SwiGLU limit) is needed and there is no config.json."""


class ConfigMismatchError(CheckpointError):
    """config.json says one thing and the tensors another."""


class AmbiguousCheckpointError(CheckpointError):
    """The files or tensors can be read in two ways."""


# --- module -----------------------------------------------------------------------------------------------


class MissingTensorError(CheckpointError):
    """A tensor (a scale, a projection, a name asked for) that is not in the checkpoint."""


class ExtraTensorError(CheckpointError):
    """A tensor that the module's format does not have; ignoring it would change the meaning."""


class UnknownFormatError(CheckpointError):
    """A weight whose dtype is no format of the dialect tables."""


class WrongDtypeError(CheckpointError):
    """A scale whose dtype is not the format's."""


class WrongShapeError(CheckpointError):
    """A tensor whose shape does not fit the weight it belongs to."""


class UnsupportedRouterError(CheckpointError):
    """A router whose choice this package does not know how to make."""


class InvalidRouterError(CheckpointError):
    """A router's table that names experts the layer does not have."""


class MissingExpertError(CheckpointError):
    """A layer or expert asked for that the checkpoint does not have."""


class InvalidScaleError(CheckpointError):
    """A global or input scale that is zero, negative, infinite or NaN."""


class SuspiciousScaleError(CheckpointError):
    """A global scale under which the weights would be absurdly large: most likely a reciprocal."""


class NonFiniteWeightError(CheckpointError):
    """A weight holds NaN or infinity, which NVFP4 cannot."""


# --- output -----------------------------------------------------------------------------------------------


class OutputExistsError(CheckpointError):
    """The destination exists; nothing is overwritten."""


class OutputInsideSourceError(CheckpointError):
    """The destination is the source, inside it, or around it; the source is never touched."""


class ConversionRunningError(CheckpointError):
    """Another process is converting to the same destination."""


class DiskFullError(CheckpointError):
    """There is no room for the output; no file that looks finished is left."""


class IncompleteWriteError(CheckpointError):
    """A file was closed before every byte of it was written."""


class NothingToConvertError(CheckpointError):
    """The checkpoint holds no expert that the conversion would change."""


class MixedOutputError(CheckpointError):
    """The output would hold NVFP4 modules of two dialects, which no config can describe."""


class InexactCastError(CheckpointError):
    """An MXFP4 weight whose exponents span too far for the exact cast to NVFP4."""


class InputScalesError(CheckpointError):
    """Input scales that name layers the checkpoint lacks, or a file of them that cannot be read."""

# SPDX-License-Identifier: Apache-2.0
"""Looking into checkpoints and layers: `inspect`, `verify`, `run`, and the picture. Returns reports; prints nothing."""

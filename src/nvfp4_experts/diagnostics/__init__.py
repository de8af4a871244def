# SPDX-License-Identifier: Apache-2.0
"""Looking into checkpoints and layers: `inspect`, `verify`, `run`, `bench`, pictures; returns reports, never prints."""

# SPDX-License-Identifier: Apache-2.0
"""Layers: expert modules over the kernels, and calibration. Knows no checkpoint dialect."""

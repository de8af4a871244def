# SPDX-License-Identifier: Apache-2.0
"""Byte orders that kernels want, each with its inverse: swizzled scales, K-major codes, interleaved gate and up."""

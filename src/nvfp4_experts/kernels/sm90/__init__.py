# SPDX-License-Identifier: Apache-2.0
"""Hopper: a fused decode kernel in CUDA C++ and an unpacking kernel in front of the vendor's GEMM."""

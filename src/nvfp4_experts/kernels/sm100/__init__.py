# SPDX-License-Identifier: Apache-2.0
"""Blackwell: the shared expert on FP4 tensor cores, in Triton, which is loaded by the first layer that uses it."""

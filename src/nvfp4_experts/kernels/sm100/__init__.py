# SPDX-License-Identifier: Apache-2.0
"""Blackwell: the shared expert on FP4 tensor cores, in Triton. Importing this package loads no Triton; backend.py does."""

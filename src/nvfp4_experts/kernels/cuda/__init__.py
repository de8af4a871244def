# SPDX-License-Identifier: Apache-2.0
"""What backends for NVIDIA GPUs share: memory from the driver, and scratch for each stream."""

# SPDX-License-Identifier: Apache-2.0
"""What Blackwell's FP4 tensor core computes, bit for bit by a published model of it, on any CPU or GPU.

rule        `exact_matmul`: the rule, in torch and through the native library
backend     the layer: what `dispatch` sees
"""

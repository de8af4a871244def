# SPDX-License-Identifier: Apache-2.0
"""Which configurations of the Hopper GEMM are fastest on this GPU; `search.tune` does it all.

halves   one layer on the GPU: either half, both, or decode.cu, run once or timed by graph replay
search   candidates by the rule, checked, timed in turn; what came out as a table and as rows
"""

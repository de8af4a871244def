# SPDX-License-Identifier: Apache-2.0
"""How fast one shared expert, or a mixture of experts, runs next to its peers and to the floor the machine sets;
`measure.bench` does it all.

work        the layer's shape, its weights, its hidden states, its floor
task        the same on a device: what candidates are built from and called with, and what is right
moe         that of a mixture: weights drawn in NVFP4, routings dealt so that a chain of calls repeats no expert
candidates  this library's layer and the peers in torch; moe_candidates likewise for a mixture; humming_peer and
            ggml_peer hold those outside torch, ggml_library what is called of the latter
ceilings    how fast this device streams bytes and multiplies matrices
timing      graph replays on CUDA, a clock elsewhere; weights rotated past the caches
measure     check, then time, interleaved
report      what came out, as numbers; picture draws it
exact       nvfp4 candidates against backend exact, bit for bit, and the file of `bench --report`
"""

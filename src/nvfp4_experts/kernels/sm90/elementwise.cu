// SPDX-License-Identifier: Apache-2.0
// What surrounds the GEMMs of a prefill, one pass each: activations into NVFP4 values, and SwiGLU out of the fp32 sums.
//
//   enter_nvfp4     a = e2m1(x / scales) * block scale as bf16, exact; formats/activations.py says how, bit for bit.
//                 Floor: x read, 2 bytes written per value.
//   swiglu_of_sums  h = silu(min(gate, L)) * clamp(up, -L, L), gate and up = sums times their scales; rounded once.
//                 Floor: 8 bytes read, 2 or 4 written per value.

#include "common.cuh"

#if ELEMENT == 0
typedef BFloat16 Element;
#else
typedef Float32 Element;
#endif

// One thread, one block of 16. g, s: encode- and decode-direction global scales, one for all (per_row = 0) or one a row.
// ELEMENT: 0 bf16, 2 fp32.
extern "C" __global__ void enter_nvfp4(const Element* __restrict__ x, const float* __restrict__ g,
                                       const float* __restrict__ s, int per_row, int rows, int columns,
                                       uint4* __restrict__ values) {
    const int blocks = columns / 16;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)rows * blocks) return;
    const int row = per_row ? (int)(index / blocks) : 0;
    float v[16];
    unpack16(load16(x + index * 16), v);
    quantize_block(v, g[row], s[row]);
    u32 out[8];
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
    values[index * 2] = make_uint4(out[0], out[1], out[2], out[3]);
    values[index * 2 + 1] = make_uint4(out[4], out[5], out[6], out[7]);
}

// sums (T, 2 columns): gate's then up's; h (T, stride) written from column 0. scales (2, columns): of gate and up per
// output row, times the activation's scale, one for all or one a token. WIDE: h is fp32, else bf16.
extern "C" __global__ void swiglu_of_sums(const float* __restrict__ sums, const float* __restrict__ gate_scale,
                                  const float* __restrict__ up_scale, int scale_stride,
                                  const float* __restrict__ token_scale, int token_stride, float limit, int tokens,
                                  int columns, int stride, void* __restrict__ h) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 4, token = blockIdx.x;
    if (column >= columns) return;
    const float4 gates = *reinterpret_cast<const float4*>(sums + (size_t)token * 2 * columns + column);
    const float4 ups = *reinterpret_cast<const float4*>(sums + (size_t)token * 2 * columns + columns + column);
    const float of_token = token_scale ? token_scale[token * token_stride] : 1.0f;
    const float gate_in[4] = {gates.x, gates.y, gates.z, gates.w}, up_in[4] = {ups.x, ups.y, ups.z, ups.w};
    float out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[i] = swiglu(gate_in[i] * (of_token * gate_scale[(column + i) * scale_stride]),
                        up_in[i] * (of_token * up_scale[(column + i) * scale_stride]), limit);
    }
#if WIDE
    *reinterpret_cast<float4*>(reinterpret_cast<float*>(h) + (size_t)token * stride + column) =
        make_float4(out[0], out[1], out[2], out[3]);
#else
    *reinterpret_cast<uint2*>(reinterpret_cast<u16*>(h) + (size_t)token * stride + column) =
        make_uint2(bf16_pair(out[0], out[1]), bf16_pair(out[2], out[3]));
#endif
}

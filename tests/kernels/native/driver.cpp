// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernel without Python: under sanitizers, and under an emulator of another processor.
//
// Every tier of the machine, shapes and numbers of tokens that divide by nothing, buffers of exactly the size they must
// have (the sanitizer guards their ends) at odd addresses. Prints, per tier, a hash over the results with NVFP4
// activations and over exact products, which must be the same in all tiers, and one over those in bf16 and fp8.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"
#include "tiers.h"

using nvfp4::Call;
using nvfp4::Exact;

extern "C" int64_t nvfp4_scratch_bytes(const Call* call);
extern "C" void nvfp4_shared_expert(const Call* call);
extern "C" int64_t nvfp4_exact_entered_bytes(int64_t tokens, int64_t columns);
extern "C" void nvfp4_exact(const Exact* product);

namespace {

uint64_t state;
uint32_t random32() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

// Memory of exactly `bytes`, not aligned to more than `element`.
template <class T>
struct Memory {
  explicit Memory(int64_t count) : bytes(count * sizeof(T)), block(static_cast<char*>(malloc(bytes + sizeof(T)))) {}
  ~Memory() { free(block); }
  Memory(const Memory&) = delete;
  T* data() { return reinterpret_cast<T*>(block + sizeof(T)); }
  int64_t bytes;
  char* block;
};

void fill_weights(uint8_t* to, int64_t rows, int64_t columns) {
  for (int64_t tile = 0; tile < rows / 16; ++tile) {
    for (int64_t i = 0; i < columns * 8; ++i) *to++ = static_cast<uint8_t>(random32());
    for (int64_t i = 0; i < columns; ++i) {
      uint32_t kind = random32() % 512;  // any byte now and then: zero, negative, subnormal, NaN
      *to++ = static_cast<uint8_t>(kind < 4 ? random32() : 0x28 + random32() % 32);
    }
  }
}

uint64_t hash(uint64_t seed, const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) seed = (seed ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return seed;
}

struct Shape {
  int64_t hidden, intermediate, tokens;
};

template <class T>
uint64_t run(int tier, Shape shape, int32_t activations, int32_t mode, int32_t element, uint64_t seed) {
  state = 1;
  const int64_t h = shape.hidden, i = shape.intermediate, t = shape.tokens;
  Memory<T> x(t * h), y(t * h);
  Memory<uint8_t> gate_up(2 * i * h * 9 / 16), down(h * i * 9 / 16);
  Memory<float> scales(5);
  Memory<uint16_t> amax(2 * i), down_amax(h);
  fill_weights(gate_up.data(), 2 * i, h);
  fill_weights(down.data(), h, i);
  for (int64_t k = 0; k < t * h; ++k) {
    float value = (static_cast<int32_t>(random32() % 20001) - 10000) / 2048.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (sizeof(T) == 4) memcpy(x.data() + k, &bits, 4);
    // bf16 is the upper half of fp32; as fp16 the same bits are other numbers, some of them infinite or NaN.
    else x.data()[k] = static_cast<T>(bits >> 16);
  }
  for (int64_t k = 0; k < 2 * i; ++k) amax.data()[k] = static_cast<uint16_t>(0x4000 + random32() % 0x100);
  for (int64_t k = 0; k < h; ++k) down_amax.data()[k] = static_cast<uint16_t>(0x4000 + random32() % 0x100);
  const float values[5] = {0.01f, 0.02f, 0.005f, 5.0f / 2688, 0.5f / 2688};
  memcpy(scales.data(), values, sizeof values);
  memset(y.data(), 0xA5, y.bytes);
  float* s = scales.data();
  // Every third case as routed experts call it: factors of h, and the largest magnitude of a larger batch.
  const bool routed = sizeof(T) == 4;
  Memory<float> factors(t);
  for (int64_t k = 0; k < t; ++k) factors.data()[k] = (static_cast<int32_t>(random32() % 201) - 50) / 64.0f;
  Memory<uint32_t> batch_amax(1);
  memcpy(batch_amax.data(), "\0\0\xC0\x40", 4);  // 6
  Call call{x.data(), y.data(), gate_up.data(), s, amax.data(), down.data(), s + 2, down_amax.data(), s + 3, s + 4,
            routed ? batch_amax.data() : nullptr, routed ? factors.data() : nullptr, nullptr, t, h, i, 10.0f, element, activations, mode, 3, tier};
  Memory<uint8_t> scratch(nvfp4_scratch_bytes(&call));
  memset(scratch.data(), 0xFF, scratch.bytes);
  call.scratch = scratch.data();
  nvfp4_shared_expert(&call);
  return hash(seed, y.data(), y.bytes);
}

// An exact product of a shape's tokens with `intermediate` rows and one more, which fill no tile.
uint64_t run_exact(int tier, Shape shape, uint64_t seed) {
  state = 2;
  const int64_t t = shape.tokens, n = shape.intermediate + 1, k = shape.hidden;
  Memory<uint8_t> a(t * k / 2), a_scales(t * k / 16), b(n * k / 2), b_scales(n * k / 16);
  for (Memory<uint8_t>* side : {&a, &a_scales, &b, &b_scales})
    for (int64_t i = 0; i < side->bytes; ++i) side->data()[i] = static_cast<uint8_t>(random32());
  for (Memory<uint8_t>* side : {&a_scales, &b_scales})  // NaN now and then
    for (int64_t i = 0; i < side->bytes; ++i) side->data()[i] &= random32() % 512 ? 0x7E : 0xFF;
  Memory<float> out(t * n);
  Memory<uint32_t> entered(nvfp4_exact_entered_bytes(t, k) / 4);
  memset(out.data(), 0xA5, out.bytes);
  memset(entered.data(), 0xFF, entered.bytes);
  Exact product{a.data(), a_scales.data(), b.data(), b_scales.data(), out.data(),
                reinterpret_cast<nvfp4::ExactBlock*>(entered.data()), t, n, k, 3, tier};
  nvfp4_exact(&product);
  return hash(seed, out.data(), out.bytes);
}

}  // namespace

int main() {
  const Shape shapes[] = {{16, 16, 1}, {48, 16, 9}, {272, 288, 7}, {288, 272, 20}, {528, 144, 131}};
  for (int tier = 0; tier < nvfp4::tier_count(); ++tier) {
    if (!nvfp4::tier_at(tier)->present()) continue;
    uint64_t exact = 14695981039346656037u, others = exact;
    for (const Shape& shape : shapes) {
      exact = run_exact(tier, shape, exact);
      for (int32_t element = 0; element < 3; ++element) {
        auto f = element == nvfp4::kElementFp32 ? run<uint32_t> : run<uint16_t>;
        for (int32_t mode = 0; mode < 3; ++mode) exact = f(tier, shape, nvfp4::kNvfp4, mode, element, exact);
        for (int32_t activations = 0; activations < 2; ++activations)
          others = f(tier, shape, activations, 0, element, others);
      }
    }
    printf("%s %016llx %016llx\n", nvfp4::tier_at(tier)->name, static_cast<unsigned long long>(exact),
           static_cast<unsigned long long>(others));
  }
}

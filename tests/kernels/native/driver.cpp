// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernel without Python: under sanitizers, and under an emulator of another processor.
//
// Every tier of the machine, shapes and numbers of tokens that divide by nothing, buffers of exactly the size they must
// have (the sanitizer guards their ends) at odd addresses; each case as a shared expert and as one of three routed ones.
// Prints, per tier, a hash over the results with NVFP4 activations and over exact products, which must be the same in all
// tiers, and one over those in bf16 and fp8.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "api.h"
#include "tiers.h"

using nvfp4::Call;
using nvfp4::Exact;
using nvfp4::RoutedCall;

extern "C" int64_t nvfp4_scratch_bytes(const Call* call);
extern "C" void nvfp4_shared_expert(const Call* call);
extern "C" int64_t nvfp4_routed_scratch_bytes(const RoutedCall* call);
extern "C" void nvfp4_routed_experts(const RoutedCall* call);
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

constexpr int64_t kExperts = 3;

// A shared expert, which is the first of three, or (Index: of what experts are named by) all three, routed.
template <class T, class Index>
uint64_t run(int tier, Shape shape, int32_t activations, int32_t mode, int32_t element, uint64_t seed) {
  state = 1;
  constexpr bool routed = !std::is_void<Index>::value;
  using Name = typename std::conditional<routed, Index, char>::type;
  const int64_t h = shape.hidden, i = shape.intermediate, t = shape.tokens, e = routed ? kExperts : 1;
  Memory<T> x(t * h);
  Memory<uint8_t> gate_up(e * 2 * i * h * 9 / 16), down(e * h * i * 9 / 16);
  Memory<float> gate_up_scales(2 * e), down_scales(e), input_scales(e), hidden_scales(e);
  Memory<uint16_t> amax(e * 2 * i), down_amax(e * h);
  fill_weights(gate_up.data(), e * 2 * i, h);
  fill_weights(down.data(), e * h, i);
  for (int64_t k = 0; k < t * h; ++k) {
    float value = (static_cast<int32_t>(random32() % 20001) - 10000) / 2048.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (sizeof(T) == 4) memcpy(x.data() + k, &bits, 4);
    // bf16 is the upper half of fp32; as fp16 the same bits are other numbers, some of them infinite or NaN.
    else x.data()[k] = static_cast<T>(bits >> 16);
  }
  for (int64_t k = 0; k < e * 2 * i; ++k) amax.data()[k] = static_cast<uint16_t>(0x4000 + random32() % 0x100);
  for (int64_t k = 0; k < e * h; ++k) down_amax.data()[k] = static_cast<uint16_t>(0x4000 + random32() % 0x100);
  for (int64_t k = 0; k < e; ++k) {
    gate_up_scales.data()[2 * k] = 0.01f / (k + 1);
    gate_up_scales.data()[2 * k + 1] = 0.02f / (k + 1);
    down_scales.data()[k] = 0.005f * (k + 1);
    input_scales.data()[k] = 5.0f / 2688 * (k + 1);
    hidden_scales.data()[k] = 0.5f / 2688 * (k + 1);
  }
  Call call{x.data(), nullptr, gate_up.data(), gate_up_scales.data(), amax.data(), down.data(), down_scales.data(),
            down_amax.data(), input_scales.data(), hidden_scales.data(), nullptr, t, h, i, 10.0f, element, activations, mode, 3, tier};
  if (!routed) {
    Memory<T> y(t * h);
    memset(y.data(), 0xA5, y.bytes);
    Memory<uint8_t> scratch(nvfp4_scratch_bytes(&call));
    memset(scratch.data(), 0xFF, scratch.bytes);
    call.y = y.data();
    call.scratch = scratch.data();
    nvfp4_shared_expert(&call);
    return hash(seed, y.data(), y.bytes);
  }
  // Three slots a token, one in five not here; y in fp32, as a caller asks for who goes on adding.
  Memory<Name> indices(3 * t);
  Memory<float> weights(3 * t), y(t * h);
  for (int64_t k = 0; k < 3 * t; ++k) {
    indices.data()[k] = static_cast<Name>(static_cast<int32_t>(random32() % 5) - 1);
    weights.data()[k] = (static_cast<int32_t>(random32() % 201) - 50) / 64.0f;
  }
  memset(y.data(), 0xA5, y.bytes);
  call.y = y.data();
  for (int32_t after_down = 0; after_down < 2; ++after_down) {
    // With weights after down, the first expert is a shared one too.
    const Call* shared = after_down ? &call : nullptr;
    RoutedCall given{call, indices.data(), weights.data(), shared, 3, e, sizeof(Name), nvfp4::kElementFp32, after_down};
    Memory<uint8_t> scratch(nvfp4_routed_scratch_bytes(&given));
    memset(scratch.data(), 0xFF, scratch.bytes);
    given.layer.scratch = scratch.data();
    nvfp4_routed_experts(&given);
    seed = hash(seed, y.data(), y.bytes);
  }
  return seed;
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
        const bool wide = element == nvfp4::kElementFp32;
        for (auto f : {wide ? run<uint32_t, void> : run<uint16_t, void>,
                       wide ? run<uint32_t, int64_t> : run<uint16_t, int32_t>}) {
          for (int32_t mode = 0; mode < 3; ++mode) exact = f(tier, shape, nvfp4::kNvfp4, mode, element, exact);
          for (int32_t activations = 0; activations < 2; ++activations)
            others = f(tier, shape, activations, 0, element, others);
        }
      }
    }
    printf("%s %016llx %016llx\n", nvfp4::tier_at(tier)->name, static_cast<unsigned long long>(exact),
           static_cast<unsigned long long>(others));
  }
}

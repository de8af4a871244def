// SPDX-License-Identifier: Apache-2.0
// What the steps of a call have in common: how scratch is laid out, how work is cut.
#pragma once

#include <cstdint>

namespace nvfp4 {

constexpr int64_t kAlign = 64;

// Below this many values, waking other threads costs more than they save.
constexpr int64_t kValuesAlone = 1 << 15;

inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
inline int64_t weight_bytes(int64_t rows, int64_t columns) { return rows * columns / 16 * 9; }
inline int64_t pieces(int64_t amount, int64_t each) { return (amount + each - 1) / each; }

// Where parts of a call's scratch begin, one after the other, each aligned.
class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = size_;
    size_ += aligned(bytes);
    return at;
  }
  int64_t size() const { return size_ + kAlign; }  // the block itself may begin anywhere

 private:
  int64_t size_ = 0;
};

inline uint8_t* begin_of(void* scratch) {
  return reinterpret_cast<uint8_t*>(aligned(reinterpret_cast<intptr_t>(scratch)));
}

}  // namespace nvfp4

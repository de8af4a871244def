// SPDX-License-Identifier: Apache-2.0
// Threads for pieces of work that do not depend on each other.
#pragma once

#include <cstdint>

namespace nvfp4 {

using Piece = void (*)(void* context, int64_t index);

// piece(context, 0 .. count - 1), each once, on up to `threads` threads, the caller among them; returns when all are done.
void run(int threads, int64_t count, Piece piece, void* context);

template <class Function>
void run(int threads, int64_t count, const Function& f) {
  run(threads, count, [](void* context, int64_t index) { (*static_cast<const Function*>(context))(index); },
      const_cast<Function*>(&f));
}

// Whose threads `run` takes: "OpenMP" or "threads of its own".
const char* whose_threads();

}  // namespace nvfp4

// SPDX-License-Identifier: Apache-2.0
// Threads, without a pool of our own.
//
// torch runs its own operations on an OpenMP team. Its workers are there already and, between operations, still awake; a
// second pool would compete with them for the cores. So the work goes to that team, through the runtime that is loaded in
// this process (GOMP_parallel, which libgomp, libiomp5 and libomp export). Where there is none, and in a process forked
// after the library was loaded, where the team's threads are gone (libgomp would wait for them for ever), threads are made
// for the call and joined at its end.
//
// Pieces are taken from a counter: several neighbours at a time, because a thread that reads weights one after the other
// reads them faster, and fewer towards the end, one at last, so that a thread the machine takes away delays little.
// Nothing depends on who did what.
#include "team.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace nvfp4 {

namespace {

// IEEE arithmetic while a piece runs, whatever the caller's thread is set to (torch.set_flush_denormal).
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }  // no flushing, nearest even, exceptions masked
  ~IeeeArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

constexpr int64_t kMostAtOnce = 16;

struct Work {
  std::atomic<int64_t> next{0};
  int64_t count;
  int threads;
  Piece piece;
  void* context;
};

void take_pieces(void* data) {
  Work& work = *static_cast<Work*>(data);
  IeeeArithmetic mode;
  for (int64_t first = work.next.load(std::memory_order_relaxed); first < work.count;) {
    const int64_t share = (work.count - first) / (4 * work.threads);
    const int64_t end = first + (share < 1 ? 1 : share > kMostAtOnce ? kMostAtOnce : share);
    if (!work.next.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
    for (int64_t index = first; index < end; ++index) work.piece(work.context, index);
    first = work.next.load(std::memory_order_relaxed);
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

// Both from when the library was loaded: torch is there by then, and no fork lies between.
const pid_t kProcess = getpid();
const GompParallel kOpenMp = find_openmp();

bool has_team() { return kOpenMp != nullptr && getpid() == kProcess; }

}  // namespace

const char* whose_threads() { return has_team() ? "OpenMP" : "threads of its own"; }

void run(int threads, int64_t count, Piece piece, void* context) {
  Work work;
  work.count = count;
  work.piece = piece;
  work.context = context;
  if (threads > count) threads = static_cast<int>(count);
  work.threads = threads < 1 ? 1 : threads;
  if (threads <= 1) return take_pieces(&work);
  if (has_team()) return kOpenMp(take_pieces, &work, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(take_pieces, &work);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  }
  take_pieces(&work);
  for (std::thread& other : others) other.join();
}

}  // namespace nvfp4

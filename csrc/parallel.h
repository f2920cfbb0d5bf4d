// Threads for loops over rows: the ones that torch has already.
//
// An OpenMP runtime keeps its threads spinning for milliseconds after a parallel region. A second
// pool beside torch's would share the cores with spinning threads, so the loop asks the runtime
// that torch has loaded, by the entry point that libgomp, libomp and libiomp5 have in common. Where
// none is loaded it starts threads of its own.

#pragma once

#include <atomic>
#include <cstdint>

namespace metis {

// Calls work(context) on so many threads, or on fewer; returns when all of them are done.
void on_threads(int threads, void (*work)(void*), void* context);

// "torch's OpenMP" or "std::thread".
const char* thread_pool();

// Calls body(i) for each i in [0, count), each once, in any order and on any thread.
template <class Body>
void for_each_row(std::int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<std::int64_t> next{0};
    std::int64_t count;
    const Body* body;
  } shared;
  shared.count = count;
  shared.body = &body;
  on_threads(
      threads < count ? threads : static_cast<int>(count),
      [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (std::int64_t i = s.next++; i < s.count; i = s.next++) (*s.body)(i);
      },
      &shared);
}

}  // namespace metis

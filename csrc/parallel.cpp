#include "parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace metis {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void on_threads(int threads, void (*work)(void*), void* context) {
  if (const Parallel parallel = openmp()) {
    parallel(work, context, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) others.emplace_back(work, context);
  work(context);
  for (std::thread& other : others) other.join();
}

const char* thread_pool() { return openmp() ? "torch's OpenMP" : "std::thread"; }

}  // namespace metis

// How threads share the items of a kernel: at once, or in one parallel region with other kernels.
#pragma once

#include <omp.h>

#include <cstdint>
#include <functional>

#define HIDDEN __attribute__((visibility("hidden")))  // from who loads the library

// What a kernel's items are. Of edges, atoms or columns, it reads what kernels of that kind wrote for
// the same ones alone, so that two of as many follow each other without a barrier.
enum class Items { others, edges, atoms, columns };

using Work = std::function<void(int64_t first, int64_t last)>;

// Whether kernels that this thread calls wait for run_together().
HIDDEN bool are_deferred();

// Has run_together() call work(first, last). What it captured must live until then.
HIDDEN void defer(Items kind, int64_t items, Work work);

// Calls work(first, last) on every thread's share of the items. Capture by value: it may be called
// when the caller has returned.
template <typename Function>
static inline void share(int64_t items, int threads, const Function& work,
                         Items kind = Items::others) {
  if (are_deferred()) return defer(kind, items, work);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    work(items * thread / all, items * (thread + 1) / all);
  }
}

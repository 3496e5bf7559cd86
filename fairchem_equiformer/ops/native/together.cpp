// Several kernels in one parallel region; ops/native/together.py.

#include "together.h"

#include <utility>
#include <vector>

namespace {

struct Step {
  Items kind;
  int64_t items;
  Work work;
};

thread_local std::vector<Step> deferred;
thread_local bool deferring = false;

// Whether a thread may begin the second when others are not done with the first.
static bool independent(const Step& first, const Step& second) {
  return first.kind != Items::others && first.kind == second.kind && first.items == second.items;
}

}  // namespace

HIDDEN bool are_deferred() { return deferring; }

HIDDEN void defer(Items kind, int64_t items, Work work) {
  deferred.push_back({kind, items, std::move(work)});
}

extern "C" {

// Until run_together() or drop_together(), kernels called by this thread wait.
void begin_together() { deferring = true; }

// Runs what waits, in one parallel region: each kernel after the one before it. Kernels go on to
// wait.
void run_together(int threads) {
  std::vector<Step> steps;
  steps.swap(deferred);
  if (steps.empty()) return;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (size_t i = 0; i < steps.size(); i++) {
      const Step& step = steps[i];
      if (i && !independent(steps[i - 1], step)) {
#pragma omp barrier
      }
      step.work(step.items * thread / all, step.items * (thread + 1) / all);
    }
  }
}

// Kernels wait no more; what waited is dropped.
void end_together() {
  deferring = false;
  deferred.clear();
}
}

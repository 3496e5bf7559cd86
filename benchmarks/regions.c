// Counts parallel regions of OpenMP: preloaded, it stands before libgomp (benchmarks/regions.py).
#define _GNU_SOURCE
#include <dlfcn.h>

typedef void (*Work)(void*);

static long regions[2];  // all others', MKL's

// Of the next library that has the function: libgomp, which is loaded after this one.
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Adds a region that more than one thread will work in.
static void count(unsigned threads, int by_mkl) {
  static int (*in_parallel)(void), (*most)(void);
  if (!in_parallel) {
    most = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    in_parallel = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_in_parallel");
  }
  if (!in_parallel() && (threads ? threads : (unsigned)most()) > 1)
    __atomic_fetch_add(&regions[by_mkl], 1, __ATOMIC_RELAXED);
}

long parallel_regions(int by_mkl) { return __atomic_load_n(&regions[by_mkl], __ATOMIC_RELAXED); }

void GOMP_parallel(Work work, void* data, unsigned threads, unsigned flags) {
  count(threads, 0);
  NEXT(GOMP_parallel)(work, data, threads, flags);
}

// What Intel's compiler makes of MKL, and no other compiler any more.
void GOMP_parallel_start(Work work, void* data, unsigned threads) {
  count(threads, 1);
  NEXT(GOMP_parallel_start)(work, data, threads);
}

void GOMP_parallel_sections(Work work, void* data, unsigned threads, unsigned sections,
                            unsigned flags) {
  count(threads, 0);
  NEXT(GOMP_parallel_sections)(work, data, threads, sections, flags);
}

// "#pragma omp parallel for" with a schedule.
#define LOOP(name)                                                                     \
  void name(Work work, void* data, unsigned threads, long start, long end, long step,  \
            long chunk, unsigned flags) {                                              \
    count(threads, 0);                                                                    \
    NEXT(name)(work, data, threads, start, end, step, chunk, flags);                   \
  }
LOOP(GOMP_parallel_loop_static)
LOOP(GOMP_parallel_loop_dynamic)
LOOP(GOMP_parallel_loop_guided)
LOOP(GOMP_parallel_loop_nonmonotonic_dynamic)
LOOP(GOMP_parallel_loop_nonmonotonic_guided)

#define LOOP_AT_RUN_TIME(name)                                                         \
  void name(Work work, void* data, unsigned threads, long start, long end, long step,  \
            unsigned flags) {                                                          \
    count(threads, 0);                                                                    \
    NEXT(name)(work, data, threads, start, end, step, flags);                          \
  }
LOOP_AT_RUN_TIME(GOMP_parallel_loop_runtime)
LOOP_AT_RUN_TIME(GOMP_parallel_loop_nonmonotonic_runtime)
LOOP_AT_RUN_TIME(GOMP_parallel_loop_maybe_nonmonotonic_runtime)

// What the loader asks of a library.

extern "C" {

// The sources that it was built from, by their hash (sources.py; setup.py defines it).
const char* built_from() { return BUILT_FROM; }

// The newest generation of x86-64, as its ABI counts them, that the processor belongs to; 0
// elsewhere, and for those before the third.
int generation() {
#if defined(__x86_64__)
  const bool third = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool fourth = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd");
  return third && fourth ? 4 : third ? 3 : 0;
#else
  return 0;
#endif
}
}

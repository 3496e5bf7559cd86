// As many floats at a time as registers of the processor hold that the library is compiled for.
#pragma once

#include <cstdint>
#include <type_traits>

#include "together.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // after the arguments of a lambda

// Of wider vectors compilers make slow code: they pass through memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int WIDTH = 16;  // channels come in multiples of this, whatever the processor
using Vec = float __attribute__((vector_size(4 * LANES)));
using IntVec = int32_t __attribute__((vector_size(4 * LANES)));
// In memory, where a tensor need not be aligned to more than a float.
using Unaligned = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Null for channels that are whole vectors anywhere, or else why they are not.
INLINE const char* misfit_of_width(int64_t channels) {
  return channels % WIDTH ? "their number is not a multiple of 16" : nullptr;
}

// A number of vectors as a type, from which a template can take it.
template <int V>
using Vectors = std::integral_constant<int, V>;

// Calls work(V, c) for all channels c from `first` to `last` at which V vectors begin: as many as
// can be at once, then one at a time.
template <int AtOnce, typename Work>
INLINE void for_vectors(int64_t first, int64_t last, const Work& work) {
  int64_t c = first;
  for (; c + AtOnce * LANES <= last; c += AtOnce * LANES) work(Vectors<AtOnce>{}, c);
  for (; c < last; c += LANES) work(Vectors<1>{}, c);
}

INLINE void load(const float* from, Vec& to) { to = *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(const Vec& from, float* to) { *reinterpret_cast<Unaligned*>(to) = from; }

// One step of a transposition: exchanges blocks of Size rows and lanes across the diagonal.
template <int Size>
INLINE void exchange_blocks(Vec (&x)[LANES]) {
  IntVec first, second;  // lanes of two rows one after the other
  for (int lane = 0; lane < LANES; lane++) {
    first[lane] = lane & Size ? LANES + lane - Size : lane;
    second[lane] = lane & Size ? LANES + lane : lane + Size;
  }
  for (int row = 0; row < LANES; row++) {
    if (row & Size) continue;
    const Vec upper = x[row], lower = x[row + Size];
    x[row] = __builtin_shuffle(upper, lower, first);
    x[row + Size] = __builtin_shuffle(upper, lower, second);
  }
}

// Rows become columns.
INLINE void transpose(Vec (&x)[LANES]) {
  if constexpr (LANES > 8) exchange_blocks<8>(x);
  if constexpr (LANES > 4) exchange_blocks<4>(x);
  exchange_blocks<2>(x);
  exchange_blocks<1>(x);
}

// 2^t of N vectors, 2e-7 relative; t is limited to -126 to 126.
// Step by step for all of them: a step waits for the one before it, and other vectors fill the wait.
template <int N>
INLINE void power_of_two(const Vec* t, Vec* out) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are t's nearest integer
  // On [-0.5, 0.5], minimax: 9e-8 relative beside float32's 6e-8.
  constexpr float TERMS[] = {1.326472712e-3f, 9.671512645e-3f, 5.550733743e-2f,
                             2.402224209e-1f, 6.931469776e-1f, 1.0f};
  Vec rest[N], nearest[N];
  for (int i = 0; i < N; i++) {
    rest[i] = t[i] < -126.0f ? Vec{} - 126.0f : t[i];
    rest[i] = rest[i] > 126.0f ? Vec{} + 126.0f : rest[i];
  }
  for (int i = 0; i < N; i++) nearest[i] = rest[i] + MAGIC;
  for (int i = 0; i < N; i++) rest[i] -= nearest[i] - MAGIC;
  for (int i = 0; i < N; i++) out[i] = Vec{} + TERMS[0];
  for (int k = 1; k < 6; k++)
    for (int i = 0; i < N; i++) out[i] = out[i] * rest[i] + TERMS[k];
  for (int i = 0; i < N; i++)  // the integer, moved to the exponent
    out[i] = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(out[i]) +
                                   (reinterpret_cast<IntVec>(nearest[i]) << 23));
}

constexpr float LOG2_E = 1.44269504088896341f;

// 1 / (1 + exp(-x)) of N vectors; 6e-7 relative, at least 1e-38.
template <int N>
INLINE void sigmoid(const Vec* x, Vec* out) {
  Vec t[N];
  for (int i = 0; i < N; i++) t[i] = x[i] * -LOG2_E;
  power_of_two<N>(t, out);
  for (int i = 0; i < N; i++) out[i] = 1.0f / (1.0f + out[i]);
}

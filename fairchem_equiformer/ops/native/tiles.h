// How a matrix product is cut into tiles, which registers hold.
#pragma once

#include "matrix_products.h"
#include "simd.h"

constexpr int WIDEST = REGISTERS / 8;  // vectors of a panel
constexpr int TALLEST = 6;             // rows of a tile: 3 of 4 registers hold their sums
constexpr int STEP = 8;

// Numbers to be fetched meanwhile: `lines` lines for every STEP columns of A.
struct Ahead {
  const char* next;
  int64_t lines;
};

INLINE void fetch(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.lines; i++, ahead.next += 4 * LANES)
    __builtin_prefetch(ahead.next, 0, 2);
}

// What a tile's sums become in one row of C.
template <int V>
INLINE void finish(const MatrixProduct& p, int64_t row, int64_t column, const Vec* sum) {
  for (int v = 0; v < V; v++) {
    const int64_t j = column + v * LANES;
    float* outs[] = {p.c, p.also};
    for (float* out : outs) {
      if (!out) continue;
      Vec start = {};
      if (p.accumulate)
        load(out + row * p.c_row + j, start);
      else if (p.bias)
        load(p.bias + j, start);
      store(start + p.sign * sum[v], out + row * p.c_row + j);
    }
  }
}

// Calls work(V, column) for the panels of n columns: four vectors each, then two, then one.
template <typename Work>
INLINE void for_panels(int64_t n, const Work& work) {
  int64_t column = 0;
  for (; column + WIDEST * LANES <= n; column += WIDEST * LANES) work(Vectors<WIDEST>{}, column);
  for (; column + 2 * LANES <= n; column += 2 * LANES) work(Vectors<2>{}, column);
  for (; column < n; column += LANES) work(Vectors<1>{}, column);
}

// Calls work(R) for a number of rows R, at most Most.
template <int Most, typename Work>
INLINE void for_height(int64_t rows, const Work& work) {
  if constexpr (Most > 1) {
    if (rows < Most) return for_height<Most - 1>(rows, work);
  }
  work(std::integral_constant<int, Most>{});
}

// Calls work(R, row, ahead) for tiles of at most Most rows from `first` to `last`. The panel of
// `steps` columns of A and V vectors that begins at `next` comes from far: a share of it is
// fetched during each tile.
template <int Most, int V, typename Work>
INLINE void for_tiles(int64_t first, int64_t last, const void* next, int64_t steps,
                      const Work& work) {
  const int64_t rows = last - first, tiles = (rows + Most - 1) / Most;
  const int64_t lines = next ? (STEP * V + tiles - 1) / tiles : 0;
  const int64_t share = lines * 4 * LANES * ((steps + STEP - 1) / STEP);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t row = first + rows * t / tiles, end = first + rows * (t + 1) / tiles;
    const Ahead ahead{static_cast<const char*>(next) + t * share, lines};
    for_height<Most>(end - row, [&](auto height) INLINED { work(height, row, ahead); });
  }
}

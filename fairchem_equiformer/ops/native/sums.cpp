// Sums of rows, by threads that share the columns; ops/native/sums.py.

#include "simd.h"

namespace {

static void add_columns(const float* rows, int64_t stride, const int64_t* index,
                        float* total, int64_t width, int64_t items, int64_t first,
                        int64_t last) {
  for (int64_t i = 0; i < items; i++) {
    const float* from = rows + i * stride;
    float* to = total + (index ? index[i] * width : 0);
    int64_t c = first;
    for (; c + LANES <= last; c += LANES) {
      Vec sum, part;
      load(to + c, sum);
      load(from + c, part);
      store(sum + part, to + c);
    }
    for (; c < last; c++) to[c] += from[c];
  }
}

static void sums_and_differences(const float* a, const float* b, int64_t stride, float* sum,
                                 float* difference, int64_t width, int64_t first,
                                 int64_t last) {
  for (int64_t i = first; i < last; i++)
    for (int64_t c = 0; c < width; c += LANES) {
      Vec one, other;
      load(a + i * stride + c, one);
      load(b + i * stride + c, other);
      store(one + other, sum + i * width + c);
      store(one - other, difference + i * width + c);
    }
}

}  // namespace

extern "C" {

// Adds rows [items, width], `stride` apart, to those of total [., width] that the index [items]
// names, or all to the first where it is null; in the order of the items.
void add_rows(const float* rows, int64_t stride, const int64_t* index, float* total, int64_t width,
              int64_t items, int threads) {
  const int64_t vectors = (width + LANES - 1) / LANES;
  share(vectors, threads, [=](int64_t first, int64_t last) {
    const int64_t stop = last * LANES < width ? last * LANES : width;
    add_columns(rows, stride, index, total, width, items, first * LANES, stop);
  }, Items::columns);
}

// a + b and a - b, [edges, width] in whole vectors; rows of a and b lie `stride` apart.
void sum_and_difference(const float* a, const float* b, int64_t stride, float* sum,
                        float* difference, int64_t width, int64_t edges, int threads) {
  share(edges, threads, [=](int64_t first, int64_t last) {
    sums_and_differences(a, b, stride, sum, difference, width, first, last);
  }, Items::edges);
}
}

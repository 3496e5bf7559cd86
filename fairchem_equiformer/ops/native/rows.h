// Rotations of edges without their zeros, row after row, and features turned by them.
#pragma once

#include "simd.h"

constexpr int MAX_COEFFICIENTS = 81;  // (lmax + 1)^2
constexpr int TOGETHER = 4;           // rows of a degree for which its features are read once

// Rows of the edge frame, sorted by degree, so that a degree's features are read once for several.
struct Rows {
  const int64_t* row;     // [rows] among the rows of the layout
  const int64_t* degree;  // [rows]
  const int64_t* entry;   // [rows] where the row starts in the compact rotation
  const int64_t* weight;  // [rows] radial weight
  int64_t rows, coefficients, entries, weights, lmin;

  // First l-major coefficient of a degree.
  int64_t first(int64_t l) const { return l * l - lmin * lmin; }
};

INLINE const char* misfit_of_rows(const Rows& rows, int64_t channels) {
  if (rows.coefficients > MAX_COEFFICIENTS) return "lmax is above 8";
  return misfit_of_width(channels);
}

// Calls work(R, i) for R = `count` rows, at most `Most`.
template <int Most, typename Work>
INLINE void for_some_rows(int64_t i, int64_t count, const Work& work) {
  if constexpr (Most > 1) {
    if (count < Most) return for_some_rows<Most - 1>(i, count, work);
  }
  work(Vectors<Most>{}, i);
}

// Calls work(R, i) for all rows: R of one degree, beginning with the i-th, at a time.
template <typename Work>
INLINE void for_rows(const Rows& rows, const Work& work) {
  for (int64_t i = 0, count; i < rows.rows; i += count) {
    count = 1;
    while (count < TOGETHER && i + count < rows.rows && rows.degree[i + count] == rows.degree[i])
      count++;
    for_some_rows<TOGETHER>(i, count, work);
  }
}

// D x for R rows of one degree, starting with the i-th; V vectors of channels.
template <int R, int V>
INLINE void rotate(const Rows& rows, int64_t i, const float* rotation, const float* x,
                   int64_t channels, Vec (&out)[R][V]) {
  const int64_t degree = rows.degree[i], first = rows.first(degree);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) out[r][v] = Vec{};
  for (int64_t k = 0; k < 2 * degree + 1; k++) {
    Vec features[V];
    for (int v = 0; v < V; v++) load(x + (first + k) * channels + v * LANES, features[v]);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) out[r][v] += rotation[rows.entry[i + r] + k] * features[v];
  }
}

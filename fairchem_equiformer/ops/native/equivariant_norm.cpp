// Equivariant layer norms of atoms' features; ops/norm.py says what. One form holds all of them:
// degrees in groups, each group divided by the root of its degrees' mean square.

#include <cmath>

#include "simd.h"

extern "C" {

struct EquivariantNorm {
  const float* weights[9];  // of each degree, [channels]
  const float* bias;        // of degree 0, [channels]
  int64_t lmax, channels;
  int64_t groups[10];  // where each begins among the degrees, and behind the last one lmax + 1
  int64_t num_groups;
  float epsilon;
};

}

namespace {

constexpr int MAX_LMAX = 8;
constexpr int BLOCK = 4;  // atoms whose gradients of parameters are summed together

INLINE float total(const Vec& x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

// Calls work(c) at each vector of a row's channels.
template <typename Work>
INLINE void for_row(const EquivariantNorm& norm, const Work& work) {
  for (int64_t c = 0; c < norm.channels; c += LANES) work(c);
}

INLINE float mean_of_scalars(const EquivariantNorm& norm, const float* x) {
  Vec sum = {};
  for_row(norm, [&](int64_t c) INLINED {
    Vec part;
    load(x + c, part);
    sum += part;
  });
  return total(sum) / norm.channels;
}

// Row k of x, of which row 0 is centred.
INLINE Vec centred(const EquivariantNorm& norm, const float* x, int64_t k, int64_t c, float mean) {
  Vec found;
  load(x + k * norm.channels + c, found);
  return k ? found : found - mean;
}

// One over the number of what a degree's mean square is taken of, times that of the group's degrees.
INLINE float share_of(const EquivariantNorm& norm, int64_t group, int64_t degree) {
  const int64_t degrees = norm.groups[group + 1] - norm.groups[group];
  return 1.0f / (degrees * (2 * degree + 1) * norm.channels);
}

// Calls work(group, degree, k) for all rows k of a group.
template <typename Work>
INLINE void for_group(const EquivariantNorm& norm, int64_t group, const Work& work) {
  for (int64_t l = norm.groups[group]; l < norm.groups[group + 1]; l++)
    for (int64_t k = l * l; k < (l + 1) * (l + 1); k++) work(l, k);
}

// 1 / sqrt(mean square + epsilon) of a group.
INLINE float scale_of(const EquivariantNorm& norm, int64_t group, const float* x, float mean) {
  float mean_square = 0;
  for (int64_t l = norm.groups[group]; l < norm.groups[group + 1]; l++) {
    Vec sum = {};
    for (int64_t k = l * l; k < (l + 1) * (l + 1); k++)
      for_row(norm, [&](int64_t c) INLINED {
        const Vec u = centred(norm, x, k, c, mean);
        sum += u * u;
      });
    mean_square += total(sum) * share_of(norm, group, l);
  }
  return 1.0f / std::sqrt(mean_square + norm.epsilon);
}

INLINE void normalize_atom(const EquivariantNorm& norm, const float* x, float* y) {
  const float mean = mean_of_scalars(norm, x);
  for (int64_t g = 0; g < norm.num_groups; g++) {
    const float scale = scale_of(norm, g, x, mean);
    for_group(norm, g, [&](int64_t l, int64_t k) INLINED {
      for_row(norm, [&](int64_t c) INLINED {
        Vec weight, bias = {};
        load(norm.weights[l] + c, weight);
        if (k == 0) load(norm.bias + c, bias);
        store(centred(norm, x, k, c, mean) * scale * weight + bias, y + k * norm.channels + c);
      });
    });
  }
}

INLINE void add(const Vec& x, float* to) {
  Vec sum;
  load(to, sum);
  store(sum + x, to);
}

// Writes x_grad; adds the gradients of weights and bias to sums [lmax + 2, channels].
INLINE void differentiate_atom(const EquivariantNorm& norm, const float* x, const float* grad,
                               float* x_grad, float* sums) {
  const float mean = mean_of_scalars(norm, x);
  for (int64_t g = 0; g < norm.num_groups; g++) {
    const float scale = scale_of(norm, g, x, mean);
    Vec along = {};
    for_group(norm, g, [&](int64_t l, int64_t k) INLINED {
      for_row(norm, [&](int64_t c) INLINED {
        Vec weight, flow;
        load(norm.weights[l] + c, weight);
        load(grad + k * norm.channels + c, flow);
        const Vec u = centred(norm, x, k, c, mean);
        add(flow * u * scale, sums + l * norm.channels + c);
        if (k == 0) add(flow, sums + (norm.lmax + 1) * norm.channels + c);
        along += flow * weight * u;
      });
    });
    const float fall = total(along) * scale * scale * scale;
    for_group(norm, g, [&](int64_t l, int64_t k) INLINED {
      const float part = fall * share_of(norm, g, l);
      for_row(norm, [&](int64_t c) INLINED {
        Vec weight, flow;
        load(norm.weights[l] + c, weight);
        load(grad + k * norm.channels + c, flow);
        store(flow * weight * scale - part * centred(norm, x, k, c, mean),
              x_grad + k * norm.channels + c);
      });
    });
  }
  const float center = mean_of_scalars(norm, x_grad);
  for_row(norm, [&](int64_t c) INLINED {
    Vec found;
    load(x_grad + c, found);
    store(found - center, x_grad + c);
  });
}

static void normalize_atoms(const EquivariantNorm& norm, const float* x, float* y,
                            int64_t first, int64_t last) {
  const int64_t size = (norm.lmax + 1) * (norm.lmax + 1) * norm.channels;
  for (int64_t n = first; n < last; n++) normalize_atom(norm, x + n * size, y + n * size);
}

static void differentiate_atoms(const EquivariantNorm& norm, const float* x,
                                const float* grad, float* x_grad, float* sums, int64_t first,
                                int64_t last) {
  const int64_t size = (norm.lmax + 1) * (norm.lmax + 1) * norm.channels;
  for (int64_t i = 0; i < (norm.lmax + 2) * norm.channels; i++) sums[i] = 0;
  for (int64_t n = first; n < last; n++)
    differentiate_atom(norm, x + n * size, grad + n * size, x_grad + n * size, sums);
}

}  // namespace

extern "C" {

int64_t sizeof_EquivariantNorm() { return sizeof(EquivariantNorm); }

// Null where such sizes fit, or else what does not.
const char* equivariant_norm_misfit(int64_t lmax, int64_t channels) {
  if (lmax > MAX_LMAX) return "lmax is above 8";
  return misfit_of_width(channels);
}

// x [atoms, (lmax + 1)^2, channels] to y.
void equivariant_norm(const EquivariantNorm* norm, const float* x, float* y, int64_t atoms,
                      int threads) {
  share(atoms, threads, [=, norm = *norm](int64_t first, int64_t last) {
    normalize_atoms(norm, x, y, first, last);
  });
}

// Atoms that one row of sums below belongs to.
int64_t equivariant_norm_block() { return BLOCK; }

// Writes x_grad, and the gradients of weights and bias to sums [blocks, lmax + 2, channels], those
// of each block of atoms to its own, so that the number of threads changes no bit.
void equivariant_norm_backward(const EquivariantNorm* norm, const float* x, const float* grad,
                               float* x_grad, float* sums, int64_t atoms, int threads) {
  share((atoms + BLOCK - 1) / BLOCK, threads, [=, norm = *norm](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
      differentiate_atoms(norm, x, grad, x_grad, sums + b * (norm.lmax + 2) * norm.channels,
                          b * BLOCK, (b + 1) * BLOCK < atoms ? (b + 1) * BLOCK : atoms);
  });
}
}

// Norms, rotations, and the products of gated units.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// ---- norm: y = x / sqrt(mean(x^2) + eps) * weight ------------------------------------------------------------------

inline void norm(const float* x, const float* weight, double eps, int64_t rows, int64_t depth, float* y) {
    for (int64_t row = 0; row < rows; row++, x += depth, y += depth) {
        Vec total{};
        int64_t k = 0;
        for (; k + kLanes <= depth; k += kLanes) {
            const Vec some = load(x + k);
            total += some * some;
        }
        float sum = sum_of(total);
        for (; k < depth; k++) sum += x[k] * x[k];
        const float scale = 1.0f / std::sqrt(sum / depth + float(eps));
        for (k = 0; k < depth; k++) y[k] = x[k] * scale * weight[k];
    }
}

// ---- rotation: RoPE of pairs half a head apart ----------------------------------------------------------------------

// Rotates one head in place: x, cos and sin [depth].
inline void rotate(float* x, const float* cos, const float* sin, int64_t depth) {
    const int64_t half = depth / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[half + i] + low * sin[half + i];
    }
}

// ---- SwiGLU's product: y = g / (1 + e^-g) * u ------------------------------------------------------------------------

inline Vec silu(Vec x) {
    const Vec small = exponential(x < 0.0f ? x : -x);  // of -|x|, so that it cannot overflow
    return x * (x < 0.0f ? small : Vec{} + 1.0f) / (small + 1.0f);
}

// Computes it in place of g [count].
inline void gated_product(float* g, const float* u, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = silu(load(g + i)) * load(u + i);
        std::memcpy(g + i, &value, sizeof value);
    }
    for (; i < count; i++) g[i] = silu(Vec{} + g[i])[0] * u[i];
}

// Computes it in place of x [count].
inline void silu(float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = silu(load(x + i));
        std::memcpy(x + i, &value, sizeof value);
    }
    for (; i < count; i++) x[i] = silu(Vec{} + x[i])[0];
}

}  // namespace

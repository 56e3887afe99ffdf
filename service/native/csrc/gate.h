// The gate (stored scalings to weights of ranks, hidden states to stored scalings), and the draft head.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "elementwise.h"
#include "floats.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// Whether it is a tensor of stored gate rows, [slots, sites, experts].
bool is_store(const Tensor& gate_rows) { return is_dense_floats(gate_rows, 3); }

// The stored scalings of the slots from first_row on, expanded to ranks and times `weight`: [slots - first_row, ranks]
void spread(
    const Tensor& gate_rows, const Tensor& slots, const Tensor& rank_index, int64_t first_row, float weight, float* weights
) {
    const int64_t rows = slots.numel() - first_row, ranks = rank_index.numel(), width = gate_rows.size(1) * gate_rows.size(2);
    const int64_t *const slot = slots.data<int64_t>() + first_row, *const index = rank_index.data<int64_t>();
    for (int64_t row = 0; row < rows; row++) {
        const float* const stored = gate_rows.data<float>() + slot[row] * width;
        for (int64_t r = 0; r < ranks; r++) weights[row * ranks + r] = stored[index[r]] * weight;
    }
}

// Softmax over `experts` logits at each of `sites` sites, with a temperature.
void softmax(const float* logits, int64_t sites, int64_t experts, float temperature, float* result) {
    const int64_t count = sites * experts;
    const Floats floats(count + kLanes);
    float* const powers = floats.data();
    for (int64_t site = 0; site < sites; site++) {
        const float* const own = logits + site * experts;
        const float maximum = *std::max_element(own, own + experts);
        for (int64_t e = 0; e < experts; e++) powers[site * experts + e] = (own[e] - maximum) / temperature;
    }
    std::fill_n(powers + count, kLanes, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec some = exponential(load(powers + i));
        std::memcpy(powers + i, &some, sizeof some);
    }
    for (int64_t first = 0; first < count; first += experts) {
        float total = 0;
        for (int64_t e = 0; e < experts; e++) total += powers[first + e];
        for (int64_t e = 0; e < experts; e++) result[first + e] = powers[first + e] / total;
    }
}

// A classifier: linears, optionally with ReLU between them.
struct Classifier {
    std::vector<Linear> linears;
    bool relu;

    // Whether its tensors fit together and map rows of `depth` floats to rows of `width`.
    bool is_sound(int64_t depth, int64_t width) const {
        for (const Linear& own : linears) {
            if (!own.is_sound() || own.depth() != depth) return false;
            depth = own.width();
        }
        return !linears.empty() && depth == width;
    }

    void run(const float* x, int64_t rows, float* logits) const {
        int64_t widest = 0;
        for (const Linear& own : linears) widest = std::max(widest, own.width());
        const Floats between(2 * rows * widest);
        for (size_t number = 0; number < linears.size(); number++) {
            const bool last = number + 1 == linears.size();
            float* const y = last ? logits : between.data() + number % 2 * rows * widest;
            linears[number].run(x, rows, y);
            if (relu && !last)
                for (int64_t i = 0; i < rows * linears[number].width(); i++) y[i] = std::max(y[i], 0.0f);
            x = y;
        }
    }
};

// Turns logits [rows, sites, experts] into scalings and stores them in `slots` of gate_rows; no temperature: no softmax.
void store_scalings(
    const float* logits, int64_t rows, std::optional<double> temperature, float* scalings, const Tensor& gate_rows,
    const int64_t* slots
) {
    const int64_t sites = gate_rows.size(1), experts = gate_rows.size(2), width = sites * experts;
    for (int64_t row = 0; row < rows; row++, logits += width, scalings += width) {
        if (temperature) {
            softmax(logits, sites, experts, float(*temperature), scalings);
        } else {
            std::copy_n(logits, width, scalings);
        }
        std::copy_n(scalings, width, gate_rows.data<float>() + slots[row] * width);
    }
}

// Computes h + D silu(U h + b) in place of h [rows, width].
void draft(const Linear& up, const Linear& down, int64_t rows, float* h) {
    const int64_t width = down.width();
    const Floats floats(rows * (width + up.width()));
    float* const between = floats.data() + rows * width;
    up.run(h, rows, between);
    silu(between, rows * up.width());
    down.run(between, rows, floats.data());
    for (int64_t i = 0; i < rows * width; i++) h[i] += floats[i];
}

}  // namespace

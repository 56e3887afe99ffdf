// Attention of rows that attend one by one, over keys and values read through the block table.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "floats.h"
#include "vectors.h"

namespace {

// The scores of `count` keys, logarithms to base 2, to weights: 2^(score - most), where `most` is the largest ever. Returns
// their sum. Up to a multiple of kLanes there are more, of which each adds 1e-38.
inline float to_weights(float* scores, int64_t count, float& most) {
    const float least = -std::numeric_limits<float>::infinity();
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(scores + count, scores + padded, least);
    Vec largest = Vec{} + most, total{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec some = load(scores + i);
        largest = some > largest ? some : largest;
    }
    most = largest_of(largest);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec weight = power_of_two(load(scores + i) - most);
        std::memcpy(scores + i, &weight, sizeof weight);
        total += weight;
    }
    return sum_of(total);
}

template <typename W>
struct Pool {  // [blocks, block_size, kv_heads, head_dim]
    const W* keys;
    const W* values;
    int64_t block_size, kv_heads, head_dim;
};

constexpr int64_t kTokens = 256;  // looked at together: their scores stay in the nearest cache
constexpr int64_t kFarBytes = 3 << 20;  // of one layer's keys and values: those of all are more than a cache holds
constexpr int64_t kTokensAhead = 32;  // how far keys are fetched before they are wanted, where they come from memory

// scores[h][i] = q[h] . key[i] for `count` keys, and for some more up to a multiple of kLanes. `far`: they come from memory,
// and so will the values, of which each block is a page; nothing else fetches the next one in time. There are keys up to
// count + kTokensAhead + kLanes, values up to count + kLanes.
template <int HEADS, typename W>
inline void score(
    const float* q, const W* const* keys, const W* const* values, int64_t offset, int64_t count, int64_t head_dim, bool far,
    float* scores
) {
    constexpr int kKeys = HEADS == 1 ? kLanes : kLanes / 2;
    for (int64_t first = 0; first < count; first += kKeys) {
        const W* const* const key = keys + first;
        if (far)
            for (int i = 0; i < kKeys; i++) {
                prefetch(key[i + kTokensAhead] + offset, head_dim);
                prefetch(values[first + i] + offset, head_dim);
            }
        Vec total[HEADS * kKeys];
        clear<HEADS * kKeys>(total);
        int64_t d = 0;
        for (; d + kLanes <= head_dim; d += kLanes) {
            Vec query[HEADS];
            for (int h = 0; h < HEADS; h++) query[h] = load(q + h * head_dim + d);
            for (int i = 0; i < kKeys; i++) {
                const Vec some = held(load(key[i] + offset + d));
                for (int h = 0; h < HEADS; h++) total[h * kKeys + i] += query[h] * some;
            }
        }
        float sum[HEADS * kKeys + kLanes];
        sums<HEADS * kKeys>(total, sum);
        for (; d < head_dim; d++)
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < kKeys; i++) sum[h * kKeys + i] += q[h * head_dim + d] * to_float(key[i][offset + d]);
        for (int h = 0; h < HEADS; h++) std::copy_n(sum + h * kKeys, kKeys, scores + h * kTokens + first);
    }
}

// out[h][0 .. VECTORS * kLanes] += sum over i of weights[h][i] * value[i], for HEADS heads at once.
template <int HEADS, int VECTORS, typename W>
inline void mix(const float* weights, const W* const* values, int64_t offset, int64_t d, int64_t count, float* out, int64_t out_stride) {
    constexpr int kAtOnce = HEADS * VECTORS > 6 ? 1 : 2;  // enough sums under way to hide how long one addition takes
    Vec total[kAtOnce][HEADS][VECTORS];
    clear<kAtOnce * HEADS * VECTORS>(&total[0][0][0]);
    int64_t i = 0;
    const auto add = [&](Vec (&own)[HEADS][VECTORS], int64_t number) {
        for (int v = 0; v < VECTORS; v++) {
            const Vec value = held(load(values[number] + offset + d + v * kLanes));
            for (int h = 0; h < HEADS; h++) own[h][v] += weights[h * kTokens + number] * value;
        }
    };
    for (; i + kAtOnce <= count; i += kAtOnce)
        for (int j = 0; j < kAtOnce; j++) add(total[j], i + j);
    if (i < count) add(total[0], i);
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS; v++) {
            float* const to = out + h * out_stride + d + v * kLanes;
            const Vec sum = load(to) + total[0][h][v] + (kAtOnce > 1 ? total[kAtOnce - 1][h][v] : Vec{});
            std::memcpy(to, &sum, sizeof sum);
        }
}

template <int HEADS, typename W>
inline void mix(const float* weights, const W* const* values, int64_t offset, int64_t count, int64_t head_dim, float* out) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) mix<HEADS, 4>(weights, values, offset, d, count, out, head_dim);
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) mix<HEADS, 2>(weights, values, offset, d, count, out, head_dim);
    for (; d + kLanes <= head_dim; d += kLanes) mix<HEADS, 1>(weights, values, offset, d, count, out, head_dim);
    for (; d < head_dim; d++)
        for (int h = 0; h < HEADS; h++)
            for (int64_t i = 0; i < count; i++) out[h * head_dim + d] += weights[h * kTokens + i] * to_float(values[i][offset + d]);
}

struct Scores {
    float scaling;
    int64_t window;  // 0: none
    float softcap;   // 0: none
};

// What some heads have seen so far of the keys and values: softmax as it goes (online).
struct Seen {
    const float* query;  // [heads, head_dim], scaled
    float* out;          // [heads, head_dim]: the values times their weights, which are 2^(score - largest)
    float* largest;      // [heads]
    float* total;        // [heads]: of the weights
    float* weights;      // [.., kTokens], to work in

    Seen from(int64_t head, int64_t head_dim) const {
        const int64_t first = head * head_dim;
        return {query + first, out + first, largest + head, total + head, weights};
    }
};

// HEADS heads see `count` more; keys and values are read once for all of them.
template <int HEADS, typename W>
void see(
    const Seen& seen, const W* const* keys, const W* const* values, int64_t offset, int64_t count, int64_t head_dim,
    float softcap, bool far
) {
    score<HEADS>(seen.query, keys, values, offset, count, head_dim, far, seen.weights);
    for (int64_t h = 0; h < HEADS; h++) {
        float* const own = seen.weights + h * kTokens;
        if (softcap > 0)
            for (int64_t i = 0; i < count; i++) own[i] = softcap * std::tanh(own[i] / softcap);
        const float before = seen.largest[h], sum = to_weights(own, count, seen.largest[h]);
        const float shrink = power_of_two(Vec{} + (before - seen.largest[h]))[0];
        seen.total[h] = seen.total[h] * shrink + sum;
        for (int64_t d = 0; d < head_dim; d++) seen.out[h * head_dim + d] *= shrink;
    }
    mix<HEADS>(seen.weights, values, offset, count, head_dim, seen.out);
}

// A row's query heads of `kv_heads` KV heads, `group` of each, over the keys begin .. position, so that any context is read
// once and needs no memory. `query` and `result` begin with the first of them, heads are `head_stride` and head_dim apart.
template <typename W>
void attend(
    const W* query, int64_t head_stride, const Pool<W>& pool, const int64_t* table, int64_t position, int64_t first_kv_head,
    int64_t kv_heads, int64_t group, const Scores& how, bool far, float* result
) {
    const int64_t head_dim = pool.head_dim, begin = how.window ? std::max<int64_t>(0, position - how.window + 1) : 0;
    const int64_t heads = kv_heads * group, stride = pool.kv_heads * head_dim;
    const Floats floats(heads * (2 * head_dim + 2) + group * kTokens);
    float* const q = floats.data();
    float* const out = q + heads * head_dim;
    float* const largest = out + heads * head_dim;
    float* const total = largest + heads;
    const Seen all{q, out, largest, total, total + heads};
    std::fill_n(out, heads * head_dim, 0.0f);
    std::fill_n(largest, heads, -std::numeric_limits<float>::max());
    std::fill_n(total, heads, 0.0f);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < head_dim; d++) q[h * head_dim + d] = to_float(query[h * head_stride + d]) * (how.scaling * kLog2E);
    const W *keys[kTokens + kTokensAhead + kLanes], *values[kTokens + kTokensAhead + kLanes];
    for (int64_t start = begin; start <= position; start += kTokens) {
        const int64_t count = std::min(kTokens, position + 1 - start);
        const int64_t known = std::min(kTokens + kTokensAhead, position + 1 - start);
        for (int64_t i = 0; i < known;) {  // block by block
            const int64_t block = table[(start + i) / pool.block_size], inside = (start + i) % pool.block_size;
            const int64_t end = std::min(known, i + pool.block_size - inside);
            int64_t at = (block * pool.block_size + inside) * stride + first_kv_head * head_dim;
            for (; i < end; i++, at += stride) keys[i] = pool.keys + at, values[i] = pool.values + at;
        }
        std::fill(keys + known, keys + count + kTokensAhead + kLanes, keys[known - 1]);
        std::fill(values + known, values + count + kTokensAhead + kLanes, values[known - 1]);
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            const Seen own = all.from(kv_head * group, head_dim);
            const int64_t offset = kv_head * head_dim;
            const auto look = [&](auto heads_at_once, int64_t h) {
                see<heads_at_once>(own.from(h, head_dim), keys, values, offset, count, head_dim, how.softcap * kLog2E, far && h == 0);
            };
            int64_t h = 0;
            for (; h + 3 <= group && group - h != 4; h += 3) look(std::integral_constant<int, 3>(), h);
            for (; h + 2 <= group; h += 2) look(std::integral_constant<int, 2>(), h);
            if (h < group) look(std::integral_constant<int, 1>(), h);
        }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < head_dim; d++)
            result[h * head_dim + d] = out[h * head_dim + d] / total[h];
}

}  // namespace

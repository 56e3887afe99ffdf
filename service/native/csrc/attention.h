// Attention over the paged KV cache: keys and values are read in place, through the block table.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "floats.h"
#include "vectors.h"

namespace {

// Turns the scores of `count` keys, logarithms to base 2, into weights 2^(score - maximum), after raising `maximum` to the
// largest of them. Returns their sum. Padding up to a multiple of kLanes adds 1e-38 each.
inline float to_weights(float* scores, int64_t count, float& maximum) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(scores + count, scores + padded, lowest);
    Vec largest = Vec{} + maximum, total{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec some = load(scores + i);
        largest = some > largest ? some : largest;
    }
    maximum = largest_of(largest);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec weight = power_of_two(load(scores + i) - maximum);
        std::memcpy(scores + i, &weight, sizeof weight);
        total += weight;
    }
    return sum_of(total);
}

struct Pool {  // [blocks, block_size, kv_heads, head_dim]
    const float* keys;
    const float* values;
    int64_t block_size, kv_heads, head_dim;
};

constexpr int64_t kTokens = 256;  // per pass, so that their scores stay in the L1 cache
constexpr int64_t kFarBytes = 3 << 20;  // from this size on, a layer's keys and values are taken to come from memory
constexpr int64_t kTokensAhead = 32;  // prefetch distance of keys from memory

// scores[h][i] = q[h] . key[i] for `count` keys, and for padding up to a multiple of kLanes. `far`: keys and values come from
// memory, and are prefetched here, because hardware prefetching ends at a page, which a block fills. There are pointers to
// keys up to count + kTokensAhead + kLanes, to values up to count + kLanes.
template <int HEADS>
inline void score(
    const float* q, const float* const* keys, const float* const* values, int64_t offset, int64_t count, int64_t head_dim, bool far,
    float* scores
) {
    constexpr int kKeys = HEADS == 1 ? kLanes : kLanes / 2;
    for (int64_t first = 0; first < count; first += kKeys) {
        const float* const* const key = keys + first;
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
                for (int i = 0; i < kKeys; i++) sum[h * kKeys + i] += q[h * head_dim + d] * key[i][offset + d];
        for (int h = 0; h < HEADS; h++) std::copy_n(sum + h * kKeys, kKeys, scores + h * kTokens + first);
    }
}

// out[h][0 .. VECTORS * kLanes] += sum over i of weights[h][i] * value[i], for HEADS heads at once.
template <int HEADS, int VECTORS>
inline void mix(const float* weights, const float* const* values, int64_t offset, int64_t d, int64_t count, float* out, int64_t out_stride) {
    constexpr int kAtOnce = HEADS * VECTORS > 6 ? 1 : 2;  // enough independent sums to hide the latency of additions
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

template <int HEADS>
inline void mix(const float* weights, const float* const* values, int64_t offset, int64_t count, int64_t head_dim, float* out) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) mix<HEADS, 4>(weights, values, offset, d, count, out, head_dim);
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) mix<HEADS, 2>(weights, values, offset, d, count, out, head_dim);
    for (; d + kLanes <= head_dim; d += kLanes) mix<HEADS, 1>(weights, values, offset, d, count, out, head_dim);
    for (; d < head_dim; d++)
        for (int h = 0; h < HEADS; h++)
            for (int64_t i = 0; i < count; i++) out[h * head_dim + d] += weights[h * kTokens + i] * values[i][offset + d];
}

struct Scores {
    float scaling;
    int64_t window;  // 0: none
};

// The state of an online softmax: the keys and values that some heads have attended to so far.
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

// HEADS heads attend to `count` more keys; keys and values are read once for all heads.
template <int HEADS>
void see(
    const Seen& seen, const float* const* keys, const float* const* values, int64_t offset, int64_t count, int64_t head_dim,
    bool far
) {
    score<HEADS>(seen.query, keys, values, offset, count, head_dim, far, seen.weights);
    for (int64_t h = 0; h < HEADS; h++) {
        float* const own = seen.weights + h * kTokens;
        const float before = seen.largest[h], sum = to_weights(own, count, seen.largest[h]);
        const float shrink = power_of_two(Vec{} + (before - seen.largest[h]))[0];
        seen.total[h] = seen.total[h] * shrink + sum;
        for (int64_t d = 0; d < head_dim; d++) seen.out[h * head_dim + d] *= shrink;
    }
    mix<HEADS>(seen.weights, values, offset, count, head_dim, seen.out);
}

// Consecutive positions of one stream, whose rows of the batch are consecutive as well, so that they read the same keys.
struct Span {
    const int64_t* table;  // its blocks
    int64_t row, rows, position;
};

// Attention of a span to some KV heads, with `group` query heads each. Its state is [kv_heads][rows][group].
class Attention {
public:
    // `kv_heads` KV heads, from `first` on.
    Attention(const Pool& pool, const Span& span, int64_t first, int64_t kv_heads, int64_t group, bool far)
        : pool_(pool), span_(span), first_(first), kv_heads_(kv_heads), group_(group), far_(far),
          floats_(count() * (2 * pool.head_dim + 2) + kMaxHeads * kTokens) {
        float* const out = floats_.data() + count() * pool.head_dim;
        float* const largest = out + count() * pool.head_dim;
        float* const total = largest + count();
        all_ = {floats_.data(), out, largest, total, total + count()};
        std::fill_n(out, count() * pool.head_dim, 0.0f);
        std::fill_n(largest, count(), -std::numeric_limits<float>::max());
        std::fill_n(total, count(), 0.0f);
    }

    // query and result: [rows, kv_heads * group, head_dim], rows `stride` floats apart. Every row attends to the keys up to its
    // own position that are inside the window. Keys that all rows attend to are read once for all rows.
    void run(const float* query, int64_t query_stride, const Scores& how, float* result, int64_t result_stride) {
        const int64_t head_dim = pool_.head_dim, last = span_.position + span_.rows - 1;
        const auto begin = [&](int64_t position) { return how.window ? std::max<int64_t>(0, position + 1 - how.window) : 0; };
        const auto each = [&](const auto& visit) {
            for (int64_t row = 0; row < span_.rows; row++)
                for (int64_t head = 0; head < kv_heads_ * group_; head++)
                    visit(number(head / group_, row) + head % group_, row, head * head_dim);
        };
        each([&](int64_t own, int64_t row, int64_t at) {
            for (int64_t d = 0; d < head_dim; d++)
                floats_[own * head_dim + d] = query[row * query_stride + at + d] * (how.scaling * kLog2E);
        });
        // Keys of a single pass stay in the cache, so there every row attends alone, and sums in the order of a single row.
        const int64_t from = begin(last), to = last < kTokens ? from : std::max(from, span_.position + 1);
        for (int64_t row = 0; row < span_.rows; row++) look(begin(span_.position + row), std::min(from, span_.position + row + 1), row, 1);
        look(from, to, 0, span_.rows);
        for (int64_t row = 0; row < span_.rows; row++) look(to, span_.position + row + 1, row, 1);
        each([&](int64_t own, int64_t row, int64_t at) {
            for (int64_t d = 0; d < head_dim; d++)
                result[row * result_stride + at + d] = all_.out[own * head_dim + d] / all_.total[own];
        });
    }

private:
    static constexpr int64_t kMaxHeads = 3;  // query heads per pass: limited by the registers for their sums

    int64_t count() const { return kv_heads_ * span_.rows * group_; }
    int64_t number(int64_t kv_head, int64_t row) const { return (kv_head * span_.rows + row) * group_; }

    // `rows` rows from `row` on attend to the keys begin .. end - 1.
    void look(int64_t begin, int64_t end, int64_t row, int64_t rows) {
        const int64_t stride = pool_.kv_heads * pool_.head_dim;
        for (int64_t start = begin; start < end; start += kTokens) {
            const int64_t count = std::min(kTokens, end - start), known = std::min(kTokens + kTokensAhead, end - start);
            for (int64_t i = 0; i < known;) {  // block by block
                const int64_t block = span_.table[(start + i) / pool_.block_size], inside = (start + i) % pool_.block_size;
                const int64_t stop = std::min(known, i + pool_.block_size - inside);
                int64_t at = (block * pool_.block_size + inside) * stride + first_ * pool_.head_dim;
                for (; i < stop; i++, at += stride) keys_[i] = pool_.keys + at, values_[i] = pool_.values + at;
            }
            std::fill(keys_ + known, keys_ + count + kTokensAhead + kLanes, keys_[known - 1]);
            std::fill(values_ + known, values_ + count + kTokensAhead + kLanes, values_[known - 1]);
            for (int64_t kv_head = 0; kv_head < kv_heads_; kv_head++) look_at(kv_head, count, number(kv_head, row), rows * group_);
        }
    }

    // `heads` query heads from `first` on attend to `count` keys of a KV head.
    void look_at(int64_t kv_head, int64_t count, int64_t first, int64_t heads) {
        const int64_t head_dim = pool_.head_dim;
        const auto together = [&](auto heads_at_once, int64_t h) {
            see<heads_at_once>(all_.from(first + h, head_dim), keys_, values_, kv_head * head_dim, count, head_dim, far_ && h == 0);
        };
        int64_t h = 0;
        for (; h + 3 <= heads && heads - h != 4; h += 3) together(std::integral_constant<int, 3>(), h);
        for (; h + 2 <= heads; h += 2) together(std::integral_constant<int, 2>(), h);
        if (h < heads) together(std::integral_constant<int, 1>(), h);
    }

    const Pool pool_;
    const Span span_;
    const int64_t first_, kv_heads_, group_;
    const bool far_;
    const Floats floats_;
    Seen all_;
    const float *keys_[kTokens + kTokensAhead + kLanes], *values_[kTokens + kTokensAhead + kLanes];
};

}  // namespace

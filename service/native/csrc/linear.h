// Adapted linears: y = W x + b, and for rows from first_row on + B ((A x) * g).
//
// Weights are read in place, and may be bfloat16; x and all sums are float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "chunks.h"
#include "floats.h"
#include "vectors.h"

namespace {

constexpr int64_t kChunk = 48;  // outputs per chunk, so that their weights stay in the L1 cache for all rows
constexpr int64_t kPairs = 2 * kLanes;
constexpr int64_t kFarAhead = 2048;  // floats: the prefetch distance of large weights

// x in the order that weights W need, in `copy` unless it is x itself. bfloat16 is upcast two at a time, by shifting or masking
// a word. So of every kPairs elements of a row, those at even indices come first, then those at odd ones.
template <typename W>
const float* operand(const float* x, int64_t rows, int64_t depth, float* copy) {
    if constexpr (std::is_same_v<W, float>) {
        return x;
    } else {
        const int64_t paired = depth / kPairs * kPairs;
        for (int64_t row = 0; row < rows; row++) {
            const float* const from = x + row * depth;
            float* const to = copy + row * depth;
            for (int64_t k = 0; k < paired; k += kPairs) {
                const Vec first = load(from + k), second = load(from + k + kLanes);
                const Vec even = evens(first, second), odd = odds(first, second);
                std::memcpy(to + k, &even, sizeof even);
                std::memcpy(to + k + kLanes, &odd, sizeof odd);
            }
            for (int64_t k = paired; k < depth; k++) to[k] = from[k];
        }
        return copy;
    }
}

// A matrix whose rows are `stride` elements apart.
template <typename W>
struct Rows {
    const W* data;
    int64_t stride;

    const W* at(int64_t row, int64_t k) const { return data + row * stride + k; }
};

// Whether weights are prefetched, and from where. From memory they are fetched to the L2 cache: in L1 they would be evicted
// before they are used.
enum Ahead { kNothing, kFromCache, kFromMemory, kNextTile };

template <Ahead AHEAD>
inline void fetch_ahead(const void* numbers) {
    if constexpr (AHEAD == kFromCache) __builtin_prefetch(numbers);
    if constexpr (AHEAD == kFromMemory) __builtin_prefetch(numbers, 0, 2);
}

// Prefetches the same elements of the next tile, `next` elements on, while all rows of this one are multiplied.
template <Ahead AHEAD, typename W>
inline void fetch_tile(const W* numbers, int64_t next) {
    if constexpr (AHEAD == kNextTile) __builtin_prefetch(numbers + next, 0, 2);
}

// out[m][n] = the sum of total[m * COLUMNS + n], plus x[m] . w[n] from k on; with `more`, it is added to `out`.
template <int ROWS, int COLUMNS, typename W>
inline void sum_up(
    const Vec (&total)[ROWS * COLUMNS], const Rows<float>& x, const Rows<W>& w, int64_t k, int64_t depth, bool more, float* out
) {
    float sum[ROWS * COLUMNS + kLanes];
    sums<ROWS * COLUMNS>(total, sum);
    for (; k < depth; k++)
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < COLUMNS; n++)
                sum[m * COLUMNS + n] = std::fma(*x.at(m, k), to_float(*w.at(n, k)), sum[m * COLUMNS + n]);
    for (int m = 0; m < ROWS; m++) {
        float* const own = sum + m * COLUMNS;
        if (more)
            for (int n = 0; n < COLUMNS; n++) own[n] += out[m * kChunk + n];
        std::memcpy(out + m * kChunk, own, COLUMNS * sizeof(float));
    }
}

// out[m][n] = x[m] . w[n] for ROWS rows and COLUMNS outputs, with an accumulator in a register for each. AHEAD: prefetches the
// weights of the next COLUMNS outputs, in memory order.
template <int ROWS, int COLUMNS, Ahead AHEAD>
inline void dots(const Rows<float>& x, const Rows<float>& w, int64_t depth, int64_t next, bool more, float* out) {
    Vec total[ROWS * COLUMNS];
    clear<ROWS * COLUMNS>(total);
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        if constexpr (ROWS <= COLUMNS) {  // the smaller operand is held in registers
            Vec rows[ROWS];
            for (int m = 0; m < ROWS; m++) rows[m] = load(x.at(m, k));
            for (int n = 0; n < COLUMNS; n++) {
                fetch_ahead<AHEAD>(w.data + COLUMNS * (w.stride + k) + n * kLanes);
                fetch_tile<AHEAD>(w.at(n, k), next);
                const Vec weight = held(load(w.at(n, k)));
                for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += rows[m] * weight;
            }
        } else {
            Vec weights[COLUMNS];
            for (int n = 0; n < COLUMNS; n++) {
                fetch_tile<AHEAD>(w.at(n, k), next);
                weights[n] = load(w.at(n, k));
            }
            for (int m = 0; m < ROWS; m++) {
                const Vec row = held(load(x.at(m, k)));
                for (int n = 0; n < COLUMNS; n++) total[m * COLUMNS + n] += row * weights[n];
            }
        }
    }
    sum_up<ROWS, COLUMNS>(total, x, w, k, depth, more, out);
}

template <int ROWS, int COLUMNS, Ahead AHEAD>
inline void dots(const Rows<float>& x, const Rows<bfloat16>& w, int64_t depth, int64_t next, bool more, float* out) {
    Vec total[ROWS * COLUMNS];
    clear<ROWS * COLUMNS>(total);
    int64_t k = 0;
    for (; k + kPairs <= depth; k += kPairs) {
        Vec even[ROWS], odd[ROWS];
        for (int m = 0; m < ROWS; m++) {
            even[m] = load(x.at(m, k));
            odd[m] = load(x.at(m, k + kLanes));
        }
        for (int n = 0; n < COLUMNS; n++) {
            fetch_ahead<AHEAD>(w.data + COLUMNS * (w.stride + k) + n * kPairs);
            fetch_tile<AHEAD>(w.at(n, k), next);
            IntVec words;
            std::memcpy(&words, w.at(n, k), sizeof words);
            const Vec low = (Vec)(words << 16), high = (Vec)(words & int32_t(0xffff0000));
            for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += even[m] * low;
            for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += odd[m] * high;
        }
    }
    sum_up<ROWS, COLUMNS>(total, x, w, k, depth, more, out);
}

template <int ROWS, int COLUMNS, Ahead AHEAD, typename W>
inline void dots_of_chunk(
    const Rows<float>& x, const Rows<W>& w, int64_t depth, int64_t count, int64_t next, bool more, float* out
) {
    int64_t n = 0;
    const auto from = [&](int64_t output) { return Rows<W>{w.at(output, 0), w.stride}; };
    for (; n + COLUMNS <= count; n += COLUMNS) dots<ROWS, COLUMNS, AHEAD>(x, from(n), depth, next, more, out + n);
    for (; n < count; n++) dots<ROWS, 1, AHEAD>(x, from(n), depth, next, more, out + n);
}

// The number of outputs that are computed together for `rows` of x: limited by the sums that one reduction takes, and by the
// registers, of which x, weights and upcasting need some.
template <typename W>
constexpr int columns_for(int rows) {
    constexpr bool kPaired = !std::is_same_v<W, float>;
    constexpr int kMany[] = {16, 8, 4, kPaired ? 4 : 6}, kFew[] = {12, 6, 4, 3}, kFewPaired[] = {6, 4, 3, 2};
    return (kManyRegisters ? kMany : kPaired ? kFewPaired : kFew)[rows - 1];
}

// Outputs whose weights stay in the L1 cache while all rows are multiplied: a multiple of columns_for(4).
template <typename W>
constexpr int kTile = kManyRegisters && !std::is_same_v<W, float> ? 16 : 12;

// Whether a weight of this many elements is taken to come from memory.
template <typename W>
bool is_far(int64_t numbers) {
    return numbers * int64_t(sizeof(W)) > 2 << 20;
}

// Like dots_of_chunk, for weights from memory: reads them in memory order, output by output. For bfloat16 it is no faster.
template <int ROWS>
void dots_in_line(const float* x, int64_t stride, const float* w, int64_t depth, int64_t count, float* out) {
    constexpr int kSteps = 4;  // enough independent sums to hide the latency of additions
    for (int64_t n = 0; n < count; n++, w += depth, out++) {
        Vec total[ROWS * kSteps];
        for (Vec& own : total) own = Vec{};
        int64_t k = 0;
        for (; k + kSteps * kLanes <= depth; k += kSteps * kLanes)
            for (int i = 0; i < kSteps; i++) {
                __builtin_prefetch(w + k + i * kLanes + kFarAhead);
                const Vec weight = load(w + k + i * kLanes);
                for (int m = 0; m < ROWS; m++) total[m * kSteps + i] += load(x + m * stride + k + i * kLanes) * weight;
            }
        for (; k + kLanes <= depth; k += kLanes) {
            const Vec weight = load(w + k);
            for (int m = 0; m < ROWS; m++) total[m * kSteps] += load(x + m * stride + k) * weight;
        }
        for (int m = 0; m < ROWS; m++) {
            Vec sum{};
            for (int i = 0; i < kSteps; i++) sum += total[m * kSteps + i];
            float value = sum_of(sum);
            for (int64_t rest = k; rest < depth; rest++) value = std::fma(x[m * stride + rest], w[rest], value);
            out[m * kChunk] = value;
        }
    }
}

// Computes `count` outputs of ROWS rows. `next`: the distance of the next tile.
template <int ROWS, Ahead AHEAD, typename W>
void tile(const Rows<float>& x, const Rows<W>& w, int64_t depth, int64_t count, bool more, float* out, int64_t next = 0) {
    constexpr int kColumns = columns_for<W>(ROWS);
    if (count >= kColumns) {
        dots_of_chunk<ROWS, kColumns, AHEAD>(x, w, depth, count, next, more, out);
    } else {
        dots_of_chunk<ROWS, std::min(kColumns, kTile<W> / 2), AHEAD>(x, w, depth, count, next, more, out);
    }
}

constexpr int64_t kMinUpcastRows = 16;  // from this many rows on, weights are upcast once for all rows
constexpr int64_t kDepth = 1024;        // inputs per pass over many rows, so that a tile stays in the cache

// `depth` elements of `count` rows of w as floats, in the order of `operand`. `far`: prefetches the next rows.
inline void upcast_weights(const Rows<bfloat16>& w, int64_t count, int64_t depth, bool far, float* floats_of_tile) {
    const int64_t paired = depth / kPairs * kPairs;
    for (int64_t n = 0; n < count; n++, floats_of_tile += depth) {
        for (int64_t k = 0; k < paired; k += kPairs) {
            IntVec words;
            std::memcpy(&words, w.at(n, k), sizeof words);
            if (far) __builtin_prefetch(w.at(n + count, k));
            const IntVec low = words << 16, high = words & int32_t(0xffff0000);
            std::memcpy(floats_of_tile + k, &low, sizeof low);
            std::memcpy(floats_of_tile + k + kLanes, &high, sizeof high);
        }
        for (int64_t k = paired; k < depth; k++) floats_of_tile[k] = to_float(*w.at(n, k));
    }
}

// out [rows][kChunk] = x [rows, depth] times `count` rows of w, four rows of x at a time. `far`: the first four prefetch the next tile.
template <typename W>
void multiply_tile(
    const Rows<float>& x, int64_t rows, const Rows<W>& w, int64_t depth, int64_t count, bool far, bool more, float* out
) {
    int64_t m = 0;
    const auto rest = [&] { return Rows<float>{x.at(m, 0), x.stride}; };
    if (far && rows >= 4) {
        tile<4, kNextTile>(x, w, depth, count, more, out, count * w.stride);
        m = 4;
    }
    for (; m + 4 <= rows; m += 4) tile<4, kNothing>(rest(), w, depth, count, more, out + m * kChunk);
    float* const last = out + m * kChunk;
    if (rows - m == 3) tile<3, kNothing>(rest(), w, depth, count, more, last);
    if (rows - m == 2) tile<2, kNothing>(rest(), w, depth, count, more, last);
    if (rows - m == 1) tile<1, kNothing>(rest(), w, depth, count, more, last);
}

// out [rows][kChunk] = x [rows, depth], in the order of `operand`, times `count` rows of w. Weights from memory are prefetched.
template <typename W>
void multiply(const float* x, int64_t rows, int64_t depth, const W* w, int64_t count, bool far, float* out) {
    if constexpr (std::is_same_v<W, float>) {
        if (far && rows == 1) return dots_in_line<1>(x, depth, w, depth, count, out);
        if (far && rows == 2) return dots_in_line<2>(x, depth, w, depth, count, out);
    }
    const Rows<float> all{x, depth};
    const Rows<W> whole{w, depth};
    const auto few = [&](auto ahead) {
        constexpr Ahead kAhead = decltype(ahead)::value;
        if (rows == 1) tile<1, kAhead>(all, whole, depth, count, false, out);
        if (rows == 2) tile<2, kAhead>(all, whole, depth, count, false, out);
        if (rows == 3) tile<3, kAhead>(all, whole, depth, count, false, out);
        if (rows == 4) tile<4, kAhead>(all, whole, depth, count, false, out);
    };
    if (rows <= 4 && far) return few(std::integral_constant<Ahead, kFromMemory>());
    if (rows <= 4) return few(std::integral_constant<Ahead, kFromCache>());
    // with more than four rows, the weights are read several times
    constexpr bool kUpcasts = !std::is_same_v<W, float>;
    const bool upcasts = kUpcasts && rows >= kMinUpcastRows;
    const int64_t tile_outputs = (upcasts ? kTile<float> : kTile<W>) / (depth > kDepth / 2 ? 2 : 1);
    const Floats floats_of_tile(upcasts ? tile_outputs * kDepth : 0);
    for (int64_t start = 0; start < depth; start += kDepth) {
        const int64_t part = std::min(kDepth, depth - start);
        const Rows<float> numbers{x + start, depth};
        for (int64_t first = 0; first < count; first += tile_outputs) {
            const int64_t some = std::min(tile_outputs, count - first);
            const Rows<W> weights{w + first * depth + start, depth};
            if constexpr (kUpcasts) {
                if (upcasts) {
                    upcast_weights(weights, some, part, far, floats_of_tile.data());
                    multiply_tile(numbers, rows, Rows<float>{floats_of_tile.data(), part}, part, some, false, start > 0, out + first);
                    continue;
                }
            }
            multiply_tile(numbers, rows, weights, part, some, far, start > 0, out + first);
        }
    }
}

// (A x) * g of the rows that experts act on, [rows, rank], rows `stride` apart.
struct LowRank {
    const float* data;
    int64_t stride, rank;
};

constexpr int64_t kRanksAhead = 8;  // the prefetch distance of B from memory

// out [ROWS][VECTORS * kLanes], rows `out_stride` apart, += the rows of `low_rank` times columns of b [rank, stride].
template <int ROWS, int VECTORS, bool FAR, typename W>
inline void add_experts(const LowRank& low_rank, const W* b, int64_t stride, float* out, int64_t out_stride) {
    constexpr int kRanks = std::clamp(12 / (ROWS * VECTORS), 1, 4);  // at once, to hide the latency of additions
    Vec total[kRanks][ROWS][VECTORS];
    for (auto& own : total)
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < VECTORS; v++) own[m][v] = Vec{};
    const auto add = [&](Vec (&own)[ROWS][VECTORS], int64_t r) {
        if (FAR && r + kRanksAhead < low_rank.rank) prefetch(b + (r + kRanksAhead) * stride, VECTORS * kLanes);
        for (int v = 0; v < VECTORS; v++) {
            const Vec weight = load(b + r * stride + v * kLanes);
            for (int m = 0; m < ROWS; m++) own[m][v] += low_rank.data[m * low_rank.stride + r] * weight;
        }
    };
    int64_t r = 0;
    for (; r + kRanks <= low_rank.rank; r += kRanks)
        for (int i = 0; i < kRanks; i++) add(total[i], r + i);
    for (; r < low_rank.rank; r++) add(total[0], r);
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) {
            float* const to = out + m * out_stride + v * kLanes;
            Vec sum = load(to);
            for (int i = 0; i < kRanks; i++) sum += total[i][m][v];
            std::memcpy(to, &sum, sizeof sum);
        }
}

// The same for `count` columns, VECTORS at a time.
template <int ROWS, int VECTORS, bool FAR, typename W>
void add_experts_to(const LowRank& low_rank, const W* b, int64_t stride, int64_t count, float* out, int64_t out_stride) {
    int64_t n = 0;
    const auto some = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (; n + kVectors * kLanes <= count; n += kVectors * kLanes)
            add_experts<ROWS, kVectors, FAR>(low_rank, b + n, stride, out + n, out_stride);
    };
    some(std::integral_constant<int, VECTORS>());
    some(std::integral_constant<int, 1>());
    for (; n < count; n++)
        for (int m = 0; m < ROWS; m++)
            for (int64_t r = 0; r < low_rank.rank; r++)
                out[m * out_stride + n] =
                    std::fma(low_rank.data[m * low_rank.stride + r], to_float(b[r * stride + n]), out[m * out_stride + n]);
}

// B from memory is read in panels of columns, as wide as the registers allow, so that reads are long.
constexpr int kPanelVectors = kManyRegisters ? 24 : 12;
constexpr int64_t kChunksOfPanel = kPanelVectors * kLanes / kChunk, kPanel = kChunksOfPanel * kChunk;
constexpr int64_t kFewGated = 2;  // panels pay for up to this many rows that experts act on

template <typename E>
struct Experts {
    const E* a;         // [rank, depth]
    const E* b_t;       // [rank, width]
    const float* gate;  // [rows - first_row, rank], rows `gate_stride` apart
    int64_t rank, gate_stride, first_row;
};

constexpr int64_t kProductsPerFar = 32;  // products in the time that one element takes to come from memory
constexpr int64_t kRankChunk = 16;       // ranks per chunk, few because there are few ranks

// x [rows, depth], weight [width, depth], bias [width] or null -> y [rows, width]. `keep` returns the owners of weights and
// experts (see Helpers::share).
template <typename W, typename E, typename Keep>
void linear(
    const float* x, const W* weight, const float* bias, const Experts<E>& experts, int64_t rows, int64_t depth, int64_t width,
    const Keep& keep, float* y
) {
    constexpr bool kCopies = !std::is_same_v<W, float>, kCopiesForExperts = !std::is_same_v<E, float> && !kCopies;
    const bool far = is_far<W>(depth * width);
    const int64_t effort = far ? std::max(rows, kProductsPerFar) : rows;  // in products, per element of a weight
    const bool is_shared = is_worth_sharing(effort * depth * width);
    const bool is_low_rank_shared = is_worth_sharing(effort * depth * experts.rank);
    const bool keeps_x = !kCopies && (is_shared || is_low_rank_shared);  // a late helper may read x after this call
    const Floats copies(kCopies || kCopiesForExperts ? rows * depth : 0), kept(keeps_x ? rows * depth : 0);
    const float* floats = operand<W>(x, rows, depth, copies.data());
    if (keeps_x) {
        std::copy_n(floats, rows * depth, kept.data());
        floats = kept.data();
    }
    const float* const for_experts = std::is_same_v<W, E> ? floats : operand<E>(x, rows, depth, copies.data());
    const int64_t rank = experts.rank, first_row = experts.first_row, gated = rank ? rows - first_row : 0;
    const Floats products(gated * rank);
    float* const low_rank = products.data();
    if (gated) {
        const auto compute = [=, a = experts.a](int64_t chunk, float* block) {
            const int64_t first = chunk * kRankChunk, count = std::min(kRankChunk, rank - first);
            multiply(for_experts + first_row * depth, gated, depth, a + first * depth, count, far, block);
        };
        const auto place = [&](int64_t chunk, const float* block) {
            const int64_t first = chunk * kRankChunk, count = std::min(kRankChunk, rank - first);
            for (int64_t m = 0; m < gated; m++)
                for (int64_t r = 0; r < count; r++)
                    low_rank[m * rank + first + r] = block[m * kChunk + r] * experts.gate[m * experts.gate_stride + first + r];
        };
        in_chunks(is_low_rank_shared, (rank + kRankChunk - 1) / kRankChunk, gated * kChunk, compute, place, keep);
    }
    const bool in_panels = far && gated > 0 && gated <= kFewGated;
    const int64_t together = in_panels ? kChunksOfPanel : 1, outputs = together * kChunk;  // chunks and outputs of a task
    const auto compute = [=, all_b_t = experts.b_t](int64_t task, float* blocks) {
        const int64_t start = task * outputs, end = std::min(start + outputs, width);
        float panels[kFewGated][kPanel];
        for (int64_t m = 0; in_panels && m < gated; m++) {
            std::fill_n(panels[m], kPanel, 0.0f);
            const LowRank own{low_rank + m * rank, rank, rank};
            add_experts_to<1, kPanelVectors, true>(own, all_b_t + start, width, end - start, panels[m], kPanel);
        }
        for (int64_t first = start; first < end; first += kChunk) {
            const int64_t count = std::min(kChunk, end - first), offset = first - start;
            const E* const b_t = all_b_t + first;
            float* const block = blocks + offset * rows;
            if (gated && !in_panels)  // too little of each row of B for hardware prefetching
                for (int64_t r = 0; r < rank; r++) prefetch(b_t + r * width, count);
            multiply(floats, rows, depth, weight + first * depth, count, far, block);
            float* const own = block + first_row * kChunk;
            for (int64_t m = 0; in_panels && m < gated; m++)
                for (int64_t n = 0; n < count; n++) own[m * kChunk + n] += panels[m][offset + n];
            if (in_panels) continue;
            constexpr int kVectors = kChunk / kLanes;
            LowRank some{low_rank, rank, rank};
            int64_t m = 0;
            for (; m + 2 <= gated; m += 2, some.data += 2 * rank)
                add_experts_to<2, kVectors, false>(some, b_t, width, count, own + m * kChunk, kChunk);
            if (m < gated) add_experts_to<1, kVectors, false>(some, b_t, width, count, own + m * kChunk, kChunk);
        }
    };
    const auto place = [&](int64_t task, const float* blocks) {
        const int64_t start = task * outputs, end = std::min(start + outputs, width);
        for (int64_t first = start; first < end; first += kChunk) {
            const int64_t count = std::min(kChunk, end - first);
            const float* const block = blocks + (first - start) * rows;
            for (int64_t row = 0; row < rows; row++)
                for (int64_t n = 0; n < count; n++)
                    y[row * width + first + n] = block[row * kChunk + n] + (bias ? bias[first + n] : 0.0f);
        }
    };
    in_chunks(is_shared, (width + outputs - 1) / outputs, rows * outputs, compute, place, keep);
}

}  // namespace

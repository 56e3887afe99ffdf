// The operations where a step spends its time on a CPU, for rows that attend one by one: adapted linears, rotations, paged attention,
// norms, layers made of these, gate and classifier.
//
// Written for g++ and clang++ with their vector extensions, so for any instruction set that the compiler knows; one
// intrinsic stands where g++ does badly. Everything is read where it lies: weights as the model stores them, keys and values
// through the block table. Storage is float or bfloat16, arithmetic is float; weights may be narrower than what they are
// multiplied with.
//
// The functions at the end are what torch calls: compiled steps by the names and types of AOTInductor's C interface (C
// shim), eager ones through the dispatcher. decode_kernels.py declares the operators and says what they compute.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "helpers.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr bool kManyRegisters = true;  // 32 of them
#else
constexpr int64_t kLanes = 8;
constexpr bool kManyRegisters = false;
#endif
constexpr int64_t kMostDims = 4;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* to, float value) { *to = value; }

inline void store(bfloat16* to, float value) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Vec load(const bfloat16* from) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
#if defined(__AVX512F__)  // g++ makes six instructions of the conversion below
    const IntVec bits = (IntVec)_mm512_cvtepu16_epi32((__m256i)words) << 16;
#else
    const IntVec bits = __builtin_convertvector(words, IntVec) << 16;
#endif
    return (Vec)bits;
}

// The same, in a register: g++ would read it again for every product.
inline Vec held(Vec value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#endif
    return value;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// Of a and b, one after the other: the sums of neighbouring numbers within every four, and of neighbouring fours.
// `evens` and `odds` take the numbers at even and at odd places.
#if defined(__AVX512F__)
inline Vec add_neighbours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
        SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

inline Vec add_neighbouring_fours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

inline Vec evens(Vec a, Vec b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline Vec odds(Vec a, Vec b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#else
inline Vec add_neighbours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

inline Vec add_neighbouring_fours(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

inline Vec evens(Vec a, Vec b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
inline Vec odds(Vec a, Vec b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#endif

// Of every four lanes, the sums of a's, b's, c's and d's.
inline Vec sums_of_fours(Vec a, Vec b, Vec c, Vec d) { return add_neighbours(add_neighbours(a, b), add_neighbours(c, d)); }

// The sums of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec all = sums_of_fours(a, b, c, d);
    Quad fours[kLanes / 4];
    std::memcpy(fours, &all, sizeof all);
    Quad sum = fours[0];
    for (int i = 1; i < kLanes / 4; i++) sum += fours[i];
    return sum;
}

inline float sum_of(Vec a) { return sums(a, Vec{}, Vec{}, Vec{})[0]; }

inline float largest_of(Vec a) {
    Quad fours[kLanes / 4];
    std::memcpy(fours, &a, sizeof a);
    Quad most = fours[0];
    for (int i = 1; i < kLanes / 4; i++) most = fours[i] > most ? fours[i] : most;
    return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// The sums of as many vectors as one has lanes.
inline Vec sums_of_lanes(const Vec* all) {
    Vec fours[kLanes / 4];
    for (int i = 0; i < kLanes / 4; i++) fours[i] = sums_of_fours(all[4 * i], all[4 * i + 1], all[4 * i + 2], all[4 * i + 3]);
    for (int count = kLanes / 4; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) fours[i] = add_neighbouring_fours(fours[2 * i], fours[2 * i + 1]);
    return fours[0];
}

// out[i] = the sum of the i-th of COUNT vectors; there is room for kLanes more.
template <int COUNT>
inline void sums(const Vec* vectors, float* out) {
    const auto at = [&](int number) { return vectors[std::min(number, COUNT - 1)]; };
    constexpr int kSome = COUNT > kLanes / 2 ? kLanes : 4;
    if constexpr (COUNT >= kLanes) {
        const Vec all = sums_of_lanes(vectors);
        std::memcpy(out, &all, sizeof all);
    } else if constexpr (kSome == kLanes) {
        Vec some[kLanes];
        for (int i = 0; i < kLanes; i++) some[i] = at(i);
        const Vec all = sums_of_lanes(some);
        std::memcpy(out, &all, sizeof all);
    } else {
        const Quad four = sums(at(0), at(1), at(2), at(3));
        std::memcpy(out, &four, sizeof four);
    }
    if constexpr (COUNT > kSome) sums<COUNT - kSome>(vectors + kSome, out + kSome);
}

// Zeros, one by one: as a loop it would become a memset, and what that has touched lives in memory and not in registers.
template <int COUNT>
inline void clear(Vec* vectors) {
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) vectors[i] = Vec{};
}

struct Room {
    Memory floats;
    int64_t size = 0;
};

// That this thread has had and wants again, by the dozen in every layer.
struct Rooms : std::vector<Room> {
    ~Rooms() {
        for (Room& room : *this) Helpers::the().bury(std::move(room.floats));
    }
};
thread_local Rooms rooms;

// Room for so many floats, of any value.
class Floats {
public:
    explicit Floats(int64_t count) {
        const auto large_enough = [&](const Room& room) { return room.size >= count; };
        const auto found = std::find_if(rooms.rbegin(), rooms.rend(), large_enough);
        if (found != rooms.rend()) std::swap(*found, rooms.back());
        if (!rooms.empty()) {
            room_ = std::move(rooms.back());
            rooms.pop_back();
        }
        if (room_.size < count) {  // in the place of a smaller one, or there would be more and more
            room_.size = std::max<int64_t>(count, 1 << 12);
            if (room_.floats) Helpers::the().bury(std::move(room_.floats));
            room_.floats = memory_for(room_.size);
        }
    }
    ~Floats() { rooms.push_back(std::move(room_)); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;

    float* data() const { return room_.floats.get(); }
    float& operator[](int64_t i) const { return room_.floats[i]; }

private:
    Room room_;
};

template <typename W>
inline void prefetch(const W* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(W))) __builtin_prefetch(numbers + i);
}

// ---- linear: y = W x + b, and for rows from first_row on + B ((A x) * g) --------------------------------------------

constexpr int64_t kChunk = 48;  // outputs computed together: their weights stay in the nearest cache for all rows
constexpr int64_t kPairs = 2 * kLanes;
constexpr int64_t kFarAhead = 2048;  // numbers: how early those of large weights are fetched

// x as weights W want it, in `copy` if not as it is. bfloat16 is widened two at a time, for which a word is shifted or
// masked: so of every kPairs numbers of a row those at even places come first, then those at odd ones.
template <typename W, typename X>
const float* operand(const X* x, int64_t rows, int64_t depth, float* copy) {
    if constexpr (std::is_same_v<W, float>) {
        static_assert(std::is_same_v<X, float>, "weights are no wider than what they are multiplied with");
        return x;
    } else {
        const int64_t paired = depth / kPairs * kPairs;
        for (int64_t row = 0; row < rows; row++) {
            const X* const from = x + row * depth;
            float* const to = copy + row * depth;
            for (int64_t k = 0; k < paired; k += kPairs) {
                const Vec first = load(from + k), second = load(from + k + kLanes);
                const Vec even = evens(first, second), odd = odds(first, second);
                std::memcpy(to + k, &even, sizeof even);
                std::memcpy(to + k + kLanes, &odd, sizeof odd);
            }
            for (int64_t k = paired; k < depth; k++) to[k] = to_float(from[k]);
        }
        return copy;
    }
}

// Numbers side by side, of rows that lie `stride` apart.
template <typename W>
struct Rows {
    const W* data;
    int64_t stride;

    const W* at(int64_t row, int64_t k) const { return data + row * stride + k; }
};

// out[m][n] = the sum of total[m * COLUMNS + n], and x[m] . w[n] from k on; what is in `out` stays in it where there is
// `more` than this.
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

// out[m][n] = x[m] . w[n] for ROWS rows and COLUMNS outputs, as many accumulators as there are registers for. AHEAD: the
// weights of as many outputs more are fetched meanwhile, in the order in which they lie.
template <int ROWS, int COLUMNS, bool AHEAD>
inline void dots(const Rows<float>& x, const Rows<float>& w, int64_t depth, bool more, float* out) {
    Vec total[ROWS * COLUMNS];
    clear<ROWS * COLUMNS>(total);
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        if constexpr (ROWS <= COLUMNS) {  // the fewer ones are held in registers
            Vec rows[ROWS];
            for (int m = 0; m < ROWS; m++) rows[m] = load(x.at(m, k));
            for (int n = 0; n < COLUMNS; n++) {
                if (AHEAD) __builtin_prefetch(w.data + COLUMNS * (w.stride + k) + n * kLanes);
                const Vec weight = held(load(w.at(n, k)));
                for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += rows[m] * weight;
            }
        } else {
            Vec weights[COLUMNS];
            for (int n = 0; n < COLUMNS; n++) weights[n] = load(w.at(n, k));
            for (int m = 0; m < ROWS; m++) {
                const Vec row = held(load(x.at(m, k)));
                for (int n = 0; n < COLUMNS; n++) total[m * COLUMNS + n] += row * weights[n];
            }
        }
    }
    sum_up<ROWS, COLUMNS>(total, x, w, k, depth, more, out);
}

template <int ROWS, int COLUMNS, bool AHEAD>
inline void dots(const Rows<float>& x, const Rows<bfloat16>& w, int64_t depth, bool more, float* out) {
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
            if (AHEAD) __builtin_prefetch(w.data + COLUMNS * (w.stride + k) + n * kPairs);
            IntVec words;
            std::memcpy(&words, w.at(n, k), sizeof words);
            const Vec low = (Vec)(words << 16), high = (Vec)(words & int32_t(0xffff0000));
            for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += even[m] * low;
            for (int m = 0; m < ROWS; m++) total[m * COLUMNS + n] += odd[m] * high;
        }
    }
    sum_up<ROWS, COLUMNS>(total, x, w, k, depth, more, out);
}

template <int ROWS, int COLUMNS, bool AHEAD, typename W>
inline void dots_of_chunk(const Rows<float>& x, const Rows<W>& w, int64_t depth, int64_t count, bool more, float* out) {
    int64_t n = 0;
    const auto from = [&](int64_t output) { return Rows<W>{w.at(output, 0), w.stride}; };
    for (; n + COLUMNS <= count; n += COLUMNS) dots<ROWS, COLUMNS, AHEAD>(x, from(n), depth, more, out + n);
    for (; n < count; n++) dots<ROWS, 1, AHEAD>(x, from(n), depth, more, out + n);
}

// How many outputs are computed together for `rows` of x: as many sums as are taken at once, or what registers there are,
// less those for x and weights. Widening takes some, too.
template <typename W>
constexpr int columns_for(int rows) {
    constexpr bool kPaired = !std::is_same_v<W, float>;
    constexpr int kMany[] = {16, 8, 4, kPaired ? 4 : 6}, kFew[] = {12, 6, 4, 3}, kFewPaired[] = {6, 4, 3, 2};
    return (kManyRegisters ? kMany : kPaired ? kFewPaired : kFew)[rows - 1];
}

// Outputs whose weights stay in the nearest cache while all rows pass: a multiple of what four of them take together.
template <typename W>
constexpr int kTile = kManyRegisters && !std::is_same_v<W, float> ? 16 : 12;

// Whether a weight of so many numbers comes from memory.
template <typename W>
bool is_far(int64_t numbers) {
    return numbers * int64_t(sizeof(W)) > 2 << 20;
}

// What dots_of_chunk computes, for one from memory: as it lies, one output after the other. bfloat16 is as fast either way.
template <int ROWS>
void dots_in_line(const float* x, int64_t stride, const float* w, int64_t depth, int64_t count, float* out) {
    constexpr int kSteps = 4;  // enough sums under way to hide how long one addition takes
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

// `count` outputs of ROWS rows.
template <int ROWS, bool AHEAD, typename W>
void tile(const Rows<float>& x, const Rows<W>& w, int64_t depth, int64_t count, bool more, float* out) {
    constexpr int kColumns = columns_for<W>(ROWS);
    if (count >= kColumns) {
        dots_of_chunk<ROWS, kColumns, AHEAD>(x, w, depth, count, more, out);
    } else {
        dots_of_chunk<ROWS, std::min(kColumns, kTile<W> / 2), AHEAD>(x, w, depth, count, more, out);
    }
}

constexpr int64_t kRowsToWiden = 16;  // from so many on, weights are widened once for all rows
constexpr int64_t kDepth = 1024;      // numbers of each that many rows are multiplied with at once: a tile stays in cache

// `depth` numbers of `count` rows of w as floats, in the order of `operand`. `far`: the next ones are fetched meanwhile.
inline void widen_weights(const Rows<bfloat16>& w, int64_t count, int64_t depth, bool far, float* wide) {
    const int64_t paired = depth / kPairs * kPairs;
    for (int64_t n = 0; n < count; n++, wide += depth) {
        for (int64_t k = 0; k < paired; k += kPairs) {
            IntVec words;
            std::memcpy(&words, w.at(n, k), sizeof words);
            if (far) __builtin_prefetch(w.at(n + count, k));
            const IntVec low = words << 16, high = words & int32_t(0xffff0000);
            std::memcpy(wide + k, &low, sizeof low);
            std::memcpy(wide + k + kLanes, &high, sizeof high);
        }
        for (int64_t k = paired; k < depth; k++) wide[k] = to_float(*w.at(n, k));
    }
}

// out [rows][kChunk] = x [rows, depth] times some rows of w, four rows of x at a time.
template <typename W>
void multiply_tile(const Rows<float>& x, int64_t rows, const Rows<W>& w, int64_t depth, int64_t count, bool more, float* out) {
    int64_t m = 0;
    const auto rest = [&] { return Rows<float>{x.at(m, 0), x.stride}; };
    for (; m + 4 <= rows; m += 4) tile<4, false>(rest(), w, depth, count, more, out + m * kChunk);
    float* const last = out + m * kChunk;
    if (rows - m == 3) tile<3, false>(rest(), w, depth, count, more, last);
    if (rows - m == 2) tile<2, false>(rest(), w, depth, count, more, last);
    if (rows - m == 1) tile<1, false>(rest(), w, depth, count, more, last);
}

// out [rows][kChunk] = x [rows, depth], as `operand` gives it, times `count` rows of w. What is multiplied with few rows is
// fetched ahead; with many, there is time, and each four would fetch the same again.
template <typename W>
void multiply(const float* x, int64_t rows, int64_t depth, const W* w, int64_t count, bool far, float* out) {
    if constexpr (std::is_same_v<W, float>) {
        if (far && rows == 1) return dots_in_line<1>(x, depth, w, depth, count, out);
        if (far && rows == 2) return dots_in_line<2>(x, depth, w, depth, count, out);
    }
    const Rows<float> all{x, depth};
    const Rows<W> whole{w, depth};
    if (rows == 1) return tile<1, true>(all, whole, depth, count, false, out);
    if (rows == 2) return tile<2, true>(all, whole, depth, count, false, out);
    if (rows == 3) return tile<3, true>(all, whole, depth, count, false, out);
    if (rows == 4) return tile<4, true>(all, whole, depth, count, false, out);
    // beyond four rows, the weights are read again and again
    constexpr bool kWidens = !std::is_same_v<W, float>;
    const bool widens = kWidens && rows >= kRowsToWiden;
    const int64_t most = (widens ? kTile<float> : kTile<W>) / (depth > kDepth / 2 ? 2 : 1);
    const Floats wide(widens ? most * kDepth : 0);
    for (int64_t start = 0; start < depth; start += kDepth) {
        const int64_t part = std::min(kDepth, depth - start);
        const Rows<float> numbers{x + start, depth};
        for (int64_t first = 0; first < count; first += most) {
            const int64_t some = std::min(most, count - first);
            const Rows<W> weights{w + first * depth + start, depth};
            if constexpr (kWidens) {
                if (widens) {
                    widen_weights(weights, some, part, far, wide.data());
                    multiply_tile(numbers, rows, Rows<float>{wide.data(), part}, part, some, start > 0, out + first);
                    continue;
                }
            }
            multiply_tile(numbers, rows, weights, part, some, start > 0, out + first);
        }
    }
}

// Some ranks of the rows that experts act on: rows `stride` apart.
struct Narrow {
    const float* data;
    int64_t stride, rank;
};

// out [ROWS][VECTORS * kLanes] += the rows of `narrow` times columns of b [rank, stride].
template <int ROWS, int VECTORS, typename W>
inline void widen(const Narrow& narrow, const W* b, int64_t stride, float* out) {
    constexpr int kRanks = std::clamp(12 / (ROWS * VECTORS), 1, 4);  // at once: additions take longer than they are apart
    Vec total[kRanks][ROWS][VECTORS];
    for (auto& own : total)
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < VECTORS; v++) own[m][v] = Vec{};
    const auto add = [&](Vec (&own)[ROWS][VECTORS], int64_t r) {
        for (int v = 0; v < VECTORS; v++) {
            const Vec weight = load(b + r * stride + v * kLanes);
            for (int m = 0; m < ROWS; m++) own[m][v] += narrow.data[m * narrow.stride + r] * weight;
        }
    };
    int64_t r = 0;
    for (; r + kRanks <= narrow.rank; r += kRanks)
        for (int i = 0; i < kRanks; i++) add(total[i], r + i);
    for (; r < narrow.rank; r++) add(total[0], r);
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) {
            Vec sum = load(out + m * kChunk + v * kLanes);
            for (int i = 0; i < kRanks; i++) sum += total[i][m][v];
            std::memcpy(out + m * kChunk + v * kLanes, &sum, sizeof sum);
        }
}

template <int ROWS, typename W>
void widen_chunk(const Narrow& narrow, const W* b, int64_t stride, int64_t count, float* out) {
    constexpr int kVectors = kChunk / kLanes;
    int64_t n = 0;
    for (; n + kVectors * kLanes <= count; n += kVectors * kLanes) widen<ROWS, kVectors>(narrow, b + n, stride, out + n);
    for (; n + kLanes <= count; n += kLanes) widen<ROWS, 1>(narrow, b + n, stride, out + n);
    for (; n < count; n++)
        for (int m = 0; m < ROWS; m++)
            for (int64_t r = 0; r < narrow.rank; r++)
                out[m * kChunk + n] =
                    std::fma(narrow.data[m * narrow.stride + r], to_float(b[r * stride + n]), out[m * kChunk + n]);
}

template <typename X, typename E>
struct Experts {
    const E* a;     // [rank, depth]
    const X* gate;  // [rows - first_row, rank], rows `gate_stride` apart
    int64_t rank, gate_stride, first_row;
};

// Outputs of one linear among several that are computed as one; the experts of each act on its own outputs only.
template <typename E>
struct Part {
    const E* b_t;  // [rank, width]
    int64_t rank, width;
};

constexpr int64_t kMostParts = 8;

// What is computed at once: `count` outputs of one part.
template <typename E>
struct Chunk {
    Part<E> part;
    int64_t first, count;  // of the part
    int64_t output, rank;  // where the part's outputs and ranks begin among all
};

template <typename E>
struct Parts {
    Part<E> all[kMostParts];
    int64_t count;

    int64_t chunks() const {
        int64_t chunks = 0;
        for (int64_t number = 0; number < count; number++) chunks += (all[number].width + kChunk - 1) / kChunk;
        return chunks;
    }

    Chunk<E> chunk(int64_t number) const {
        Chunk<E> chunk{all[0], number * kChunk, 0, 0, 0};
        for (const Part<E>* next = all + 1; chunk.first >= chunk.part.width; next++) {
            chunk.first -= (chunk.part.width + kChunk - 1) / kChunk * kChunk;
            chunk.output += chunk.part.width;
            chunk.rank += chunk.part.rank;
            chunk.part = *next;
        }
        chunk.count = std::min(kChunk, chunk.part.width - chunk.first);
        return chunk;
    }
};

constexpr int64_t kWorthSharing = 1 << 19;  // products: some microseconds
constexpr int64_t kProductsPerFar = 32;     // as long as one number from memory takes
constexpr int64_t kNarrowChunk = 16;        // ranks computed together: there are few

// compute(chunk, block) and place(chunk, block) of all chunks; helpers are asked if there are enough products.
template <typename Compute, typename Place, typename Keep>
void in_chunks(
    int64_t chunks, int64_t floats, int64_t products, const Compute& compute, const Place& place, const Keep& keep
) {
    const Floats block(floats);
    Helpers& helpers = Helpers::the();
    if (products >= kWorthSharing && helpers.count()) return helpers.share(chunks, floats, compute, place, keep, block.data());
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        compute(chunk, block.data());
        place(chunk, block.data());
    }
}

// x [rows, depth], weight [width, depth], bias [width] or null -> y [rows, width], where all parts together are `width`.
// `keep` as Helpers want it, for weights and experts.
template <typename X, typename W, typename E, typename Keep>
void linear(
    const X* x, const W* weight, const X* bias, const Experts<X, E>& experts, const Parts<E>& parts, int64_t rows,
    int64_t depth, int64_t width, const Keep& keep, X* y
) {
    constexpr bool kCopies = !std::is_same_v<W, float>, kCopiesForExperts = !std::is_same_v<E, float> && !kCopies;
    const bool far = is_far<W>(depth * width);
    const int64_t effort = far ? std::max(rows, kProductsPerFar) : rows;  // in products, of each weight
    const bool shares = Helpers::the().count() && effort * depth * width >= kWorthSharing;
    const Floats copies(kCopies || kCopiesForExperts ? rows * depth : 0), plain(!kCopies && shares ? rows * depth : 0);
    const float* floats = operand<W>(x, rows, depth, copies.data());
    if constexpr (!kCopies)
        if (shares) floats = std::copy_n(x, rows * depth, plain.data()) - rows * depth;  // x may be gone before helpers are
    const float* const for_experts = std::is_same_v<W, E> ? floats : operand<E>(x, rows, depth, copies.data());
    const int64_t gated = experts.rank ? rows - experts.first_row : 0, first_row = experts.first_row;
    const Floats narrowed(gated * experts.rank);
    float* const narrow = narrowed.data();
    if (gated) {
        const int64_t rank = experts.rank;
        const auto compute = [=, a = experts.a](int64_t chunk, float* block) {
            const int64_t first = chunk * kNarrowChunk, count = std::min(kNarrowChunk, rank - first);
            multiply(for_experts + first_row * depth, gated, depth, a + first * depth, count, false, block);
        };
        const auto place = [&](int64_t chunk, const float* block) {
            const int64_t first = chunk * kNarrowChunk, count = std::min(kNarrowChunk, rank - first);
            for (int64_t m = 0; m < gated; m++)
                for (int64_t r = 0; r < count; r++)
                    narrow[m * rank + first + r] =
                        block[m * kChunk + r] * to_float(experts.gate[m * experts.gate_stride + first + r]);
        };
        in_chunks((rank + kNarrowChunk - 1) / kNarrowChunk, gated * kChunk, effort * rank * depth, compute, place, keep);
    }
    const auto compute = [=, all_ranks = experts.rank](int64_t number, float* block) {
        const Chunk<E> chunk = parts.chunk(number);
        const E* const b_t = chunk.part.b_t + chunk.first;
        const int64_t rank = chunk.part.rank, stride = chunk.part.width, count = chunk.count;
        if (gated)  // a few outputs of every rank: little of each row of B, so nothing else fetches it in time
            for (int64_t r = 0; r < rank; r++) prefetch(b_t + r * stride, count);
        multiply(floats, rows, depth, weight + (chunk.output + chunk.first) * depth, count, far, block);
        float* const own = block + first_row * kChunk;
        Narrow some{narrow + chunk.rank, all_ranks, rank};
        int64_t m = 0;
        for (; m + 2 <= gated; m += 2, some.data += 2 * all_ranks) widen_chunk<2>(some, b_t, stride, count, own + m * kChunk);
        if (m < gated) widen_chunk<1>(some, b_t, stride, count, own + m * kChunk);
    };
    const auto place = [&](int64_t number, const float* block) {
        const Chunk<E> chunk = parts.chunk(number);
        const int64_t first = chunk.output + chunk.first;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t n = 0; n < chunk.count; n++)
                store(y + row * width + first + n, block[row * kChunk + n] + (bias ? to_float(bias[first + n]) : 0.0f));
    };
    in_chunks(parts.chunks(), rows * kChunk, effort * depth * width, compute, place, keep);
}

// ---- attention -----------------------------------------------------------------------------------------------------

// e^x for x <= 0, to about 1e-7 (polynomial of the Cephes library).
inline Vec exponential(Vec x) {
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it drops the digits behind the point
    const Vec whole = (x * 1.44269504f + round) - round;
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec exponent = (__builtin_convertvector(whole, IntVec) + 127) << 23;
    return p * (Vec)exponent;
}

// The scores of `count` keys to weights: e^(score - most), where `most` is the largest ever. Returns their sum. Up to a
// multiple of kLanes there are more, of which each adds 1e-38.
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
        const Vec weight = exponential(load(scores + i) - most);
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
    float* out;          // [heads, head_dim]: the values times their weights, which are e^(score - largest)
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
        const float shrink = exponential(Vec{} + (before - seen.largest[h]))[0];
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
        for (int64_t d = 0; d < head_dim; d++) q[h * head_dim + d] = to_float(query[h * head_stride + d]) * how.scaling;
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
                see<heads_at_once>(own.from(h, head_dim), keys, values, offset, count, head_dim, how.softcap, far && h == 0);
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

// ---- norm: y = x / sqrt(mean(x^2) + eps) * weight ------------------------------------------------------------------

template <typename W>
void norm(const W* x, const W* weight, double eps, int64_t rows, int64_t depth, W* y) {
    for (int64_t row = 0; row < rows; row++, x += depth, y += depth) {
        Vec total{};
        int64_t k = 0;
        for (; k + kLanes <= depth; k += kLanes) {
            const Vec some = load(x + k);
            total += some * some;
        }
        float sum = sum_of(total);
        for (; k < depth; k++) sum += to_float(x[k]) * to_float(x[k]);
        const float scale = 1.0f / std::sqrt(sum / depth + float(eps));
        for (k = 0; k < depth; k++) store(y + k, to_float(x[k]) * scale * to_float(weight[k]));
    }
}

// ---- rotation: RoPE of pairs half a head apart ----------------------------------------------------------------------

inline float rounded(float value, float*) { return value; }

inline float rounded(float value, bfloat16* as) {
    store(as, value);
    return to_float(*as);
}

// One head: x, cos and sin [depth] -> y [depth]. Rounds where the formula in torch does: after every product.
template <typename W>
void rotate(const W* x, const W* cos, const W* sin, int64_t depth, W* y) {
    const int64_t half = depth / 2;
    W spare;
    for (int64_t i = 0; i < half; i++) {
        const float low = to_float(x[i]), high = to_float(x[half + i]);
        store(y + i, rounded(low * to_float(cos[i]), &spare) - rounded(high * to_float(sin[i]), &spare));
        store(y + half + i, rounded(high * to_float(cos[half + i]), &spare) + rounded(low * to_float(sin[half + i]), &spare));
    }
}

// ---- SwiGLU's product: y = g / (1 + e^-g) * u ------------------------------------------------------------------------

inline Vec silu(Vec x) {
    const Vec small = exponential(x < 0.0f ? x : -x);  // of -|x|: it cannot overflow
    return x * (x < 0.0f ? small : Vec{} + 1.0f) / (small + 1.0f);
}

// In place of g [count].
inline void gated_product(float* g, const float* u, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = silu(load(g + i)) * load(u + i);
        std::memcpy(g + i, &value, sizeof value);
    }
    for (; i < count; i++) g[i] = silu(Vec{} + g[i])[0] * u[i];
}

// In place of x [count].
inline void silu(float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = silu(load(x + i));
        std::memcpy(x + i, &value, sizeof value);
    }
    for (; i < count; i++) x[i] = silu(Vec{} + x[i])[0];
}

// ---- what AOTInductor calls ----------------------------------------------------------------------------------------

// A tensor that somebody else owns; none where there is no handle.
class Tensor {
public:
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
    explicit Tensor(const AtenTensorHandle* handle) : handle_(handle ? *handle : nullptr) {}

    explicit operator bool() const { return handle_ != nullptr; }

    template <typename T>
    T* data() const {
        void* pointer = nullptr;
        if (handle_) aoti_torch_get_data_ptr(handle_, &pointer);
        return static_cast<T*>(pointer);
    }

    int64_t dims() const {
        int64_t dims = 0;
        aoti_torch_get_dim(handle_, &dims);
        return dims;
    }

    int64_t size(int64_t dim) const {
        int64_t size = 0;
        aoti_torch_get_size(handle_, dim, &size);
        return size;
    }

    int64_t stride(int64_t dim) const {
        int64_t stride = 0;
        aoti_torch_get_stride(handle_, dim, &stride);
        return stride;
    }

    bool has(int32_t dtype) const {
        int32_t own = -1;
        aoti_torch_get_dtype(handle_, &own);
        return own == dtype;
    }

    int64_t numel() const {
        int64_t numel = 0;
        aoti_torch_get_numel(handle_, &numel);
        return numel;
    }

    // Whether it is there and has the other's dtype, or is not there.
    bool is_like(const Tensor& other) const {
        int32_t dtype = -1;
        aoti_torch_get_dtype(other.handle_, &dtype);
        return !handle_ || has(dtype);
    }

    // The same, or it is there and narrower.
    bool is_no_wider_than(const Tensor& other) const {
        return is_like(other) || (has(aoti_torch_dtype_bfloat16()) && other.has(aoti_torch_dtype_float32()));
    }

    // Whether the dimensions from `first` on lie without gaps, last one fastest.
    bool is_dense(int64_t dims, int64_t first = 0) const {
        int64_t expected = 1;
        for (int64_t dim = dims - 1; dim >= first; dim--) {
            if (size(dim) > 1 && stride(dim) != expected) return false;
            expected *= size(dim);
        }
        return true;
    }

    std::shared_ptr<void> owner() const {
        AtenTensorHandle same = nullptr;
        if (handle_) aoti_torch_new_tensor_handle(handle_, &same);
        return {same, [](void* tensor) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(tensor)); }};
    }

private:
    AtenTensorHandle handle_;
};

using Owners = std::vector<std::shared_ptr<void>>;

// What an adapted linear is made of; without experts a and gate are missing.
struct Linear {
    Tensor weight, bias, a, gate;
    std::vector<Tensor> b_t;  // of each part
    int64_t first_row;
    int64_t gate_offset = 0;  // where its ranks begin in the rows of the gate

    int64_t depth() const { return weight.size(1); }
    int64_t width() const { return weight.size(0); }

    Owners owners() const {
        Owners all{weight.owner(), a.owner()};
        for (const Tensor& part : b_t) all.push_back(part.owner());
        return all;
    }
};

template <typename X, typename W, typename E>
void linear_with(const X* x, int64_t rows, const Linear& own, X* y) {
    Experts<X, E> experts{};
    Parts<E> parts{{}, 0};
    if (own.a) {
        const X* const gate = own.gate.data<X>() + own.gate_offset;
        experts = {own.a.data<E>(), gate, own.a.size(0), own.gate.stride(0), own.first_row};
        for (const Tensor& b_t : own.b_t) parts.all[parts.count++] = {b_t.data<E>(), b_t.size(0), b_t.size(1)};
    } else {
        parts.all[parts.count++] = {nullptr, 0, own.width()};
    }
    const auto keep = [&] { return own.owners(); };
    linear(x, own.weight.data<W>(), own.bias.data<X>(), experts, parts, rows, own.depth(), own.width(), keep, y);
}

template <typename X>
void linear_of(const X* x, int64_t rows, const Linear& own, X* y) {
    if constexpr (std::is_same_v<X, float>) {
        const bool narrow_experts = own.a && own.a.has(aoti_torch_dtype_bfloat16());
        if (own.weight.has(aoti_torch_dtype_bfloat16())) {
            (narrow_experts ? linear_with<X, bfloat16, bfloat16> : linear_with<X, bfloat16, float>)(x, rows, own, y);
        } else {
            (narrow_experts ? linear_with<X, float, bfloat16> : linear_with<X, float, float>)(x, rows, own, y);
        }
    } else {
        linear_with<X, X, X>(x, rows, own, y);
    }
}

// Rows of heads, wherever they lie: row r's head h begins at data + r * row_stride + h * head_stride.
template <typename W>
struct Heads {
    W* data;
    int64_t rows, heads, row_stride, head_stride;

    W* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// `of_query` is the tensor that `query` lies in, if it is none of Floats.
template <typename W>
void attention_of(
    const Heads<W>& query, const Tensor& of_query, const Tensor& keys, const Tensor& values, const Tensor& table,
    const Tensor& positions, const Scores& how, const Heads<W>& result
) {
    const Pool<W> pool{keys.data<W>(), values.data<W>(), keys.size(1), keys.size(2), keys.size(3)};
    const int64_t group = query.heads / pool.kv_heads, width = table.size(1), stride = positions.stride(0);
    const int64_t* const position = positions.data<int64_t>();
    int64_t seen = 0;
    for (int64_t row = 0; row < query.rows; row++)
        seen += how.window ? std::min(how.window, position[row * stride] + 1) : position[row * stride] + 1;
    const bool far = 2 * seen * pool.kv_heads * pool.head_dim * int64_t(sizeof(W)) > kFarBytes;
    // All KV heads of a token lie side by side, so they are one chunk, unless these were too few.
    const int64_t head_dim = pool.head_dim, kv_heads = query.rows <= Helpers::the().count() ? 1 : pool.kv_heads;
    const int64_t chunks_of_row = pool.kv_heads / kv_heads, heads = kv_heads * group;
    const auto compute = [=, table = table.data<int64_t>()](int64_t chunk, float* block) {
        const int64_t row = chunk / chunks_of_row, first = chunk % chunks_of_row * kv_heads;
        attend<W>(
            query.at(row, first * group), query.head_stride, pool, table + row * width, position[row * stride], first, kv_heads,
            group, how, far, block);
    };
    const auto place = [&](int64_t chunk, const float* block) {
        const int64_t row = chunk / chunks_of_row, first = chunk % chunks_of_row * heads;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < head_dim; d++) store(result.at(row, first + h) + d, block[h * head_dim + d]);
    };
    const auto keep = [&] { return Owners{keys.owner(), values.owner(), table.owner(), positions.owner(), of_query.owner()}; };
    in_chunks(query.rows * chunks_of_row, heads * head_dim, 2 * seen * query.heads * head_dim, compute, place, keep);
}

bool is_known(const Tensor& tensor) {
    return tensor.has(aoti_torch_dtype_float32()) || tensor.has(aoti_torch_dtype_bfloat16());
}

// A new tensor of the dtype of `like`; `order` names its dimensions from the slowest to the fastest, if not the first to the
// last.
AOTITorchError new_tensor(
    const Tensor& like, int64_t dims, const int64_t* sizes, AtenTensorHandle* result, const int64_t* order = nullptr
) {
    int64_t strides[kMostDims];
    for (int64_t i = dims - 1, stride = 1; i >= 0; i--) {
        const int64_t dim = order ? order[i] : i;
        strides[dim] = stride;
        stride *= sizes[dim];
    }
    const int32_t dtype = like.has(aoti_torch_dtype_float32()) ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result);
}

// Whether its tensors are of one piece and fit together, and what is added or multiplied with them is of the dtype of x.
bool is_sound(const Linear& own, const Tensor& x) {
    if (!own.bias.is_like(x) || !own.gate.is_like(x) || !own.weight.is_no_wider_than(x) || !own.a.is_no_wider_than(x))
        return false;
    if (!own.weight || !own.weight.is_dense(2)) return false;
    if (own.bias && (own.bias.numel() != own.width() || !own.bias.is_dense(own.bias.dims()))) return false;
    if (!own.a) return true;
    if (own.b_t.size() > kMostParts) return false;
    int64_t rank = 0, width = 0;
    for (const Tensor& b_t : own.b_t) {
        if (!b_t.is_like(own.a) || !b_t.is_dense(2)) return false;
        rank += b_t.size(0);
        width += b_t.size(1);
    }
    return own.a.is_dense(2) && own.a.size(1) == own.depth() && own.gate && own.gate.is_dense(2, 1) &&
        rank == own.a.size(0) && own.gate_offset + rank <= own.gate.size(1) && width == own.width();
}

// Whether it can be computed for that many rows of x.
bool takes(const Linear& own, int64_t rows) {
    return !own.a || (own.first_row >= 0 && own.gate.size(0) == rows - own.first_row);
}

bool fits(const Tensor& x, const Linear& own) {
    const int64_t dims = x.dims();
    return dims <= kMostDims && is_known(x) && x.is_dense(dims) && is_sound(own, x) &&
        x.size(dims - 1) == own.depth() && takes(own, x.numel() / own.depth());
}

AOTITorchError run(const Tensor& x, const Linear& own, AtenTensorHandle* result) {
    if (!fits(x, own)) return AOTI_TORCH_FAILURE;
    const int64_t dims = x.dims();
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = dim == dims - 1 ? own.weight.size(0) : x.size(dim);
    if (new_tensor(x, dims, sizes, result) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    const int64_t rows = x.numel() / own.depth();
    if (x.has(aoti_torch_dtype_float32())) {
        linear_of(x.data<float>(), rows, own, Tensor(*result).data<float>());
    } else {
        linear_of(x.data<bfloat16>(), rows, own, Tensor(*result).data<bfloat16>());
    }
    return AOTI_TORCH_SUCCESS;
}

// [..., rows, heads, head_dim]
template <typename W>
Heads<W> rows_first(const Tensor& tensor) {
    const int64_t rows = tensor.dims() - 3, heads = rows + 1;
    return {tensor.data<W>(), tensor.size(rows), tensor.size(heads), tensor.stride(rows), tensor.stride(heads)};
}

// [1, heads, rows, head_dim]
template <typename W>
Heads<W> heads_first(const Tensor& tensor) {
    return {tensor.data<W>(), tensor.size(2), tensor.size(1), tensor.stride(2), tensor.stride(1)};
}

// Whether it is a pool that so many rows of `heads` query heads can look into.
bool is_pool_of(
    const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& positions, int64_t rows, int64_t heads,
    int64_t head_dim
) {
    if (keys.dims() != 4 || !keys.is_dense(4) || values.dims() != 4 || !values.is_dense(4)) return false;
    for (int64_t dim = 0; dim < 4; dim++)
        if (keys.size(dim) != values.size(dim)) return false;
    return keys.size(2) > 0 && heads % keys.size(2) == 0 && keys.size(3) == head_dim && table.dims() == 2 &&
        table.is_dense(2) && table.has(aoti_torch_dtype_int64()) && table.size(0) == rows && positions.dims() == 1 &&
        positions.has(aoti_torch_dtype_int64()) && positions.size(0) == rows;
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_decode_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* a, AtenTensorHandle* b_t,
    AtenTensorHandle* gate, int64_t first_row, AtenTensorHandle* result
) {
    return run(Tensor(x), {Tensor(weight), Tensor(bias), Tensor(a), Tensor(gate), {Tensor(b_t)}, first_row}, result);
}

AOTITorchError aoti_torch_cpu_decode_attention(
    AtenTensorHandle query_, AtenTensorHandle keys_, AtenTensorHandle values_, AtenTensorHandle table_,
    AtenTensorHandle positions_, double scaling, int64_t window, double softcap, AtenTensorHandle* result
) {
    const Tensor query(query_), keys(keys_), values(values_), table(table_), positions(positions_);
    if (!is_known(query) || !keys.is_like(query) || !values.is_like(query)) return AOTI_TORCH_FAILURE;
    if (query.dims() != 3 || !query.is_dense(3)) return AOTI_TORCH_FAILURE;
    if (!is_pool_of(keys, values, table, positions, query.size(0), query.size(1), query.size(2))) return AOTI_TORCH_FAILURE;
    const int64_t sizes[] = {query.size(0), query.size(1), query.size(2)};
    if (new_tensor(query, 3, sizes, result) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    const Tensor attended(*result);
    const Scores how{float(scaling), window, float(softcap)};
    if (query.has(aoti_torch_dtype_float32())) {
        attention_of<float>(rows_first<float>(query), query, keys, values, table, positions, how, rows_first<float>(attended));
    } else {
        attention_of<bfloat16>(
            rows_first<bfloat16>(query), query, keys, values, table, positions, how, rows_first<bfloat16>(attended));
    }
    return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

// ---- what eager steps call, through torch's dispatcher ---------------------------------------------------------------

namespace {

using Given = torch::stable::Tensor;
using Maybe = std::optional<Given>;

constexpr int64_t kRowsFirst[] = {0, 2, 1, 3};  // in memory, of [1, heads, rows, head_dim]

AtenTensorHandle handle(const Maybe& tensor) { return tensor ? tensor->get() : nullptr; }

Given checked(AOTITorchError error, AtenTensorHandle result) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("wanted are dense float or bfloat16 tensors of fitting shapes");
    return Given(result);
}

Given decode_linear(Given x, Given weight, Maybe bias, Maybe a, Maybe b_t, Maybe gate, int64_t first_row) {
    AtenTensorHandle result = nullptr, handles[] = {handle(bias), handle(a), handle(b_t), handle(gate)};
    const AOTITorchError error = aoti_torch_cpu_decode_linear(
        x.get(), weight.get(), &handles[0], &handles[1], &handles[2], &handles[3], first_row, &result);
    return checked(error, result);
}

Given decode_siblings(Given x, Given weight, Maybe bias, Given a, std::vector<Given> b_t, Given gate, int64_t first_row) {
    Linear own{Tensor(weight.get()), Tensor(handle(bias)), Tensor(a.get()), Tensor(gate.get()), {}, first_row};
    for (const Given& one : b_t) own.b_t.emplace_back(one.get());
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = run(Tensor(x.get()), own, &result);
    return checked(error, result);
}

// One of the rows [1, heads, rows, head_dim] that a step brings.
bool is_row_of(const Tensor& tensor, const Tensor& query, int64_t heads) {
    return tensor.is_like(query) && tensor.dims() == 4 && tensor.size(0) == 1 && tensor.size(1) == heads &&
        tensor.size(2) == query.size(2) && tensor.size(3) == query.size(3) && tensor.is_dense(4, 3);
}

template <typename W>
void write(const Heads<W>& from, const int64_t* slots, const Tensor& pool) {
    const int64_t depth = pool.size(3);
    for (int64_t row = 0; row < from.rows; row++)
        for (int64_t head = 0; head < from.heads; head++)
            std::copy_n(from.at(row, head), depth, pool.data<W>() + (slots[row] * from.heads + head) * depth);
}

template <typename W>
void self_attention_of(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
    const int64_t* slots, const Tensor& table, const Tensor& positions, const Scores& how, const Tensor& result
) {
    write(heads_first<W>(key), slots, keys);
    write(heads_first<W>(value), slots, values);
    attention_of<W>(heads_first<W>(query), query, keys, values, table, positions, how, rows_first<W>(result));
}

Given decode_self_attention(
    Given query_, Given key_, Given value_, Given keys_, Given values_, Given slots_, Given table_, Given positions_,
    double scaling, int64_t window, double softcap
) {
    const Tensor query(query_.get()), key(key_.get()), value(value_.get()), keys(keys_.get()), values(values_.get());
    const Tensor slots(slots_.get()), table(table_.get()), positions(positions_.get());
    const bool known = is_known(query) && keys.is_like(query) && values.is_like(query) && query.dims() == 4 &&
        is_pool_of(keys, values, table, positions, query.size(2), query.size(1), query.size(3));
    if (!known || !is_row_of(query, query, query.size(1)) || !is_row_of(key, query, keys.size(2)) ||
        !is_row_of(value, query, keys.size(2)) || !slots.is_dense(1) || slots.size(0) != query.size(2))
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {1, query.size(2), query.size(1), query.size(3)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(query, 4, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor attended(result);
        const int64_t* const at = slots.data<int64_t>();
        const Scores how{float(scaling), window, float(softcap)};
        if (query.has(aoti_torch_dtype_float32())) {
            self_attention_of<float>(query, key, value, keys, values, at, table, positions, how, attended);
        } else {
            self_attention_of<bfloat16>(query, key, value, keys, values, at, table, positions, how, attended);
        }
    }
    return checked(error, result);
}

template <typename W>
void rotation_of(const Heads<W>& x, const Tensor& cos, const Tensor& sin, const Heads<W>& y) {
    const int64_t depth = cos.size(2);
    for (int64_t row = 0; row < x.rows; row++)
        for (int64_t head = 0; head < x.heads; head++)
            rotate<W>(x.at(row, head), cos.data<W>() + row * depth, sin.data<W>() + row * depth, depth, y.at(row, head));
}

Given decode_rotate(Given given, Given cos_, Given sin_) {
    const Tensor x(given.get()), cos(cos_.get()), sin(sin_.get());
    const bool like = x.dims() == 4 && is_known(x) && is_row_of(x, x, x.size(1)) && cos.is_like(x) && sin.is_like(x);
    if (!like || !cos.is_dense(3) || !sin.is_dense(3) || cos.size(1) != x.size(2) || cos.size(2) != x.size(3))
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {1, x.size(1), x.size(2), x.size(3)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, 4, sizes, &result, kRowsFirst);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor y(result);
        if (x.has(aoti_torch_dtype_float32())) {
            rotation_of(heads_first<float>(x), cos, sin, heads_first<float>(y));
        } else {
            rotation_of(heads_first<bfloat16>(x), cos, sin, heads_first<bfloat16>(y));
        }
    }
    return checked(error, result);
}

Given decode_norm(Given given, Given weight_, double eps) {
    const Tensor x(given.get()), weight(weight_.get());
    const int64_t dims = x.dims(), depth = weight.size(0);
    if (dims > kMostDims || !is_known(x) || !weight.is_like(x) || !x.is_dense(dims) || x.size(dims - 1) != depth)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = x.size(dim);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, dims, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const Tensor y(result);
        if (x.has(aoti_torch_dtype_float32())) {
            norm(x.data<float>(), weight.data<float>(), eps, x.numel() / depth, depth, y.data<float>());
        } else {
            norm(x.data<bfloat16>(), weight.data<bfloat16>(), eps, x.numel() / depth, depth, y.data<bfloat16>());
        }
    }
    return checked(error, result);
}

Tensor or_none(const Given& tensor) {
    const Tensor given(tensor.get());
    return given.numel() ? given : Tensor(static_cast<AtenTensorHandle>(nullptr));
}

// ---- the gate: from stored scalings to the weights of ranks, from hidden states to stored scalings ---------------------

// Rows of scalings, wherever they are stored: [slots, sites, experts]
bool is_store(const Tensor& gate_rows) {
    return gate_rows.dims() == 3 && gate_rows.has(aoti_torch_dtype_float32()) && gate_rows.is_dense(3);
}

bool is_index(const Tensor& tensor) {
    return tensor.dims() == 1 && tensor.has(aoti_torch_dtype_int64()) && tensor.is_dense(1);
}

Given decode_spread(Given gate_rows_, Given slots_, Given rank_index_, int64_t first_row, double weight) {
    const Tensor gate_rows(gate_rows_.get()), slots(slots_.get()), rank_index(rank_index_.get());
    if (!is_store(gate_rows) || !is_index(slots) || !is_index(rank_index) || first_row < 0 ||
        first_row > slots.numel())
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t rows = slots.numel() - first_row, ranks = rank_index.numel(), width = gate_rows.size(1) * gate_rows.size(2);
    const int64_t sizes[] = {rows, ranks};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(gate_rows, 2, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS) {
        const int64_t *const slot = slots.data<int64_t>() + first_row, *const index = rank_index.data<int64_t>();
        float* const spread = Tensor(result).data<float>();
        for (int64_t row = 0; row < rows; row++) {
            const float* const stored = gate_rows.data<float>() + slot[row] * width;
            for (int64_t r = 0; r < ranks; r++) spread[row * ranks + r] = stored[index[r]] * float(weight);
        }
    }
    return checked(error, result);
}

// Softmax of `sites` times `experts` logits at this temperature.
void softmax(const float* logits, int64_t sites, int64_t experts, float temperature, float* result) {
    const int64_t count = sites * experts;
    const Floats floats(count + kLanes);
    float* const powers = floats.data();
    for (int64_t site = 0; site < sites; site++) {
        const float* const own = logits + site * experts;
        const float most = *std::max_element(own, own + experts);
        for (int64_t e = 0; e < experts; e++) powers[site * experts + e] = (own[e] - most) / temperature;
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

// The first rows of hidden [.., H] through linears with biases, or without where these are empty -> logits
// [rows, sites, experts]; their scalings go to `slots` of gate_rows.
Given decode_scalings(
    Given hidden_, std::vector<Given> layers, bool relu, std::optional<double> temperature, Given gate_rows_, Given slots_,
    int64_t rows
) {
    const Tensor hidden(hidden_.get()), gate_rows(gate_rows_.get()), slots(slots_.get());
    const int64_t count = int64_t(layers.size()) / 2;
    bool known = hidden.dims() == 2 && hidden.has(aoti_torch_dtype_float32()) && hidden.is_dense(2) && is_store(gate_rows) &&
        is_index(slots) && rows <= slots.numel() && rows <= hidden.size(0) && count > 0;
    int64_t width = known ? hidden.size(1) : 0, widest = 0;
    std::vector<Linear> linears;
    for (int64_t number = 0; known && number < count; number++) {
        const Tensor none(static_cast<AtenTensorHandle>(nullptr));
        const Linear& own = linears.emplace_back(
            Linear{Tensor(layers[2 * number].get()), or_none(layers[2 * number + 1]), none, none, {}, 0});
        known = own.weight.dims() == 2 && is_sound(own, hidden) && own.depth() == width;
        width = known ? own.width() : 0;
        widest = std::max(widest, width);
    }
    if (!known || width != gate_rows.size(1) * gate_rows.size(2)) return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t sizes[] = {rows, gate_rows.size(1), gate_rows.size(2)};
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(hidden, 3, sizes, &result);
    if (error != AOTI_TORCH_SUCCESS) return checked(error, result);
    float* const logits = Tensor(result).data<float>();
    const Floats between(2 * rows * widest);
    const float* x = hidden.data<float>();
    for (int64_t number = 0; number < count; number++) {
        const bool last = number + 1 == count;
        float* const y = last ? logits : between.data() + number % 2 * rows * widest;
        linear_of(x, rows, linears[number], y);
        if (relu && !last)
            for (int64_t i = 0; i < rows * linears[number].width(); i++) y[i] = std::max(y[i], 0.0f);
        x = y;
    }
    for (int64_t row = 0; row < rows; row++) {
        float* const stored = gate_rows.data<float>() + slots.data<int64_t>()[row] * width;
        const float* const own = logits + row * width;
        if (temperature) {
            softmax(own, sizes[1], sizes[2], float(*temperature), stored);
        } else {
            std::copy_n(own, width, stored);
        }
    }
    return checked(error, result);
}

// ---- the draft head: h + D silu(U h + b) of scaling rows ---------------------------------------------------------------

// rows [L] of hidden [T, H], the first `scaling_rows` of which draft; tensors U [R, H], b [R], D [H, R] -> [L, H]
Given decode_drafting(Given hidden_, Given rows_, int64_t scaling_rows, std::vector<Given> tensors) {
    const Tensor hidden(hidden_.get()), rows(rows_.get()), none(static_cast<AtenTensorHandle>(nullptr));
    if (hidden.dims() != 2 || !hidden.has(aoti_torch_dtype_float32()) || !hidden.is_dense(2) || !is_index(rows) ||
        tensors.size() != 3)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const Linear up{Tensor(tensors[0].get()), Tensor(tensors[1].get()), none, none, {}, 0};
    const Linear down{Tensor(tensors[2].get()), none, none, none, {}, 0};
    const int64_t width = hidden.size(1);
    if (up.weight.dims() != 2 || down.weight.dims() != 2 || !is_sound(up, hidden) || !is_sound(down, hidden) ||
        up.depth() != width || down.width() != width || up.width() != down.depth())
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const int64_t count = rows.numel(), sizes[] = {count, width};
    for (int64_t i = 0; i < count; i++)
        if (rows.data<int64_t>()[i] < 0 || rows.data<int64_t>()[i] >= hidden.size(0))
            return checked(AOTI_TORCH_FAILURE, nullptr);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(hidden, 2, sizes, &result);
    if (error != AOTI_TORCH_SUCCESS) return checked(error, result);
    float* const seen = Tensor(result).data<float>();
    const Floats floats(count * (2 * width + up.width()));
    float* const drafts = floats.data();
    float* const changes = drafts + count * width;
    float* const between = changes + count * width;
    int64_t drafting = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = rows.data<int64_t>()[i];
        std::copy_n(hidden.data<float>() + row * width, width, seen + i * width);
        if (row < scaling_rows) std::copy_n(seen + i * width, width, drafts + drafting++ * width);
    }
    if (!drafting) return checked(error, result);
    linear_of(drafts, drafting, up, between);
    silu(between, drafting * up.width());
    linear_of(between, drafting, down, changes);
    const float* change = changes;
    for (int64_t i = 0; i < count; i++) {
        if (rows.data<int64_t>()[i] >= scaling_rows) continue;
        for (int64_t k = 0; k < width; k++) seen[i * width + k] += change[k];
        change += width;
    }
    return checked(error, result);
}

// ---- a decoder layer: h = x + O attention(rotated Q n, rotated K n, V n), y = h + D (silu(G m) * U m), n and m normed

// In the order in which decode_kernels.py gives them; what is missing is empty there.
enum { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };
enum { kInputNorm, kInnerNorm, kQueryNorm, kKeyNorm, kNorms };
constexpr int64_t kPerLinear = 4;  // weight, bias, a, b_t

struct Layer {
    std::vector<Tensor> norms;
    std::vector<Linear> linears;
    double eps;
};

Layer layer_of(
    const std::vector<Given>& tensors, const Maybe& gate, const std::vector<int64_t>& gate_offsets, int64_t first_row,
    double eps
) {
    Layer layer{{}, {}, eps};
    for (int number = 0; number < kNorms; number++) layer.norms.push_back(or_none(tensors[number]));
    const Tensor none(static_cast<AtenTensorHandle>(nullptr));
    for (int number = 0; number < kLinears; number++) {
        const Given* const own = tensors.data() + kNorms + kPerLinear * number;
        const Tensor a = gate ? or_none(own[2]) : none, open = a ? Tensor(gate->get()) : none;
        layer.linears.push_back(
            {or_none(own[0]), or_none(own[1]), a, open, {Tensor(own[3].get())}, first_row, gate_offsets[number]});
    }
    return layer;
}

bool is_norm_of(const Tensor& weight, int64_t depth) {
    return weight && weight.has(aoti_torch_dtype_float32()) && weight.is_dense(1) && weight.numel() == depth;
}

// Whether layer, rows and pool go together, all of them float.
bool fits(const Layer& layer, const Tensor& x, const Tensor& cos, const Tensor& keys) {
    for (const Linear& own : layer.linears)
        if (!is_sound(own, x)) return false;
    const int64_t dims = x.dims(), hidden = x.size(dims - 1), rows = x.numel() / hidden, head_dim = keys.size(3);
    const int64_t across = layer.linears[kQuery].width(), inner = layer.linears[kGate].width();
    const int64_t kv_across = keys.size(2) * head_dim;
    const int64_t depths[] = {hidden, hidden, hidden, across, hidden, hidden, inner};
    const int64_t widths[] = {across, kv_across, kv_across, hidden, inner, inner, hidden};
    if (!x.has(aoti_torch_dtype_float32()) || dims > kMostDims || !x.is_dense(dims) || across % kv_across) return false;
    for (int number = 0; number < kLinears; number++) {
        const Linear& own = layer.linears[number];
        if (own.depth() != depths[number] || own.width() != widths[number]) return false;
        if (!takes(own, rows)) return false;
    }
    for (int number = kQueryNorm; number < kNorms; number++)
        if (layer.norms[number] && !is_norm_of(layer.norms[number], head_dim)) return false;
    return is_norm_of(layer.norms[kInputNorm], hidden) && is_norm_of(layer.norms[kInnerNorm], hidden) &&
        cos.numel() == rows * head_dim;
}

// x [rows, hidden] -> y [rows, hidden]
void run_layer(
    const Layer& layer, const float* x, int64_t rows, int64_t hidden, const Tensor& cos, const Tensor& sin,
    const Tensor& keys, const Tensor& values, const int64_t* slots, const Tensor& table, const Tensor& positions,
    const Scores& how, float* y
) {
    const int64_t head_dim = keys.size(3), kv_heads = keys.size(2), heads = layer.linears[kQuery].width() / head_dim;
    const int64_t across = heads * head_dim, kv_across = kv_heads * head_dim, inner = layer.linears[kGate].width();
    const Floats floats(rows * (hidden + 2 * across + 2 * kv_across + 2 * inner));
    float* const normed = floats.data();  // and what a linear gives back to the stream
    float* const query = normed + rows * hidden;
    float* const attended = query + rows * across;
    float* const key = attended + rows * across;
    float* const value = key + rows * kv_across;
    float* const gate = value + rows * kv_across;
    float* const up = gate + rows * inner;
    const auto run = [&](int number, const float* from, float* to) { linear_of(from, rows, layer.linears[number], to); };
    norm(x, layer.norms[kInputNorm].data<float>(), layer.eps, rows, hidden, normed);
    run(kQuery, normed, query);
    run(kKey, normed, key);
    run(kValue, normed, value);
    const auto rotate = [&](float* rotated, int64_t own_heads, const Tensor& weight) {
        if (weight) norm(rotated, weight.data<float>(), layer.eps, rows * own_heads, head_dim, rotated);
        const Heads<float> all{rotated, rows, own_heads, own_heads * head_dim, head_dim};
        rotation_of(all, cos, sin, all);
        return all;
    };
    const Heads<float> queries = rotate(query, heads, layer.norms[kQueryNorm]);
    write(rotate(key, kv_heads, layer.norms[kKeyNorm]), slots, keys);
    write(Heads<float>{value, rows, kv_heads, kv_across, head_dim}, slots, values);
    const Tensor none(static_cast<AtenTensorHandle>(nullptr));
    attention_of(queries, none, keys, values, table, positions, how, Heads<float>{attended, rows, heads, across, head_dim});
    run(kOutput, attended, normed);
    for (int64_t i = 0; i < rows * hidden; i++) y[i] = x[i] + normed[i];
    norm(y, layer.norms[kInnerNorm].data<float>(), layer.eps, rows, hidden, normed);
    run(kGate, normed, gate);
    run(kUp, normed, up);
    gated_product(gate, up, rows * inner);
    run(kDown, gate, normed);
    for (int64_t i = 0; i < rows * hidden; i++) y[i] += normed[i];
}

Given decode_layer(
    Given x_, std::vector<Given> tensors, Maybe gate, std::vector<int64_t> gate_offsets, int64_t first_row, Given cos_,
    Given sin_, Given keys_, Given values_, Given slots_, Given table_, Given positions_, double eps, double scaling,
    int64_t window
) {
    const Tensor x(x_.get()), cos(cos_.get()), sin(sin_.get()), keys(keys_.get()), values(values_.get());
    const Tensor slots(slots_.get()), table(table_.get()), positions(positions_.get());
    if (tensors.size() != kNorms + kPerLinear * kLinears || gate_offsets.size() != kLinears)
        return checked(AOTI_TORCH_FAILURE, nullptr);
    const Layer layer = layer_of(tensors, gate, gate_offsets, first_row, eps);
    const int64_t dims = x.dims(), hidden = x.size(dims - 1), rows = x.numel() / hidden;
    if (keys.dims() != 4 || !fits(layer, x, cos, keys) || !keys.is_like(x) || !values.is_like(x) || !cos.is_like(x) ||
        !sin.is_like(x) || !cos.is_dense(3) || !sin.is_dense(3) || sin.numel() != cos.numel() || !is_index(slots) ||
        slots.numel() != rows ||
        !is_pool_of(keys, values, table, positions, rows, layer.linears[kQuery].width() / keys.size(3), keys.size(3)))
        return checked(AOTI_TORCH_FAILURE, nullptr);
    int64_t sizes[kMostDims];
    for (int64_t dim = 0; dim < dims; dim++) sizes[dim] = x.size(dim);
    AtenTensorHandle result = nullptr;
    const AOTITorchError error = new_tensor(x, dims, sizes, &result);
    if (error == AOTI_TORCH_SUCCESS)
        run_layer(
            layer, x.data<float>(), rows, hidden, cos, sin, keys, values, slots.data<int64_t>(), table, positions,
            {float(scaling), window, 0.0f}, Tensor(result).data<float>());
    return checked(error, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xlora, CPU, library) {
    library.impl("decode_drafting", TORCH_BOX(&decode_drafting));
    library.impl("decode_layer", TORCH_BOX(&decode_layer));
    library.impl("decode_scalings", TORCH_BOX(&decode_scalings));
    library.impl("decode_spread", TORCH_BOX(&decode_spread));
    library.impl("decode_linear", TORCH_BOX(&decode_linear));
    library.impl("decode_siblings", TORCH_BOX(&decode_siblings));
    library.impl("decode_self_attention", TORCH_BOX(&decode_self_attention));
    library.impl("decode_rotate", TORCH_BOX(&decode_rotate));
    library.impl("decode_norm", TORCH_BOX(&decode_norm));
}

extern "C" {

void xlora_set_helpers(int count, int guests) { Helpers::the().set(count, guests); }

int64_t xlora_repeated_chunks() { return Helpers::the().repeated(); }

}  // extern "C"

// A decoder layer with Llama's architecture, and the experts of its linears:
//
//     h = x + O attention(rotated Q n, rotated K n, V n)    n = norm(x)     Q n and K n may have norms of their own
//     y = h + D (silu(G m) * U m)                           m = norm(h)

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "chunks.h"
#include "elementwise.h"
#include "floats.h"
#include "helpers.h"
#include "tensors.h"

namespace {

constexpr int64_t kSpanRows = 16;  // rows of one stream that attend together, at most

// The rows of a step: their rotations, the slots that their keys and values are written to, and their spans.
struct Step {
    int64_t count;
    const float *cos, *sin;  // [count, head_dim]
    const int64_t* slots;    // [count]
    std::shared_ptr<std::vector<Span>> spans;
};

// An attention group: `segments` streams with `rows_each` rows each.
struct Group {
    Tensor table;  // [segments, blocks]
    int64_t rows_each;
};

std::vector<Span> spans_of(const std::vector<Group>& groups, const int64_t* positions) {
    std::vector<Span> spans;
    int64_t row = 0;
    for (const Group& group : groups)
        for (int64_t segment = 0; segment < group.table.size(0); segment++)
            for (int64_t left = group.rows_each; left > 0;) {
                const int64_t rows = std::min(left, kSpanRows);
                spans.push_back({group.table.data<int64_t>() + segment * group.table.size(1), row, rows, positions[row]});
                row += rows;
                left -= rows;
            }
    return spans;
}

// query [rows, heads, head_dim] -> result, like query. `keys` and `values` are the pool; `keep` returns the tables' owners.
template <typename Keep>
void attend(
    const float* query, int64_t heads, const Step& step, const Tensor& keys, const Tensor& values, const Scores& how,
    const Keep& keep, float* result
) {
    const Pool pool{keys.data<float>(), values.data<float>(), keys.size(1), keys.size(2), keys.size(3)};
    const int64_t head_dim = pool.head_dim, group = heads / pool.kv_heads, across = heads * head_dim;
    const std::vector<Span>& spans = *step.spans;
    int64_t seen = 0, products = 0;
    for (const Span& span : spans) {
        const int64_t known = span.position + span.rows, own = how.window ? std::min(how.window, known) : known;
        seen += own;
        products += 2 * own * span.rows * across;
    }
    const bool far = 2 * seen * pool.kv_heads * head_dim * int64_t(sizeof(float)) > kFarBytes;
    // The KV heads of a token are neighbours in memory, so they are one chunk, unless that made too few chunks.
    const int64_t count = int64_t(spans.size()), kv_heads = count <= Helpers::the().count() ? 1 : pool.kv_heads;
    const int64_t chunks_of_span = pool.kv_heads / kv_heads, chunk_across = kv_heads * group * head_dim;
    // Late helpers still read the query, which is in Floats, and the spans.
    const auto compute = [=, span = spans.data()](int64_t chunk, float* block) {
        const Span& own = span[chunk / chunks_of_span];
        const int64_t part = chunk % chunks_of_span;
        Attention attention(pool, own, part * kv_heads, kv_heads, group, far);
        attention.run(query + own.row * across + part * chunk_across, across, how, block, chunk_across);
    };
    const auto place = [&](int64_t chunk, const float* block) {
        const Span& own = spans[chunk / chunks_of_span];
        float* const to = result + own.row * across + chunk % chunks_of_span * chunk_across;
        for (int64_t row = 0; row < own.rows; row++) std::copy_n(block + row * chunk_across, chunk_across, to + row * across);
    };
    const auto keep_all = [&] {
        Owners owners = keep();
        owners.insert(owners.end(), {keys.owner(), values.owner(), step.spans});
        return owners;
    };
    const int64_t floats = (count == step.count ? 1 : kSpanRows) * chunk_across;
    in_chunks(is_worth_sharing(products), count * chunks_of_span, floats, compute, place, keep_all);
}

// Writes [count, heads, head_dim] to the slots of a pool [blocks, block_size, heads, head_dim].
void write(const float* from, const Step& step, const Tensor& pool) {
    const int64_t across = pool.size(2) * pool.size(3);
    for (int64_t row = 0; row < step.count; row++) std::copy_n(from + row * across, across, pool.data<float>() + step.slots[row] * across);
}

struct Layer {
    // In the order of the arguments of operators.cpp; norms of queries and keys may be missing.
    enum { kInputNorm, kInnerNorm, kQueryNorm, kKeyNorm, kNorms };
    enum { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };

    std::vector<Tensor> norms;
    std::vector<Linear> linears;
    double eps;

    // Whether its tensors fit together, and fit `rows` rows of `hidden` floats and the pool of keys.
    bool is_sound(int64_t rows, int64_t hidden, const Tensor& keys) const {
        for (const Linear& own : linears)
            if (!own.is_sound() || !own.takes(rows)) return false;
        const int64_t head_dim = keys.size(3), across = linears[kQuery].width(), inner = linears[kGate].width();
        const int64_t kv_across = keys.size(2) * head_dim;
        const int64_t depths[] = {hidden, hidden, hidden, across, hidden, hidden, inner};
        const int64_t widths[] = {across, kv_across, kv_across, hidden, inner, inner, hidden};
        if (!kv_across || across % kv_across) return false;
        for (int number = 0; number < kLinears; number++)
            if (linears[number].depth() != depths[number] || linears[number].width() != widths[number]) return false;
        for (int number = kQueryNorm; number < kNorms; number++)
            if (norms[number] && !is_norm_of(norms[number], head_dim)) return false;
        return is_norm_of(norms[kInputNorm], hidden) && is_norm_of(norms[kInnerNorm], hidden);
    }

    // Computes the layer in place of x [rows, hidden].
    template <typename Keep>
    void run(
        float* x, int64_t hidden, const Step& step, const Tensor& keys, const Tensor& values, const Scores& how, const Keep& keep
    ) const {
        const int64_t count = step.count, head_dim = keys.size(3), across = linears[kQuery].width();
        const int64_t kv_across = linears[kKey].width(), inner = linears[kGate].width();
        const Floats floats(count * (hidden + 2 * across + 2 * kv_across + 2 * inner));
        float* const normed = floats.data();  // and the outputs that are added to x
        float* const query = normed + count * hidden;
        float* const attended = query + count * across;
        float* const key = attended + count * across;
        float* const value = key + count * kv_across;
        float* const gate = value + count * kv_across;
        float* const up = gate + count * inner;
        const auto run = [&](int number, const float* from, float* to) { linears[number].run(from, count, to); };
        const auto add = [&] {
            for (int64_t i = 0; i < count * hidden; i++) x[i] += normed[i];
        };
        norm(x, norms[kInputNorm].data<float>(), eps, count, hidden, normed);
        run(kQuery, normed, query);
        run(kKey, normed, key);
        run(kValue, normed, value);
        turn(query, across / head_dim, head_dim, norms[kQueryNorm], step);
        turn(key, kv_across / head_dim, head_dim, norms[kKeyNorm], step);
        write(key, step, keys);
        write(value, step, values);
        attend(query, across / head_dim, step, keys, values, how, keep, attended);
        run(kOutput, attended, normed);
        add();
        norm(x, norms[kInnerNorm].data<float>(), eps, count, hidden, normed);
        run(kGate, normed, gate);
        run(kUp, normed, up);
        gated_product(gate, up, count * inner);
        run(kDown, gate, normed);
        add();
    }

private:
    static bool is_norm_of(const Tensor& weight, int64_t depth) { return is_dense_floats(weight, 1) && weight.numel() == depth; }

    // Norm, if there is one, and rotation of every head, in place, of [count, heads, head_dim].
    void turn(float* all, int64_t heads, int64_t head_dim, const Tensor& weight, const Step& step) const {
        if (weight) norm(all, weight.data<float>(), eps, step.count * heads, head_dim, all);
        for (int64_t row = 0; row < step.count; row++)
            for (int64_t head = 0; head < heads; head++, all += head_dim)
                rotate(all, step.cos + row * head_dim, step.sin + row * head_dim, head_dim);
    }
};

}  // namespace

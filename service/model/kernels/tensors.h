// Tensors of torch, and the operations of the other headers on them: whether shapes, strides and dtypes fit, and which of
// the templates compute.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "chunks.h"
#include "elementwise.h"
#include "helpers.h"
#include "linear.h"

namespace {

constexpr int64_t kMostDims = 4;

// A tensor that somebody else owns; none where there is no handle.
class Tensor {
public:
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}

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
    const bool shares = is_worth_sharing(2 * seen * query.heads * head_dim);
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
    in_chunks(shares, query.rows * chunks_of_row, heads * head_dim, compute, place, keep);
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

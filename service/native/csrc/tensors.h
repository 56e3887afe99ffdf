// torch's tensors, and adapted linears made of them: checks of shapes, strides and dtypes, and the choice of templates.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "linear.h"

namespace {

// A reference to a tensor; without a handle, none.
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

    int64_t numel() const {
        int64_t numel = 0;
        aoti_torch_get_numel(handle_, &numel);
        return numel;
    }

    bool is_float() const { return has(aoti_torch_dtype_float32()); }
    bool is_bfloat16() const { return has(aoti_torch_dtype_bfloat16()); }
    bool is_int64() const { return has(aoti_torch_dtype_int64()); }

    // Whether the dimensions from `first` on are contiguous, in row-major order.
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
    bool has(int32_t dtype) const {
        int32_t own = -1;
        aoti_torch_get_dtype(handle_, &own);
        return own == dtype;
    }

    AtenTensorHandle handle_;
};

using Owners = std::vector<std::shared_ptr<void>>;

// Whether it is a contiguous tensor of floats with `dims` dimensions.
bool is_dense_floats(const Tensor& tensor, int64_t dims) {
    return tensor && tensor.is_float() && tensor.dims() == dims && tensor.is_dense(dims);
}

bool is_index(const Tensor& tensor) { return tensor.is_int64() && tensor.dims() == 1 && tensor.is_dense(1); }

// The tensors of an adapted linear; without experts a, b_t and gate are missing. Weights and experts may be bfloat16.
struct Linear {
    Tensor weight, bias, a, b_t, gate;
    int64_t first_row = 0;    // experts act on the rows from here on
    int64_t gate_offset = 0;  // the index of its first rank in the rows of the gate

    int64_t depth() const { return weight.size(1); }
    int64_t width() const { return weight.size(0); }

    // Whether its tensors are contiguous and fit together.
    bool is_sound() const {
        if (!is_weight(weight) || (bias && !(is_dense_floats(bias, 1) && bias.numel() == width()))) return false;
        if (!a) return true;
        return is_weight(a) && is_weight(b_t) && a.is_float() == b_t.is_float() && a.size(1) == depth() &&
            b_t.size(1) == width() && a.size(0) == b_t.size(0) && gate && gate.is_float() && gate.dims() == 2 &&
            gate.is_dense(2, 1) && gate_offset >= 0 && gate_offset + a.size(0) <= gate.size(1);
    }

    // Whether its gate fits this many rows.
    bool takes(int64_t rows) const { return !a || (first_row >= 0 && gate.size(0) == rows - first_row); }

    // x [rows, depth] -> y [rows, width]
    void run(const float* x, int64_t rows, float* y) const {
        if (weight.is_bfloat16()) {
            (a && a.is_bfloat16() ? run_with<bfloat16, bfloat16>(x, rows, y) : run_with<bfloat16, float>(x, rows, y));
        } else {
            (a && a.is_bfloat16() ? run_with<float, bfloat16>(x, rows, y) : run_with<float, float>(x, rows, y));
        }
    }

private:
    static bool is_weight(const Tensor& tensor) {
        return tensor && (tensor.is_float() || tensor.is_bfloat16()) && tensor.dims() == 2 && tensor.is_dense(2);
    }

    template <typename W, typename E>
    void run_with(const float* x, int64_t rows, float* y) const {
        Experts<E> experts{};
        if (a) experts = {a.data<E>(), b_t.data<E>(), gate.data<float>() + gate_offset, a.size(0), gate.stride(0), first_row};
        const auto keep = [&] { return Owners{weight.owner(), a.owner(), b_t.owner()}; };
        linear(x, weight.data<W>(), bias.data<float>(), experts, rows, depth(), width(), keep, y);
    }
};

// A new tensor of floats.
AOTITorchError new_tensor(int64_t dims, const int64_t* sizes, AtenTensorHandle* result) {
    std::vector<int64_t> strides(dims);
    for (int64_t dim = dims - 1, stride = 1; dim >= 0; stride *= sizes[dim--]) strides[dim] = stride;
    return aoti_torch_empty_strided(
        dims, sizes, strides.data(), aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, result);
}

}  // namespace

// Runs work in chunks, on this thread alone or with helpers.

#pragma once

#include <cstdint>

#include "floats.h"
#include "helpers.h"

namespace {

constexpr int64_t kWorthSharing = 1 << 19;  // products, which take some microseconds

// Whether there are helpers, and enough products for them.
inline bool is_worth_sharing(int64_t products) { return products >= kWorthSharing && Helpers::the().count() > 0; }

// Calls compute(chunk, block) and place(chunk, block) for all chunks (see Helpers::share), with helpers if `is_shared`.
template <typename Compute, typename Place, typename Keep>
void in_chunks(
    bool is_shared, int64_t chunks, int64_t floats, const Compute& compute, const Place& place, const Keep& keep
) {
    const Floats block(floats);
    if (is_shared) return Helpers::the().share(chunks, floats, compute, place, keep, block.data());
    Helpers::alone(chunks, compute, place, block.data());
}

}  // namespace

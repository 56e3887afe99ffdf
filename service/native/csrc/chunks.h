// Work in chunks, by this thread alone or with helpers.

#pragma once

#include <cstdint>

#include "floats.h"
#include "helpers.h"

namespace {

constexpr int64_t kWorthSharing = 1 << 19;  // products: some microseconds

// Whether there are helpers, and so many products for them.
inline bool is_worth_sharing(int64_t products) { return products >= kWorthSharing && Helpers::the().count() > 0; }

// compute(chunk, block) and place(chunk, block) of all chunks, as Helpers have them; with helpers if it `shares` them.
template <typename Compute, typename Place, typename Keep>
void in_chunks(
    bool shares, int64_t chunks, int64_t floats, const Compute& compute, const Place& place, const Keep& keep
) {
    const Floats block(floats);
    if (shares) return Helpers::the().share(chunks, floats, compute, place, keep, block.data());
    Helpers::alone(chunks, compute, place, block.data());
}

}  // namespace

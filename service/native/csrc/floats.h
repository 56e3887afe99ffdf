// Work memory that a thread keeps and reuses.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "helpers.h"

namespace {

struct Room {
    Memory floats;
    int64_t size = 0;
};

// The free memory of a thread, which needs dozens of pieces in every layer.
struct Rooms : std::vector<Room> {
    ~Rooms() {
        for (Room& room : *this) Helpers::the().retire(std::move(room.floats));
    }
};
thread_local Rooms rooms;

// Uninitialised memory for `count` floats.
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
        if (room_.size < count) {  // replaces a smaller one, or their number would grow without end
            room_.size = std::max<int64_t>(count, 1 << 12);
            if (room_.floats) Helpers::the().retire(std::move(room_.floats));
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

}  // namespace

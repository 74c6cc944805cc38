// Memory that grows to what is asked for and is kept: nothing is allocated once a thread or a layer is warm.
//
// It begins with a cache line, since a vector that lies in two costs two accesses. Not for files of one instruction set:
// what is instantiated here serves all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace duomo {

template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};

    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
    void deallocate(T* values, size_t) { ::operator delete(values, line); }
    bool operator==(const LineAllocator&) const = default;
};

template <class T>
using Memory = std::vector<T, LineAllocator<T>>;

// Room for `count` values, whatever they are. Not a value more, and what was too small goes before: a vector that grows
// by itself holds twice what was asked for, and both while it copies.
template <class T>
T* grown(Memory<T>& memory, int64_t count) {
    if (int64_t(memory.size()) < count) {
        memory = {};
        memory.resize(size_t(count));
    }
    return memory.data();
}

}  // namespace duomo

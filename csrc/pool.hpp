// A thread pool of our own: fork, do items, join. The caller is one of the workers.
//
// A decode step has some hundred parallel pieces of 50 to 300 microseconds, so waking must cost about one: a worker
// spins for a moment after each piece and then parks on a futex, where it takes no time from torch's threads or from
// anybody else. Items are handed out one by one from a counter: on a busy machine a slow thread simply does fewer.
// Results never depend on which thread did what, because no item's arithmetic crosses into another's.
#pragma once

#include <cstdint>
#include <type_traits>

namespace duomo {

// Threads in use, the caller included. `set_num_threads(0)` takes the cores this process may run on, asked for once.
int num_threads();
void set_num_threads(int count);

// Calls body(context, item) for every item in [0, count). Bodies must not throw; scratch of theirs is thread_local.
// Calls from several threads take turns; a call from within a body runs its items in the caller.
void parallel(int64_t count, void (*body)(void* context, int64_t item), void* context);

template <class Body>
void parallel(int64_t count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    parallel(
        count, [](void* context, int64_t item) { (*static_cast<Plain*>(context))(item); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// The same for rows that take less time than handing one out does: they go out in runs, some for every thread.
template <class Body>
void parallel_rows(int64_t count, Body&& body) {
    const int64_t fair = count / (4 * num_threads()), run = fair < 1 ? 1 : fair > 16 ? 16 : fair;
    parallel((count + run - 1) / run, [&](int64_t item) {
        const int64_t end = (item + 1) * run < count ? (item + 1) * run : count;
        for (int64_t row = item * run; row < end; ++row) body(row);
    });
}

}  // namespace duomo

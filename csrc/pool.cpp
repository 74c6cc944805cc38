#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace duomo {
namespace {

thread_local bool is_inside = false;  // a body is running on this thread

constexpr int kSpins = 4000;  // about 20 microseconds of pauses before a worker parks

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int allowed_cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
    const unsigned count = std::thread::hardware_concurrency();
    return count ? int(count) : 1;
}

// Spins, then sleeps, until `word` differs from `old`.
uint32_t wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
        const uint32_t now = word.load(std::memory_order_acquire);
        if (now != old) return now;
        relax();
    }
    word.wait(old, std::memory_order_acquire);
    return word.load(std::memory_order_acquire);
}

class Pool {
public:
    explicit Pool(int count) : size_(count) {
        for (int thread = 1; thread < count; ++thread) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stopping_ = true;
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int size() const { return size_; }

    void run(int64_t count, void (*body)(void*, int64_t), void* context) {
        count_ = count;
        body_ = body;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
        ticket_.store(uint64_t(generation) << 32 | uint64_t(count), std::memory_order_release);
        generation_.store(generation, std::memory_order_release);
        generation_.notify_all();
        take_items(generation);
        for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != uint32_t(count);)
            wait_for_change(done_, done);
    }

private:
    // The ticket is the piece's number and its items left. Whoever takes one by exchange knows that the piece cannot
    // end before it reports the item done, so body, context and count are this piece's. The caller waits for items,
    // not for workers: one that is not awake, because another process has its core, is not missed.
    void take_items(uint32_t generation) {
        for (uint64_t ticket = ticket_.load(std::memory_order_acquire);;) {
            if (uint32_t(ticket >> 32) != generation || uint32_t(ticket) == 0) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            const int64_t count = count_;
            body_(context_, count - int64_t(uint32_t(ticket)));
            if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(count)) done_.notify_one();
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        uint32_t seen = 0;
        is_inside = true;
        for (;;) {
            seen = wait_for_change(generation_, seen);
            if (stopping_) return;
            take_items(seen);
        }
    }

    const int size_;
    std::vector<std::thread> workers_;
    std::atomic<bool> stopping_{false};
    int64_t count_ = 0;
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

std::mutex turn;  // one parallel piece at a time
Pool* pool = nullptr;
std::atomic<int> known_threads{0};  // 0: not asked yet

// A forked child has none of the parent's threads: it forgets the pool and makes its own when it needs one.
void forget() {
    pool = nullptr;
    new (&turn) std::mutex;
}

}  // namespace

int num_threads() {
    int count = known_threads.load(std::memory_order_relaxed);
    if (count == 0) known_threads.store(count = allowed_cores(), std::memory_order_relaxed);
    return count;
}

void set_num_threads(int count) { known_threads.store(count > 0 ? count : 0, std::memory_order_relaxed); }

void parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
    const int threads = num_threads();
    if (count <= 1 || threads == 1 || is_inside) {
        for (int64_t item = 0; item < count; ++item) body(context, item);
        return;
    }
    std::lock_guard<std::mutex> lock(turn);
    if (!pool || pool->size() != threads) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget);
        (void)registered;
        delete pool;
        pool = new Pool(threads);
    }
    is_inside = true;
    pool->run(count, body, context);
    is_inside = false;
}

}  // namespace duomo

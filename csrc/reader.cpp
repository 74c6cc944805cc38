#include "reader.hpp"

#include <atomic>
#include <cstring>

#include "pool.hpp"

namespace duomo {
namespace {

typedef uint64_t U64x8 __attribute__((vector_size(64)));
constexpr int64_t kPiece = 1 << 20;

uint64_t read_piece(const uint8_t* data, int64_t count) {
    U64x8 sum[4] = {};
    for (int64_t i = 0; i + 256 <= count; i += 256)
        for (int part = 0; part < 4; ++part) {
            U64x8 v;
            std::memcpy(&v, data + i + 64 * part, sizeof v);
            sum[part] ^= v;
        }
    const U64x8 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    uint64_t out = 0;
    for (int lane = 0; lane < 8; ++lane) out ^= all[lane];
    return out;
}

}  // namespace

uint64_t read_all(const uint8_t* data, int64_t count) {
    std::atomic<uint64_t> total{0};
    parallel((count + kPiece - 1) / kPiece, [&](int64_t item) {
        const int64_t first = item * kPiece, size = count - first < kPiece ? count - first : kPiece;
        total.fetch_xor(read_piece(data + first, size), std::memory_order_relaxed);
    });
    return total.load();
}

}  // namespace duomo

// A plain reader: what the memory gives when nothing is computed. The measure of every kernel that streams.
#pragma once

#include <cstdint>

namespace duomo {

// Reads all bytes once, on the pool, a mebibyte an item; the XOR of all whole 64-bit words.
uint64_t read_all(const uint8_t* data, int64_t count);

}  // namespace duomo

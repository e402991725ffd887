// Key limits of queries from the positions that tokens kept.

#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace pruneops {

// kv_limit[i] = number of keys of the query's segment whose position is at most the query's own.
// Key positions ascend within a segment; if they do not, the result is still within [0, k_len].
//   positions_q  [total_q]      positions_k  [total_k]      kv_limit  [total_q]
template <class Q, class K>
void kv_limit_from_positions(const Q* positions_q, const K* positions_k,
                             const std::vector<Segment>& segments, int32_t* kv_limit) {
  for (const Segment& s : segments) {
    const K* keys = positions_k + s.k_begin;
    for (int64_t i = s.q_begin; i < s.q_begin + s.q_len; ++i) {
      int64_t low = 0, high = s.k_len;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (static_cast<int64_t>(keys[middle]) <= static_cast<int64_t>(positions_q[i])) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      kv_limit[i] = static_cast<int32_t>(low);
    }
  }
}

}  // namespace pruneops

// Choosing rows of a packed tensor, segment by segment: the torch-free interface.
//
// Scores are turned into int32 keys that sort like the scores do: NaN lowest, -0.0 equal to +0.0. A
// protected row gets the highest key of all. What a segment keeps is then described by one cutoff
// key and a number of ties: every row above the cutoff, and the first rows that equal it.

#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/parallel.h"

namespace pruneops {

// What one segment keeps: rows with key > cutoff, and the first num_ties rows with key == cutoff.
struct SegmentCut {
  int32_t cutoff;
  int32_t num_ties;
  int32_t count;  // rows kept, protected ones included
};

struct SelectParams {
  const void* scores;  // [total], of score_type
  FloatType score_type;
  const uint8_t* protect;      // [total], nonzero = always kept; or null
  const int32_t* cu_seqlens;   // [num_segments + 1], sanitized (common/segments.h)
  const int32_t* keep_counts;  // [num_segments], unprotected rows to keep at least; or null for 0
  bool use_threshold;          // also keep every score > threshold
  float threshold;
  int64_t num_segments;
  int32_t* keys;     // scratch [total]
  SegmentCut* cuts;  // scratch [num_segments]
};

// Phase 1: fills keys and cuts.
void select_cuts(const SelectParams& params, const ParallelFor& parallel);

// Prefix sum of the kept counts, cut off at capacity. Returns the number kept without the cut.
//   cu_seqlens_out  [num_segments + 1], int32
int64_t select_offsets(const SelectParams& params, int64_t capacity, int32_t* cu_seqlens_out);

// Phase 2: writes the kept rows in ascending order.
//   cu_seqlens_out  [num_segments + 1], from select_offsets
//   indices         [capacity], int32; -1 behind cu_seqlens_out[num_segments]
void select_emit(const SelectParams& params, const int32_t* cu_seqlens_out, int32_t* indices,
                 int64_t capacity, const ParallelFor& parallel);

// The two per-segment steps, one pair per instruction set.
struct SelectKernels {
  // Fills params.keys of the segment and returns its cut.
  SegmentCut (*cut)(const SelectParams& params, int64_t segment);
  // Writes the first `limit` kept rows of the segment to out [limit].
  void (*emit)(const SelectParams& params, int64_t segment, int32_t* out, int32_t limit);
};

SelectKernels select_kernels_scalar();
SelectKernels select_kernels_avx2();
SelectKernels select_kernels_avx512();

}  // namespace pruneops

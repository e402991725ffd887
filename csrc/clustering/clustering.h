// DPC-kNN clustering of packed rows, segment by segment, and the means of clusters: the torch-free
// interface.
//
// A segment's rows are moved near the origin and packed into panels of a vector's width. Squared
// distances come from the Gram matrix of the panels, and from differences where the Gram matrix
// would cancel. Up to a limit they are stored, each pair computed once; above it every pass
// computes them anew, in tiles. Both give the same bits, on any number of threads.

#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/float_types.h"
#include "common/parallel.h"

namespace pruneops {

// The longest segment whose distances are stored by default: 64 MiB of them.
constexpr int64_t kMaxStoredRows = 4096;

struct DpcParams {
  const void* x;  // [total, channels], row stride below, unit stride within a row
  FloatType type;
  int64_t row_stride;  // elements
  int64_t channels;
  const int32_t* cu_seqlens;  // [num_segments + 1], sanitized (common/segments.h)
  int64_t num_segments;
  const int32_t* cu_clusters;  // [num_segments + 1], centres kept before each segment
  const float* noise;          // [total], or null
  int64_t k;                   // neighbours of the density, the row itself included
  int64_t max_stored_rows;     // longest segment whose distances are stored
  int32_t* cluster_ids;        // [total]; only rows of segments are written, here and below
  int32_t* center_indices;     // [cu_clusters[num_segments]]
  float* density;              // [total]
  float* delta;                // [total]
  float* score;                // [total]
};

// Centres that `count` asks for in a segment of `rows` rows.
inline int64_t clamped_clusters(int64_t count, int64_t rows) {
  if (count < 1) count = 1;
  return count < rows ? count : rows;
}

struct MeanParams {
  const void* x;  // [total, channels], row stride below, unit stride within a row
  FloatType type;
  int64_t row_stride;  // elements
  int64_t channels;
  const float* weights;         // [total], or null
  const int32_t* member_begin;  // [clusters + 1], where the members of a cluster begin
  const int32_t* members;       // rows, ascending within a cluster
  int64_t clusters;
  void* merged;  // [clusters, channels], contiguous, of type
};

struct PositionParams {
  const void* x;  // [total, channels], row stride below, unit stride within a row
  FloatType type;
  int64_t row_stride;  // elements
  int64_t channels;
  void* means;        // [rows, channels], contiguous, of type
  float* similarity;  // [rows]
};

// Neighbouring positions in the frames of one segment.
struct PositionRun {
  int64_t first_row;   // of x, of the first position in the first frame
  int64_t first_out;   // row of the results
  int64_t positions;   // of the run
  int64_t frame_rows;  // positions of a whole frame
  int64_t frames;
};

// Rows of one segment, or its centres, in panels of ClusterKernels::panel_rows rows, channel by
// channel: element (row, c) at [row / panel_rows][c][row % panel_rows].
struct Panels {
  float* values;   // [padded / panel_rows][channels][panel_rows], 0 behind the last row
  float* norms;    // [padded], squared
  int64_t rows;    // without padding
  int64_t padded;  // a multiple of panel_rows
  int64_t channels;
};

// Where rows come from: consecutive ones, or those that `indices` names.
struct SourceRows {
  const char* data;  // the first row
  FloatType type;
  int64_t row_bytes;
  const int32_t* indices;  // [rows], or null
};

// The steps that depend on the instruction set. Squared distances are means over the channels;
// rows of them are padded to a multiple of panel_rows with +inf.
struct ClusterKernels {
  int64_t panel_rows;
  int64_t tile_panels;  // panels that one tile spans

  // A point near the rows, with few significant bits, so that subtracting it loses nothing.
  //   origin   [channels]
  //   scratch  [4 * channels]
  void (*choose_origin)(const SourceRows& source, int64_t rows, int64_t channels, float* origin,
                        float* scratch);
  // Fills panels [begin, end) with rows minus origin, and their norms.
  //   scratch  [pack_scratch]
  void (*pack)(const SourceRows& source, const float* origin, const Panels& panels, int64_t begin,
               int64_t end, float* scratch);
  int64_t pack_scratch;
  // Squared distances of panel pairs (p, q), p in [p_begin, p_end), q in [q_begin, q_end), p <= q,
  // and of (q, p).
  //   out  [rows][padded]
  void (*store_distances)(const Panels& panels, int64_t p_begin, int64_t p_end, int64_t q_begin,
                          int64_t q_end, float* out);
  // Squared distances of panel p of `a` to panels [q, q + count) of `b`, count <= tile_panels; 0
  // for a row and itself where a and b are the same panels.
  //   out  [panel_rows][tile_panels * panel_rows]
  void (*tile_distances)(const Panels& a, int64_t p, const Panels& b, int64_t q, int64_t count,
                         float* out);
  // Takes values into the k smallest so far, and returns the largest of them and `largest`.
  //   values  [padded], the first `count` are no padding
  //   heap    [k], largest first; +inf at the start
  float (*update_nearest)(const float* values, int64_t count, int64_t padded, float* heap,
                          int64_t k, float largest);
  // The smallest of `best` and the values at denser rows. With `ties`, an equal density is denser
  // at columns below `row`.
  //   values, density  [padded]
  float (*update_delta)(const float* values, const float* density, int64_t padded,
                        float own_density, bool ties, int64_t row, float best);
  // Gives columns to the centre `rank` where it is nearer than the best one so far.
  //   values, best, ids  [padded]; ids hold ranks
  void (*update_nearest_center)(const float* values, int64_t padded, int64_t rank, float* best,
                                float* ids);
  // Means of the clusters [begin, end).
  void (*mean)(const MeanParams& params, int64_t begin, int64_t end);
  // Means and similarity of one run.
  //   scratch  [2 * channels]
  void (*position_means)(const PositionParams& params, const PositionRun& run, float* scratch);
};

// The kernels of `isa`, or of the best one below it that was compiled.
const ClusterKernels& cluster_kernels(Isa isa);

void dpc_knn(const DpcParams& params, const ClusterKernels& kernels, const ParallelFor& parallel);

void merge_mean(const MeanParams& params, const ClusterKernels& kernels,
                const ParallelFor& parallel);

//   runs  [num_runs]
void position_means(const PositionParams& params, const PositionRun* runs, int64_t num_runs,
                    const ClusterKernels& kernels, const ParallelFor& parallel);

}  // namespace pruneops

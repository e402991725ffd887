// DPC-kNN of one segment after the other, or of several at once: what is computed, in which order,
// by which thread. The arithmetic on distances is in the per-ISA files.

#include <math.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "clustering/clustering.h"
#include "clustering/cpu/tasks.h"
#include "common/huge_pages.h"

namespace pruneops {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Panels that one task compares with as many others should stay in this much cache.
constexpr int64_t kCacheBytes = int64_t{768} << 10;
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kColumnsPerTask = 1024;
// Panels of rows that share the panels which pass by, where distances are not stored.
constexpr int64_t kStripPanels = 8;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out 64-byte aligned arrays. Started at null it only adds up the size.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(new char[bytes + 63]) {
    advise_huge_pages(data_.get(), bytes + 63);
  }

  char* data() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.get());
    return data_.get() +
           (round_up(static_cast<int64_t>(address), 64) - static_cast<int64_t>(address));
  }

 private:
  std::unique_ptr<char[]> data_;
};

struct Segment {
  int64_t first;     // row of x
  int64_t rows;      // at least 1
  int64_t clusters;  // centres kept
  int64_t center;    // place of the first one in center_indices
};

// What the clustering of one segment needs, for up to `rows` rows and `clusters` centres.
struct Workspace {
  Panels panels;
  Panels centers;    // only where distances are not stored
  float* distances;  // [rows][padded], or null
  float* origin;     // [channels]
  float* scratch;    // [4 * channels]
  float* density;    // [padded]
  float* largest;    // [rows], of each row's distances
  float* best;       // [padded]: of each row, the distance to the nearest centre so far,
  float* ids;        // [padded]: and its rank
  int32_t* order;    // [rows]
  // One a worker:
  float* staging;  // [pack_scratch]
  float* tile;     // [panel_rows * tile_panels * panel_rows]
  float* heaps;    // [strip rows][heap_size]
  int64_t staging_size;
  int64_t tile_size;
  int64_t heap_size;
  int64_t heaps_size;

  Workspace(const DpcParams& p, const ClusterKernels& kernels, int64_t rows, int64_t clusters,
            int64_t workers, Arena& arena) {
    const int64_t padded = round_up(rows, kernels.panel_rows);
    const bool stored = rows <= p.max_stored_rows;
    panels = take_panels(p, kernels, rows, arena);
    centers = stored ? Panels{} : take_panels(p, kernels, clusters, arena);
    distances = stored ? arena.take<float>(rows * padded) : nullptr;
    origin = arena.take<float>(p.channels);
    scratch = arena.take<float>(4 * p.channels);
    density = arena.take<float>(padded);
    largest = arena.take<float>(rows);
    best = arena.take<float>(padded);
    ids = arena.take<float>(padded);
    order = arena.take<int32_t>(rows);
    heap_size = std::min(p.k, rows);
    heaps_size = round_up((stored ? 1 : kStripPanels * kernels.panel_rows) * heap_size, 16);
    staging_size = round_up(kernels.pack_scratch, 16);
    tile_size = round_up(kernels.panel_rows * kernels.tile_panels * kernels.panel_rows, 16);
    staging = arena.take<float>(workers * staging_size);
    tile = arena.take<float>(workers * tile_size);
    heaps = arena.take<float>(workers * heaps_size);
  }

  static Panels take_panels(const DpcParams& p, const ClusterKernels& kernels, int64_t rows,
                            Arena& arena) {
    const int64_t padded = round_up(rows, kernels.panel_rows);
    Panels panels{};
    panels.values = arena.take<float>(padded * p.channels);
    panels.norms = arena.take<float>(padded);
    panels.rows = rows;
    panels.padded = padded;
    panels.channels = p.channels;
    return panels;
  }
};

int64_t workspace_bytes(const DpcParams& p, const ClusterKernels& kernels, int64_t rows,
                        int64_t clusters, int64_t workers) {
  Arena arena(nullptr);
  const Workspace sizes(p, kernels, rows, clusters, workers, arena);
  return arena.used();
}

// The clustering of one segment.
class Clustering {
 public:
  Clustering(const DpcParams& params, const ClusterKernels& kernels, const Segment& segment,
             const ParallelFor& parallel, char* memory)
      : p_(params),
        kernels_(kernels),
        segment_(segment),
        parallel_(parallel),
        arena_(memory),
        w_(params, kernels, segment.rows, segment.clusters, std::max(parallel.num_threads, 1),
           arena_) {}

  void run() {
    const SourceRows source = source_rows(nullptr);
    kernels_.choose_origin(source, segment_.rows, p_.channels, w_.origin, w_.scratch);
    pack(source, w_.panels);
    if (w_.distances != nullptr) store_distances();
    find_density();
    find_delta();
    choose_centers();
    if (segment_.clusters > 0) assign();
  }

 private:
  SourceRows source_rows(const int32_t* indices) const {
    const int64_t row_bytes = p_.row_stride * element_size(p_.type);
    return {static_cast<const char*>(p_.x) + segment_.first * row_bytes, p_.type, row_bytes,
            indices};
  }

  void pack(const SourceRows& source, const Panels& panels) {
    const int64_t count = panels.padded / kernels_.panel_rows;
    run_tasks(parallel_, count, [&](int64_t panel, int64_t worker) {
      kernels_.pack(source, w_.origin, panels, panel, panel + 1,
                    w_.staging + worker * w_.staging_size);
    });
  }

  // Blocks of panels on and above the diagonal of the distance matrix.
  void store_distances() {
    const int64_t width = kernels_.tile_panels;
    const int64_t count = w_.panels.padded / kernels_.panel_rows;
    const int64_t panel_bytes = kernels_.panel_rows * std::max<int64_t>(p_.channels, 1) *
                                static_cast<int64_t>(sizeof(float));
    int64_t block = kCacheBytes / (2 * panel_bytes);
    if (parallel_.num_threads > 1) block = std::min(block, count / (4 * parallel_.num_threads));
    block = std::max(block / width, int64_t{1}) * width;
    const int64_t blocks = (count + block - 1) / block;
    // Blocks of the same columns follow each other.
    run_tasks(parallel_, blocks * (blocks + 1) / 2, [&](int64_t task, int64_t) {
      int64_t column = 0;
      while (task > column) task -= ++column;
      kernels_.store_distances(w_.panels, task * block, std::min((task + 1) * block, count),
                               column * block, std::min((column + 1) * block, count), w_.distances);
    });
  }

  // Calls f(row, heap, values, column, count, padded) for every row and all of its distances, at
  // once or, where they are not stored, in pieces from left to right; before(row, heap) first and
  // after(row, heap) last.
  template <class Before, class Piece, class After>
  void for_each_row(const Before& before, const Piece& piece, const After& after) {
    const int64_t rows = segment_.rows;
    const int64_t padded = w_.panels.padded;
    if (w_.distances != nullptr) {
      const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
      run_tasks(parallel_, tasks, [&](int64_t task, int64_t worker) {
        float* heap = w_.heaps + worker * w_.heaps_size;
        for (int64_t i = task * kRowsPerTask; i < std::min((task + 1) * kRowsPerTask, rows); ++i) {
          before(i, heap);
          piece(i, heap, w_.distances + i * padded, 0, rows, padded);
          after(i, heap);
        }
      });
      return;
    }
    const int64_t width = kernels_.panel_rows;
    const int64_t panels = padded / width;
    const int64_t strip = kStripPanels * width;
    run_tasks(parallel_, (panels + kStripPanels - 1) / kStripPanels,
              [&](int64_t task, int64_t worker) {
                float* heaps = w_.heaps + worker * w_.heaps_size;
                float* tile = w_.tile + worker * w_.tile_size;
                const int64_t begin = task * strip;
                const int64_t end = std::min(begin + strip, rows);
                const auto heap = [&](int64_t row) { return heaps + (row - begin) * w_.heap_size; };
                for (int64_t i = begin; i < end; ++i) before(i, heap(i));
                for (int64_t q = 0; q < panels; q += kernels_.tile_panels) {
                  const int64_t count = std::min(kernels_.tile_panels, panels - q);
                  const int64_t valid = std::min(count * width, rows - q * width);
                  for (int64_t i = begin; i < end; i += width) {
                    kernels_.tile_distances(w_.panels, i / width, w_.panels, q, count, tile);
                    for (int64_t m = 0; m < std::min(width, end - i); ++m) {
                      piece(i + m, heap(i + m), tile + m * kernels_.tile_panels * width, q * width,
                            valid, count * width);
                    }
                  }
                }
                for (int64_t i = begin; i < end; ++i) after(i, heap(i));
              });
  }

  void find_density() {
    float* density = p_.density + segment_.first;
    const float* noise = p_.noise == nullptr ? nullptr : p_.noise + segment_.first;
    const int64_t k = w_.heap_size;
    for_each_row(
        [&](int64_t row, float* heap) {
          std::fill(heap, heap + k, kInfinity);
          w_.largest[row] = 0.0f;
        },
        [&](int64_t row, float* heap, const float* values, int64_t, int64_t count, int64_t padded) {
          w_.largest[row] =
              kernels_.update_nearest(values, count, padded, heap, k, w_.largest[row]);
        },
        [&](int64_t row, const float* heap) {
          double sum = 0.0;
          for (int64_t i = 0; i < k; ++i) sum += heap[i];
          density[row] = static_cast<float>(exp(-sum / static_cast<double>(k)));
          if (noise != nullptr) density[row] += noise[row] * 1e-6f;
        });
    std::copy(density, density + segment_.rows, w_.density);
    std::fill(w_.density + segment_.rows, w_.density + w_.panels.padded, -kInfinity);
  }

  void find_delta() {
    float* delta = p_.delta + segment_.first;
    float* score = p_.score + segment_.first;
    const float largest = *std::max_element(w_.largest, w_.largest + segment_.rows);
    for_each_row(
        [&](int64_t row, float*) { delta[row] = kInfinity; },
        [&](int64_t row, float*, const float* values, int64_t column, int64_t, int64_t padded) {
          delta[row] = kernels_.update_delta(values, w_.density + column, padded, w_.density[row],
                                             p_.noise == nullptr, row - column, delta[row]);
        },
        [&](int64_t row, const float*) {
          // No denser row, or one infinitely far, which is then the largest distance.
          delta[row] = sqrtf(delta[row] < kInfinity ? delta[row] : largest);
          score[row] = delta[row] * w_.density[row];
        });
  }

  void choose_centers() {
    const float* score = p_.score + segment_.first;
    std::iota(w_.order, w_.order + segment_.rows, 0);
    std::partial_sort(w_.order, w_.order + segment_.clusters, w_.order + segment_.rows,
                      [score](int32_t a, int32_t b) {
                        const float x = score[a], y = score[b];
                        if (x > y || x < y) return x > y;
                        if (isnan(x) != isnan(y)) return static_cast<bool>(isnan(y));
                        return a < b;
                      });
    for (int64_t c = 0; c < segment_.clusters; ++c) {
      p_.center_indices[segment_.center + c] = static_cast<int32_t>(segment_.first) + w_.order[c];
    }
    if (segment_.clusters > 0) return;
    int32_t* ids = p_.cluster_ids + segment_.first;
    std::fill(ids, ids + segment_.rows, -1);
  }

  void assign() {
    const int64_t rows = segment_.rows;
    const int64_t padded = w_.panels.padded;
    int32_t* ids = p_.cluster_ids + segment_.first;
    if (w_.distances == nullptr) {
      w_.centers.rows = segment_.clusters;
      pack(source_rows(w_.order), w_.centers);
    }
    const int64_t tile_columns = kernels_.tile_panels * kernels_.panel_rows;
    const int64_t columns = w_.distances != nullptr
                                ? round_up(kColumnsPerTask, kernels_.panel_rows)
                                : round_up(kStripPanels * kernels_.panel_rows, tile_columns);
    run_tasks(parallel_, (padded + columns - 1) / columns, [&](int64_t task, int64_t worker) {
      const int64_t begin = task * columns;
      const int64_t end = std::min(begin + columns, padded);
      std::fill(w_.best + begin, w_.best + end, kInfinity);
      std::fill(w_.ids + begin, w_.ids + end, 0.0f);
      if (w_.distances != nullptr) {
        for (int64_t c = 0; c < segment_.clusters; ++c) {
          kernels_.update_nearest_center(w_.distances + w_.order[c] * padded + begin, end - begin,
                                         c, w_.best + begin, w_.ids + begin);
        }
      } else {
        float* tile = w_.tile + worker * w_.tile_size;
        const int64_t width = kernels_.panel_rows;
        for (int64_t c = 0; c < segment_.clusters; c += width) {
          for (int64_t i = begin; i < end; i += tile_columns) {
            const int64_t count = std::min(tile_columns, end - i);
            kernels_.tile_distances(w_.centers, c / width, w_.panels, i / width, count / width,
                                    tile);
            for (int64_t m = 0; m < std::min(width, segment_.clusters - c); ++m) {
              kernels_.update_nearest_center(tile + m * tile_columns, count, c + m, w_.best + i,
                                             w_.ids + i);
            }
          }
        }
      }
      for (int64_t i = begin; i < std::min(end, rows); ++i) {
        ids[i] = static_cast<int32_t>(w_.ids[i]);
      }
    });
    for (int64_t c = 0; c < segment_.clusters; ++c) ids[w_.order[c]] = static_cast<int32_t>(c);
  }

  const DpcParams& p_;
  const ClusterKernels& kernels_;
  const Segment& segment_;
  const ParallelFor& parallel_;
  Arena arena_;
  Workspace w_;
};

double work(const Segment& segment) {
  return static_cast<double>(segment.rows) * static_cast<double>(segment.rows);
}

}  // namespace

void dpc_knn(const DpcParams& p, const ClusterKernels& kernels, const ParallelFor& parallel) {
  std::vector<Segment> segments;
  double total = 0.0;
  for (int64_t b = 0; b < p.num_segments; ++b) {
    const int64_t first = p.cu_seqlens[b], rows = p.cu_seqlens[b + 1] - first;
    const int64_t center = p.cu_clusters[b], clusters = p.cu_clusters[b + 1] - center;
    if (rows == 0) continue;
    segments.push_back({first, rows, clusters, center});
    total += work(segments.back());
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.rows > b.rows; });

  // All threads share a segment that is a good part of the work; of the others each thread takes
  // whole ones.
  const int64_t threads = std::max(parallel.num_threads, 1);
  const double share = total / static_cast<double>(2 * threads);
  size_t shared = 0;
  if (threads > 1) {
    while (shared < segments.size() && work(segments[shared]) > share) ++shared;
  }
  const auto largest = [&](size_t begin, size_t end, int64_t workers) {
    int64_t bytes = 0;
    for (size_t i = begin; i < end; ++i) {
      bytes = std::max(
          bytes, workspace_bytes(p, kernels, segments[i].rows, segments[i].clusters, workers));
    }
    return bytes;
  };
  const int64_t rest = static_cast<int64_t>(segments.size() - shared);
  const int64_t workers = std::min(threads, rest);
  const int64_t bytes_each = largest(shared, segments.size(), 1);
  const Memory memory(std::max(largest(0, shared, threads), workers * bytes_each));
  for (size_t i = 0; i < shared; ++i) {
    Clustering(p, kernels, segments[i], parallel, memory.data()).run();
  }
  const ParallelFor serial{nullptr, nullptr, 1};
  run_tasks(parallel, rest, [&](int64_t task, int64_t worker) {
    Clustering(p, kernels, segments[shared + static_cast<size_t>(task)], serial,
               memory.data() + worker * bytes_each)
        .run();
  });
}

void merge_mean(const MeanParams& p, const ClusterKernels& kernels, const ParallelFor& parallel) {
  constexpr int64_t kClustersPerTask = 8;
  run_tasks(parallel, (p.clusters + kClustersPerTask - 1) / kClustersPerTask,
            [&](int64_t task, int64_t) {
              kernels.mean(p, task * kClustersPerTask,
                           std::min((task + 1) * kClustersPerTask, p.clusters));
            });
}

}  // namespace pruneops

// The schemas of every pruneops op. This is the only file that defines schemas; the wrappers in
// csrc/<family>/<family>_cpu.cpp register implementations for them. Sizes are SymInt, so that
// tracing with dynamic shapes keeps them symbolic; the kernels receive int64_t.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pruneops, m) {
  // Selection: which rows of a packed tensor stay.
  m.def(
      "segment_topk(Tensor scores, Tensor cu_seqlens, Tensor keep_counts, SymInt capacity, "
      "Tensor? protect=None) -> (Tensor indices, Tensor cu_seqlens_out)");
  m.def(
      "segment_threshold(Tensor scores, Tensor cu_seqlens, float threshold, SymInt capacity, "
      "Tensor? min_keep=None, Tensor? protect=None) -> (Tensor indices, Tensor cu_seqlens_out)");

  // Compaction: move the rows that stay.
  m.def("gather_rows(Tensor[] tensors, Tensor indices) -> Tensor[]");
  m.def("scatter_rows(Tensor[] tensors, Tensor indices, SymInt total) -> Tensor[]");
  m.def(
      "select_compact(Tensor scores, Tensor[] tensors, Tensor cu_seqlens, Tensor keep_counts, "
      "SymInt capacity, Tensor? protect=None) "
      "-> (Tensor[] tensors, Tensor indices, Tensor cu_seqlens_out)");

  // Attention over packed sequences and cache slots, and the scores taken from it.
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale, "
      "Tensor? kv_limit=None, Tensor? seqused_k=None) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "varlen_attention_backward(Tensor dout, Tensor? dsoftmax_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor softmax_lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale, "
      "Tensor? kv_limit=None) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqused_k, "
      "float softmax_scale, int num_splits, bool return_scores) "
      "-> (Tensor out, Tensor softmax_lse, Tensor scores)");
  m.def(
      "last_query_scores(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "float softmax_scale, str head_reduce, str query_reduce, Tensor? kv_limit=None) -> Tensor");
  m.def(
      "column_scores(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale, "
      "str query_reduce, str head_reduce, Tensor? softmax_lse=None) -> Tensor");
  m.def(
      "kv_limit_from_positions(Tensor position_ids_q, Tensor position_ids_k, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k) -> Tensor");

  // Clustering: DPC-kNN over packed segments, and the means of its clusters.
  m.def(
      "dpc_knn(Tensor x, Tensor cu_seqlens, Tensor num_clusters, SymInt k, SymInt max_seqlen, "
      "SymInt capacity, Tensor? noise=None) -> (Tensor cluster_ids, Tensor center_indices, "
      "Tensor cu_clusters, Tensor density, Tensor delta, Tensor score)");
  m.def(
      "merge_mean(Tensor x, Tensor cluster_ids, Tensor cu_seqlens, Tensor num_clusters, "
      "SymInt capacity, Tensor? weights=None) -> (Tensor merged, Tensor counts)");
}

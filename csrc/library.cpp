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
  m.def(
      "scatter_scaled(Tensor x, Tensor residual, Tensor branch, Tensor weights, Tensor indices) "
      "-> Tensor");
  m.def(
      "scatter_scaled_backward(Tensor dout, Tensor x, Tensor branch, Tensor weights, "
      "Tensor indices) -> (Tensor dx, Tensor dresidual, Tensor dbranch, Tensor dweights)");

  // Routing: a weight for every row, learned.
  m.def(
      "router_weights(Tensor x, Tensor weight, Tensor? bias, Tensor? target, str activation, "
      "float scale, float shift) -> (Tensor logits, Tensor weights)");
  m.def(
      "router_weights_backward(Tensor dweights, Tensor logits, Tensor x, Tensor weight, "
      "Tensor? target, str activation, float scale) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");

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
      "policy_attention(Tensor q, Tensor k, Tensor v, Tensor policy, Tensor cu_seqlens, "
      "SymInt max_seqlen, float softmax_scale, float epsilon) "
      "-> (Tensor out, Tensor softmax_max, Tensor softmax_sum)");
  m.def(
      "policy_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor policy, "
      "Tensor out, Tensor softmax_max, Tensor softmax_sum, Tensor cu_seqlens, SymInt max_seqlen, "
      "float softmax_scale, float epsilon) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dpolicy)");
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
  m.def(
      "position_means(Tensor x, Tensor cu_seqlens, Tensor num_positions, SymInt capacity) "
      "-> (Tensor means, Tensor similarity)");
}

"""Text-to-image person retrieval with MRA: encode, rank, re-rank, fuse, measure, draw."""

from typing import TYPE_CHECKING

from mra.common.lazy import lazy_names


if TYPE_CHECKING:
    from mra.common.drawing import RankedQuery, draw_rankings
    from mra.retrieval.encode import ImageEncodings, TextEncodings, encode_images, encode_texts
    from mra.retrieval.evaluation import RetrievalResult, evaluate_retrieval, format_table
    from mra.retrieval.matching import PairMatcher, match_pairs
    from mra.retrieval.metrics import QueryMetrics, query_metrics, retrieval_metrics
    from mra.retrieval.paired_bootstrap import PairedDifference, paired_difference
    from mra.retrieval.rerank_depth import choose_rerank_depth
    from mra.retrieval.reranking import rerank, similarity_matrix, top_k
    from mra.retrieval.retrieval_choice import RetrievalChoice, choose_retrieval, fusion_candidates
    from mra.retrieval.score_fusion import fuse_scores


__all__ = [
    "ImageEncodings",
    "PairMatcher",
    "PairedDifference",
    "QueryMetrics",
    "RankedQuery",
    "RetrievalChoice",
    "RetrievalResult",
    "TextEncodings",
    "choose_rerank_depth",
    "choose_retrieval",
    "draw_rankings",
    "encode_images",
    "encode_texts",
    "evaluate_retrieval",
    "format_table",
    "fuse_scores",
    "fusion_candidates",
    "match_pairs",
    "paired_difference",
    "query_metrics",
    "rerank",
    "retrieval_metrics",
    "similarity_matrix",
    "top_k",
]

_MODULES = {
    "mra.common.drawing": ("RankedQuery", "draw_rankings"),
    "mra.retrieval.encode": ("ImageEncodings", "TextEncodings", "encode_images", "encode_texts"),
    "mra.retrieval.evaluation": ("RetrievalResult", "evaluate_retrieval", "format_table"),
    "mra.retrieval.matching": ("PairMatcher", "match_pairs"),
    "mra.retrieval.metrics": ("QueryMetrics", "query_metrics", "retrieval_metrics"),
    "mra.retrieval.paired_bootstrap": ("PairedDifference", "paired_difference"),
    "mra.retrieval.rerank_depth": ("choose_rerank_depth",),
    "mra.retrieval.reranking": ("rerank", "similarity_matrix", "top_k"),
    "mra.retrieval.retrieval_choice": ("RetrievalChoice", "choose_retrieval", "fusion_candidates"),
    "mra.retrieval.score_fusion": ("fuse_scores",),
}

__getattr__, __dir__ = lazy_names(__name__, {name: module for module, names in _MODULES.items() for name in names})

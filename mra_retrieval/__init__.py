"""Text-to-image person retrieval with MRA: encode, rank, re-rank, fuse, measure, draw."""

from .encode import ImageEncodings, TextEncodings, encode_images, encode_texts
from .evaluation import RetrievalResult, evaluate_retrieval, format_table
from .figures import RankedQuery, draw_rankings
from .matching import PairMatcher, match_pairs
from .metrics import retrieval_metrics
from .rerank import rerank, similarity_matrix, top_k
from .rerank_depth import RerankDepth, choose_rerank_depth
from .score_fusion import fuse_scores


__all__ = [
    "ImageEncodings",
    "PairMatcher",
    "RankedQuery",
    "RerankDepth",
    "RetrievalResult",
    "TextEncodings",
    "choose_rerank_depth",
    "draw_rankings",
    "encode_images",
    "encode_texts",
    "evaluate_retrieval",
    "format_table",
    "fuse_scores",
    "match_pairs",
    "rerank",
    "retrieval_metrics",
    "similarity_matrix",
    "top_k",
]

"""Text-to-image person retrieval with MRA: encode, rank, re-rank, fuse, measure, draw."""

from typing import TYPE_CHECKING

from .encode import ImageEncodings, TextEncodings, encode_images, encode_texts
from .evaluation import RetrievalResult, evaluate_retrieval, format_table
from .figures import RankedQuery, draw_rankings
from .matching import PairMatcher, match_pairs
from .metrics import retrieval_metrics
from .rerank import rerank, similarity_matrix, top_k
from .rerank_depth import choose_rerank_depth
from .retrieval_choice import RetrievalChoice, choose_retrieval, fusion_candidates
from .score_fusion import fuse_scores


if TYPE_CHECKING:
    from .gallery import Gallery

__all__ = [
    "Gallery",
    "ImageEncodings",
    "PairMatcher",
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
    "rerank",
    "retrieval_metrics",
    "similarity_matrix",
    "top_k",
]


def __getattr__(name: str):
    """Import `Gallery` when it is asked for: what it stands on is the extra [search]."""
    if name == "Gallery":
        from .gallery import Gallery

        return Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Evaluation of a model on one split of a person-search set: encode, rank, re-rank, measure."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel

from mra.common.sharding import Shard
from mra.retrieval.encode import Rows, encode_images, encode_texts
from mra.retrieval.metrics import QueryMetrics, query_metrics, retrieval_metrics
from mra.retrieval.reranking import rerank_logits, similarity_matrix, top_k
from mra.retrieval.score_fusion import (
    DEFAULT_SCORE_FUSION,
    SCORE_FUSIONS,
    fuse_scores,
    fusion_name,
    match_scores,
    require_finite,
)
from processing_mra import MRAProcessor


if TYPE_CHECKING:  # search does not need `datasets`
    import datasets

    from mra.common.tables import Table

logger = logging.getLogger(__name__)

# Titles of the metrics in tables.
METRIC_TITLES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP": "mAP", "mINP": "mINP"}

REQUIRED_COLUMNS = ("image", "captions", "image_id")


@dataclass
class RetrievalResult:
    """Result of an evaluation, the same on every process.

    Attributes:
        metrics: `similarity` and, with re-ranking, `reranked`: each a dict of R1, R5, R10, mAP and mINP in percent.
        queries: for the same rankings, the results of each query.
        timings: seconds of each stage on this process, and re-ranked pairs per second over all processes.
        counts: identities, images and captions evaluated.
        rerank_k: images re-ranked per query, 0 for none; at most the size of the gallery.
        score_fusion: fusion of `reranked`.
        match_weight: weight of the matching log-odds in "posterior", None for other fusions.
        flip: whether mirror images were used.
        dtype: dtype of the forward passes, for example "float32".
        temperature: the model's learned temperature, or None.
        similarity: `(captions, images)` float32.
        reranked: fused scores, `(captions, images)` float32, or None.
        top_indices: re-ranked images of each query, `(captions, rerank_k)`, or None.
        match_logits: logits of the matching head (class 1 is "match"), `(views, captions, rerank_k, 2)`, or None.
        query_ids: identity of each query, `(captions,)`.
        query_rows: dataset row of each query, `(captions,)`.
        gallery_ids: identity of each dataset row, `(images,)`.
        captions: the queries.
        query_seed: seed by which the queries were drawn among the captions; None if all captions are queries.
    """

    metrics: dict[str, dict[str, float]]
    queries: dict[str, QueryMetrics]
    timings: dict[str, float]
    counts: dict[str, int]
    rerank_k: int
    score_fusion: str
    match_weight: float | None
    flip: bool
    dtype: str
    temperature: float | None
    similarity: torch.Tensor
    reranked: torch.Tensor | None
    top_indices: torch.Tensor | None
    match_logits: torch.Tensor | None
    query_ids: torch.Tensor
    query_rows: torch.Tensor
    gallery_ids: torch.Tensor
    captions: list[str] = field(repr=False)
    query_seed: int | None = None

    @property
    def sample(self) -> str | None:
        """Description of the drawn queries; None if all captions are queries."""
        return None if self.query_seed is None else f"{len(self.captions):,} captions drawn by seed {self.query_seed}"

    @property
    def scores(self) -> torch.Tensor:
        """Scores of the final ranking, `(captions, images)`: the re-ranked ones if there are any."""
        return self.similarity if self.reranked is None else self.reranked

    @property
    def match_scores(self) -> torch.Tensor | None:
        """Fused matching scores, `(views, captions, rerank_k)`: logits of "match" (log-odds for "posterior"), or None."""
        if self.match_logits is None or self.top_indices is None:
            return None
        return match_scores(self.match_logits, self.score_fusion == "posterior")

    @property
    def ranking(self) -> str:
        """Description of the ranking for tables: fusion, weight and number of re-ranked images."""
        return describe_ranking(self.rerank_k, self.score_fusion, self.match_weight)

    def fuse(self, score_fusion: str, match_weight: float | None = None, k: int | None = None) -> torch.Tensor:
        """Compute another fusion of the scores, without running the model again.

        Args:
            score_fusion: "single", "published" or "posterior".
            match_weight: weight of the matching log-odds in "posterior"; None for 1.
            k: re-rank only the first k images of each query; None for all that were matched.

        Returns:
            Fused scores, `(captions, images)` float32.

        Raises:
            ValueError: if nothing was re-ranked, or as for `fuse_scores`.
        """
        if self.match_logits is None or self.top_indices is None:
            raise ValueError("scores can only be fused after an evaluation with re-ranking, rerank_k > 0")
        return fuse_scores(
            self.similarity,
            self.top_indices[:, :k],
            match_scores(self.match_logits[..., :k, :], score_fusion == "posterior"),
            score_fusion,
            temperature=self.temperature,
            match_weight=1.0 if match_weight is None else match_weight,
        )

    def image_to_text(self) -> tuple[dict[str, float], int]:
        """Measure the other direction by similarity: each image is a query to all captions, of which its person's are right.

        Returns:
            R1, R5, R10, mAP and mINP in percent, and the number of images measured: those of people with a caption.
        """
        is_described = torch.isin(self.gallery_ids, self.query_ids)
        scores = self.similarity[:, is_described].T
        return retrieval_metrics(scores, self.gallery_ids[is_described], self.query_ids), len(scores)

    def with_fusion(self, score_fusion: str, match_weight: float | None = None) -> "RetrievalResult":
        """Return this result with another fusion of its scores; for arguments and errors see `fuse`."""
        reranked = self.fuse(score_fusion, match_weight)
        queries = self.queries | {"reranked": query_metrics(reranked, self.query_ids, self.gallery_ids)}
        metrics = self.metrics | {"reranked": queries["reranked"].mean()}
        weight = (1.0 if match_weight is None else match_weight) if score_fusion == "posterior" else None
        ranking = {"score_fusion": score_fusion, "match_weight": weight}
        return replace(self, metrics=metrics, queries=queries, reranked=reranked, **ranking)


def evaluate_retrieval(
    model: PreTrainedModel,
    processor: MRAProcessor,
    dataset: "Table",
    *,
    rerank_k: int | None = None,
    flip: bool = True,
    score_fusion: str = DEFAULT_SCORE_FUSION,
    match_weight: float = 1.0,
    batch_size: int = 64,
    rerank_batch_size: int | None = None,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
    num_queries: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RetrievalResult:
    """Evaluate text-to-image person retrieval: every caption of a split is a query to the gallery of its images.

    With an initialised process group the work is shared and every process must make this call. Batches do not depend on the
    number of processes, so neither does the result (bit for bit with equal numbers of threads; CPU kernels round differently
    otherwise).

    Args:
        model: unwrapped MRAModel, MRAForPreTraining or MRAForImageTextRetrieval, on the device to use. It is in eval mode
            during the call. (Under ZeRO-3, gather its parameters first.)
        processor: the model's MRAProcessor.
        dataset: `datasets.Dataset` with columns image, captions (list of texts) and image_id (identity).
        rerank_k: images per query to re-rank with the fusion layers; None or 0 ranks by similarity alone.
        flip: use the mirror image too, for features and for matching.
        score_fusion: "single", "published" or "posterior", see `fuse_scores`; the last needs a model with a learned
            temperature, which a bare MRAModel lacks. `choose_retrieval` finds the best fusion for a model.
        match_weight: weight of the matching log-odds in "posterior".
        batch_size: images or captions per forward pass.
        rerank_batch_size: most pairs per forward pass of re-ranking; None for a number chosen for the device.
        num_workers: worker processes that decode and resize images.
        dtype: dtype of the forward passes and the kept hidden states; None for that of the weights.
        num_queries: captions to draw as queries to the whole gallery, see `draw_queries`; None for all.
        seed: seed of the draw.
        progress: whether to show progress bars on the main process.

    Raises:
        ValueError: if an argument or the dataset is wrong (the message says how to fix it), or the matching score of a
            pair is not finite.
    """
    shard = Shard.current()
    if score_fusion not in SCORE_FUSIONS:
        raise ValueError(f"score_fusion must be one of {', '.join(SCORE_FUSIONS)}, got {score_fusion!r}")
    temperature = cast(torch.Tensor, model.temperature).item() if hasattr(model, "temperature") else None
    if rerank_k is not None and rerank_k < 0:
        raise ValueError(f"rerank_k must be 0 (no re-ranking) or more, got {rerank_k}")
    captions, query_rows, gallery_ids = read_captions(dataset)
    drawn = None
    if num_queries is not None and num_queries < len(captions):
        drawn = draw_queries(len(captions), num_queries, seed)
        captions, query_rows = [captions[query] for query in drawn.tolist()], query_rows[drawn]
    query_ids = gallery_ids[query_rows]
    rerank_k = rerank_k or 0
    if rerank_k > len(dataset):
        logger.warning("rerank_k %d is larger than the gallery: re-ranking all %d images", rerank_k, len(dataset))
        rerank_k = len(dataset)

    timings = {}
    encoding = {"keep_hidden_states": rerank_k > 0, "batch_size": batch_size, "dtype": dtype, "shard": shard}
    encoding["progress"] = progress = progress and shard.is_main
    with _eval_mode(model):
        with _timed(timings, "encode_images"):
            images = encode_images(
                model, processor, cast(Rows, dataset), flip=flip, num_workers=num_workers, **encoding
            )
        with _timed(timings, "encode_texts"):
            texts = encode_texts(model, processor, captions, **encoding)
        with _timed(timings, "rank"):
            similarity = similarity_matrix(texts.embeds, images.embeds, next(model.parameters()).device)
            queries = {"similarity": query_metrics(similarity, query_ids, gallery_ids)}
        top_indices = match_logits = None
        if rerank_k:
            with _timed(timings, "rerank"):
                top_indices = top_k(similarity, rerank_k)
                match_logits = rerank_logits(
                    model,
                    texts,
                    images,
                    top_indices,
                    batch_size=rerank_batch_size,
                    dtype=dtype,
                    shard=shard,
                    progress=progress,
                )
            timings["pairs_per_second"] = match_logits[..., 0].numel() / timings["rerank"]

            def name_pair(query: int, rank: int) -> str:
                row = int(query_rows[query])
                return (
                    f"the caption {captions[query]!r} (row {row}) and the image of row {int(top_indices[query, rank])}"
                )

            require_finite(match_logits, name_pair)
    counts = {"identities": len(gallery_ids.unique()), "images": len(gallery_ids), "captions": len(captions)}
    result = RetrievalResult(
        metrics={name: values.mean() for name, values in queries.items()},
        queries=queries,
        timings=timings,
        counts=counts,
        rerank_k=rerank_k,
        score_fusion=score_fusion,
        match_weight=match_weight if score_fusion == "posterior" else None,
        flip=flip,
        dtype=str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
        temperature=temperature,
        similarity=similarity,
        reranked=None,
        top_indices=top_indices,
        match_logits=match_logits,
        query_ids=query_ids,
        query_rows=query_rows,
        gallery_ids=gallery_ids,
        captions=captions,
        query_seed=None if drawn is None else seed,
    )
    if rerank_k:
        with _timed(timings, "fuse"):
            result = result.with_fusion(score_fusion, match_weight)
    return result


def read_captions(dataset: "Table") -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Read the queries of a person-search split without decoding images.

    Returns:
        Captions of all rows; the row of each caption, `(captions,)`; the identity of each row, `(rows,)`.

    Raises:
        ValueError: if a column is missing or of the wrong type, there are no rows or captions, or a caption is blank.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {', '.join(missing)}: expected {', '.join(REQUIRED_COLUMNS)} "
            f"(as written by `mra prepare pedes`), got {', '.join(dataset.column_names)}"
        )
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows: expected at least one image with a caption")
    columns = cast("datasets.Dataset", dataset.select_columns(["captions", "image_id"])).with_format(None)[:]
    captions, rows = [], []
    for row, row_captions in enumerate(columns["captions"]):
        if not isinstance(row_captions, list):
            raise ValueError(f"row {row}: captions must be a list of texts, got {row_captions!r}")
        for caption in row_captions:
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"row {row}: a caption must be a text with at least one word, got {caption!r}")
        captions.extend(row_captions)
        rows.extend([row] * len(row_captions))
    if not captions:
        raise ValueError("no row has a caption: expected at least one query")
    identities = columns["image_id"]
    if not all(isinstance(identity, int) for identity in identities):
        raise ValueError(f"image_id must be an integer in every row, got {identities[0]!r}")
    return captions, torch.tensor(rows), torch.tensor(identities)


def draw_queries(num_captions: int, num_queries: int, seed: int) -> torch.Tensor:
    """Draw captions without replacement, each with the same probability.

    Their mean R@k, mAP and mINP by similarity are unbiased estimates of those of all captions: the gallery stays whole, and no
    query depends on the others. Drawing people with all of their captions would give larger errors for as many captions,
    because captions of one person resemble each other.

    Returns:
        Numbers of the captions in order, `(num_queries,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_captions, generator=generator)[:num_queries].sort().values


def describe_ranking(rerank_k: int, score_fusion: str, match_weight: float | None) -> str:
    """Describe a ranking for tables: fusion, weight and number of re-ranked images."""
    return f"{fusion_name(score_fusion, match_weight)}, k {rerank_k}" if rerank_k else "similarity alone"


def below_similarity(metrics: dict[str, dict[str, float]]) -> str | None:
    """Describe by how much re-ranking is below similarity alone.

    Args:
        metrics: metrics of a `RetrievalResult`, or R1 and mAP alone.

    Returns:
        A message with the values of R@1 or mAP or both; None if re-ranking lowers neither.
    """
    if "reranked" not in metrics:
        return None
    pairs = {
        title: (metrics["reranked"][name], metrics["similarity"][name])
        for name, title in (("R1", "R@1"), ("mAP", "mAP"))
    }
    lower = [f"{title} {ours:.2f} against {alone:.2f}" for title, (ours, alone) in pairs.items() if ours < alone]
    return f"re-ranking is below similarity alone: {', '.join(lower)}" if lower else None


def format_table(metrics: dict[str, dict[str, float]]) -> str:
    """Format named rows of metrics (in percent) as a plain-text table."""
    width = max(10, *(len(name) for name in metrics))
    lines = [" " * width + "".join(f"{title:>8}" for title in METRIC_TITLES.values())]
    for name, values in metrics.items():
        lines.append(f"{name:<{width}}" + "".join(f"{values[metric]:8.2f}" for metric in METRIC_TITLES))
    return "\n".join(lines)


@contextlib.contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start

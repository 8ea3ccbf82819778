"""Best ranking of a model: fusion, weight and depth, chosen on validation and saved with the weights."""

import functools
import json
import logging
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mra.common.files import write_whole
from mra.common.weight_files import find_model_file, weights_digest
from mra.retrieval.rerank_depth import COMPARED, TOLERANCE, choose_rerank_depth, compared
from mra.retrieval.score_fusion import SCORE_FUSIONS, fusion_name, match_scores


if TYPE_CHECKING:
    import torch

    from mra.retrieval.evaluation import RetrievalResult


logger = logging.getLogger(__name__)

FILE_NAME = "retrieval.json"

# Setting that chooses the fusion on the validation split.
AUTO = "auto"

# Weights of the matching log-odds to try in "posterior", in order of preference among equals. 1 is right for a perfect
# matching head; a briefly trained one is overconfident and needs less.
MATCH_WEIGHTS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 1.5, 2.0)

Fusion = tuple[str, float | None]


def fusion_candidates(score_fusion: str, match_weight: float | None = None) -> list[Fusion]:
    """List the fusions allowed by a setting, in order of preference among equals.

    Args:
        score_fusion: "auto" for all, or the name of one fusion.
        match_weight: weight of the matching log-odds in "posterior"; None for all of `MATCH_WEIGHTS`.

    Raises:
        ValueError: if the name is unknown, the weight is negative or not finite, or the fusion has no weight.
    """
    if score_fusion not in (AUTO, *SCORE_FUSIONS):
        raise ValueError(f"score_fusion must be one of {AUTO}, {', '.join(SCORE_FUSIONS)}, got {score_fusion!r}")
    if match_weight is not None:
        if score_fusion != "posterior":
            raise ValueError(
                f"match_weight {match_weight:g} is given with score_fusion {score_fusion}, but only posterior has a weight; "
                "leave it out, or use posterior"
            )
        if not (math.isfinite(match_weight) and match_weight >= 0):
            raise ValueError(f"match_weight must be finite and at least 0, got {match_weight}")
    weights = MATCH_WEIGHTS if match_weight is None else (match_weight,)
    # `published` has no weight to fit and gives results comparable with the published ones.
    candidates = [("published", None), *(("posterior", weight) for weight in weights), ("single", None)]
    return [candidate for candidate in candidates if score_fusion in (AUTO, candidate[0])]


def choice_score(metrics: dict[str, float]) -> float:
    """Return the score by which fusions are compared: the mean of R@1 and mAP in percent, rounded to 0.01 as in tables.

    R@1 is the reported metric, but on a small split single queries change it a lot; mAP depends on the whole ranking and is
    less noisy.
    """
    return round(sum(metrics[name] for name in COMPARED) / len(COMPARED), 2)


@dataclass(frozen=True)
class RetrievalChoice:
    """Chosen ranking of a model, and the data behind the choice.

    Attributes:
        rerank_k: images to re-rank: the smallest number that loses almost nothing with the chosen fusion.
        chosen_on: name of the data it was chosen on.
        gallery_size: images in that data's gallery.
        score_fusion: the chosen fusion of scores.
        match_weight: weight of the matching log-odds, if the fusion has one.
        flip: whether it was chosen with mirror images.
        tolerance: percentage points that R@1 and mAP may lose against the largest k tried.
        tried: R@1 and mAP in percent by the number of re-ranked images, with the chosen fusion.
        tried_fusions: R@1 and mAP in percent of similarity alone and of every compared fusion, by name, all with the largest
            k tried. Empty in files of versions that chose only the number of re-ranked images.
        num_queries: captions in that data.
        dtype: dtype of the forward passes it was chosen with.
        model: folder or Hub id of the model if the choice is not saved with it.
        weights: [`weights_digest`] of the weights it was chosen with; None in files of versions that did not record it.
        largest_log_odds: [`largest_log_odds`] of that data, the bound of early stopping in a gallery. Empty in files of
            versions without early stopping.
    """

    rerank_k: int
    chosen_on: str
    gallery_size: int
    score_fusion: str
    match_weight: float | None
    flip: bool
    tolerance: float
    tried: dict[int, dict[str, float]]
    tried_fusions: dict[str, dict[str, float]] = field(default_factory=dict)
    num_queries: int | None = None
    dtype: str | None = None
    model: str | None = None
    weights: str | None = None
    largest_log_odds: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("rerank_k", self.rerank_k), ("gallery_size", self.gallery_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.flip) is not bool:
            raise ValueError(f"flip must be true or false, got {self.flip!r}")
        if self.score_fusion not in SCORE_FUSIONS or (self.match_weight is None) == (self.score_fusion == "posterior"):
            raise ValueError(
                "score_fusion must be single or published without match_weight, or posterior with one, got "
                f"{self.score_fusion!r} and {self.match_weight!r}"
            )
        fusion_candidates(self.score_fusion, self.match_weight)
        if not self.tried:
            raise ValueError("tried is empty: expected the metrics of at least one number of re-ranked images")
        for name, values in (*self.tried.items(), *self.tried_fusions.items()):
            if set(values) != set(COMPARED) or not all(math.isfinite(value) for value in values.values()):
                raise ValueError(f"{name!r} must have the percentages {' and '.join(COMPARED)}, got {values!r}")
        if not all(views in (1, 2) and math.isfinite(value) for views, value in self.largest_log_odds.items()):
            raise ValueError(f"largest_log_odds must be finite numbers by 1 or 2 views, got {self.largest_log_odds!r}")

    @property
    def fusion(self) -> str:
        """Name of the chosen fusion, with its weight where it has one."""
        return fusion_name(self.score_fusion, self.match_weight)

    @property
    def compares_fusions(self) -> bool:
        """Whether the fusion was chosen among several rather than given."""
        return len(self.tried_fusions) > 2  # similarity alone and the given one

    def misfit(self, score_fusion: str, match_weight: float | None, flip: bool) -> str | None:
        """Describe why the choice does not apply to an evaluation; None if it does.

        Args:
            score_fusion: the requested fusion, "auto" included.
            match_weight: the requested weight.
            flip: whether mirror images are used.
        """
        if flip != self.flip:
            return f"it was chosen {'with' if self.flip else 'without'} mirror images"
        candidates = fusion_candidates(score_fusion, match_weight)
        if (self.score_fusion, self.match_weight) not in candidates:
            return f"it was chosen for the fusion {self.fusion}"
        if len(candidates) > 1 and any(fusion_name(*fusion) not in self.tried_fusions for fusion in candidates):
            return f"its fusion {self.fusion} was given, not chosen among all"
        return None

    def supersedes(self, saved: "RetrievalChoice | None") -> bool:
        """Return whether this choice covers all that a saved one chose, and can replace it."""
        return saved is None or (self.flip == saved.flip and self.tried_fusions.keys() >= saved.tried_fusions.keys())

    def posterior_weight(self) -> float | None:
        """Return the best weight of the matching log-odds in "posterior"; None if that fusion was not tried."""
        if self.score_fusion == "posterior":
            return self.match_weight
        weights = [weight for weight in MATCH_WEIGHTS if fusion_name("posterior", weight) in self.tried_fusions]
        return max(
            weights,
            key=lambda weight: choice_score(self.tried_fusions[fusion_name("posterior", weight)]),
            default=None,
        )

    def describe(self) -> str:
        """Describe the choice of the fusion in one line."""
        how = f"chosen among {len(self.tried_fusions) - 1} fusions" if self.compares_fusions else "given"
        size = f"{self.gallery_size:,} images"
        if self.num_queries is not None:
            size = f"{self.num_queries:,} captions, {size}"
        mirror = "" if self.flip else ", without mirror images"
        return (
            f"score fusion {self.fusion}, {how}; measured at k {max(self.tried)}{mirror} on {self.chosen_on} ({size})"
        )

    def describe_depth(self) -> str:
        """Describe the choice of the number of re-ranked images in one line."""
        return (
            f"rerank_k {self.rerank_k} loses at most {self.tolerance} points of R@1 and mAP against {max(self.tried)} "
            f"on {self.chosen_on}"
        )

    def warning(self) -> str | None:
        """Describe by how much the choice is below similarity alone on its data; None if it is not."""
        from mra.retrieval.evaluation import below_similarity  # imports PyTorch, which reading a choice does not need

        if "similarity" not in self.tried_fusions:
            return None
        found = below_similarity(
            {"similarity": self.tried_fusions["similarity"], "reranked": self.tried[max(self.tried)]}
        )
        return found and f"{found} on {self.chosen_on}, {self.fusion} at k {max(self.tried)}"

    def format_table(self) -> str:
        """Format R@1 and mAP of all compared fusions as a plain-text table that marks the chosen one."""
        lines = [f"fusions of scores on {self.chosen_on}", " " * 24 + f"{'R@1':>8}{'mAP':>8}"]
        for name, values in self.tried_fusions.items():
            label = name if name == "similarity" else f"{name}, k {max(self.tried)}"
            mark = "  chosen" if name == self.fusion else ""
            lines.append(f"{label:<24}" + "".join(f"{values[metric]:8.2f}" for metric in COMPARED) + mark)
        return "\n".join(lines)

    def save(self, folder: str | Path) -> Path:
        """Write retrieval.json to a folder atomically, tied to the weights of `model`, or else of that folder."""
        path = Path(folder) / FILE_NAME
        tied = replace(self, weights=weights_digest(self.model or folder))
        write_whole(path, json.dumps(asdict(tied), indent=2) + "\n")
        return path

    @classmethod
    def load(cls, folder: str, model: str | None = None) -> "RetrievalChoice | None":
        """Read the choice saved with a model, or for it in another folder; None if there is none.

        A choice made with other weights than the model's current ones is ignored with a warning on the first call.

        Args:
            folder: folder or Hub id that holds the choice.
            model: folder or Hub id of the model, if the choice is in another folder; a choice for another model is
                ignored.

        Raises:
            ValueError: if the file was not written by `save`.
        """
        path = find_model_file(folder, FILE_NAME)
        if path is None:
            return None
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            required = {
                item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING
            }
            if not required <= set(saved) <= {item.name for item in fields(cls)}:
                raise ValueError(f"its keys are {', '.join(saved)}")
            by_number = {
                name: {int(number): value for number, value in saved[name].items()}
                for name in ("tried", "largest_log_odds")
                if name in saved
            }
            choice = cls(**saved | by_number)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{FILE_NAME} of model {folder} is not a saved choice of fusion and rerank_k ({error}): remove it to choose "
                "again"
            ) from error
        if model is not None and choice.model != model:
            return None
        if choice.weights is not None and choice.weights != (found := weights_digest(model or folder)):
            _warn_of_other_weights(path, model or folder, found)
            return None
        return choice


@functools.cache
def _warn_of_other_weights(path: str, model: str, found: str | None) -> None:
    """Warn once per state of the weights that a saved choice was made with other weights."""
    logger.warning(
        f"{path} is not applied: it was chosen with other weights than the current ones of {model}; evaluate the model on a "
        "dataset with a validation split to choose again"
    )


def chosen_match_weight(model: str) -> float | None:
    """Return the weight of the matching log-odds chosen for a model on validation, or None.

    The embeddings of a gallery are those of both views, so a choice without mirror images does not apply to it. One with
    them does, whether the gallery matches one view or two.

    Raises:
        ValueError: if the choice saved with the model cannot be read.
    """
    choice = RetrievalChoice.load(model)
    return choice.posterior_weight() if choice is not None and choice.flip else None


def seen_log_odds(model: str) -> dict[int, float]:
    """Return the largest log-odds of a match seen on validation by number of views; empty if none were recorded.

    Raises:
        ValueError: if the choice saved with the model cannot be read.
    """
    choice = RetrievalChoice.load(model)
    return {} if choice is None else choice.largest_log_odds


def largest_log_odds(log_odds: "torch.Tensor") -> dict[int, float]:
    """Return the largest log-odds of a match by the number of views averaged, the first one or all.

    Args:
        log_odds: `(views, queries, k)`, the upright image first.
    """
    return {views: log_odds[:views].mean(dim=0).max().item() for views in range(1, len(log_odds) + 1)}


def choose_retrieval(
    result: "RetrievalResult",
    chosen_on: str,
    score_fusion: str = AUTO,
    match_weight: float | None = None,
    tolerance: float = TOLERANCE,
) -> RetrievalChoice:
    """Choose the fusion of scores with its weight, and the number of images to re-rank with it.

    No model runs, because every fusion can be computed from the logits of the matched pairs. Fusions are compared by
    `choice_score`; among equals the first of `fusion_candidates` is chosen. Re-ranking is compared with similarity alone but
    never turned off; rerank_k 0 does that.

    Args:
        result: an evaluation with re-ranking and any fusion, on data other than the test split.
        chosen_on: name of its data, to be saved with the choice.
        score_fusion: "auto" to choose among all fusions, or the name of one to choose depth and weight for.
        match_weight: weight of the matching log-odds in "posterior"; None to choose it.
        tolerance: percentage points that R@1 and mAP may each lose with a smaller number.

    Raises:
        ValueError: if nothing was re-ranked, or a setting is wrong.
    """
    from mra.retrieval.metrics import retrieval_metrics  # imports PyTorch, which reading a choice does not need

    candidates = fusion_candidates(score_fusion, match_weight)
    if score_fusion == AUTO and result.temperature is None:  # a bare MRAModel cannot compute the posterior
        candidates = [fusion for fusion in candidates if fusion[0] != "posterior"]
    tried_fusions = {"similarity": compared(result.metrics["similarity"])}
    for fusion in candidates:
        metrics = retrieval_metrics(result.fuse(*fusion), result.query_ids, result.gallery_ids)
        tried_fusions[fusion_name(*fusion)] = compared(metrics)
    best = max(candidates, key=lambda fusion: choice_score(tried_fusions[fusion_name(*fusion)]))
    rerank_k, tried = choose_rerank_depth(result.with_fusion(*best), tolerance)
    assert result.match_logits is not None, "checked by `fuse`"
    return RetrievalChoice(
        rerank_k=rerank_k,
        chosen_on=chosen_on,
        gallery_size=len(result.gallery_ids),
        score_fusion=best[0],
        match_weight=best[1],
        flip=result.flip,
        tolerance=tolerance,
        tried=tried,
        tried_fusions=tried_fusions,
        num_queries=len(result.captions),
        dtype=result.dtype,
        largest_log_odds=largest_log_odds(match_scores(result.match_logits, log_odds=True)),
    )

"""How a model ranks best: fusion of scores, its weight and the depth, chosen on validation and kept beside the weights."""

import functools
import json
import logging
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

from transformers.utils.hub import cached_file

from mra.common.files import write_whole
from mra.common.weight_files import weights_digest
from mra.retrieval.evaluation import RetrievalResult, below_similarity
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.rerank_depth import COMPARED, TOLERANCE, choose_rerank_depth, compared
from mra.retrieval.score_fusion import SCORE_FUSIONS, fusion_name


logger = logging.getLogger(__name__)

FILE_NAME = "retrieval.json"

# Setting that leaves the fusion to the validation split.
AUTO = "auto"

# Weights of the matching log-odds that are tried in "posterior", the one preferred among equals first. A perfect matching
# head deserves 1; one that was trained briefly is too sure of itself and deserves less.
MATCH_WEIGHTS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 1.5, 2.0)

Fusion = tuple[str, float | None]


def fusion_candidates(score_fusion: str, match_weight: float | None = None) -> list[Fusion]:
    """List the fusions that a setting leaves open, the one preferred among equals first.

    Args:
        score_fusion: "auto" for all, or the name of one.
        match_weight: weight of the matching log-odds in "posterior"; None for all of `MATCH_WEIGHTS`.

    Raises:
        ValueError: if the name is unknown, or a weight is given to a fusion that has none or is not a number from 0 on.
    """
    if score_fusion not in (AUTO, *SCORE_FUSIONS):
        raise ValueError(f"score_fusion must be one of {AUTO}, {', '.join(SCORE_FUSIONS)}, got {score_fusion!r}")
    if match_weight is not None:
        if score_fusion != "posterior":
            raise ValueError(
                f"match_weight {match_weight:g} is given with score_fusion {score_fusion}: only posterior has a weight; "
                "leave it out, or name posterior"
            )
        if not (math.isfinite(match_weight) and match_weight >= 0):
            raise ValueError(f"match_weight must be a number from 0 on, got {match_weight}")
    weights = MATCH_WEIGHTS if match_weight is None else (match_weight,)
    # `published` has no weight to fit and gives figures that compare with the published ones.
    candidates = [("published", None), *(("posterior", weight) for weight in weights), ("single", None)]
    return [candidate for candidate in candidates if score_fusion in (AUTO, candidate[0])]


def choice_score(metrics: dict[str, float]) -> float:
    """Return what fusions are compared by: the mean of R@1 and mAP, in percent, to the hundredth that tables show.

    R@1 is what is reported, but a single query decides a large part of it on a small split; mAP weighs the whole ranking and
    moves less by chance.
    """
    return round(sum(metrics[name] for name in COMPARED) / len(COMPARED), 2)


@dataclass(frozen=True)
class RetrievalChoice:
    """How to rank with a model, and what the choice rests on.

    Attributes:
        rerank_k: images to re-rank: the least number that loses next to nothing with the chosen fusion.
        chosen_on: the data that it was chosen on.
        gallery_size: images in that data's gallery.
        score_fusion: the chosen fusion of scores.
        match_weight: weight of the matching log-odds, where the fusion has one.
        flip: whether it was chosen with mirror images.
        tolerance: percentage points that R@1 and mAP may lose against the largest k tried.
        tried: R@1 and mAP in percent by the number of re-ranked images, with the chosen fusion.
        tried_fusions: R@1 and mAP in percent of similarity alone and of every fusion that was compared, by its name, all with
            the largest k tried. Empty in a file of a version that chose the number of re-ranked images alone.
        num_queries: captions in that data.
        dtype: dtype of the forward passes it was chosen with.
        model: folder or Hub id of the model where the choice was not saved with it.
        weights: digest of the weights that it was chosen with, as [`weights_digest`] gives it; None in a file of a version
            that did not keep it.
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

    def __post_init__(self) -> None:
        for name, value in (("rerank_k", self.rerank_k), ("gallery_size", self.gallery_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
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

    @property
    def fusion(self) -> str:
        """Name of the chosen fusion, with its weight where it has one."""
        return fusion_name(self.score_fusion, self.match_weight)

    @property
    def compares_fusions(self) -> bool:
        """Return whether the fusion was chosen among several rather than given."""
        return len(self.tried_fusions) > 2  # similarity alone and the one

    def misfit(self, score_fusion: str, match_weight: float | None, flip: bool) -> str | None:
        """Say why the choice does not answer for a way to evaluate; None where it does.

        Args:
            score_fusion: as asked for, "auto" included.
            match_weight: as asked for.
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
        """Return whether this choice can replace a saved one without losing anything that was chosen."""
        return saved is None or (self.flip == saved.flip and self.tried_fusions.keys() >= saved.tried_fusions.keys())

    def posterior_weight(self) -> float | None:
        """Return the best weight of the matching log-odds in "posterior"; None where that fusion was not tried."""
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
        """Say by how much the choice is below similarity alone where it was made; None where it loses nothing."""
        if "similarity" not in self.tried_fusions:
            return None
        found = below_similarity(
            {"similarity": self.tried_fusions["similarity"], "reranked": self.tried[max(self.tried)]}
        )
        return found and f"{found} on {self.chosen_on}, {self.fusion} at k {max(self.tried)}"

    def format_table(self) -> str:
        """Lay out R@1 and mAP of everything that was compared, the chosen fusion marked, as a plain-text table."""
        lines = [f"fusions of scores on {self.chosen_on}", " " * 24 + f"{'R@1':>8}{'mAP':>8}"]
        for name, values in self.tried_fusions.items():
            label = name if name == "similarity" else f"{name}, k {max(self.tried)}"
            mark = "  chosen" if name == self.fusion else ""
            lines.append(f"{label:<24}" + "".join(f"{values[metric]:8.2f}" for metric in COMPARED) + mark)
        return "\n".join(lines)

    def save(self, folder: str | Path) -> Path:
        """Write retrieval.json into a folder in one move, tied to the weights of `model`, or else of that folder."""
        path = Path(folder) / FILE_NAME
        tied = replace(self, weights=weights_digest(self.model or folder))
        write_whole(path, json.dumps(asdict(tied), indent=2) + "\n")
        return path

    @classmethod
    def load(cls, folder: str, model: str | None = None) -> "RetrievalChoice | None":
        """Read the choice that was saved with a model, or for it elsewhere; None where there is none.

        A choice that was made with other weights than the model has now counts as none; the first call says so.

        Args:
            folder: of the choice, or Hub id.
            model: folder or Hub id of the model, where the choice lies in another folder; a choice for another model
                counts as none.

        Raises:
            ValueError: if the file is not what `save` writes.
        """
        path = cached_file(
            folder,
            FILE_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return None
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            required = {
                item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING
            }
            if not required <= set(saved) <= {item.name for item in fields(cls)}:
                raise ValueError(f"its keys are {', '.join(saved)}")
            choice = cls(**saved | {"tried": {int(k): metrics for k, metrics in saved["tried"].items()}})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{FILE_NAME} of model {folder} is not a saved choice of fusion and rerank_k ({error}): remove it to choose "
                "again"
            ) from error
        if model is not None and choice.model != model:
            return None
        found = weights_digest(model or folder)
        if choice.weights not in (None, found):
            _warn_of_other_weights(path, model or folder, found)
            return None
        return choice


@functools.cache
def _warn_of_other_weights(path: str, model: str, found: str | None) -> None:
    """Log once for each state of the weights that a saved choice was made with others."""
    logger.warning(
        f"{path} is not applied: it was chosen with other weights than those of {model}; evaluate the model on a dataset "
        "with a validation split to choose again"
    )


def choose_retrieval(
    result: RetrievalResult,
    chosen_on: str,
    score_fusion: str = AUTO,
    match_weight: float | None = None,
    tolerance: float = TOLERANCE,
) -> RetrievalChoice:
    """Choose the fusion of scores with its weight, and the number of images to re-rank with it.

    No model runs: the logits of all matched pairs are there, and every fusion follows from them. The fusions are compared by
    `choice_score`; among equals the first of `fusion_candidates` is taken. Re-ranking is compared with similarity alone but
    never left out: that is asked for with rerank_k 0.

    Args:
        result: an evaluation with re-ranking, however it was fused, of data that is not the test split.
        chosen_on: name of its data, for the record.
        score_fusion: "auto" to choose among all fusions, or the name of the one to choose depth, and weight, for.
        match_weight: weight of the matching log-odds in "posterior"; None to choose it.
        tolerance: percentage points that R@1 and mAP may each lose to a smaller number.

    Raises:
        ValueError: if nothing was re-ranked, or a setting is not as described.
    """
    candidates = fusion_candidates(score_fusion, match_weight)
    if score_fusion == AUTO and result.temperature is None:  # a bare MRAModel, which cannot compute the posterior
        candidates = [fusion for fusion in candidates if fusion[0] != "posterior"]
    tried_fusions = {"similarity": compared(result.metrics["similarity"])}
    for fusion in candidates:
        metrics = retrieval_metrics(result.fuse(*fusion), result.query_ids, result.gallery_ids)
        tried_fusions[fusion_name(*fusion)] = compared(metrics)
    best = max(candidates, key=lambda fusion: choice_score(tried_fusions[fusion_name(*fusion)]))
    rerank_k, tried = choose_rerank_depth(result.with_fusion(*best), tolerance)
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
    )

"""Thresholds of the filter, calibrated on the target dataset, and decisions on scored images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_scripts.dad.image_checks import HASH_BITS, find_near_duplicates
from data_scripts.dad.sections import FilterSection


# Checks in order; the first failed one is an image's first reason. Near-duplicates come last, among images that pass all
# other checks, so that a good image is never dropped because of a bad one before it.
CHECKS = (
    "does not decode",
    "too small",
    "flat",
    "greyscale",
    "blurred",
    "little detail",
    "much detail",
    "person",
    "text score",
    "near-duplicate",
)
# check -> (measure, whether the limit is a minimum, argument that overrides the calibration)
CALIBRATED = {
    "flat": ("contrast", True, "min_contrast"),
    "greyscale": ("colour", True, "min_colour"),
    "blurred": ("sharpness", True, "min_sharpness"),
    "little detail": ("detail", True, "min_detail"),
    "much detail": ("detail", False, "max_detail"),
    "text score": ("text_score", True, "min_score"),
}
_SHOWN_QUANTILES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


def calibrate(target: Sequence[dict[str, float]], section: FilterSection) -> dict[str, Any]:
    """Set the thresholds.

    Args:
        target: measures of the target images, with `text_score` if a model gives one.
        section: quantile, and limits that override it.

    Returns:
        Content of `thresholds.json`: `limits` (check -> measure, side, value, source), the number of target images, and
        quantiles of each measure, for choosing other limits.
    """
    limits, quantiles = {}, {}
    for check, (measure, is_lowest, argument) in CALIBRATED.items():
        values = [row[measure] for row in target if row.get(measure) is not None]
        given = getattr(section, argument)
        if given is None and not values:
            continue
        share = section.quantile if is_lowest else 1 - section.quantile
        limits[check] = {
            "measure": measure,
            "side": "at least" if is_lowest else "at most",
            "value": float(np.quantile(values, share)) if given is None else float(given),
            "source": f"quantile {share:g} of the target" if given is None else f"filter.{argument}",
        }
        if values:
            quantiles[measure] = {str(each): float(np.quantile(values, each)) for each in _SHOWN_QUANTILES}
    return {"limits": limits, "target_images": len(target), "target_quantiles": quantiles}


def describe_limits(thresholds: dict[str, Any], section: FilterSection) -> dict[str, str]:
    """Describe the limit of each check and its source: check -> text."""
    person = (
        f"one of score {section.person_threshold:g} or more, {section.min_person_height:.0%} of the height or more"
    )
    limits = {
        "too small": f"at least {section.min_width} x {section.min_height} pixels",
        "person": person if section.person_model else "not checked: no filter.person_model",
        "text score": "not checked: no filter.score_model",
        "near-duplicate": f"more than {section.duplicate_distance} of {HASH_BITS} bits from all that are kept",
    }
    for check, limit in thresholds["limits"].items():
        if check != "text score" or section.score_model:
            value = f"{limit['value']:,.0f}" if abs(limit["value"]) >= 1000 else f"{limit['value']:.4g}"
            limits[check] = f"{limit['measure'].replace('_', ' ')} {limit['side']} {value} ({limit['source']})"
    return limits


def cheap_reasons(row: dict[str, Any], thresholds: dict[str, Any], section: FilterSection) -> list[str]:
    """Return the checks without a model that a scored image fails, in order."""
    if not row["decodes"]:
        return ["does not decode"]
    small = row["width"] < section.min_width or row["height"] < section.min_height
    return (["too small"] if small else []) + _outside(row, thresholds, with_models=False)


def model_reasons(row: dict[str, Any], thresholds: dict[str, Any], section: FilterSection) -> list[str]:
    """Return the model checks that a scored image fails; without a score it passes."""
    reasons = _outside(row, thresholds, with_models=True)
    if row["persons"] is not None:
        persons = [height for score, _, _, _, height in row["persons"] if score >= section.person_threshold]
        if len(persons) != 1 or persons[0] < section.min_person_height:
            reasons.insert(0, "person")
    return reasons


def _outside(row: dict[str, Any], thresholds: dict[str, Any], with_models: bool) -> list[str]:
    reasons = []
    for check, limit in thresholds["limits"].items():
        value = row.get(limit["measure"])
        if value is None or (check == "text score") != with_models:
            continue
        if value < limit["value"] if limit["side"] == "at least" else value > limit["value"]:
            reasons.append(check)
    return reasons


@dataclass
class Decision:
    """Decision on scored images.

    Attributes:
        reasons: checks that each row failed, in the order of `CHECKS`; empty for kept images.
        look_alikes: position of a near-duplicate -> position of the image that it looks like.
    """

    reasons: list[list[str]]
    look_alikes: dict[int, int]

    def kept(self) -> list[int]:
        """Return the positions of the kept rows."""
        return [place for place, reasons in enumerate(self.reasons) if not reasons]

    def count(self, first: bool) -> Counter:
        """Count the images dropped by each check, as their first or as any reason."""
        return Counter(reason for reasons in self.reasons for reason in (reasons[:1] if first else reasons))


def decide(rows: Sequence[dict[str, Any]], thresholds: dict[str, Any], section: FilterSection) -> Decision:
    """Decide which images are kept.

    Args:
        rows: rows of `scores.jsonl` in the order of their prompts; the first of near-duplicates is kept.
        thresholds: result of [`calibrate`].
        section: limits that are not calibrated.
    """
    reasons = []
    for row in rows:
        own = cheap_reasons(row, thresholds, section)
        reasons.append(own if own else model_reasons(row, thresholds, section))
    passed = [place for place, own in enumerate(reasons) if not own]
    found = find_near_duplicates([rows[place]["hash"] for place in passed], section.duplicate_distance)
    look_alikes = {passed[later]: passed[earlier] for later, earlier in found.items()}
    for place in look_alikes:
        reasons[place].append("near-duplicate")
    return Decision(reasons, look_alikes)

"""Text of the report: converts facts to the blocks of a page."""

from collections.abc import Sequence
from typing import Any

from data_scripts.dad.reporting.report_page import Block, Heading, Paragraph, Picture, Table


_MODEL_ROLES = {
    "common.base_model": "images",
    "filter.person_model": "persons in the filter",
    "filter.score_model": "image and text in the filter",
    "caption.model": "captions",
    "ground.model": "boxes",
}
_DISTANCE_NAMES = {
    "kept": "generated, kept",
    "generated": "generated, all",
    "target halves": "one half of the target",
}
_MEASURE_NAMES = {
    "brightness": "brightness (mean luma, 0 to 255)",
    "contrast": "contrast (standard deviation of the luma)",
    "colour": "colour (variance between the channels)",
    "sharpness": "sharpness (variance of the Laplacian)",
    "detail": "detail (bytes as a small JPEG)",
}


def make_blocks(facts: dict[str, Any], figures: Sequence[tuple[str, str]]) -> list[Block]:
    """Build the blocks of the page.

    Args:
        facts: content of `report.json`.
        figures: (path relative to the page, caption) of each picture.
    """
    blocks: list[Block] = [Heading("Result of the data factory", 1)]
    if facts["note"]:
        blocks.append(Paragraph(facts["note"], is_note=True))
    return [
        *blocks,
        *_counts(facts["counts"], facts["models"]),
        *_filter(facts["filter"]),
        *_distances(facts["distances"]),
        *_captions(facts["captions"]),
        *_regions(facts["regions"]),
        Heading("Pictures"),
        *(Picture(path, caption) for path, caption in figures),
    ]


def _counts(counts: dict[str, int], models: dict[str, str | None]) -> list[Block]:
    images = counts["images"]
    rows = [
        ["prompts", f"{counts['prompts']:,}", ""],
        ["images generated", f"{images:,}", ""],
        ["kept by the filter", f"{counts['kept']:,}", _share(counts["kept"], images)],
        ["with a caption", f"{counts['captioned']:,}", _share(counts["captioned"], images)],
        ["annotated", f"{counts['annotated']:,}", _share(counts["annotated"], images)],
        ["boxes", f"{counts['boxes']:,}", ""],
    ]
    used = [[role, models[name] or "none"] for name, role in _MODEL_ROLES.items()]
    return [
        Heading("From prompts to boxes"),
        Table(["stage", "number", "share of the images"], rows),
        Table(["for", "model"], used, text_columns=2),
    ]


def _filter(filtered: dict[str, Any]) -> list[Block]:
    dropped = filtered["images"] - filtered["kept"]
    rows = [
        [check, each["limit"] or "", f"{each['looked_at']:,}", f"{each['first_reason']:,}", f"{each['any_reason']:,}"]
        for check, each in filtered["checks"].items()
    ]
    return [
        Heading("Dropped images"),
        Paragraph(
            f"{dropped:,} of {filtered['images']:,} images ({_share(dropped, filtered['images'])}). An image counts once "
            "as a first reason, and under every check that it failed as any reason. The paper dropped 10.63% of its "
            "images, with unpublished thresholds; this run was not tuned to that number."
        ),
        Table(["check", "limit", "looked at", "first reason", "any reason"], rows, text_columns=2),
    ]


def _distances(distances: dict[str, dict | None]) -> list[Block]:
    known = {name: each for name, each in distances.items() if each is not None}
    if not known:
        return [Heading("Distance from the target dataset"), Paragraph("Too few images to measure a distance.")]
    first = next(iter(known.values()))
    rows = []
    for name, each in known.items():
        pictures = f"{each['num_generated']:,} and {each['num_target']:,}"
        rows.append(
            [_DISTANCE_NAMES[name], pictures, f"{each['fid']:.4g}", f"{each['kid']:.4g} ± {each['kid_std']:.2g}"]
        )
    few = min(each["num_generated"] for each in known.values()) <= first["num_features"]
    warning = " There are fewer images than features, so FID is unreliable; KID is unbiased." if few else ""
    return [
        Heading("Distance from the target dataset"),
        Paragraph(
            f"Measured on {first['extractor']}. The last row shows the effect of chance, the distance between two halves of "
            "the target dataset. FID grows with fewer images, so compare only rows with similar numbers." + warning
        ),
        Table(["images", "number, and number of target images", "FID", "KID"], rows),
        *_statistics(known),
    ]


def _statistics(known: dict[str, dict]) -> list[Block]:
    ours = known.get("kept") or next(iter(known.values()))
    chance = known.get("target halves")
    rows = [
        [
            _MEASURE_NAMES[measure],
            *(_number(value[key]) for key in ("generated", "target")),
            f"{value['distance']:.2f}",
            f"{chance['statistics'][measure]['distance']:.2f}" if chance else "",
        ]
        for measure, value in ours["statistics"].items()
    ]
    return [
        Paragraph(
            "Simple measures of the images, and the Wasserstein distance of their distributions in standard deviations "
            "of the target, next to the distance between the target's halves."
        ),
        Table(["measure", "generated, mean", "target, mean", "distance", "by chance"], rows),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _captions(captions: dict[str, dict]) -> list[Block]:
    made, target = captions["made"], captions["target"]
    rows = [
        [title, f"{made[name]:,}", f"{target[name]:,}"]
        for name, title in (
            ("captions", "captions"),
            ("different_captions", "distinct captions"),
            ("different_words", "distinct words"),
        )
    ]
    counts = [each["words_per_caption"] for each in (made, target)]
    spans = [f"{count['mean']:.1f} ({count['least']} to {count['most']})" for count in counts]
    rows.append(["words per caption", *spans])
    return [
        Heading("Captions"),
        Table(["", "made", "target"], rows),
        Paragraph(
            f"Frequent words: {_list(made['frequent_words'])}. In the target dataset: {_list(target['frequent_words'])}."
        ),
    ]


def _regions(regions: dict[str, Any]) -> list[Block]:
    images, boxes = regions["images"], regions["boxes"]
    per_image = [
        [str(number), f"{count:,}", _share(count, images)] for number, count in regions["boxes_per_image"].items()
    ]
    kinds = [
        [kind, f"{each['boxes']:,}", f"{each['mean_area']:.1%}", f"{each['mean_score']:.2f}"]
        for kind, each in regions["kinds"].items()
    ]
    blocks: list[Block] = [
        Heading("Boxes"),
        Paragraph(
            f"{boxes:,} boxes for {regions['phrases_named']:,} noun phrases in {images:,} captions. Without a box the whole "
            "image is the region in training, and the caption its phrase."
        ),
        Table(["boxes in an image", "images", "share"], per_image),
    ]
    if kinds:
        blocks.append(Table(["what they show", "boxes", "mean share of the image", "mean score"], kinds))
        blocks.append(Paragraph(f"Frequent phrases: {_list(regions['frequent_phrases'])}."))
    return blocks


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _list(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{text} ({count:,})" for text, count in counts) or "none"

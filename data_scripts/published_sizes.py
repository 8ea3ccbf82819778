"""Sizes of the published datasets, to check that a prepared one is complete."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Size of a split; None for unpublished numbers."""

    images: int
    captions: int
    people: int | None = None


# SDA: the README of github.com/Shuyu-XJTU/MRA. PEDES: the papers' tables.
PUBLISHED = {
    "sda": {"train": Size(1_217_750, 1_217_750)},
    "cuhk": {
        "train": Size(34_054, 68_126, 11_003),
        "validation": Size(3_078, 6_158, 1_000),
        "test": Size(3_074, 6_156, 1_000),
    },
    "icfg": {"train": Size(34_674, 34_674, 3_102), "test": Size(19_848, 19_848, 1_000)},
    "rstp": {
        "train": Size(18_505, 37_010, 3_701),
        "validation": Size(1_000, 2_000, 200),
        "test": Size(1_000, 2_000, 200),
    },
}


def compare_with_published(dataset: str, sizes: dict[str, Size]) -> list[str]:
    """Compare a prepared dataset with the published one.

    Args:
        dataset: `sda`, `cuhk`, `icfg` or `rstp`; others have no published sizes.
        sizes: sizes of the prepared splits.

    Returns:
        A line for each split that differs, with its size, the published size and the difference.
    """
    if dataset not in PUBLISHED:
        return []
    lines = []
    for split, published in PUBLISHED[dataset].items():
        if split not in sizes:
            lines.append(f"{split}: missing ({published.images:,} images published)")
            continue
        differences = []
        for count in ("images", "captions", "people"):
            found, expected = getattr(sizes[split], count), getattr(published, count)
            if expected is None or found == expected:
                continue
            gap = f"{expected - found:,} missing" if found < expected else f"{found - expected:,} too many"
            differences.append(f"{found:,} of {expected:,} {count} ({gap})")
        if differences:
            lines.append(f"{split}: {', '.join(differences)}")
    unknown = [split for split in sizes if split not in PUBLISHED[dataset]]
    return lines + [f"{split}: not in the published dataset ({sizes[split].images:,} images)" for split in unknown]

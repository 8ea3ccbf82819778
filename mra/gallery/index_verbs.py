"""Manage a gallery of your own images: `mra index build`, `add`, `remove`, `stats`, `verify`, `calibrate`."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mra.common.command_line import try_folder, try_output
from mra.common.tables import load_split
from mra.gallery.arguments import (
    CalibrationArguments,
    EncoderArguments,
    NewGalleryArguments,
    PlaceArguments,
    RemovalArguments,
    SourceArguments,
    StatsArguments,
    open_gallery,
)
from mra.gallery.connection import is_server
from mra.gallery.types import BuildReport


if TYPE_CHECKING:
    from mra.gallery.gallery import Gallery


NAMES_SHOWN = 10

# Seconds left from which a build says what `--dtype auto` would take.
WORTH_A_HINT = 300

# Of a progress bar; the forecast is the postfix.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}{postfix}"


def build(source: SourceArguments, place: PlaceArguments, encoder: EncoderArguments, new: NewGalleryArguments) -> None:
    """Index a folder or dataset; create the gallery if there is none."""
    _index(source, place, encoder, new, must_exist=False)


def add(source: SourceArguments, place: PlaceArguments, encoder: EncoderArguments, new: NewGalleryArguments) -> None:
    """Index more images into an existing gallery."""
    _index(source, place, encoder, new, must_exist=True)


def _index(
    source: SourceArguments,
    place: PlaceArguments,
    encoder: EncoderArguments,
    new: NewGalleryArguments,
    must_exist: bool,
) -> None:
    if place.files:
        try_folder(place.files, "--files")
    if not is_server(place.gallery) and Path(place.gallery).parent.is_dir():
        try_output(place.gallery, "--gallery")
    with open_gallery(place, encoder, new) as gallery:
        verb = gallery.add if must_exist else gallery.build
        options: dict[str, Any] = vars(source) | {"copy_images": source.copy_images or None}
        gain = partial(_gain_of_auto, gallery) if encoder.dtype is None else None
        report = verb(**options, progress=progress_bar("images", gain))
        print(format_report(report))
        print(f"{place.gallery}: {len(gallery):,} images")


def format_report(report: BuildReport) -> str:
    """Format a report as text, with the first names of each list."""
    rate = f", {report.encoded / report.seconds:.1f} encoded per second" if report.encoded else ""
    lines = [
        f"{report.added:,} added, {report.changed:,} changed, {report.unchanged:,} unchanged "
        f"({report.relabelled:,} with new metadata), {report.removed:,} removed, {len(report.skipped):,} skipped "
        f"in {report.seconds:.1f} s{rate}"
    ]

    def show(title: str, names: list[str]) -> None:
        if names:
            lines.append(f"{title}:")
            lines.extend(f"  {name}" for name in names[:NAMES_SHOWN])
            if len(names) > NAMES_SHOWN:
                lines.append(f"  ... and {len(names) - NAMES_SHOWN:,} more")

    show("skipped", [f"{skipped.key}: {skipped.reason}" for skipped in report.skipped])
    show("no longer in the source, still in the gallery (--prune removes them)", report.missing)
    show("metadata paths that match no image", report.unmatched)
    return "\n".join(lines)


def remove(removal: RemovalArguments, place: PlaceArguments) -> None:
    """Remove images permanently."""
    with open_gallery(place) as gallery:
        count = gallery.remove(where=removal.where, keys=removal.keys, delete_files=removal.delete_files)
        print(f"removed {count:,} images with their vectors, tokens and copies; {len(gallery):,} remain")
        if count and not removal.delete_files:
            print("your own files are unchanged: building from their folder would index them again")


def stats(options: StatsArguments, place: PlaceArguments) -> None:
    """Print the contents and sizes of a gallery."""
    with open_gallery(place) as gallery:
        result = gallery.stats()
    if options.json:
        print(json.dumps(asdict(result)))
        return
    calibration = result.calibration
    rows = {
        "images": f"{result.images:,}, copies of {result.copies:,}",
        "cameras": ", ".join(f"{name or 'unknown'} {count:,}" for name, count in result.cameras.items()),
        "times": f"{result.first_time} to {result.last_time}" if result.first_time else "unknown",
        "fields": ", ".join(f"{name} ({kind})" for name, kind in result.fields.items()) or "none",
        "folders": ", ".join(result.roots) or "none",
        "model": f"{result.model}, fingerprint {(result.fingerprint or 'unknown')[:12]}, width {result.embedding_dim}",
        "tokens": f"of {result.tokens:,} images in {result.token_dtype}; matched views: {result.matched_views}",
        "disk": ", ".join(
            f"{name} {size / 2**20:.1f} MiB" for name, size in result.disk_bytes.items() if size is not None
        ),
        "threshold": "0.5, not calibrated"
        if calibration is None
        else f"{calibration.threshold:.3f}, calibrated on {calibration.split}: {calibration.false_alarms:.1%} false "
        f"alarms, {calibration.misses:.1%} misses; matching weight {calibration.match_weight}",
    }
    for name, value in rows.items():
        print(f"{name:<10} {value}")


def verify(place: PlaceArguments) -> None:
    """Read every image again and compare it with the index."""
    with open_gallery(place) as gallery:
        result = gallery.verify(progress_bar("images"))
    for problem in result.problems:
        print(f"{problem.key}: {problem.reason}")
    print(
        f"{result.images:,} images, {len(result.problems):,} problems, {result.tokens_missing:,} without cached tokens"
    )
    if result.problems:
        raise SystemExit(1)


def calibrate(calibration: CalibrationArguments, place: PlaceArguments, encoder: EncoderArguments) -> None:
    """Choose the threshold and the matching weight on a labelled split."""
    name = f"{calibration.dataset} {calibration.split}"
    dataset = load_split(calibration.dataset, calibration.split, argument="--dataset")
    with open_gallery(place, encoder) as gallery:
        result = gallery.calibrate(
            dataset, rerank=calibration.rerank, max_false_alarms=calibration.max_false_alarms, name=name
        )
    print(
        f"threshold {result.threshold:.3f}: {result.false_alarms:.1%} false alarms, {result.misses:.1%} misses over "
        f"{result.queries:,} queries; matching weight {result.match_weight}"
    )


def progress_bar(unit: str, gain: Callable[[], float | None] | None = None) -> Callable[[int, int], None]:
    """Return a function that shows the number of images done and the total as a progress bar with a forecast.

    The forecast counts from the first call, after which every image takes its time: unchanged images are done at once.

    Args:
        unit: what is counted.
        gain: asked once, where minutes are left: how many times as fast `--dtype auto` would be, None if it is no faster.
    """
    bars: list[tuple[Any, int, float]] = []
    asked: list[float | None] = []

    def update(done: int, total: int) -> None:
        if not bars:  # at the first image, below the output of loading the model
            bars.append((tqdm(total=total, unit=f" {unit}", leave=False, bar_format=BAR), done, time.monotonic()))
        bar, first, start = bars[0]
        if done > first:
            seconds = (time.monotonic() - start) / (done - first)
            bar.set_postfix_str(forecast(seconds, total - done), refresh=False)
            if gain is not None and not asked and seconds * (total - done) > WORTH_A_HINT:
                asked.append(gain())
                if asked[0] is not None:
                    time_left = format_duration(seconds * (total - done) / asked[0])
                    bar.write(f"about {time_left} with --dtype auto, which would encode in bfloat16 on this CPU")
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


def _gain_of_auto(gallery: "Gallery") -> float | None:
    """Return how many times as fast as now a gallery's model would encode with `--dtype auto`; None if not at all."""
    from mra.retrieval.encoders import TorchEncoder
    from mra.retrieval.precision import LEAST_GAIN, bfloat16_gain

    encoder = gallery.encoder
    if not isinstance(encoder, TorchEncoder) or encoder.device.type != "cpu":
        return None
    gain = bfloat16_gain(encoder.model)
    return gain if gain >= LEAST_GAIN else None


def forecast(seconds_per_image: float, left: int) -> str:
    """Format a rate and the time left: "1,250 ms an image, 3 h 28 min left"."""
    rate = f"{1e3 * seconds_per_image:,.{0 if seconds_per_image >= 0.1 else 1}f}"
    return f"{rate} ms an image, {format_duration(seconds_per_image * left)} left"


def format_duration(seconds: float) -> str:
    """Format a time in its two largest units: "3 h 28 min", "28 min", "5 s"."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"

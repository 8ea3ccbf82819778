"""Shared steps of the preparation scripts: atomic output, sizes, card, upload."""

import contextlib
import fcntl
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from data_scripts.annotation_builder import ESCAPED, AnnotationBuilder, RejectedRows
from data_scripts.arguments import REJECTED, PreparationArguments
from data_scripts.dataset_card import TITLES, write_card
from data_scripts.published_sizes import PUBLISHED, Size, compare_with_published
from mra.common.command_line import plain_errors, try_output
from mra.common.digests import write_digests
from mra.common.files import whole_folder
from mra.common.streaming import list_lengths


_SHARDS = "data/*.parquet"


def run(program: str, prepare: Callable[[], None], output: str) -> None:
    """Run a script's work; user errors and full disks exit with a one-line message."""
    # `datasets` warns about every dataset outside its cache; errors are raised at any log level.
    datasets.utils.logging.set_verbosity_error()
    try:
        with plain_errors(program, output):
            prepare()
    except KeyboardInterrupt:
        print(f"{program}: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def prepare(
    dataset: str, options: PreparationArguments, make_builder: Callable[[RejectedRows, Path], AnnotationBuilder]
) -> None:
    """Write a dataset atomically, report its content, and upload it if requested.

    Args:
        dataset: `sda`, `cuhk`, `icfg`, `rstp` or `csv`.
        options: the command-line options.
        make_builder: creates the builder from the handler of bad rows and a folder for temporary files.

    Raises:
        ValueError: if paths, files or rows are wrong, or the upload fails.
    """
    if options.push_to_hub:
        _create_repository(options.push_to_hub, options.private)
    output = Path(options.output).absolute()
    started = time.monotonic()
    with _unfinished(output, options.overwrite) as folder:
        work = folder / ".work"
        (work / "rejected").mkdir(parents=True)
        rejected = RejectedRows(work / "rejected", options.on_error)
        builder = make_builder(rejected, work)
        builder.prepare(work / "shards", options.max_shard_size, options.num_proc)
        splits = _collect_shards(work / "shards", folder / "data", builder)
        seconds = time.monotonic() - started
        counts = _write_rejected(rejected, folder) if options.on_error == "skip" else Counter()
        if not splits:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            raise ValueError(f"no row can be used ({reasons or 'the annotations are empty'}); nothing was written")
        sizes = {split: _measure(folder / "data", split) for split in splits}
        repository = options.push_to_hub or options.output
        digests = {split: builder.digest(split) for split in splits}
        write_card(folder, dataset, builder.FEATURES, splits, sizes, repository, digests, sum(counts.values()))
        write_digests(folder, _SHARDS)
        shutil.rmtree(work)
    _report(dataset, options, sizes, counts, builder.notes, seconds)
    if options.push_to_hub:
        _upload(output, options.push_to_hub)


# Output


@contextlib.contextmanager
def _unfinished(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to the output, for one run at a time, after removing those of killed runs."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise ValueError(f"--output {output} exists; expected a new folder; pass --overwrite to replace it")
        if not (output / "README.md").is_file() or not any(output.glob(_SHARDS)):
            raise ValueError(
                f"--output {output} exists and is not a prepared dataset, so --overwrite does not replace it; "
                "choose another folder, or remove it yourself"
            )
    try_output(output, "--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_path = output.with_name(f".{output.name}.lock")
    with open(lock_path, "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by child processes
        except (BlockingIOError, PermissionError):  # depends on the system
            raise ValueError(f"--output {output}: another run is writing it; wait for it or stop it") from None
        try:
            with whole_folder(output) as unfinished:
                yield unfinished
        finally:
            lock_path.unlink(missing_ok=True)


def _collect_shards(source: Path, target: Path, builder: AnnotationBuilder) -> dict[str, datasets.SplitInfo]:
    """Move the shards to `data/SPLIT-00000-of-00001-DIGEST.parquet`, except empty ones; return the splits with rows."""
    target.mkdir(parents=True)
    splits = {}
    for name, info in (builder.info.splits or {}).items():
        shards = [path for path in sorted(source.glob(f"prepared-{name}*.parquet")) if pq.read_metadata(path).num_rows]
        for index, path in enumerate(shards):
            path.rename(target / f"{name}-{index:05d}-of-{len(shards):05d}-{builder.digest(name)}.parquet")
        if shards:
            splits[name] = datasets.SplitInfo(name=name, num_bytes=info.num_bytes, num_examples=info.num_examples)
    return splits


def _write_rejected(rejected: RejectedRows, folder: Path) -> Counter:
    counts = Counter()
    with open(folder / REJECTED, "w", encoding="utf-8", errors=ESCAPED) as file:
        for record in rejected.read():
            counts[record["reason"]] += 1
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return counts


def _measure(folder: Path, split: str) -> Size:
    """Count the content of a split's shards without reading images."""
    images = captions = 0
    people = []
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=["image_id", *(["captions"] if "captions" in names else [])])
        images += len(table)
        captions += int(list_lengths(table["captions"]).sum()) if "captions" in names else len(table)
        people.append(np.unique(table["image_id"].to_numpy()))
    return Size(images, captions, len(np.unique(np.concatenate(people))))


def _report(
    dataset: str,
    options: PreparationArguments,
    sizes: dict[str, Size],
    counts: Counter,
    notes: list[str],
    seconds: float,
) -> None:
    rows = sum(size.images for size in sizes.values()) + sum(counts.values())
    print(f"{options.output}: {TITLES[dataset]}, {rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)")
    for split, size in sizes.items():
        people = "" if dataset == "sda" else f", {size.people:,} people"
        print(f"  {split}: {size.images:,} images, {size.captions:,} captions{people}")
    if counts:
        print(f"  left out: {sum(counts.values()):,} rows, listed in {Path(options.output, REJECTED)}")
        for reason, count in counts.most_common():
            print(f"    {count:,} {reason}")
    absent = [split for split in PUBLISHED.get(dataset, ("train", "validation", "test")) if split not in sizes]
    if absent:
        notes = [*notes, f"there is no {' and no '.join(absent)} split"]
    for note in notes:
        print(f"  note: {note}")
    differences = [] if options.no_size_check else compare_with_published(dataset, sizes)
    if differences:
        print(
            f"warning: not the size of the published {TITLES[dataset]}, as expected only for a part of it or a sample:",
            *differences,
            sep="\n  ",
            file=sys.stderr,
        )


# Hub


def _create_repository(repository: str, private: bool) -> None:
    """Create the repository before hours of work, to check login and permissions."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
    except Exception as error:  # no login, permission or network, or a wrong name
        raise ValueError(
            f"--push_to_hub {repository}: the repository cannot be created: {error}; log in with `hf auth login` or set "
            "HF_TOKEN, and give USER/NAME"
        ) from None


def _upload(folder: Path, repository: str) -> None:
    """Upload a prepared dataset in one commit that replaces the previous content."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=str(folder),
            commit_message="Upload the prepared dataset",
            ignore_patterns=[REJECTED],
            delete_patterns=[_SHARDS],
        )
    except Exception as error:  # any network error; the result of hours of work is on disk
        raise ValueError(
            f"--push_to_hub {repository}: the upload failed: {error}; the complete dataset is in {folder}; upload it with "
            f"`hf upload {repository} {folder} . --repo-type dataset --exclude {REJECTED} --delete '{_SHARDS}'`"
        ) from error
    print(f"pushed to {commit.commit_url}")

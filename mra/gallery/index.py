"""Make and keep a gallery of one's own images.

python -m mra.gallery.index build --model outputs/finetune/best --images photos --gallery gallery.db --metadata people.csv
python -m mra.gallery.index add --images more_photos --prefix more/ --gallery gallery.db
python -m mra.gallery.index remove --gallery gallery.db --where 'camera == "c3"'
python -m mra.gallery.index stats --gallery gallery.db
python -m mra.gallery.index verify --gallery gallery.db
python -m mra.gallery.index calibrate --gallery gallery.db --dataset data/arrow/cuhk --split validation
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from mra.common.command_line import plain_errors, try_folder
from mra.gallery.arguments import add_model, add_new, add_place, open_gallery, progress_bar
from mra.gallery.gallery import DEFAULT_RERANK, BuildReport
from mra.gallery.milvus import is_server


NAMES_SHOWN = 10


def main(command_line: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    args = make_parser().parse_args(command_line)
    with plain_errors(f"index {args.command}", args.files or args.gallery):
        args.run(args)


def make_parser() -> argparse.ArgumentParser:
    """One sub-command for each verb."""
    parser = argparse.ArgumentParser(
        prog="index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_place(added)
        added.set_defaults(run=run)
        return added

    for name, text in (
        ("build", "index a folder or data set: what is new or changed is encoded"),
        ("add", "index more images into a gallery that exists"),
    ):
        added = command(name, build, text)
        add_model(added)
        add_new(added)
        add_images(added)
    added = command("remove", remove, "remove images for good: no vector, token or copy stays")
    which = added.add_mutually_exclusive_group(required=True)
    which.add_argument("--where", help="""which ones, such as 'camera == "c3"'""")
    which.add_argument("--keys", nargs="+", help="which ones, by key")
    added.add_argument("--delete_files", action="store_true", help="delete your own files of these images too")
    added = command("stats", stats, "what a gallery holds")
    added.add_argument("--json", action="store_true", help="print one JSON object")
    command("verify", verify, "read every image again and compare it with what was indexed")
    added = command("calibrate", calibrate, "choose the threshold on a labelled split")
    add_model(added)
    added.add_argument("--dataset", required=True, help="folder or Hub id with columns image, captions and image_id")
    added.add_argument("--split", default="validation", help="default: %(default)s")
    added.add_argument(
        "--rerank", type=int, default=DEFAULT_RERANK, help="images re-ranked for each query (%(default)s)"
    )
    added.add_argument("--max_false_alarms", type=float, help="most false alarms to accept, a share such as 0.05")
    return parser


def add_images(parser: argparse.ArgumentParser) -> None:
    """Options that say what to index."""
    parser.add_argument(
        "--images", required=True, help="folder of images, or folder or Hub id that load_dataset reads"
    )
    parser.add_argument("--metadata", help="CSV file with the column path, and camera, time and any others")
    parser.add_argument("--split", help="of a data set")
    parser.add_argument("--prefix", default="", help="put before the keys, to keep equal file names apart")
    parser.add_argument("--prune", action="store_true", help="remove images that are no longer in the source")
    parser.add_argument("--copy_images", action="store_true", default=None, help="keep a copy of each image")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a forward pass (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode images (default: %(default)s)")


def build(args: argparse.Namespace) -> None:
    if args.files:
        try_folder(args.files, "--files")
    if not is_server(args.gallery) and Path(args.gallery).parent.is_dir():
        try_folder(Path(args.gallery).parent, "--gallery")
    with open_gallery(args) as gallery:
        verb = gallery.build if args.command == "build" else gallery.add
        report = verb(
            args.images,
            args.metadata,
            split=args.split,
            prefix=args.prefix,
            prune=args.prune,
            copy_images=args.copy_images,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            progress=progress_bar("images"),
        )
        print(format_report(report))
        print(f"{args.gallery}: {len(gallery):,} images")


def format_report(report: BuildReport) -> str:
    """The report in words, with the first of each list of names."""
    rate = f", {report.encoded / report.seconds:.1f} encoded a second" if report.encoded else ""
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
    show("paths of the metadata that name no image", report.unmatched)
    return "\n".join(lines)


def remove(args: argparse.Namespace) -> None:
    with open_gallery(args) as gallery:
        count = gallery.remove(where=args.where, keys=args.keys, delete_files=args.delete_files)
        print(f"removed {count:,} images: their vectors, tokens and copies are deleted; {len(gallery):,} are left")
        if count and not args.delete_files:
            print("your own files are untouched, and building from their folder again would index them again")


def stats(args: argparse.Namespace) -> None:
    with open_gallery(args) as gallery:
        result = gallery.stats()
    if args.json:
        print(json.dumps(asdict(result)))
        return
    calibration = result.calibration
    rows = {
        "images": f"{result.images:,}, copies of {result.copies:,}",
        "cameras": ", ".join(f"{name or 'unknown'} {count:,}" for name, count in result.cameras.items()),
        "times": f"{result.first_time} to {result.last_time}" if result.first_time else "unknown",
        "fields": ", ".join(f"{name} ({kind})" for name, kind in result.fields.items()) or "none",
        "folders": ", ".join(result.roots) or "none",
        "model": f"{result.model}, fingerprint {result.fingerprint[:12]}, width {result.embedding_dim}",
        "tokens": f"of {result.tokens:,} images",
        "disk": ", ".join(
            f"{name} {size / 2**20:.1f} MiB" for name, size in result.disk_bytes.items() if size is not None
        ),
        "threshold": "0.5, not calibrated"
        if calibration is None
        else f"{calibration.threshold:.3f}, calibrated on {calibration.split}: {calibration.false_alarms:.1%} false "
        f"alarms, {calibration.misses:.1%} misses; weight of matching {calibration.match_weight}",
    }
    for name, value in rows.items():
        print(f"{name:<10} {value}")


def verify(args: argparse.Namespace) -> None:
    with open_gallery(args) as gallery:
        result = gallery.verify(progress_bar("images"))
    for problem in result.problems:
        print(f"{problem.key}: {problem.reason}")
    print(
        f"{result.images:,} images, {len(result.problems):,} problems, {result.tokens_missing:,} without cached tokens"
    )
    if result.problems:
        raise SystemExit(1)


def calibrate(args: argparse.Namespace) -> None:
    from mra.common.tables import load_table

    try:
        dataset = load_table(args.dataset, args.split)
    except Exception as error:
        raise ValueError(f"--dataset {args.dataset}, split {args.split}, cannot be loaded ({error})") from None
    with open_gallery(args) as gallery:
        result = gallery.calibrate(
            dataset,
            rerank=args.rerank,
            max_false_alarms=args.max_false_alarms,
            name=f"{args.dataset} {args.split}",
        )
    print(
        f"threshold {result.threshold:.3f}: {result.false_alarms:.1%} false alarms, {result.misses:.1%} misses over "
        f"{result.queries:,} queries; weight of the matching score {result.match_weight}"
    )


if __name__ == "__main__":
    main()

"""Search a gallery in words, by an image of the person, or by both.

python -m mra.gallery.search "a woman in a red coat with a black backpack" --gallery gallery.db --save ranking.png
python -m mra.gallery.search --image person.jpg --gallery gallery.db --where 'camera == "c3"' --json
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from mra.common.command_line import plain_errors, try_file
from mra.common.drawing import PICTURE_SUFFIXES, RankedQuery, draw_rankings, save_picture
from mra.gallery.arguments import add_model, add_place, open_gallery
from mra.gallery.gallery import DEFAULT_RERANK, DEFAULT_TOP, Gallery, SearchResult
from mra.retrieval.score_fusion import fusion_name


IN_PICTURE = 10
NOT_IN_GALLERY = "probably not in the gallery"


def main(command_line: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    parser = make_parser()
    args = parser.parse_args(command_line)
    if not args.texts and args.image is None:
        parser.error("give a sentence, --image, or both")
    with plain_errors("search", args.save or args.gallery):
        if args.save:
            try_file(args.save, "--save", PICTURE_SUFFIXES)
        with open_gallery(args) as gallery:
            run(gallery, args)


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="a sentence; several are searched one after the other"
    )
    add_place(parser)
    add_model(parser)
    parser.add_argument("--image", help="picture of the person; with a sentence, both count equally")
    parser.add_argument("--top", type=int, default=DEFAULT_TOP, help="hits to show (default: %(default)s)")
    parser.add_argument(
        "--rerank",
        type=int,
        default=DEFAULT_RERANK,
        help="nearest images to re-rank, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--where", help="""restricts the search, such as 'camera == "c3" and time > "2026-01-31"'""")
    parser.add_argument(
        "--threshold", type=float, help="matching probability of a likely hit; the calibrated one or 0.5"
    )
    parser.add_argument(
        "--phrase", action="append", default=[], help="gets a matching probability with each hit; can be repeated"
    )
    parser.add_argument("--save", help=f"write a picture of the best {IN_PICTURE} hits of each search")
    parser.add_argument("--json", action="store_true", help="print one JSON object a search")
    return parser


def run(gallery: Gallery, args: argparse.Namespace) -> None:
    """Search for each sentence, or by the image alone, print the hits and save the picture."""
    rows = []
    for text in args.texts or [None]:
        result = gallery.search(
            text, image=args.image, top=args.top, rerank=args.rerank, where=args.where, threshold=args.threshold
        )
        phrases = []
        if args.phrase and result.hits:
            phrases = gallery.match(args.phrase, [hit.key for hit in result.hits]).T.tolist()
        question = " + ".join(part for part in (text, args.image) if part)
        print(
            to_json(question, result, args.phrase, phrases)
            if args.json
            else to_table(question, result, args.phrase, phrases)
        )
        if args.save:
            rows.append(to_row(gallery, question, result))
    if args.save:
        if not any(row.images for row in rows):
            raise ValueError("there is no hit to draw")
        save_picture(draw_rankings(rows, f"green: likely, red: {NOT_IN_GALLERY}"), Path(args.save))
        if not args.json:
            print(f"wrote {args.save}")


def to_json(question: str, result: SearchResult, names: list[str], phrases: list[list[float]]) -> str:
    """One line that holds everything of a search."""
    hits = [asdict(hit) | {"path": str(hit.path)} for hit in result.hits]
    for hit, scores in zip(hits, phrases, strict=False):
        hit["phrases"] = dict(zip(names, scores, strict=True))
    return json.dumps(
        {
            "query": question,
            "threshold": result.threshold,
            "likely_in_gallery": result.likely_in_gallery,
            "reranked": result.reranked,
            "match_weight": result.match_weight,
            "timings": result.timings,
            "hits": hits,
        },
        ensure_ascii=False,
    )


def to_table(question: str, result: SearchResult, names: list[str], phrases: list[list[float]]) -> str:
    """The hits as a plain-text table under the question."""
    seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in result.timings.items())
    order = "" if result.match_weight is None else f" ({fusion_name('posterior', result.match_weight)})"
    lines = [question, f"{len(result.hits)} hits, {result.reranked} re-ranked{order}; seconds: {seconds}"]
    if result.likely_in_gallery is False:
        lines.append(f"{NOT_IN_GALLERY}: the first hit does not reach {result.threshold:.3f}")
    if not result.hits:
        return "\n".join(lines)
    width = max(len("key"), *(len(hit.key) for hit in result.hits))
    titles = "".join(f"  {name}" for name in names)
    lines.append(f"rank  score  similarity  {'key':<{width}}  camera      time               {titles}".rstrip())
    for number, hit in enumerate(result.hits):
        score = "    -" if hit.score is None else f"{hit.score:.3f}"
        of_phrases = "".join(
            f"  {value:>{len(name)}.3f}"
            for name, value in zip(names, phrases[number] if phrases else [], strict=False)
        )
        mark = f"  {NOT_IN_GALLERY}" if hit.likely is False else ""
        lines.append(
            f"{hit.rank:>4}  {score}  {hit.similarity:>10.4f}  {hit.key:<{width}}  {hit.camera or '-':<10}  "
            f"{hit.time or '-':<19}{of_phrases}{mark}".rstrip()
        )
    return "\n".join(lines) + "\n"


def to_row(gallery: Gallery, question: str, result: SearchResult) -> RankedQuery:
    """The best hits as a row of the picture, without those whose file is gone; red marks what is probably wrong."""
    images, hits = [], []
    for hit in result.hits[:IN_PICTURE]:
        try:
            images.append(gallery.image(hit.key))
        except ValueError as error:
            logging.getLogger(__name__).warning("not in the picture: %s", error)
            continue
        hits.append(hit)
    return RankedQuery(
        text=question,
        images=images,
        scores=[hit.similarity if hit.score is None else hit.score for hit in hits],
        is_match=[hit.likely is not False for hit in hits],
        caption="matching probability" if result.reranked else "similarity",
    )


if __name__ == "__main__":
    main()

"""Search a gallery by text, by an image of the person, or by both: `mra search`."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from mra.common.command_line import try_file
from mra.common.drawing import PICTURE_SUFFIXES, RankedQuery, draw_rankings, save_picture
from mra.gallery.arguments import EncoderArguments, PlaceArguments, SearchArguments, open_gallery
from mra.gallery.gallery import Gallery
from mra.gallery.types import SearchResult
from mra.retrieval.score_fusion import fusion_name


IN_PICTURE = 10
NOT_IN_GALLERY = "probably not in the gallery"


def search(question: SearchArguments, place: PlaceArguments, encoder: EncoderArguments) -> None:
    """Search for each text, or by the image alone, print the hits and save them as an image."""
    if question.save:
        try_file(question.save, "--save", PICTURE_SUFFIXES)
    with open_gallery(place, encoder, auto="auto") as gallery:
        answers = [_answer(gallery, text, question) for text in question.texts or [None]]
    rows = [row for row in answers if row is not None]
    if question.save:
        if not any(row.images for row in rows):
            raise ValueError("--save has no hit to draw: search with a wider --where, or without --save")
        save_picture(draw_rankings(rows, f"green: likely, red: {NOT_IN_GALLERY}"), Path(question.save))
        if not question.json:
            print(f"wrote {question.save}")


def _answer(gallery: Gallery, text: str | None, question: SearchArguments) -> RankedQuery | None:
    """Search for one text, print the hits, and return them as a row if an image is saved."""
    result = gallery.search(
        text,
        image=question.image,
        top=question.top,
        rerank=question.rerank,
        early_stop=question.early_stop,
        where=question.where,
        threshold=question.threshold,
    )
    phrases = []
    if question.phrase and result.hits:
        phrases = gallery.match(question.phrase, [hit.key for hit in result.hits]).T.tolist()
    asked = " + ".join(part for part in (text, question.image) if part)
    print((to_json if question.json else to_table)(asked, result, question.phrase, phrases))
    return to_row(gallery, asked, result) if question.save else None


def to_json(question: str, result: SearchResult, names: list[str], phrases: list[list[float]]) -> str:
    """Format a search and its result as one line of JSON."""
    hits = [asdict(hit) | {"path": str(hit.path)} for hit in result.hits]
    for hit, scores in zip(hits, phrases, strict=False):
        hit["phrases"] = dict(zip(names, scores, strict=True))
    return json.dumps(
        {
            "query": question,
            "threshold": result.threshold,
            "likely_in_gallery": result.likely_in_gallery,
            "reranked": result.reranked,
            "matched": result.matched,
            "match_weight": result.match_weight,
            "timings": result.timings,
            "backend": result.backend,
            "hits": hits,
        },
        ensure_ascii=False,
    )


def to_table(question: str, result: SearchResult, names: list[str], phrases: list[list[float]]) -> str:
    """Format the hits as a text table below the query."""
    seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in result.timings.items())
    seconds += f" ({result.backend})" if result.backend else ""
    order = "" if result.match_weight is None else f" ({fusion_name('posterior', result.match_weight)})"
    matched = f"; matched {result.matched} of {result.reranked}" if result.reranked else ""
    lines = [question, f"{len(result.hits)} hits, {result.reranked} re-ranked{order}; seconds: {seconds}{matched}"]
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
    """Return the best hits with a readable image as a row of the saved image."""
    images, hits = [], []
    for hit in result.hits[:IN_PICTURE]:
        try:
            images.append(gallery.image(hit.key))
        except ValueError as error:
            logging.getLogger(__name__).warning("image not drawn: %s", error)
            continue
        hits.append(hit)
    return RankedQuery(
        text=question,
        images=images,
        scores=[hit.similarity if hit.score is None else hit.score for hit in hits],
        is_match=[hit.likely is not False for hit in hits],
        caption="matching probability" if result.reranked else "similarity",
    )

"""Functions of the web page, without its layout: search, explain, index."""

import contextlib
import datetime
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from mra.gallery.gallery import Gallery
from mra.gallery.types import DEFAULT_RERANK, DEFAULT_TOP, MAX_TEXT, BuildReport, GalleryStats, Hit, SearchResult
from mra.gallery.where import parse_where
from mra.retrieval.encoders import TorchEncoder
from mra.retrieval.explain import Explanation, PhraseScore, explain_pair
from mra.web.uploads import Unpacker, UploadLimits, inside_any


MAX_PHRASES = 10
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Query:
    """Fields of the search tab.

    Attributes:
        text: description of the person, or empty.
        image: path of an image of the person, or None.
        cameras: selected cameras; all if empty.
        first: earliest ISO 8601 time, or empty.
        last: latest ISO 8601 time, or empty.
        where: filter as for `Gallery.search`, or empty.
        threshold: matching probability of a likely hit.
        rerank: whether to re-rank the best hits.
        top: number of hits.
    """

    text: str | None = None
    image: str | None = None
    cameras: Sequence[str] = ()
    first: str | None = None
    last: str | None = None
    where: str | None = None
    threshold: float = 0.5
    rerank: bool = True
    top: int = DEFAULT_TOP


class Page:
    """Functions of the page, without its layout.

    Args:
        gallery: open gallery.
        folders: folders that the page can index, with their subfolders.
        limits: limits of an upload.
    """

    def __init__(self, gallery: Gallery, folders: list[Path], limits: UploadLimits) -> None:
        self.gallery, self.folders, self.limits = gallery, folders, limits

    def stats(self) -> GalleryStats | None:
        """Return the contents of the gallery, None if it is empty."""
        return self.gallery.stats() if len(self.gallery) else None

    def cameras(self) -> list[str]:
        """Return the cameras of the gallery."""
        stats = self.stats()
        return sorted(camera for camera in stats.cameras if camera) if stats else []

    def query(self, query: Query) -> SearchResult:
        """Search with the fields of the page.

        Raises:
            ValueError: if a field is invalid, or text and image are empty.
        """
        if not len(self.gallery):
            raise ValueError("gallery is empty: add images first")
        text, where, top = (query.text or "").strip(), (query.where or "").strip(), int(query.top)
        if len(text) > MAX_TEXT:
            raise ValueError(f"description has {len(text):,} characters, expected at most {MAX_TEXT:,}: shorten it")
        if not text and query.image is None:
            raise ValueError("description and image are empty: describe the person, or choose an image")
        if where:
            parse_where(where, self.gallery.fields)  # alone, before it is joined with the other filters
        return self.gallery.search(
            text or None,
            image=query.image,
            top=top,
            rerank=max(DEFAULT_RERANK, top) if query.rerank else 0,
            where=join_filters(query.cameras, query.first, query.last, where),
            threshold=float(query.threshold),
        )

    def to_json(self, result: SearchResult) -> dict:
        """Convert a search result for programs, without the paths of files, which are private."""
        hits = [{name: value for name, value in asdict(hit).items() if name != "path"} for hit in result.hits]
        return {"hits": hits, "threshold": result.threshold, "likely_in_gallery": result.likely_in_gallery}

    def thumbnails(self, hits: Sequence[Hit]) -> list[Image.Image | None]:
        """Read the images of hits, None for one that cannot be read."""
        images = []
        for hit in hits:
            try:
                images.append(self.gallery.image(hit.key))
            except ValueError:
                images.append(None)
        return images

    def explain(self, text: str, key: str) -> tuple[Image.Image, Explanation | None]:
        """Return the image of a key and its explanation by a text, None for an empty text."""
        image, encoder = self.gallery.image(key), cast(TorchEncoder, self.gallery.encoder)
        if not text:
            return image, None
        tokens = torch.from_numpy(self.gallery.image_tokens(key)[0])
        return image, explain_pair(encoder.model, encoder.processor, text, image_hidden_states=tokens)

    def score_phrases(self, phrases: str, key: str) -> list[PhraseScore]:
        """Score comma-separated phrases with the image of a key.

        Raises:
            ValueError: if the key is empty or unknown, or the number of phrases is not allowed.
        """
        listed = [phrase.strip() for phrase in (phrases or "").split(",") if phrase.strip()]
        if not key:
            raise ValueError("no result is selected: choose one first")
        if not listed or len(listed) > MAX_PHRASES or len(phrases) > MAX_TEXT:
            raise ValueError(
                f"expected 1 to {MAX_PHRASES} phrases in at most {MAX_TEXT:,} characters: separate them by commas"
            )
        scores = self.gallery.match(listed, [key])[:, 0].tolist()
        return [PhraseScore(phrase, score) for phrase, score in zip(listed, scores, strict=True)]

    def index_folder(self, folder: str, progress: Progress | None) -> BuildReport:
        """Index a local folder.

        Raises:
            ValueError: if it is not in an allowed folder, or as for `Gallery.build`.
        """
        if not (folder or "").strip():
            raise ValueError("folder is empty: write the path of a folder")
        return self.gallery.build(inside_any(folder.strip(), self.folders), progress=progress)

    def index_upload(self, files: list[str] | None, progress: Progress | None) -> tuple[BuildReport, list[str]]:
        """Index copies of uploaded images and archives, and delete the uploaded files.

        Raises:
            ValueError: if an upload is not allowed, or as for `Gallery.build`.
        """
        if not files:
            raise ValueError("upload is empty: choose images or a ZIP archive")
        try:
            with tempfile.TemporaryDirectory(prefix="mra-upload-") as folder:
                unpacked = Unpacker(Path(folder), self.limits).unpack(files)
                prefix = f"upload {datetime.datetime.now():%Y-%m-%d %H.%M.%S}/"
                report = self.gallery.build(
                    folder, unpacked.metadata, prefix=prefix, copy_images=True, progress=progress
                )
        finally:
            for file in files:
                Path(file).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # gradio makes a folder for each
                    Path(file).parent.rmdir()
        return report, unpacked.ignored


def join_filters(cameras: Sequence[str], first: str | None, last: str | None, where: str | None) -> str | None:
    """Join the filters of the page into one, None if all are empty."""
    parts = [f"camera in {list(cameras)!r}"] if cameras else []
    parts += [
        f"time {sign} {value.strip()!r}" for sign, value in ((">=", first), ("<=", last)) if value and value.strip()
    ]
    parts += [f"({where.strip()})"] if where and where.strip() else []
    return " and ".join(parts) or None

"""What the web page does, apart from how it looks: searching, explaining, indexing what may be indexed."""

import contextlib
import datetime
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from PIL import Image

from mra.gallery.gallery import Gallery
from mra.gallery.types import DEFAULT_RERANK, DEFAULT_TOP, BuildReport, GalleryStats, Hit, SearchResult
from mra.gallery.where import parse_where
from mra.retrieval.encoders import TorchEncoder
from mra.retrieval.explain import Explanation, PhraseScore, explain_pair
from mra.web.uploads import Unpacker, UploadLimits, inside_any


MAX_TEXT = 1_000  # characters of a query; the model reads some fifty words
MAX_PHRASES = 10
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Query:
    """Fields of the search tab.

    Attributes:
        text: description of the person, or nothing.
        image: path of a picture of the person, or None.
        cameras: chosen ones; none stands for all.
        first: earliest time, ISO 8601, or nothing.
        last: latest time.
        where: condition as `Gallery.search` takes it, or nothing.
        threshold: matching probability of a likely hit.
        rerank: whether the best are re-ranked.
        top: hits to show.
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
    """What the page does, apart from how it looks.

    Args:
        gallery: open.
        folders: that may be indexed from the page, with all below them.
        limits: of an upload.
    """

    def __init__(self, gallery: Gallery, folders: list[Path], limits: UploadLimits) -> None:
        self.gallery, self.folders, self.limits = gallery, folders, limits

    def stats(self) -> GalleryStats | None:
        """Count what the gallery holds; None where there is none yet."""
        return self.gallery.stats() if len(self.gallery) else None

    def cameras(self) -> list[str]:
        """Return the cameras that can be chosen."""
        stats = self.stats()
        return sorted(camera for camera in stats.cameras if camera) if stats else []

    def query(self, query: Query) -> SearchResult:
        """Search with the fields of the page.

        Raises:
            ValueError: if a field cannot be used, or all are empty.
        """
        if not len(self.gallery):
            raise ValueError("the gallery is empty: add images first")
        text, where, top = (query.text or "").strip(), (query.where or "").strip(), int(query.top)
        if len(text) > MAX_TEXT:
            raise ValueError(f"the description is longer than {MAX_TEXT} characters")
        if not text and query.image is None:
            raise ValueError("describe the person, or give an image")
        if where:
            parse_where(where, self.gallery.fields)  # by itself, before it stands beside the other filters
        return self.gallery.search(
            text or None,
            image=query.image,
            top=top,
            rerank=max(DEFAULT_RERANK, top) if query.rerank else 0,
            where=join_filters(query.cameras, query.first, query.last, where),
            threshold=float(query.threshold),
        )

    def to_json(self, result: SearchResult) -> dict:
        """Make a search result readable for programs, without the paths of files, which stay private."""
        hits = [{name: value for name, value in asdict(hit).items() if name != "path"} for hit in result.hits]
        return {"hits": hits, "threshold": result.threshold, "likely_in_gallery": result.likely_in_gallery}

    def thumbnails(self, hits: Sequence[Hit]) -> list[Image.Image | None]:
        """Read the images of results, None where one cannot be read any more."""
        images = []
        for hit in hits:
            try:
                images.append(self.gallery.image(hit.key))
            except ValueError:
                images.append(None)
        return images

    def explain(self, text: str, key: str) -> tuple[Image.Image, Explanation | None]:
        """Return the image of a key, and which words look where in it (None without words)."""
        image, encoder = self.gallery.image(key), cast(TorchEncoder, self.gallery.encoder)
        if not text:
            return image, None
        tokens = self.gallery.image_tokens(key)[0]
        return image, explain_pair(encoder.model, encoder.processor, text, image_hidden_states=tokens)

    def score_phrases(self, phrases: str, key: str) -> list[PhraseScore]:
        """Score the match of phrases, separated by commas, with the image of a key."""
        listed = [phrase.strip() for phrase in (phrases or "").split(",") if phrase.strip()]
        if not key:
            raise ValueError("choose a result first")
        if not listed or len(listed) > MAX_PHRASES or len(phrases) > MAX_TEXT:
            raise ValueError(f"write 1 to {MAX_PHRASES} phrases, separated by commas")
        scores = self.gallery.match(listed, [key])[:, 0].tolist()
        return [PhraseScore(phrase, score) for phrase, score in zip(listed, scores, strict=True)]

    def index_folder(self, folder: str, progress: Progress | None) -> BuildReport:
        """Index a folder of this machine that may be indexed."""
        if not (folder or "").strip():
            raise ValueError("write the path of a folder")
        return self.gallery.build(inside_any(folder.strip(), self.folders), progress=progress)

    def index_upload(self, files: list[str] | None, progress: Progress | None) -> tuple[BuildReport, list[str]]:
        """Index uploaded pictures and archives; the gallery keeps copies, what was uploaded is deleted."""
        if not files:
            raise ValueError("choose pictures or a ZIP archive")
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
    """Join the fields of the page into one `where`; None where all are empty."""
    parts = [f"camera in {list(cameras)!r}"] if cameras else []
    parts += [
        f"time {sign} {value.strip()!r}" for sign, value in ((">=", first), ("<=", last)) if value and value.strip()
    ]
    parts += [f"({where.strip()})"] if where and where.strip() else []
    return " and ".join(parts) or None

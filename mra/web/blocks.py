"""Layout of the web page in gradio: tabs, fields, events, and endpoints for programs."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from mra.gallery.types import Hit


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra [app]

from mra.retrieval.explain import draw_explanation
from mra.web import view as view
from mra.web.page import MAX_TEXT, Page, Query


EXAMPLES = [
    "a woman in a red coat with a black backpack",
    "a man wearing a blue pullover and black jeans",
    "a person with a yellow handbag",
]
RESPONSIBLE = """
A ranking is not an identification: some image always comes first, even if the person is not in the gallery.

- Search only images of people who agreed to it, or with a lawful basis, for research or in your own collection. Never
  identify, track or profile people, and never use a result as evidence against anyone.
- SDA and the models trained on it are for research only; the person-search datasets have their own terms.
- Expect uneven errors: captions reflect their writers' ideas of gender and age, the images come from few places, and rare
  clothes, dark images and small crops are found less often.
- On request, remove a person permanently with `mra index remove --gallery GALLERY --keys KEY`, which deletes vectors, tokens
  and copies.
"""


def build_page(page: Page) -> gr.Blocks:
    """Build the page with its events."""
    with gr.Blocks(title="Search your own people", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        title = gr.HTML(view.show_title(page.stats()))
        blocks.load(lambda: view.show_title(page.stats()), None, title, api_visibility="private")
        with gr.Tab("Search"):
            cameras = add_search(page)
        with gr.Tab("Add images"):
            add_indexing(page, title, cameras)
        with gr.Tab("Responsible use"):
            gr.Markdown(RESPONSIBLE)
    return blocks.queue(default_concurrency_limit=1, max_size=32)


def add_search(page: Page) -> gr.Dropdown:
    """Add the search tab; return its list of cameras."""
    hits, asked, chosen = gr.State([]), gr.State(""), gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=280):
            button, fields = add_fields(page)
            add_api(page, fields)  # first, so that the endpoints get their names
        with gr.Column(scale=9, min_width=280):
            status = gr.HTML(view.show_message("Describe a person, or choose an example."), elem_id="status")
            with gr.Column(visible=False, elem_id="detail") as panel:
                detail = gr.HTML("", elem_id="explanation")
                with gr.Row(equal_height=True):
                    label, example = "Score your own phrases", "black backpack, red coat"
                    phrases = gr.Textbox(label=label, placeholder=example, scale=4, min_width=200, elem_id="phrases")
                    score = gr.Button("Score", scale=1, min_width=90, elem_id="score")
                scored = gr.HTML("", elem_id="scored")
            results = gr.HTML("", js_on_load=view.ON_CLICK, elem_id="results")
    answers, options = Answers(page, list(fields)), {"api_visibility": "private", "show_progress": "minimal"}
    for event in (button.click, fields["text"].submit):
        found = event(answers.search, list(fields.values()), [status, results, hits, asked, panel], **options)
        found.then(None, js=view.SCROLL_TO_STATUS, api_visibility="private")
    shown = results.click(answers.show, [hits, asked], [detail, panel, chosen, scored], **options)
    shown.then(None, js=view.SCROLL_TO_DETAIL, api_visibility="private")
    for event in (score.click, phrases.submit):
        event(answers.rate, [phrases, chosen], scored, **options)
    return fields["cameras"]


class Answers:
    """Event handlers of the search tab.

    Args:
        page: page that runs the queries.
        names: names in `Query` of the fields passed to `search`.
    """

    def __init__(self, page: Page, names: list[str]) -> None:
        self.page, self.names = page, names

    def search(self, *values: Any) -> tuple[Any, ...]:
        """Return status, results, hits, query text, and the closed detail panel."""
        query = Query(**dict(zip(self.names, values, strict=True)))
        try:
            result = self.page.query(query)
        except ValueError as error:
            return view.show_message(str(error), "error"), "", [], "", gr.update(visible=False)
        shown = view.show_hits(result.hits, self.page.thumbnails(result.hits))
        return view.show_status(result), shown, result.hits, (query.text or "").strip(), gr.update(visible=False)

    def show(self, found: Sequence[Hit], words: str, event: gr.EventData) -> tuple[Any, ...]:
        """Return the details of the clicked hit, the open panel, its key, and no phrase scores."""
        key = str(getattr(event, "key", ""))
        hit = next((hit for hit in found if hit.key == key), None)
        if hit is None:
            return "", gr.update(visible=False), "", ""
        try:
            return view.show_detail(hit, *self.page.explain(words, key)), gr.update(visible=True), key, ""
        except ValueError as error:
            return view.show_message(str(error), "error"), gr.update(visible=True), "", ""

    def rate(self, listed: str, key: str) -> str:
        """Return the phrase scores as bars."""
        try:
            return view.show_phrases(self.page.score_phrases(listed, key))
        except ValueError as error:
            return view.show_message(str(error), "error")


def add_fields(page: Page) -> tuple[gr.Button, dict[str, Any]]:
    """Add the fields of a query; return the button, and the fields by their names in `Query`."""
    text = gr.Textbox(
        label="Describe the person",
        lines=3,
        max_lines=6,
        placeholder=EXAMPLES[0],
        elem_id="query",
        max_length=MAX_TEXT,
    )
    button = gr.Button("Search", variant="primary", elem_id="search")
    gr.Examples([[example] for example in EXAMPLES], [text], label="Examples", api_visibility="private")
    with gr.Accordion("Search by image", open=False, elem_id="by-image"):
        image = gr.Image(
            # Without a mode, because gradio would convert the image and clip 16 bits to white.
            label="Image of the person",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=220,
            buttons=[],
        )
    with gr.Accordion("Filters", open=False, elem_id="filters"):
        known, info = page.cameras(), f"Fields: {', '.join(page.gallery.fields)}; operators: and, or, not"
        cameras = gr.Dropdown(
            known, multiselect=True, label="Cameras", info="All if none is chosen", elem_id="cameras"
        )
        with gr.Row():
            first = gr.Textbox(label="From", placeholder="2026-01-31", min_width=120)
            last = gr.Textbox(label="Until", placeholder="2026-02-01", min_width=120)
        where = gr.Textbox(label="Condition", placeholder='camera != "c3" and key > "b"', elem_id="where", info=info)
    with gr.Accordion("Ranking", open=False, elem_id="ranking"):
        rerank = gr.Checkbox(True, label="Re-rank the best hits with the fusion layers", elem_id="rerank")
        known, info = page.gallery.threshold, "Hits below it are probably not in the gallery"
        threshold = gr.Slider(0, 1, known, step=0.01, label="Threshold", info=info, elem_id="threshold")
        top = gr.Slider(5, 60, 20, step=5, label="Results", elem_id="top")
    fields = {"text": text, "image": image, "cameras": cameras, "first": first, "last": last}
    return button, fields | {"where": where, "threshold": threshold, "rerank": rerank, "top": top}


def add_api(page: Page, fields: dict[str, Any]) -> None:
    """Add endpoints for programs: search, explain, score_phrases."""
    key, phrases = gr.Textbox(visible=False, label="key"), gr.Textbox(visible=False, label="phrases")
    found, scores = gr.JSON(visible=False, label="result"), gr.JSON(visible=False, label="scores")
    picture = gr.Image(visible=False, label="explanation", format="png")

    @contextlib.contextmanager
    def shown_errors() -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def search(*values: Any) -> dict[str, Any]:
        with shown_errors():
            return page.to_json(page.query(Query(**dict(zip(fields, values, strict=True)))))

    def explain(text: str | None, key: str) -> Image.Image:
        with shown_errors():
            words = (text or "").strip()
            if not words:
                raise ValueError("text is empty: describe the person to explain a result")
            image, explanation = page.explain(words, key)
            assert explanation is not None
            return draw_explanation(image, explanation)

    def score_phrases(phrases: str, key: str) -> dict[str, float]:
        with shown_errors():
            return {score.phrase: score.match_probability for score in page.score_phrases(phrases, key)}

    gr.Button(visible=False).click(search, list(fields.values()), found, api_name="search")
    gr.Button(visible=False).click(explain, [fields["text"], key], picture, api_name="explain")
    gr.Button(visible=False).click(score_phrases, [phrases, key], scores, api_name="score_phrases")


def add_indexing(page: Page, title: gr.HTML, cameras: gr.Dropdown) -> None:
    """Add the tab that indexes uploads and local folders."""
    limits = page.limits
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            files = gr.File(
                label="Images or a ZIP archive",
                file_count="multiple",
                file_types=["image", ".zip", ".csv"],
                elem_id="files",
                height=180,
            )
            gr.Markdown(
                f"Up to {limits.images:,} images, {limits.bytes >> 20:,} MiB unpacked, {limits.image_bytes >> 20} MiB each. "
                "The gallery keeps copies. A CSV file can add metadata: path, and optionally camera, time and further columns."
            )
            upload = gr.Button("Index the upload", variant="primary", elem_id="index-upload")
        with gr.Column(min_width=280, visible=bool(page.folders)):
            allowed = ", ".join(map(str, page.folders))
            folder = gr.Textbox(
                label="Folder on the server of this page", elem_id="folder", info=f"Allowed: {allowed}"
            )
            build = gr.Button("Index the folder", elem_id="index-folder")
    report = gr.HTML("", elem_id="report", min_height=120)

    indexing, outputs = Indexing(page), [report, title, cameras]
    options = {"api_visibility": "private", "concurrency_id": "index", "show_progress_on": report}
    upload.click(indexing.upload, files, [*outputs, files], **options)
    build.click(indexing.folder, folder, outputs, **options)


class Indexing:
    """Event handlers of the indexing tab; they return report, title and cameras."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def upload(self, files: list[str] | None, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008  gradio reads the default
        """Index an upload and clear its field."""
        try:
            done, ignored = self.page.index_upload(files, self._count(progress))
        except ValueError as error:
            return [*self._refresh(view.show_message(str(error), "error")), None]
        return [*self._refresh(view.show_report(done, ignored)), None]

    def folder(self, path: str, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        """Index a local folder."""
        try:
            return self._refresh(view.show_report(self.page.index_folder(path, self._count(progress))))
        except ValueError as error:
            return self._refresh(view.show_message(str(error), "error"))

    def _count(self, progress: gr.Progress) -> Callable[[int, int], None]:
        return lambda done, total: progress((done, total), desc="Indexing", unit="images")

    def _refresh(self, shown: str) -> tuple[Any, ...]:
        return shown, view.show_title(self.page.stats()), gr.update(choices=self.page.cameras())


def make_theme() -> gr.themes.Base:
    """Return gradio's theme with system fonts, so that nothing is fetched from other servers."""
    return gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")

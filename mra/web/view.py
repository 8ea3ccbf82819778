"""HTML of the web page, without external resources: results, explanations, phrase scores, reports, styles."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image, ImageOps

from mra.gallery.types import BuildReport, GalleryStats, Hit, SearchResult
from mra.retrieval.explain import Explanation, PhraseScore, scale_heatmap
from mra.retrieval.overlay import overlay_heatmap


THUMBNAIL = (192, 384)  # pixels of a result
TILE = (96, 192)  # pixels of a word
SHOWN_SKIPPED = 20

# Colours follow the light or dark theme of the page; buttons are large enough for touch.
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; padding-top: 12px !important; }
.html-container { padding: 0 !important; }
.mra-title h1 { font-size: 1.5rem; margin: 0; font-weight: 650; }
.mra-title p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.mra-status { padding: 10px 14px; border-radius: 10px; background: var(--background-fill-secondary); line-height: 1.45; }
.mra-status.mra-warning { background: #fff3d6; color: #5b3d00; }
.mra-status.mra-error { background: #fde3e1; color: #7a150d; }
.mra-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); gap: 12px; }
.mra-hit { display: flex; flex-direction: column; width: 100%; padding: 0;
  border: 1px solid var(--border-color-primary); border-radius: 10px;
  overflow: hidden; background: var(--background-fill-primary); color: var(--body-text-color); text-align: left;
  cursor: pointer; font: inherit; }
.mra-hit:hover, .mra-hit:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.mra-hit img { display: block; width: 100%; aspect-ratio: 1 / 2; object-fit: contain; background: #eceef1; }
.mra-hit div { padding: 7px 9px 9px; font-size: 0.82rem; line-height: 1.35; overflow-wrap: anywhere; }
.mra-hit b { font-size: 0.95rem; }
.mra-hit small { display: block; color: var(--body-text-color-subdued); }
.mra-unlikely img { opacity: 0.5; filter: grayscale(0.6); }
.mra-mark { display: inline-block; margin-top: 3px; padding: 1px 7px; border-radius: 8px; background: #fff3d6;
  color: #5b3d00; font-size: 0.74rem; }
.mra-detail { scroll-margin-top: 8px; }
.mra-detail h3 { margin: 0 0 4px; font-size: 1.1rem; }
.mra-facts { color: var(--body-text-color-subdued); overflow-wrap: anywhere; margin: 0 0 10px; font-size: 0.9rem; }
.mra-explained { display: flex; gap: 14px; align-items: flex-start; }
.mra-words { display: flex; flex-wrap: wrap; gap: 8px; }
.mra-words figure { margin: 0; width: 76px; }
.mra-large { flex: none; }
.mra-large figure { width: 130px; }
.mra-words img { display: block; width: 100%; border-radius: 6px; }
.mra-words figcaption { text-align: center; font-size: 0.82rem; margin-top: 3px; overflow-wrap: anywhere; }
.mra-words .mra-faint { opacity: 0.55; }
.mra-note { color: var(--body-text-color-subdued); font-size: 0.82rem; margin: 10px 0 0; }
.mra-phrase { display: grid; grid-template-columns: minmax(90px, 1fr) 2fr 56px; gap: 10px; align-items: center;
  margin: 5px 0; font-size: 0.92rem; }
.mra-bar { height: 12px; border-radius: 6px; background: var(--background-fill-secondary); overflow: hidden;
  border: 1px solid var(--border-color-primary); }
.mra-bar i { display: block; height: 100%; background: var(--color-accent); }
.mra-phrase span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  .mra-grid { grid-template-columns: repeat(3, 1fr); gap: 8px; }
  .mra-hit div { padding: 5px 7px 7px; font-size: 0.76rem; }
  .mra-explained { flex-direction: column; }
  .mra-words figure { width: calc(25% - 6px); }
  .mra-large { width: 100%; }
  .mra-large figure { width: calc(50% - 4px); }
}
"""
# In the head, because gradio restricts `css` to the inside of the page.
HEAD = """<style>
footer .divider { display: none; }
@media (max-width: 640px) { .gradio-container main.app, .gradio-container .main.app { padding: 12px 10px !important; } }
</style>"""

# A click or Enter on a result sends its key; the listener is on the element that outlives its content.
ON_CLICK = """
element.addEventListener('click', (event) => {
  const hit = event.target.closest('[data-key]');
  if (hit) trigger('click', { key: hit.dataset.key });
});
"""
# On a phone, the results are below the fields.
SCROLL_TO_STATUS = """() => {
  const status = document.getElementById('status');
  if (status.getBoundingClientRect().top > 0.6 * window.innerHeight) status.scrollIntoView({ behavior: 'smooth' });
}"""
SCROLL_TO_DETAIL = "() => document.getElementById('mra-detail')?.scrollIntoView({ behavior: 'smooth' })"


def show_title(stats: GalleryStats | None) -> str:
    """Render the head of the page with the contents of the gallery."""
    if stats is None or not stats.images:
        said = "The gallery is empty: add images first."
    else:
        cameras = len([camera for camera in stats.cameras if camera])
        said = _images(stats.images) + (f" from {cameras} cameras" if cameras else "")
        if stats.first_time:
            said += f", {_readable(stats.first_time)} to {_readable(stats.last_time)}"
    return f'<div class="mra-title"><h1>Search your own people</h1><p>{html.escape(said)}</p></div>'


def show_message(text: str, kind: str = "") -> str:
    """Render plain text in a box; `kind` is "", "warning" or "error"."""
    return f'<div class="mra-status{f" mra-{kind}" if kind else ""}" role="status">{html.escape(text)}</div>'


def show_status(result: SearchResult) -> str:
    """Render the summary of a search, and whether the person is likely to be in the gallery."""
    if not result.hits:
        return show_message("No image matches the filters.", "warning")
    seconds = sum(result.timings.values())
    done = f"{_images(len(result.hits))} in {seconds:.2f} s"
    matched = f" ({result.matched} matched)" if 0 < result.matched < result.reranked else ""
    done += (
        f", {result.reranked} re-ranked{matched}."
        if result.reranked
        else ", ranked by similarity only, without probabilities."
    )
    if result.likely_in_gallery is False:
        least = f"{result.threshold:.0%}"
        return show_message(
            f"Probably not in the gallery: no image reaches the threshold of {least}. Some image always comes first. {done}",
            "warning",
        )
    return show_message(done)


def show_hits(hits: Sequence[Hit], images: Sequence[Image.Image | None]) -> str:
    """Render hits as a grid of buttons; an image that cannot be read is None."""
    return f'<div class="mra-grid">{"".join(map(_show_hit, hits, images))}</div>'


def _show_hit(hit: Hit, image: Image.Image | None) -> str:
    score = f"similarity {hit.similarity:.2f}" if hit.score is None else f"{hit.score:.0%}"
    facts = [html.escape(fact) for fact in (hit.camera, _readable(hit.time)) if fact]
    mark = '<span class="mra-mark">probably not in the gallery</span>' if hit.likely is False else ""
    key = html.escape(hit.key)
    return (
        f'<button class="mra-hit{" mra-unlikely" if hit.likely is False else ""}" data-key="{key}" title="{key}">'
        f'<img src="{as_data(image, THUMBNAIL)}" alt="result {hit.rank}, {key}"/>'
        f"<div><b>{hit.rank}. {score}</b>{''.join(f'<small>{fact}</small>' for fact in facts)}{mark}</div></button>"
    )


def show_detail(hit: Hit, image: Image.Image, explanation: Explanation | None) -> str:
    """Render the details of a hit: its metadata, and where each word of the query looks."""
    facts = {"file": hit.key, "camera": hit.camera, "time": _readable(hit.time), **hit.metadata}
    known = " · ".join(
        f"{html.escape(str(name))}: {html.escape(str(value))}" for name, value in facts.items() if value
    )
    score = f"similarity {hit.similarity:.2f}" if hit.score is None else f"{hit.score:.1%} match"
    large, words = [_figure("image", as_data(image, THUMBNAIL))], []
    note = "Search by text to see where each word looks."
    if explanation is not None:
        small = ImageOps.contain(image, THUMBNAIL)
        heat = overlay_heatmap(small, scale_heatmap(explanation.sentence))
        large.append(_figure("all words", as_data(heat, THUMBNAIL)))
        small = ImageOps.contain(image, TILE)
        for word in explanation.words:
            heat = overlay_heatmap(small, scale_heatmap(word.heatmap), word.is_stop_word)
            words.append(_figure(word.word, as_data(heat, TILE), "mra-faint" if word.is_stop_word else ""))
        note = "Bright areas contribute most to a word. They are a hint, not a proof, of why the image was found."
    return (
        f'<div class="mra-detail" id="mra-detail"><h3>Result {hit.rank}: {score}</h3><p class="mra-facts">{known}</p>'
        f'<div class="mra-explained"><div class="mra-words mra-large">{"".join(large)}</div>'
        f'<div class="mra-words">{"".join(words)}</div></div><p class="mra-note">{note}</p></div>'
    )


def show_phrases(scores: Sequence[PhraseScore]) -> str:
    """Render the matching probability of each phrase as a bar and in percent."""
    rows = [
        f'<div class="mra-phrase"><span>{html.escape(score.phrase)}</span>'
        f'<div class="mra-bar"><i style="width:{100 * score.match_probability:.1f}%"></i></div>'
        f"<span>{score.match_probability:.1%}</span></div>"
        for score in scores
    ]
    return f"<div>{''.join(rows)}</div>"


def show_report(report: BuildReport, ignored: Sequence[str] = ()) -> str:
    """Render the report of indexing, with the files skipped and the reasons."""
    counts = ("added", "changed", "unchanged")
    said = ", ".join(f"{getattr(report, name):,} {name}" for name in counts if getattr(report, name)) or "nothing"
    lines = [f"<p><b>Indexed: {said}</b> in {report.seconds:.1f} s.</p>"]
    left = [f"{skipped.key}: {skipped.reason}" for skipped in report.skipped]
    left += [f"{name}: not an image" for name in ignored] + [
        f"{path}: only in the CSV file" for path in report.unmatched
    ]
    if left:
        shown = "".join(f"<li>{html.escape(line)}</li>" for line in left[:SHOWN_SKIPPED])
        more = f"<li>and {len(left) - SHOWN_SKIPPED:,} more</li>" if len(left) > SHOWN_SKIPPED else ""
        lines.append(f"<p>Skipped:</p><ul>{shown}{more}</ul>")
    return f'<div class="mra-status{" mra-warning" if left else ""}" role="status">{"".join(lines)}</div>'


def as_data(image: Image.Image | None, size: tuple[int, int]) -> str:
    """Encode an image as a data URL, so that no image file has an address."""
    if image is None:
        return ""
    buffer = io.BytesIO()
    ImageOps.contain(image, size).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _readable(time: str | None) -> str | None:
    """Format a time of the gallery without seconds and zone: "2026-01-31 08:15"."""
    return time and time.replace("T", " ").removesuffix(":00").removesuffix(" 00:00")


def _figure(label: str, source: str, kind: str = "") -> str:
    label = html.escape(label)
    return f'<figure class="{kind}"><img src="{source}" alt="{label}"/><figcaption>{label}</figcaption></figure>'

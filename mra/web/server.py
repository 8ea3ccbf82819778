"""Server of the web page: `python app.py`."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mra.common.arguments import parse_arguments
from mra.common.command_line import plain_errors
from mra.gallery.arguments import LOOPBACK, TOKEN_VARIABLE
from mra.web.arguments import PageArguments, UploadLimits


if TYPE_CHECKING:
    import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra [app]


DESCRIPTION = "Web page to search a gallery of people by text, by an image or by both, and to add images to it."


def main(argv: list[str] | None = None, program: str = "app.py") -> None:
    """Open the gallery and serve the page until it is stopped.

    Raises:
        SystemExit: with a one-line message if the gallery or model cannot be opened, the port is in use or gradio is missing.
    """
    (options,) = parse_arguments([PageArguments], prog=program, description=DESCRIPTION, argv=argv, config=False)
    try:
        from mra.web.blocks import build_page
    except ImportError as error:
        if error.name is None or not error.name.startswith("gradio"):
            raise
        raise SystemExit(f"{program}: the web page needs gradio ({error}): pip install '.[app]'") from None
    from mra.gallery.gallery import Gallery
    from mra.web.page import Page

    with contextlib.ExitStack() as stack:
        with plain_errors(program, errors=(ValueError,)):
            place = {"collection": options.collection, "token": os.environ.get(TOKEN_VARIABLE)}
            gallery = stack.enter_context(Gallery(options.gallery, options.model, **place))
            if options.images:
                gallery.build(options.images)
            elif len(gallery) or options.model:
                _ = gallery.encoder  # loads it now, to report errors before the page starts
        # Components read the folder of uploads when they are created.
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="mra-page-"))
        folders = [Path(options.images)] if options.images and Path(options.images).is_dir() else []
        blocks = build_page(Page(gallery, folders, UploadLimits(images=options.max_upload_images)))
        with plain_errors(program, errors=(ValueError,)):
            serve(blocks, options)


def serve(blocks: "gr.Blocks", options: PageArguments) -> None:
    """Serve a page until it is stopped.

    Raises:
        ValueError: if the port is in use.
    """
    from mra.web import view
    from mra.web.blocks import make_theme

    # A Space is only reachable through the Hub's proxy, which connects from outside its container.
    host = options.host or ("0.0.0.0" if os.environ.get("SPACE_ID") else LOOPBACK)
    print(f"page: http://{host}:{options.port}", flush=True)
    try:
        blocks.launch(
            server_name=host,
            server_port=options.port,
            share=False,
            quiet=True,
            max_file_size=f"{options.max_upload_mb}mb",
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            footer_links=["api"],
            theme=make_theme(),
            css=view.CSS,
            head=view.HEAD,
            ssr_mode=False,
        )
    except OSError as error:
        if "Cannot find empty port" not in str(error):
            raise
        raise ValueError(f"port {options.port} is in use: pass a different --port") from None


if __name__ == "__main__":
    main()

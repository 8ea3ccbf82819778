"""Serve a gallery to programs on this machine over HTTP, with the model loaded once: `mra serve`.

`GET /search?text=...&top=...&rerank=...&where=...` answers what `mra search --json` prints, and `GET /health` that the server
is ready. No request reads or writes a file that it names.

Only this machine can connect. Its browsers can be asked by any web page to connect too, so requests that carry the name of
another host (DNS rebinding) or come from another origin are refused, and no answer allows another origin to read it.
"""

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from mra.gallery.arguments import LOOPBACK, EncoderArguments, PlaceArguments, ServeArguments, open_gallery
from mra.gallery.gallery import Gallery
from mra.gallery.search_verb import to_json
from mra.gallery.types import DEFAULT_RERANK, DEFAULT_TOP, MAX_TEXT
from mra.gallery.where import parse_where


logger = logging.getLogger(__name__)

HOSTS = (LOOPBACK, "localhost")
PARAMETERS = ("text", "top", "rerank", "where")
MAX_DIGITS = 9  # of a number in a query
SECONDS_TO_ASK = 30  # that a client may take to send its request


class RequestError(ValueError):
    """A request that is refused, with the status of the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class SearchServer(ThreadingTCPServer):
    """HTTP server of one gallery on the loopback interface; unlike `HTTPServer` it asks no name server for its own name.

    Searches run one after another, because each uses all threads of the model.

    Args:
        port: port to listen on; 0 for any free one.

    Raises:
        ValueError: if the port is in use or not permitted.
    """

    allow_reuse_address = True  # while connections of an earlier server time out
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        self.gallery: Gallery | None = None  # none before and after it serves
        self.turn = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ValueError(f"--port {port} cannot be used ({error.strerror}): pass a different one") from None
        self.port = self.server_address[1]

    @contextlib.contextmanager
    def serving(self, gallery: Gallery) -> Iterator[None]:
        """Answer requests during the block; at its end, wait for the search that runs and refuse those that wait."""
        self.gallery = gallery
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            with self.turn:
                self.gallery = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a connection, such as one that the client closed before its answer."""
        logger.debug("connection of %s", client_address, exc_info=True)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Gallery]:
        """Yield the gallery when it is this request's turn."""
        with self.turn:
            if self.gallery is None:
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            yield self.gallery


class _Handler(BaseHTTPRequestHandler):
    """One request; every answer is a JSON object, `{"error": ...}` if it is refused."""

    server: SearchServer
    server_version, sys_version = "mra", ""
    timeout = SECONDS_TO_ASK

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            self._refuse_foreign()
            url = urlsplit(self.path)
            if url.path == "/search":
                body = self._search(url.query)
            elif url.path == "/health":
                body = json.dumps({"status": "ok"})  # without a turn: it answers during a search
            else:
                raise RequestError(HTTPStatus.NOT_FOUND, "expected /search?text=... or /health")
        except RequestError as error:
            self.send_error(error.status, str(error))
        except Exception as error:  # of this request alone: the server goes on
            logger.exception("a search failed")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error) or repr(error))
        else:
            self._send(HTTPStatus.OK, body)

    def _refuse_method(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, f"method {self.command} is not allowed: expected GET")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_method

    def _refuse_foreign(self) -> None:
        """Refuse requests that a web page of another origin may have caused."""
        addresses = [f"{host}:{self.server.port}" for host in HOSTS]
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].strip().lower() not in (*HOSTS, *addresses):
            raise RequestError(HTTPStatus.FORBIDDEN, f"header Host must be {' or '.join(addresses)}")
        origins = self.headers.get_all("Origin", [])
        is_foreign = any(
            origin.strip().lower() not in [f"http://{address}" for address in addresses] for origin in origins
        )
        if is_foreign or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise RequestError(HTTPStatus.FORBIDDEN, "requests of another origin are refused")

    def _search(self, query: str) -> str:
        values = _read_query(query)
        text, where = values["text"], values.get("where")
        with self.server.opened() as gallery:
            if where is not None and where.strip():
                try:
                    parse_where(where, gallery.fields)
                except ValueError as error:
                    raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
            top, rerank = _whole(values, "top", DEFAULT_TOP, 1), _whole(values, "rerank", DEFAULT_RERANK, 0)
            result = gallery.search(text, top=top, rerank=rerank, where=where)
        return to_json(text, result, [], [])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send a refusal, also those of the standard library."""
        self._send(HTTPStatus(code), json.dumps({"error": message or HTTPStatus(code).phrase}))

    def _send(self, status: HTTPStatus, body: str) -> None:
        content = body.encode("utf-8", "backslashreplace")  # file names need not be UTF-8
        self.send_response(status)
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests for debugging only: what people search for is private."""
        logger.debug(format, *args)


def _read_query(query: str) -> dict[str, str]:
    """Return the parameters of a search.

    Raises:
        RequestError: if one is unknown, repeated, missing, too long or not UTF-8.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError as error:
        raise RequestError(
            HTTPStatus.BAD_REQUEST, f"the query cannot be read ({error}): percent-encode UTF-8"
        ) from None
    values = dict(pairs)
    unknown = [name for name in values if name not in PARAMETERS]
    if unknown or len(values) < len(pairs):
        wrong = f"parameter {unknown[0]!r} is unknown" if unknown else "a parameter is given twice"
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{wrong}: expected {', '.join(PARAMETERS)}, each once")
    if not values.get("text", "").strip():
        raise RequestError(HTTPStatus.BAD_REQUEST, "text must have at least one word")
    if len(values["text"]) > MAX_TEXT:
        got = f"got {len(values['text']):,}"
        raise RequestError(HTTPStatus.BAD_REQUEST, f"text must have at most {MAX_TEXT:,} characters, {got}")
    return values


def _whole(values: dict[str, str], name: str, default: int, least: int) -> int:
    value = values.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS and int(value) >= least):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def serve(options: ServeArguments, place: PlaceArguments, encoder: EncoderArguments) -> None:
    """Answer requests until the process is asked to stop by Ctrl-C or SIGTERM."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with SearchServer(options.port) as server, open_gallery(place, encoder, auto="auto") as gallery:
            backend = gallery.search("a person", top=1, rerank=1).backend  # loads the model, and reports errors now
            with server.serving(gallery):
                address = f"http://{LOOPBACK}:{server.port}"
                print(f"serving {len(gallery):,} images with {backend} at {address}/search?text=...", flush=True)
                stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

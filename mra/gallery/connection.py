"""Connections to Milvus, on a server or embedded in this process, with one-sentence errors."""

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mra.common.extras import extra_needed


# Maximum interval of gRPC: a local connection needs no keep-alive pings.
NEVER_MS = 2**31 - 1

# File by which milvus-lite keeps other processes out of a folder.
LOCK = "LOCK"


def is_server(uri: str) -> bool:
    """Return whether the location of a gallery is the address of a Milvus server."""
    return urlparse(uri).scheme in ("http", "https", "tcp", "unix")


class Client:
    """A `pymilvus.MilvusClient` whose errors name the gallery.

    Raises:
        ValueError: by every method, instead of the errors of pymilvus, which become the cause.
    """

    def __init__(self, client: Any, uri: str) -> None:
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        """Return a method of the client."""
        method = getattr(self._client, name)

        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            with readable_errors(self._uri):
                return method(*arguments, **options)

        return call


@contextlib.contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """Raise a ValueError that names the gallery instead of an error of pymilvus."""
    from pymilvus import MilvusException

    try:
        yield
    except MilvusException as error:
        hint = "check that the server is running and healthy"
        if not is_server(uri):
            hint = "a file of its index is damaged; restore a backup, or delete the folder and build the gallery again"
        raise ValueError(f"gallery {uri} cannot be read ({_reason(error)}): {hint}") from error


def connect(uri: str, token: str | None) -> Client:
    """Return the client of a server or of an embedded gallery.

    Raises:
        ValueError: if pymilvus is missing or the gallery cannot be opened; the cause is the original error.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise extra_needed("a gallery on disk or on a server", "search", error) from error
    # They log failed requests with a traceback although they also raise; the engine retries at the next flush.
    for name in ("pymilvus", "grpc._server", "milvus_lite.adapter", "milvus_lite.engine"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _logged_errors("milvus_lite.server_manager") as logged:
        try:
            if not is_server(uri):
                Path(uri).mkdir(exist_ok=True)
                (Path(uri) / LOCK).touch()  # milvus-lite would make it read-only for the group, whatever the umask
            # pymilvus pings every 10 s; milvus-lite treats that as an attack and disconnects, with errors on the terminal.
            options: dict[str, Any] = {} if is_server(uri) else {"grpc_options": {"grpc.keepalive_time_ms": NEVER_MS}}
            return Client(MilvusClient(uri, token=token or "", **options), uri)
        except Exception as error:
            cause = logged[-1] if logged else error
            raise readable(cause, uri) from cause


@contextlib.contextmanager
def _logged_errors(name: str) -> Iterator[list[BaseException]]:
    """Collect the exceptions that a library logs, with a traceback on the terminal, instead of raising them."""
    errors: list[BaseException] = []

    def collect(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            errors.append(error)
        return error is None

    library = logging.getLogger(name)
    library.addFilter(collect)
    try:
        yield errors
    finally:
        library.removeFilter(collect)


def readable(error: BaseException, uri: str) -> ValueError:
    """Return a one-sentence error for a gallery that cannot be opened."""
    hint = "check the address and the token, and that Milvus is running there"
    if not is_server(uri):
        hint = "check that the folder contains a gallery and is writable"
    return ValueError(f"gallery {uri} cannot be opened ({_reason(error)}): {hint}")


def _reason(error: BaseException) -> str:
    """Return the message of an error, with its type if the message alone is not clear."""
    reason = getattr(error, "message", None) or str(error)
    return f"{type(error).__name__}: {reason}" if isinstance(error, LookupError) or not reason else reason


def refuse_locked(path: Path) -> None:
    """Raise an error if a different process has the folder open; that of milvus-lite is less clear."""
    lock = path / LOCK
    if lock.is_dir():
        raise ValueError(f"gallery {path} cannot be opened ({lock} is a folder, expected a file): delete that folder")
    if not lock.exists():
        return
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError as error:
        raise readable(error, str(path)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"gallery {path} is open in a different process, and an embedded gallery serves one at a time: close it "
            "there, or use a Milvus server (--gallery http://host:19530), which serves many"
        ) from None
    finally:
        os.close(descriptor)

"""Index of one's own pictures: add, search in words, filter, remove."""

from typing import TYPE_CHECKING

from mra.common.lazy import lazy_names


if TYPE_CHECKING:
    from mra.gallery.gallery import Gallery


__all__ = ["Gallery"]

__getattr__, __dir__ = lazy_names(__name__, {"Gallery": "mra.gallery.gallery"})

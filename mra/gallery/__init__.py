"""Gallery of your own images: index, search by text or image, filter, remove."""

from typing import TYPE_CHECKING

from mra.common.lazy import lazy_names


if TYPE_CHECKING:
    from mra.gallery.gallery import Gallery


__all__ = ["Gallery"]

__getattr__, __dir__ = lazy_names(__name__, {"Gallery": "mra.gallery.gallery"})

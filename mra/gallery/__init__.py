"""Index of one's own pictures: add, search in words, filter, remove."""

from mra.gallery.gallery import Gallery


__all__ = ["Gallery"]

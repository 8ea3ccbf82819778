"""Models, processors and tokenizers of any library, by folder or Hub id, refused in one sentence when they do not load."""

import pickle
from typing import Any

from safetensors import SafetensorError

from mra.common.weight_files import first_line


# What `from_pretrained` of transformers and diffusers raises for files that are missing, cut off, damaged or of another kind.
_UNREADABLE = (
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def load_pretrained(cls: Any, name: str, argument: str, **options: Any) -> Any:
    """Call `from_pretrained` of a class.

    Args:
        cls: to load.
        name: folder or Hub id.
        argument: that gave the name, for the message.
        options: of `from_pretrained`.

    Raises:
        ValueError: naming the argument, if nothing can be loaded; the library's own error is its cause.
    """
    try:
        return cls.from_pretrained(name, **options)
    except _UNREADABLE as error:
        part = f" ({options['subfolder']})" if options.get("subfolder") else ""
        raise ValueError(
            f"{argument}: {str(name)!r}{part} cannot be loaded as {cls.__name__} ({first_line(error)}): give the folder or "
            "Hub id of one, or download it again if files of it are damaged"
        ) from error

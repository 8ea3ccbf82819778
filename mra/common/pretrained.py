"""Loading of models, processors and tokenizers of any library, with one-line errors."""

import pickle
from typing import Any

from safetensors import SafetensorError

from mra.common.digests import check_digests
from mra.common.weight_files import first_line


# Errors of `from_pretrained` in transformers and diffusers for missing, truncated, damaged or unrelated files.
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
    """Load an object with a class's `from_pretrained`.

    Args:
        cls: class to load.
        name: folder or Hub id.
        argument: name of the argument that gave the name, for the message.
        options: options of `from_pretrained`.

    Raises:
        ValueError: if loading fails; the message names the argument, and the library's error is its cause.
    """
    check_digests(name, argument)
    try:
        return cls.from_pretrained(name, **options)
    except _UNREADABLE as error:
        part = f" ({options['subfolder']})" if options.get("subfolder") else ""
        raise ValueError(
            f"{argument}: {str(name)!r}{part} cannot be loaded as {cls.__name__} ({first_line(error)}): give the folder or "
            "Hub id of one, or download it again if its files are damaged"
        ) from error

"""Error messages for optional libraries that cannot be imported."""


def extra_needed(what: str, extra: str, error: ImportError) -> ValueError:
    """Return the error for a library that is not installed or cannot be imported.

    Args:
        what: the feature that needs the library, in words.
        extra: name of this project's extra that installs it.
        error: the import error; the message quotes it, because a broken library is not a missing one.
    """
    return ValueError(f"{what} needs the extra [{extra}] ({error}): pip install 'mra-retrieval[{extra}]'")

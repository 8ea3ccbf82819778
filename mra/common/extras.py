"""Optional libraries: what to say where one cannot be imported."""


def extra_needed(what: str, extra: str, error: ImportError) -> ValueError:
    """Return the error of a library that is not installed, or is installed and cannot be imported.

    Args:
        what: needs it, in words.
        extra: of this project that installs it.
        error: that importing it raised, which the message quotes: a broken library is not an absent one.
    """
    return ValueError(f"{what} needs the extra [{extra}] ({error}): pip install 'mra-retrieval[{extra}]'")

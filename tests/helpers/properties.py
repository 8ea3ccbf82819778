"""How many examples the property tests draw; the profiles stand in tests/conftest.py."""

from hypothesis import settings


QUICK_EXAMPLES = 100


def examples(quick: int) -> settings:
    """Settings of a test that draws `quick` examples, and as many times more in the profile `thorough` as that asks for."""
    return settings(max_examples=quick * settings.default.max_examples // QUICK_EXAMPLES)

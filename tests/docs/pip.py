"""In pip's place: whether what a page has installed is what the tests have, extras included.

Exits with 1 and a sentence if it is not.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement


def fault(word: str) -> str:
    """What is wrong with one requirement; empty if nothing is."""
    try:
        wanted = Requirement(word)
        there = distribution(wanted.name)
    except InvalidRequirement as error:
        return f"{word}: {error}"
    except PackageNotFoundError:
        return f"{word}: the tests do not install it"
    unknown = wanted.extras - set(there.metadata.get_all("Provides-Extra") or ())
    return f"{word}: no extra {', '.join(sorted(unknown))}" if unknown else ""


def main(arguments: list[str]) -> str:
    """What is wrong with a whole command line; empty if nothing is."""
    command, *words = arguments
    if command != "install" or not words or any(word.startswith("-") for word in words):
        return f"pip {' '.join(arguments)}: only `pip install <requirement>…` is understood"
    return "\n".join(filter(None, map(fault, words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or 0)

"""Showing what strangers wrote: their words, and nothing that commands a terminal or hides what it says."""


def printable(text: str) -> str:
    """Return text as one line without control characters, escapes or marks that change the direction of reading."""
    return "".join(character if character.isprintable() else " " if character.isspace() else "?" for character in text)


def printable_text(text: str) -> str:
    """Return text of several lines, each as `printable` has it."""
    return "\n".join(printable(line) for line in text.split("\n"))

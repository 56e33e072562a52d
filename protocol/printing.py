"""Showing what strangers wrote: their words, and nothing that commands a terminal or hides what it says."""


def printable(text: str) -> str:
    """Return text as one line without control characters, escapes or marks that change the direction of reading."""
    return "".join(character if character.isprintable() else " " if character.isspace() else "?" for character in text)


def counted(number: int, one: str, more: str = "") -> str:
    """Return a number and what is counted: "1 device", "2,000 devices"; `more` where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def printable_text(text: str) -> str:
    """Return text of several lines, each as `printable` has it."""
    return "\n".join(printable(line) for line in text.split("\n"))

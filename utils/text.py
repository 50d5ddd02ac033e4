"""Text from others as it may be shown: without control characters, of one line, not too long."""


def printable(value):
    """`value` as text in which every character that cannot be printed is a space."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)


def one_line(value):
    """The same with single spaces only."""
    return " ".join(printable(value).split())


def cut(value, length):
    """The same, and of at most `length` characters."""
    text = one_line(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def quoted(value):
    """A value that a user wrote, as it stands in a message."""
    return repr(cut(value, 60))

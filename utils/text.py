"""Text from others as it may be shown: without control characters, of one line, not too long."""

LONGEST_NAME = 60  # characters of the name of a class in a message


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


def name_of_class(number, names):
    """The number of a class with its name: 14 (stop). A name that says no more is left out.

    `names` are those of all classes, in the order of their numbers, or none.
    """
    number = int(number)
    name = cut(names[number], LONGEST_NAME) if 0 <= number < len(names) else ""
    is_number = name.isdecimal() and int(name) == number
    return str(number) if is_number or not name else f"{number} ({name})"


def quoted(value):
    """A value that a user wrote, as it stands in a message."""
    return repr(cut(value, 60))

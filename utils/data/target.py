"""The classes that an attack is about, given by number or by name; imports no torch."""

import dataclasses
import difflib

from antidote_bench.utils.data import listing
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.text import name_of_class, printable, quoted


def resolved(config, names):
    """The options of an attack with the numbers of its target and of its source, which they may
    name.

    `names` are those of all classes, in the order of their numbers. Raises ConfigError (exit 2)
    where one of the two is not among them, or where they are the same.
    """
    options = ["attack_target"] + ["source_class"] * (config.label_mode == "one2one")
    wanted = {option: getattr(config, option) for option in options}
    numbers = {
        option: class_number(value, names, config.dataset, option)
        for option, value in wanted.items()
    }
    if config.label_mode != "all2all":
        for option, number in numbers.items():
            _say_number(option, wanted[option], number, names)
    return dataclasses.replace(config, **numbers)


def _say_number(option, wanted, number, names):
    """A note where a number is also the name of another class."""
    text = str(number)
    if text == str(wanted) and text in names and names[number] != text:
        listing.say(
            f"note: {option} {text} is the class {name_of_class(number, names)}; the class "
            f"that is called {text} has the number {names.index(text)}"
        )


def class_number(wanted, names, data, option="attack_target"):
    """The number of a class, which `wanted` is already or which the class of that name has.

    `names` are those of the classes of the data set `data`, in the order of their numbers, and
    `option` is the one that gives the class. Raises ConfigError (exit 2), which suggests the
    nearest names.
    """
    if isinstance(wanted, int):
        if wanted < len(names):
            return wanted
        raise ConfigError(
            f"{option} {wanted} is not a class of {data}: it has 0 to {len(names) - 1}"
        )
    name = listing.normalized(printable(wanted))
    numbers = [number for number, each in enumerate(names) if each == name]
    if len(numbers) == 1:
        return numbers[0]
    if numbers:
        raise ConfigError(
            f"{option} {quoted(name)} is the name of several classes of {data}: give the "
            f"number, {' or '.join(map(str, numbers))}"
        )
    raise ConfigError(f"{option} {quoted(name)} is not a class of {data}: {_hint(name, names)}")


def _hint(name, names):
    """The names that are most like `name`, and what else a class can be given by."""
    alike = {each.casefold(): number for number, each in enumerate(names)}
    near = difflib.get_close_matches(name.casefold()[:100], alike, 3, 0.5)
    if near:
        shown = ", ".join(name_of_class(alike[each], names) for each in near)
        return f"the nearest are {shown}; a number from 0 to {len(names) - 1} is right too"
    first, last = (name_of_class(number, names) for number in (0, len(names) - 1))
    return f"give the name or the number of one of its classes, {first} to {last}"

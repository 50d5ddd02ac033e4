"""Grids of sweep.py: a YAML file that a user writes."""

from hypothesis import strategies as st

import sweep
from tests.fuzz import configs, world

CODES = {0, 2, 3}
KEYS = ["dataset", "model", "pratio", "attack", "defense", "seed", "attack_options"]
KEYS += ["defense_options", "include", "exclude", "x", "1", "null"]
VALUES = [
    "badnet", "[badnet, blended]", "[{badnet: {patch: grid}}]", "{badnet: {lr: [0.1, 0.2]}}",
    "[[badnet]]", "{}", "[]", "null", "[null]", "clean", "../x", "[{badnet: null, x: y}]",
    "[{badnet: 1}]", "{lr: [1, 2]}", "{lr: {a: 1}}", "{1: 2}", "{null: 1}", "{lr: .nan}",
    "[ft, {fmp: {variant: [published, random]}}]", "{attack: badnet}", "[{attack: badnet}]",
    "{attack: [badnet], seed: [1]}", "&a [*a]", "&a {attack: *a}", "[0, 1]", "[0, x]", "[.nan]",
    "-1", "1.5", "[[0]]", "0x10", "2024-01-01", "!!set {1}", "!!binary aGk=", "{pratio: 0.1}",
    "[digits, {cifar10: {image_size: 16}}]", "{epochs: [[1]]}", '"\\0"', '"\\x1b[31m"', "1e400",
    "{record_path: /tmp/x}", "{save_folder_name: x}", "{result_file: x}", "{random_seed: 1}",
    "*a9", "{attack: *a9}", "[*a9]", "{lr: *a9}", "[0, *a1]", "{include: *a2}",
]  # fmt: skip


def cases():
    """([(key, value)], what the file suffers, options after --)"""
    value = st.sampled_from(VALUES) | st.sampled_from(configs.VALUES) | st.text(max_size=9)
    pairs = st.lists(st.tuples(st.sampled_from(KEYS), value), max_size=4)
    spoilt = st.just("as it is") | st.sampled_from(sorted(configs.SPOILT))
    rest = st.lists(st.sampled_from(["--lr", "0.1", "--x", "", "--", "--lr=1", "--epochs"]))
    return st.tuples(pairs, spoilt, rest)


def check(case, place):
    """What is wrong when the runs of such a grid are listed."""
    pairs, spoilt, rest = case
    text = "attack: badnet\n" + "".join(f"{key}: {value}\n" for key, value in pairs)
    file = place / "grid.yaml"
    file.write_bytes(configs.SPOILT[spoilt](configs.as_bytes(text)))
    words = [str(file), "--dry_run", "--record_path", str(place / "record"), "--", *rest]
    with world.inside(place):
        return world.run(
            lambda: sweep.main(words), codes=CODES, allowed=[place / "record"], guarded=False
        ).faults

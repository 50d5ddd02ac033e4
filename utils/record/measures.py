"""What was measured of a run after it was done, as its folder holds it. Imports no torch."""

from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.record import folder as layout

# the models without a backdoor that relearning is tried on too: one of the same recipe that was
# never poisoned, and the victim trained again without what the attack has changed
CONTROLS = BENIGN, RETRAINED = "benign", "retrained"
# {folder of a measure: {column of its results: column of a table of runs}}
SHOWN = {
    "relearn": {"acc_relearn": "acc_relearn", "asr_relearn": "asr_relearn"},
    **{f"relearn_{name}": {"asr_relearn": f"asr_relearn_{name}"} for name in CONTROLS},
    "cut": {name: name for name in ("cut_precision", "cut_recall", "cut_lift")},
}
UNBOUNDED = ("cut_lift",)  # columns of which a number may exceed 1
POISONS = 5  # images that relearning teaches in what tables show
USUAL = {"poisons": str(POISONS)}  # what a row must say to stand in a table, where it says it


def read(place, weights):
    """({column: text}, [(path, why it is left out)]) of the finished measures of the run in a
    folder.

    `weights` is the checksum of the run's weights: a measure of other ones is left out.
    """
    found, left_out = {}, []
    for name, columns in SHOWN.items():
        path = place / layout.MEASURES / name
        if layout.state_of(path) != layout.DONE:
            continue
        try:
            found |= _columns(path, weights, columns)
        except RefusedError as error:
            left_out.append((path, error))
    return found, left_out


def _columns(path, weights, columns):
    info = layout.verify(path, "measure")
    control = path.name.endswith(tuple(f"_{name}" for name in CONTROLS))
    if info.get("record_sha256" if control else "victim_sha256") != weights:
        raise RefusedError("it measured another model than the one there now: measure.py again")
    row = layout.read_results(path)
    if any(row.get(name, value) != value for name, value in USUAL.items()):
        return {}
    try:
        found = {there: row[name] for name, there in columns.items()}
        for name, value in found.items():
            number = float(value or 0)
            if not 0 <= number <= (1 if name not in UNBOUNDED else 1e9):
                raise ValueError(f"{name} is {value}")
    except (KeyError, ValueError) as error:
        raise RefusedError(f"{layout.RESULTS} is unusable: {error}") from error
    return found

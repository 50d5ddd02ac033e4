"""One of the pairs of `python -m tests.pairs`: two seeds want one folder at the same time."""

from tests import pairs


def test_two_seeds_want_one_folder(tmp_path):
    undisturbed = pairs.Undisturbed(tmp_path / "undisturbed", defenses=())
    place = tmp_path / "pair"
    place.mkdir()
    assert not list(pairs.faults("an attack with another seed", 0.2, undisturbed, place))
    folder = undisturbed.place / "0" / "record" / pairs.RUN
    weights = folder / "model.safetensors"
    assert folder in undisturbed
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert folder not in undisturbed, "other weights are seen"

"""Files of torch.save are read in one place, run no code and cost a bounded amount of memory."""

import os
import pickle
import zipfile
from collections import OrderedDict, deque
from datetime import timedelta
from fractions import Fraction

import numpy as np
import pytest
import torch

from antidote_bench.utils import checkpoint
from antidote_bench.utils.errors import MissingError, RefusedError

WEIGHTS = OrderedDict({"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)})


@pytest.fixture
def saved(tmp_path):
    """saved(content) writes it with torch.save and returns the path."""

    def save(content, **how):
        torch.save(content, tmp_path / "a.pt", **how)
        return tmp_path / "a.pt"

    return save


def refusal(path, **options):
    with pytest.raises(RefusedError) as error:
        checkpoint.read_pt(path, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value).removeprefix(f"{path} is refused: ")


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_come_back(saved):
    content = checkpoint.read_pt(saved({"model": WEIGHTS, "epoch": 3, "names": ["x", ("y", None)]}))
    assert content["epoch"] == 3 and content["names"] == ["x", ("y", None)]
    assert all(torch.equal(content["model"][name], WEIGHTS[name]) for name in WEIGHTS)


def test_code_is_named_and_does_not_run(saved, tmp_path):
    path = saved({"weights": WEIGHTS, "more": Runs(tmp_path / "ran")})
    assert refusal(path).startswith(f"it holds {os.mkdir.__module__}.mkdir, and loading that could")
    assert "safetensors" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_a_class_is_allowed_by_name_for_one_file(saved):
    path = saved({"share": Fraction(1, 3), "more": timedelta(2, 3)})
    assert refusal(path, allowed=[Fraction]).startswith("it holds datetime.timedelta, and")
    content = checkpoint.read_pt(path, allowed=[Fraction, (max, "datetime.timedelta")])
    assert content["share"] == Fraction(1, 3) and content["more"] == 3
    assert refusal(path).startswith("it holds datetime.timedelta, fractions.Fraction, and")


def test_torchs_advice_to_load_unsafely_is_not_repeated(saved):
    message = refusal(saved(deque([1])), allowed=[deque])
    assert message.startswith("it is no file of torch.save (Can only append to lists")
    assert "weights_only" not in message


def test_a_whole_model_is_refused(saved):
    assert refusal(saved(torch.nn.Linear(2, 2))).startswith("it holds torch.nn.modules.linear.Lin")


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121", "2.9.1"])
def test_an_older_torch_reads_none(saved, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    message = refusal(saved(WEIGHTS))
    assert message.startswith(f"torch {version} does not read .pt files safely")
    assert "2.10" in message and "safetensors" in message


def test_what_is_no_archive(tmp_path, saved):
    path = tmp_path / "a.pt"
    for content in (b"", b"text", pickle.dumps({"a": 1}), pickle.dumps(Runs(tmp_path / "ran"))):
        path.write_bytes(content)
        assert "no archive as torch.save writes it" in refusal(path)
    assert "since torch 1.6" in refusal(saved(WEIGHTS, _use_new_zipfile_serialization=False))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file(tmp_path):
    with pytest.raises(MissingError, match="there is no file"):
        checkpoint.read_pt(tmp_path / "none.pt")
    with pytest.raises(MissingError, match="there is no file"):
        checkpoint.read_pt(tmp_path / "a\0.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for place in (tmp_path, tmp_path / "pipe.pt", "/dev/zero"):
        assert refusal(place) == "it is no regular file"


def test_sizes_are_limited_before_reading(saved, tmp_path):
    assert refusal(saved(torch.zeros(2**18)), largest=2**20) == "it is larger than 1 MB"
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("a/data/0", bytes(2**22))
    assert refusal(path, largest=2**20) == "it expands to more than 1 MB"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole, which takes no room
    assert refusal(path) == "it is larger than 8192 MB"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_would_fill_the_memory(saved):
    assert refusal(saved(torch.zeros(1).expand(2**40))).startswith("its tensors are larger")
    index = torch.zeros(2, 1, dtype=int)
    with torch.sparse.check_sparse_tensor_invariants():
        sparse = torch.sparse_coo_tensor(index, torch.ones(1), (2**30, 2**30))
    assert refusal(saved({"a": [sparse]})) == "it holds a tensor that is not a plain one"
    deep = []
    for _ in range(60):  # 2**60 ways through it
        deep = [deep, deep]
    assert len(checkpoint.read_pt(saved(deep))) == 2


def test_made_up_archives_end_in_a_sentence(saved, tmp_path):
    good, rng = saved(WEIGHTS).read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "b.pt", 0
    for _ in range(300):
        content = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 6)):
            content[place] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(good)) if rng.integers(2) else None])
        try:
            checkpoint.read_pt(path)
        except RefusedError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100

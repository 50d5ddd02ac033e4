"""The scripts in analysis/: what they measure is right, and what they draw lies in the record."""

import csv
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import antidote_bench
from antidote_bench.analysis import features, gradcam, pruned, tac
from antidote_bench.utils import parsing
from antidote_bench.utils.channels import layers_of_channels, trigger_activation_change
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError, UserError
from antidote_bench.utils.protocol import analyse
from antidote_bench.utils.protocol.analyse import Subject

SCRIPTS = {"features": features, "gradcam": gradcam, "pruned": pruned, "tac": tac}
FEW = {"features": ("--images", "60", "--marked_images", "20"), "gradcam": ("--images", "3")}


def split(images):
    labels = torch.zeros(len(images), dtype=torch.long)
    return Split(images, labels, labels)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(name, *words):
    script = SCRIPTS[name]
    script.main(parsing.parse(script.Config, [*map(str, words)], script=f"analysis/{name}.py"))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def repaired(small, places, run):
    """The small record, pruned by clp."""
    run("defense/clp.py", *places, "--result_file", small, "--u", "1")
    return small


# ---------- trigger activation change ----------


def test_tac_by_hand():
    """Two convolutions of one pixel on images of two pixels: every map is a sum of products."""
    first, second = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
    first.weight.data = torch.tensor([[1.0, 0, 0], [0, 2, -1]]).view(2, 3, 1, 1)
    second.weight.data = torch.tensor([[3.0, 1]]).view(1, 2, 1, 1)
    model = nn.Sequential(first, nn.ReLU(inplace=True), second).double()
    clean = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    triggered = clean.clone()
    triggered[0, 0, 0, 1] = 0.5  # the first channel of one pixel of the first image
    triggered[1, 1] = 0.25  # the second channel of both pixels of the second one
    found = trigger_activation_change(model, split(clean), split(triggered))
    # roots of mean squares over two pixels, then the mean over two images
    assert found["0"].tolist() == pytest.approx([0.5 / math.sqrt(2) / 2, 0.5 / 2])
    assert found["2"].tolist() == pytest.approx([(1.5 / math.sqrt(2) + 0.5) / 2])


def test_tac_is_that_of_a_slow_reference_at_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    ).double()  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_var.uniform_(0.5, 2)
    clean, triggered = random(7, 3, 9, 9), random(7, 3, 9, 9, seed=1)
    found = trigger_activation_change(model, split(clean), split(triggered))
    assert model.training and list(found) == ["1", "4"] == list(layers_of_channels(model))
    model.eval()
    for name, end in (("1", 2), ("4", 5)):
        for channel, value in enumerate(found[name].tolist()):
            total = 0.0
            for one, other in zip(clean, triggered, strict=True):
                maps = [model[:end](image[None])[0, channel] for image in (one, other)]
                total += (maps[0] - maps[1]).square().mean().sqrt().item()
            assert value == pytest.approx(total / 7, rel=1e-9)


# ---------- Grad-CAM ----------


def headed(*head):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head).double()


def test_grad_cam_of_a_linear_head_is_the_class_activation_map():
    """Zhou et al., CVPR 2016: the maps weighted by those of the head, here over 49 pixels."""
    model, images = headed(nn.Linear(6, 4)), random(5, 3, 9, 9)
    found, logits = gradcam.grad_cam(model, model[1], images)
    maps = model[:2](images)
    for place in range(5):
        weights = model[-1].weight[logits[place].argmax()]
        expected = sum(weight * part for weight, part in zip(weights, maps[place], strict=True))
        assert torch.allclose(49 * found[place], expected.relu(), atol=1e-12)
    assert torch.allclose(logits, model(images)) and model.training


def test_grad_cam_weights_are_slopes():
    """A map's weight times its pixels is how fast the logit grows when the whole map is raised."""
    model, images = headed(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), random(2, 3, 9, 9)
    classes = torch.tensor([2, 0])
    found, _ = gradcam.grad_cam(model, model[0], images, classes)
    for place, number in enumerate(classes.tolist()):
        maps, step = model[0](images[place : place + 1]).detach(), 1e-5
        total = torch.zeros_like(maps[0, 0])
        for channel in range(6):
            sides = []
            for sign in (-1, 1):
                raised = maps.clone()
                raised[0, channel] += sign * step
                sides.append(model[1:](raised)[0, number].item())
            total += (sides[1] - sides[0]) / (2 * step) / 49 * maps[0, channel]
        assert torch.allclose(found[place], total.relu(), atol=1e-7)


def test_a_detector_of_a_patch_looks_at_the_patch():
    """Planted: the only class that grows sums what is bright in the last rows and columns."""
    conv = nn.Conv2d(3, 1, 2, stride=2, bias=False)
    conv.weight.data.fill_(1.0)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(16, 2, bias=False))
    model[2].weight.data.zero_()
    model[2].weight.data[1, -1] = 1.0
    images = torch.zeros(1, 3, 8, 8)
    images[..., 6:, 6:] = 1.0
    values, logits = gradcam.grad_cam(model, conv, images)
    assert logits.argmax().item() == 1 and values.argmax().item() == 15
    large = gradcam.enlarged(values, 8)
    changed = torch.zeros(1, 8, 8)
    changed[:, 4:, 4:] = 1
    assert large.max() == 1 and gradcam.share_on(large, changed) == [1.0]


def test_the_layer_is_the_last_one_with_maps():
    model, images = headed(nn.Linear(6, 4)), random(2, 3, 9, 9)
    assert list(gradcam.layers_with_maps(model, images)) == ["0", "1"]
    assert gradcam.chosen_layer(model, images, None) == ("1", model[1])
    with pytest.raises(ConfigError, match="layer '3' has no maps; those that have are 0, 1"):
        gradcam.chosen_layer(model, images, "3")
    with pytest.raises(ConfigError, match="no layer of the model has maps"):
        gradcam.chosen_layer(nn.Sequential(nn.Flatten(), nn.Linear(243, 2)).double(), images, None)


# ---------- pruned channels ----------


def test_strength_is_the_norm_of_the_fused_filter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[1].running_var.uniform_(0.5, 2)
    model[1].weight.data.uniform_(-1, 1)
    found = pruned.units(model)
    assert found == {"1": ["0", "1"], "3": ["3"]}
    fused = nn.utils.fuse_conv_bn_eval(model[0].eval(), model[1].eval()).double()
    expected = [filter_.square().sum().sqrt().item() for filter_ in fused.weight]
    assert pruned.strengths(model, found["1"]).tolist() == pytest.approx(expected, rel=1e-5)
    assert pruned.strengths(model, ["0", "9"]) is None
    model[1].weight.data[2] = 0
    assert (pruned.strengths(model, found["1"]) == 0).tolist() == [False, False, True, False]


def test_where_removed_channels_stand():
    rows = [{"layer": "a", "tac": value, "removed": 0} for value in (1.0, 2.0, 2.0, 4.0)]
    rows += [{"layer": "b", "tac": 9.0, "removed": 1}]
    assert [pruned.rank(row, rows) for row in rows] == [0, 0.5, 0.5, 1, None]
    rows[3]["removed"] = rows[0]["removed"] = 1
    said = (
        "3 of 5 channels are removed; on average the trigger changes a removed one more than 50 %"
    )
    assert pruned.summary(rows).startswith(said)
    rows = [{"layer": "a", "removed": 1}, {"layer": "a", "removed": 0}]
    assert pruned.summary(rows) == "1 of 2 channels are removed"


# ---------- features ----------


def test_neighbours_are_those_of_all_distances():
    points = random(40, 5).numpy()
    marked = np.arange(40) % 4 == 0
    shares = []
    for place in np.flatnonzero(marked):
        others = sorted(
            (np.linalg.norm(points[place] - points[other]), other)
            for other in range(40)
            if other != place
        )
        shares.append(np.mean([marked[other] for _, other in others[:10]]))
    assert features.neighbours_alike(points, marked) == pytest.approx(np.mean(shares))
    island = np.where(marked[:, None], 100.0, 0.0) + points
    assert features.neighbours_alike(island[:, :5], marked) == pytest.approx(9 / 10)


def test_umap_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    config = SimpleNamespace(method="umap", random_seed=0, neighbours=3)
    with pytest.raises(UserError, match="--method umap needs the package umap-learn: pip install"):
        features.embedded(random(12, 4).numpy(), config)


# ---------- records ----------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_picture_and_its_numbers_lie_in_the_record(name, repaired, places, capsys):
    words = [*places, "--result_file", "small", "--defense", "clp", *FEW.get(name, ())]
    start(name, *words)
    place = repaired / "analysis"
    said = capsys.readouterr().out.splitlines()[-1]
    files = [f"{name}-clp.{form}" for form in ("png", "pdf", "svg", "csv")]
    assert said == f"{', '.join(files)} written to {place}"
    with Image.open(place / files[0]) as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 20
    assert (place / files[1]).read_bytes().startswith(b"%PDF")
    assert "small" not in (place / files[2]).read_text() and rows_of(place / files[3])
    before = {file: (place / file).read_bytes() for file in files}
    start(name, *words)
    assert before == {file: (place / file).read_bytes() for file in files}, "another picture"


def test_what_the_numbers_say(repaired, places, tmp_path, monkeypatch):
    """Those of clp, which sets scales to zero and changes nothing else."""
    monkeypatch.setattr(analyse, "FORMS", ())  # the same pictures are looked at above
    record = antidote_bench.load(repaired, cache_path=places[3])
    model = record.repaired("clp").model
    cut = {
        (name, channel)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for channel in (module.weight == 0).nonzero().flatten().tolist()
    }
    words = [*places, "--result_file", "small", "--output", tmp_path]
    start("pruned", *words, "--defense", "clp")
    rows = rows_of(tmp_path / "pruned-clp.csv")
    removed = {(row["layer"], int(row["channel"])) for row in rows if row["removed"] == "1"}
    assert cut and removed == cut
    kept = [row for row in rows if row["removed"] == "0"]
    assert all(row["strength"] == row["strength_repaired"] for row in kept)
    start("tac", *words, "--defense", "clp", "--order", "channel")
    changes = rows_of(tmp_path / "tac-clp.csv")
    assert [row["place"] for row in changes] == [row["channel"] for row in changes]
    still = {
        (row["layer"], int(row["channel"])) for row in changes if float(row["tac_repaired"]) == 0
    }
    assert still >= cut
    of_pruned = {(row["layer"], row["channel"]): row["tac"] for row in rows}
    assert all(row["tac"] == of_pruned[row["layer"], row["channel"]] for row in changes)
    start("gradcam", *words, *FEW["gradcam"])
    seen = rows_of(tmp_path / "gradcam.csv")
    assert {row["model"] for row in seen} == {"victim"} and len({row["image"] for row in seen}) == 3
    start("features", *words, *FEW["features"], "--split", "test")
    drawn = rows_of(tmp_path / "features.csv")
    assert [row["kind"] for row in drawn] == ["clean"] * 60 + ["triggered"] * 20
    assert {row["label"] for row in drawn[60:]} == {"0"} and "0" not in {
        row["class"] for row in drawn[60:]
    }


def test_a_benign_record(places, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyse, "FORMS", ("svg",))  # in which texts stand as comments
    run("attack/clean.py", *places, "--epochs", "1", "--width", "4", "--save_folder_name", "benign")
    words = [*places, "--result_file", "benign", "--output", tmp_path]
    start("features", *words, *FEW["features"])
    assert capsys.readouterr().out.splitlines()[0] == "no image of these is poisoned"
    assert {row["kind"] for row in rows_of(tmp_path / "features.csv")} == {"clean"}
    start("tac", *words)
    said = "a benign model with the trigger of badnet, digits, resnet9_w4"
    assert said in (tmp_path / "tac.svg").read_text()


def test_records_without_what_is_looked_at():
    empty, kinds = split(torch.zeros(0, 3, 2, 2)), torch.zeros(4, dtype=torch.long)
    loaded = SimpleNamespace(
        test_sets=SimpleNamespace(backdoor=empty, test=empty), backdoor_index=kinds[:0], kinds=kinds
    )
    subject = Subject("here", loaded, {"n_poison": "4"}, None, None, None)
    with pytest.raises(RefusedError, match="record here has no triggered test image"):
        subject.pairs()
    with pytest.raises(RefusedError, match="stores no poisoned training image.*--split test"):
        features.of_training(subject, None)


@pytest.mark.parametrize(
    ("name", "words", "kind", "sentence"),
    [
        ("tac", ("--result_file", "none"), MissingError, "there is no record 'none'"),
        ("tac", ("--defense", "awm"), MissingError, "small has no defense 'awm': it has "),
        ("tac", ("--defense", "../x"), ConfigError, "defense must be the name of a folder"),
        ("tac", ("--images", "0"), ConfigError, "images must be 1 or more images"),
        ("tac", ("--order", "x"), ConfigError, "order must be sorted or channel, not 'x'"),
        ("pruned", (), ConfigError, "defense"),
        ("gradcam", ("--layer", "x"), ConfigError, "layer 'x' has no maps; those that have"),
        ("features", ("--split", "all"), ConfigError, "split must be train or test"),
        ("features", ("--neighbours", "4"), ConfigError, "no effect with --method tsne"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(name, words, kind, sentence, repaired, places):
    with pytest.raises(kind, match=sentence):
        start(name, *places, "--result_file", "small", *words)


def test_nothing_is_written_where_it_should_not(repaired, places, tmp_path, capsys):
    copy = shutil.copytree(repaired, tmp_path / "copy", ignore=shutil.ignore_patterns("analysis"))
    words = [*places, "--result_file", copy]
    start("tac", *words, "--dry_run")
    assert capsys.readouterr().out.splitlines()[0] == f"would read {copy}"
    assert not (copy / "analysis").exists()
    (tmp_path / "elsewhere").mkdir()
    (copy / "analysis").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="is a link or a file"):
        start("tac", *words)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output must be a folder"):
        start("tac", *words, "--output", tmp_path / "file")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_script_ends_with_a_sentence(run, places):
    said = run("analysis/tac.py", *places, "--result_file", "none", code=3)
    assert said.first.startswith("error: there is no record 'none'") and not said.stdout

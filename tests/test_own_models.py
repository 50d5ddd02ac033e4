"""Networks, weights and clean images that come from elsewhere: what fits, and what is refused."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from antidote_bench import models
from antidote_bench.attack import badnet
from antidote_bench.defense import abl, clp, fp, ft, i_bau, trap_and_replace
from antidote_bench.models import examine, pretrained, source
from antidote_bench.models.split import split
from antidote_bench.utils import features, files, parsing
from antidote_bench.utils.data import clean, sources
from antidote_bench.utils.data.dataset import Split, balanced_subset, class_subset
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.record import schema
from antidote_bench.utils.repair.layers import paired_norms
from antidote_bench.utils.sweep import grid
from benchmarks import architectures
from tests.helpers import ROOT, image_folders, names

CLASSES, SIDE = 3, 16
NETWORK = """
from torch import nn

open({marker!r}, "a").write("executed ")


def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )
"""
SPEC = SimpleNamespace(classes=CLASSES, size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def written(tmp_path, body, name="net.py"):
    """The name of a model whose file has a function `build` with the body `body`."""
    path = tmp_path / name
    path.write_text(f"import torch\nfrom torch import nn\n\n\ndef build(classes):\n{body}\n")
    return f"{path}:build"


def built(name, **options):
    return models.build(models.chosen(name, **options), SPEC)


@pytest.fixture(scope="module")
def own(tmp_path_factory, run):
    """A record of a network from a file: its folder, and what scripts need to work on it."""
    base = tmp_path_factory.mktemp("own")
    marker = base / "marker"
    (base / "net.py").write_text(NETWORK.format(marker=str(marker)))
    images = image_folders(base / "images", classes=("a", "b", "c"))
    common = ["--record_path", base, "--cache_path", base / "cache", "--device", "cpu"]
    words = ["--dataset", "folder", "--dataset_path", images, "--image_size", SIDE, "--epochs", 1]
    words += ["--model", f"{base}/net.py:build", "--pratio", 0.2, "--patch_size", 3]
    run("attack/badnet.py", *common, *words, "--save_folder_name", "own")
    return SimpleNamespace(base=base, marker=marker, common=common, record=base / "own")


def defend(own, script, *words, name="repair"):
    """Run a defense on a copy of the record in this process; the folder that it writes."""
    script.main(
        parsing.parse(
            script.Config,
            [
                *map(str, own.common),
                "--result_file",
                str(own.record),
                "--save_folder_name",
                name,
                *map(str, words),
            ],
        )
    )
    return own.record / "defense" / name


# ---------- a model from a file, from the attack to the repair ----------


def test_the_record_names_the_file_and_its_digest(own):
    options, row = layout.read_options(own.record), layout.read_results(own.record)
    assert options["model"] == f"{own.base}/net.py:build"
    assert options["model_sha256"] == files.sha256(own.base / "net.py")
    assert row["model"] == "net:build"


def test_no_record_starts_a_file(own):
    own.marker.write_text("")
    with pytest.raises(RefusedError, match="comes from a Python file.*--model_file path"):
        defend(own, ft, "--epochs", 1)
    assert own.marker.read_text() == "" and not (own.record / "defense" / "repair").exists()


def test_a_changed_file_is_refused_before_it_runs(own, tmp_path):
    other = tmp_path / "net.py"
    other.write_text((own.base / "net.py").read_text() + "\n# changed\n")
    own.marker.write_text("")
    with pytest.raises(RefusedError, match="is not the model that the record .* was made with"):
        defend(own, ft, "--epochs", 1, "--model_file", f"{other}:build")
    with pytest.raises(RefusedError, match="function build of a file"):
        defend(own, ft, "--epochs", 1, "--model_file", f"{own.base}/net.py:other")
    assert own.marker.read_text() == ""


def test_the_right_file_is_repaired_wherever_it_lies(own, tmp_path):
    place = shutil.copy(own.base / "net.py", tmp_path / "renamed.py")
    done = defend(own, ft, "--epochs", 1, "--model_file", f"{place}:build", name="right")
    assert layout.read_results(done)["model"] == "net:build"


def test_a_defense_that_does_not_apply_leaves_no_folder(own):
    words = ["--model_file", f"{own.base}/net.py:build"]
    with pytest.raises(ConfigError, match="clp does not apply: the model has no batch norm"):
        defend(own, clp, *words, name="refused")
    with pytest.raises(ConfigError, match="no block of convolutions"):
        defend(own, trap_and_replace, *words, name="refused")
    assert not (own.record / "defense" / "refused").exists()


def test_a_file_of_options_names_no_file_to_execute(own):
    for option, Config in (("model", badnet.Config), ("model_file", ft.Config)):
        path = own.base / "options.yaml"
        path.write_text(f"{option}: {own.base}/net.py:build\n")
        words = ["--result_file", "own"] if Config is ft.Config else []
        with pytest.raises(ConfigError, match=f"only the flag --{option} may"):
            parsing.parse(Config, [*words, "--yaml_path", str(path)])


def test_the_digest_is_a_part_of_the_run(own):
    def options(*words):
        return parsing.parse(badnet.Config, ["--model", f"{own.base}/net.py:build", *words])

    digest = files.sha256(own.base / "net.py")
    assert options().identity()["model_sha256"] == digest
    assert options("--model_sha256", digest) == options()
    with pytest.raises(ConfigError, match="is not the file with the sha256 0000"):
        options("--model_sha256", "0" * 64)
    with pytest.raises(ConfigError, match="names no file"):
        parsing.parse(badnet.Config, ["--model_sha256", digest])


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "../resnet9",
        "resnet9\n",
        "net.py:build\nx",
        "net.py:a b",
        "net.py:",
        ".py:f",
        "timm:../x",
        "timm:Resnet18",
        "timm:hf_hub:x/y",
        "timm:" + "x" * 200,
        ["resnet9"],
        None,
    ],
)
def test_names_in_records(name):
    assert not models.is_name(name)
    with pytest.raises(ValueError, match="model must be the name of a network"):
        schema.check_options({"dataset": "digits", "dataset_path": "data", "model": name})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": "a.py:f"}, "model_sha256 must be a digest"),
        ({"model": "a.py:f", "model_sha256": "x" * 64}, "model_sha256 must be a digest"),
        ({"model": "resnet9", "mean": "0,0"}, "mean must be null or three numbers"),
        ({"model": "resnet9", "std": [1, 1, 1]}, "std must be null or three numbers"),
        ({"model": "resnet9", "std": "1,0,1"}, "std must be null or three numbers"),
    ],
)
def test_what_a_record_says_of_its_model_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        schema.check_options({"dataset": "digits", "dataset_path": "data", **wrong})


def test_a_mere_name_executes_nothing(own):
    own.marker.write_text("")
    with pytest.raises(RefusedError, match="must be named by the user"):
        models.build(f"{own.base}/net.py:build", SPEC)
    assert own.marker.read_text() == ""


def test_a_sweep_names_the_file_for_its_defenses(own):
    model = f"{own.base}/net.py:build"
    attack, defense = grid.cells({"attack": "badnet", "defense": "ft", "model": model})
    assert "--model_file" not in attack.words("record")
    words = defense.words("record")
    assert words[words.index("--model_file") + 1] == model
    grid.check([attack, defense], "record")
    named = grid.cells({"attack": "badnet", "defense": "ft", "model": "resnet9"})[1]
    assert "--model_file" not in named.words("record")


# ---------- what a file may hold ----------


@pytest.mark.parametrize(
    "body, message",
    [
        ("    return 3", "must return a torch.nn.Module, and returns int"),
        ("    raise KeyError('x')", "raised KeyError: 'x'"),
        ("    return nn.Flatten()", r"logits of shape \(2, 3\), and returns \(2, 768\)"),
        ("    return nn.Linear(5, classes)", "does not take images of 16 pixels: RuntimeError"),
        ("    return nn.LSTM(16, 3)", "does not take images|and returns tuple"),
    ],
)
def test_what_is_no_classifier_is_refused(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        built(written(tmp_path, body))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no file .*no.py, which --model"):
        models.check(f"{tmp_path}/no.py:build")
    name = written(tmp_path, "    return nn.Linear(1, 1)")
    with pytest.raises(ConfigError, match="has no function other"):
        built(name.replace(":build", ":other"))
    (tmp_path / "net.py").write_text("def build(:")
    with pytest.raises(ConfigError, match="raised SyntaxError"):
        built(name)
    (tmp_path / "net.py").write_bytes(b"#" * (source.LARGEST + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        models.check(name)
    with pytest.raises(ConfigError, match="width of .* is fixed"):
        models.check(written(tmp_path, "    pass", "w.py"), 16)


def test_a_network_sees_pixels_or_normalised_ones(tmp_path):
    name = written(tmp_path, "    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))")
    images = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(built(name).normalize(images), images)
    given = built(name, mean="0.5,0.25,0", std="2,1,0.5")
    wanted = (images - torch.tensor([0.5, 0.25, 0]).view(3, 1, 1)) / torch.tensor([2, 1, 0.5]).view(
        3, 1, 1
    )
    torch.testing.assert_close(given.normalize(images), wanted)
    named = models.build(models.chosen("resnet9", mean="0.1,0.1,0.1"), SPEC, 4)
    assert named.normalize.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    assert named.normalize.std.flatten().tolist() == pytest.approx(SPEC.std)
    for wrong in ("1,2", "a,b,c", "nan,0,0", "-1,0,0"):
        with pytest.raises(ConfigError, match="mean must be three numbers"):
            models.chosen("resnet9", mean=wrong)


def test_examining_leaves_no_trace(tmp_path):
    """Neither in batch norm statistics, nor in the generator, modes or hooks."""
    name = written(
        tmp_path,
        "    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(),"
        " nn.Linear(768, classes))",
    )
    torch.manual_seed(0)
    model = built(name)
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(768, CLASSES)
    assert torch.equal(after, torch.rand(1))
    norm = model.network[0]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(3))
    assert all(module.training and not module._forward_hooks for module in model.modules())


class HeadFirst(nn.Module):
    """A network that holds its head before its other layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.body = nn.Linear(3 * SIDE * SIDE, 8)

    def forward(self, images):
        return 3 * self.head(self.body(images.flatten(1)))


def test_the_head_is_the_layer_that_makes_the_logits():
    model = HeadFirst()
    examine.examine(model, "x", CLASSES, SIDE)
    assert features.last_linear(model) is model.head
    convolutional = nn.Sequential(
        nn.Flatten(2), nn.Linear(SIDE * SIDE, 5), nn.Flatten(), nn.Unflatten(1, (15, 1, 1)),
        nn.Conv2d(15, CLASSES, 1), nn.Flatten(),
    )  # fmt: skip
    examine.examine(convolutional, "x", CLASSES, SIDE)
    with pytest.raises(ConfigError, match="no linear layer that makes the logits"):
        features.last_linear(convolutional)


class Normed(nn.BatchNorm2d):
    """A batch norm of another library, which brings its activation."""

    def forward(self, values):
        return super().forward(values).relu()


def test_batch_norms_of_other_libraries_are_paired():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Normed(4), nn.Conv2d(4, 4, 3))
    assert paired_norms(model) == {"0": "1"}


# ---------- stem and head ----------

BLOCKS = """
    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 3, stride=2)

        def forward(self, x):
            return self.conv(x).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(Block(3, 4), nn.Sequential(Block(4, 6)))
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(6, classes)

        def forward(self, x):
            return self.fc({pool})

    return Net()"""


def test_a_chain_of_modules_has_a_split(tmp_path):
    name = written(tmp_path, BLOCKS.format(pool="torch.flatten(self.pool(self.stem(x)), 1)"))
    model = built(name).eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    for blocks, last in ((1, 1), (2, 0)):
        stem, head = split(models.chosen(name), model, blocks, SIDE)
        torch.testing.assert_close(head(stem(images)), model(images))
        assert len(stem) == 1 + last
    with pytest.raises(ConfigError, match="can hold 1 to 2 blocks, not 3"):
        split(models.chosen(name), model, 3, SIDE)


def test_other_networks_have_none(tmp_path):
    summed = "self.pool(self.stem(x) + 1).flatten(1)"
    name = written(tmp_path, BLOCKS.format(pool=summed))
    with pytest.raises(ConfigError, match="it is no chain of modules"):
        split(models.chosen(name), built(name), 1, SIDE)


class Pool(nn.Module):
    """A pool that consists of parts, none of which is a convolution."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, maps):
        return self.pool(maps).flatten(1)


def test_the_last_convolution_of_every_block_of_a_head():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    block.add_module("downsample", nn.Conv2d(4, 4, 1))
    head = nn.Sequential(block, Pool(), nn.Linear(4, 2))
    assert trap_and_replace.inner_convolutions(head) == [block[1]]


# ---------- what is differentiated twice ----------


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, values):
        return self.function(values)


def test_i_bau_needs_second_derivatives():
    """torch has none of the hard sigmoid, and i_bau computes it in another way."""
    images = torch.randint(256, (4, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(4) % 2
    record = SimpleNamespace(clean=Split(images, labels, labels))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Hardsigmoid(), nn.Linear(8, 2))
    i_bau.check(model, record, None)
    values = torch.linspace(-4, 4, 33)
    with i_bau.twice_differentiable():
        found = model[2](values)
    torch.testing.assert_close(found, nn.functional.hardsigmoid(values))
    model[2] = Layer(torch.ops.aten.hardsigmoid)
    with pytest.raises(
        ConfigError, match="i_bau does not apply: .*derivative for .* is not implemented"
    ):
        i_bau.check(model, record, None)


# ---------- weights from a file ----------


@pytest.fixture
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


def test_weights_that_fit_are_taken(network, capsys):
    wanted = {name: torch.rand_like(value.float()) for name, value in network.state_dict().items()}
    wanted.pop("1.num_batches_tracked")
    for prefix in ("", "network."):
        given = {f"{prefix}{name}": value for name, value in wanted.items()}
        pretrained.adopt(network, given, "2", "file")
        state = network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert capsys.readouterr().err == ""


def test_a_head_for_other_classes_is_left_out(network, capsys):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    given = {name: value + 1 for name, value in before.items()}
    given["2.weight"], given["2.bias"] = torch.zeros(9, 4), torch.zeros(9)
    pretrained.adopt(network, given, "2", "other")
    after = network.state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name] if name.startswith("2.") else given[name]), name
    assert "the last layer, 2, starts at random" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"0.weight": None}, "0.weight missing"),
        ({"9.weight": torch.zeros(1)}, "9.weight too many"),
        ({"0.weight": torch.zeros(4, 3)}, r"0.weight is \(4, 3\) there and \(4, 2\) here"),
        ({"0.weight": torch.full((4, 2), torch.nan)}, "not all finite"),
    ],
)
def test_all_else_must_fit(network, change, message):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    given = {name: torch.rand_like(value.float()) for name, value in before.items()} | change
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        pretrained.adopt(network, given, "2", "file")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_training_starts_from_the_weights_of_a_record(own, capsys):
    """Without a step they are those of the file; a file that has changed is refused."""
    words = [*map(str, own.common), "--model", f"{own.base}/net.py:build", "--epochs", "0"]
    words += ["--dataset", "folder", "--dataset_path", f"{own.base}/images", "--patch_size", "3"]
    words += ["--image_size", str(SIDE), "--save_folder_name", "from_weights"]
    weights = own.record / layout.WEIGHTS
    config = parsing.parse(badnet.Config, [*words, "--pretrained", str(weights)])
    badnet.main(config)
    made = safetensors.torch.load_file(own.base / "from_weights" / layout.WEIGHTS)
    wanted = safetensors.torch.load_file(weights)
    assert all(torch.equal(value, wanted[name]) for name, value in made.items())
    row = layout.read_results(own.base / "from_weights")
    assert row["recipe"].endswith(f"pretrained {files.sha256(weights)[:8]}")
    with pytest.raises(MissingError, match="there is no file /no, which --pretrained names"):
        parsing.parse(badnet.Config, [*words, "--pretrained", "/no"])
    given = ["--pretrained", str(weights), "--pretrained_sha256", "0" * 64, "--overwrite"]
    with pytest.raises(ConfigError, match="is not the file with the sha256 0000"):
        badnet.main(parsing.parse(badnet.Config, [*words, *given]))


# ---------- clean images ----------


def test_as_many_clean_images_of_every_class():
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] * 20)
    index = class_subset(labels, 6, seed=3)
    assert labels[index].bincount().tolist() == [6, 4, 6]
    assert torch.equal(class_subset(labels, 3, 5), balanced_subset(labels, 9, 5))
    assert not torch.equal(class_subset(labels, 3, 5), class_subset(labels, 3, 6))


def other_source(place, folders, size=(20, 12)):
    for value, (name, count) in enumerate(folders.items()):
        (place / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((*size, 3), 10 * value + number, np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
    return place


def options(**given):
    return ft.Config(result_file="x", **given)


def held(config):
    """What a defense of three classes, cat, dog and owl, holds of 40 training images."""
    labels = torch.arange(40) % CLASSES
    images = torch.full((40, 3, 8, 8), 200, dtype=torch.uint8)
    spec = SimpleNamespace(classes=CLASSES, size=8, class_names=("cat", "dog", "owl"))
    return clean.hold(Split(images, labels, labels), spec, config)


@pytest.mark.parametrize("folders", [("cat", "dog", "owl"), ("0", "1", "2"), ("00", "01", "2")])
def test_clean_images_of_another_source(tmp_path, folders):
    place = other_source(tmp_path / "other", dict.fromkeys(folders, 5))
    found = held(options(clean_from=str(place), clean_count=6))
    assert len(found.index) == 0 and found.split.images.shape == (6, 3, 8, 8)
    assert found.split.labels.bincount().tolist() == [2, 2, 2]
    values = found.split.images.float().mean((1, 2, 3))
    assert torch.equal((values / 10).long(), found.split.labels), "images go with their labels"
    assert torch.equal(found.split.labels, found.split.truth)


def test_the_budget_applies_to_them(tmp_path, capsys):
    place = other_source(tmp_path / "other", {"cat": 5, "dog": 2, "owl": 5})
    default = held(options(clean_from=str(place)))
    assert len(default.split) == CLASSES, "a twentieth of 40, but one of every class"
    few = held(options(clean_from=str(place), clean_per_class=3))
    assert few.split.labels.bincount().tolist() == [3, 2, 3]
    assert "holds 1 images fewer than asked for" in capsys.readouterr().err
    assert len(held(options(clean_from=str(place), clean_count=30)).split) == 12
    assert "has 12 images, and 30 were asked for" in capsys.readouterr().err
    own = held(options(clean_per_class=4))
    assert own.mark is None and own.split.labels.bincount().tolist() == [4, 4, 4]


def test_another_folder_is_another_run(tmp_path):
    folders = {"cat": 2, "dog": 2, "owl": 2}
    one = other_source(tmp_path / "one", folders)
    two = other_source(tmp_path / "two", folders, size=(8, 8))
    Image.new("RGB", (8, 8), "red").save(two / "cat" / "0.png")
    marks = {held(options(clean_from=str(place), clean_count=6)).mark for place in (one, two)}
    assert len(marks) == 2
    assert options(clean_from=str(one)).identity() != options(clean_from=str(two)).identity()
    assert options().identity() == options(clean_from=None, clean_per_class=None).identity()


@pytest.mark.parametrize(
    "folders, message",
    [
        ({"cat": 1, "dog": 1}, "no folder for the class owl"),
        ({"cat": 1, "dog": 1, "owl": 1, "cow": 1}, "the folder 'cow', which is no class"),
        ({"0": 1, "1": 1, "3": 1}, "the folder '3', which is no class"),
        ({"cat": 1, "dog": 1, "owl": 0}, "class owl in .* has no image"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, folders, message):
    place = other_source(tmp_path / "other", folders)
    with pytest.raises(MissingError, match=message):
        sources.find_labelled(place, ("cat", "dog", "owl"))


def test_a_data_set_gives_its_training_images(tmp_path):
    other_source(tmp_path / "train", {"cat": 2, "dog": 1})
    other_source(tmp_path / "test", {"cat": 4, "dog": 4})
    paths, labels = sources.find_labelled(tmp_path, ("cat", "dog"))
    assert len(paths) == 3 and labels.tolist() == [0, 0, 1]
    with pytest.raises(MissingError, match="there is no folder"):
        sources.find_labelled(tmp_path / "none", ("cat", "dog"))


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError, match="clean_per_class must be left out where --clean_count"):
        options(clean_per_class=1, clean_count=1)
    for given in ({"clean_from": "x"}, {"clean_per_class": 1}):
        for script in (abl, clp):
            with pytest.raises(ConfigError, match="this method holds no clean images"):
                script.Config(result_file="x", **given)


def test_results_state_where_clean_images_are_from(own, tmp_path):
    place = other_source(tmp_path / "sketches", {"a": 2, "b": 2, "c": 2})
    words = ["--model_file", f"{own.base}/net.py:build", "--epochs", 1, "--clean_from", place]
    done = defend(own, ft, *words, "--clean_per_class", 2, name="elsewhere")
    row = layout.read_results(done)
    assert row["prior"] == "clean_from=sketches" and row["clean_budget"] == "6"
    Image.new("RGB", (8, 8), "red").save(place / "a" / "0.png")
    with pytest.raises(ConfigError, match="a run on other data"):
        defend(own, ft, *words, "--clean_per_class", 2, name="elsewhere")


def test_a_defense_that_selects_needs_images_to_choose_by(own):
    words = ["--model_file", f"{own.base}/net.py:build", "--clean_count", 3]
    with pytest.raises(ConfigError, match="too few to hold some of every class out"):
        defend(own, fp, *words, name="few")
    assert not (own.record / "defense" / "few").exists()


# ---------- networks of timm ----------


def test_without_timm_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs timm, which is not installed: pip install timm"):
        models.check("timm:resnet18")


def test_networks_of_timm():
    pytest.importorskip("timm")
    for name, message in (
        ("timm:resnt18", "timm has no network 'resnt18'; did you mean timm:resnet18"),
        ("timm:resnet18.a1_in1k", "leave .a1_in1k out"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.check(name)
    spec = SimpleNamespace(**{**vars(SPEC), "size": 64})
    for name, head in (("timm:test_vit", "head"), ("timm:test_resnet", "fc")):
        model = models.build(name, spec)
        assert features.last_linear(model) is model.network.get_submodule(head)
        assert model.normalize.mean.flatten().tolist() == pytest.approx(SPEC.mean)
        assert not any(getattr(module, "inplace", False) for module in model.modules())
    spec.size = 7
    with pytest.raises(ConfigError, match="does not take images|cannot be built for images of 7"):
        models.build("timm:test_vit", spec)


# ---------- which defense works on what ----------


def test_the_table_of_architectures_is_the_measured_one():
    rows = files.read_csv(architectures.RESULTS)
    page = (ROOT / "docs" / "models.md").read_text()
    assert architectures.table(rows) in page
    tried = [
        {(row["defense"], row["variant"]) for row in rows if row["model"] == model}
        for model in architectures.MODELS
    ]
    assert tried[0] == tried[1] and {name for name, _ in tried[0]} <= set(names("defense"))
    assert not [row for row in rows if "unexpected" in row["outcome"]]

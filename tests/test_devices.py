"""Every attack and every defense on a device that is not the CPU, on any machine.

They run whole, from options to record, on a CUDA device that is made of CPU tensors (see
tests/fake_device.py): three classes of 16x16 images, resnet9 of width 4, one epoch of six steps.
"""

import copy
import csv
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from antidote_bench import models
from antidote_bench.utils import device as devices
from antidote_bench.utils import parsing, seeds
from antidote_bench.utils.config import Attack
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.loader import augmentation, forward_all
from antidote_bench.utils.errors import ConfigError, UserError
from benchmarks import gpu_check
from tests.fake_device import FakeDevice
from tests.helpers import names

# a few steps of everything
FEW = {
    "batch_size": 16, "contrastive_batch": 16, "ssl_batch_size": 16, "head_batch_size": 8,
    "search_batch": 8, "score_batch": 16, "steps": 6, "terms": 1, "rounds": 1, "together": 2,
    "scenes": 4, "blend_size": 16, "start_batches": 2, "clean_count": 48, "pratio": 0.2,
    "cover_ratio": 0.2, "attempts": 2,
}  # fmt: skip
FIXED_SHARE = {"clean", "blind", "lira", "sra"}  # attacks with a pratio of their own
# what recurs and is not in a loop of steps
ONCE_PER_CONVOLUTION = ("defense/fmp.py:score_maps",)
NEEDED = {"tact": {"cover_classes": 2}}  # there are three classes
ATTACKS = [(name, NEEDED.get(name, {})) for name in names("attack")] + [
    ("badnet", {"label_mode": "all2all", "eval_every": 1, "precision": "bf16"}),
    ("badnet", {"resident_gb": 0}),
    ("badnet", {"model": "airbench", "recipe": "airbench", "flip": "alternating"}),
    ("badnet", {"model": "preactresnet18", "recipe": "fast"}),
    ("badnet", {"crop": "resized", "mirror": "true"}),
    ("blind", {"balance": "mgda"}),
    ("bpp", {"dither": "true"}),
    ("adaptive_patch", {"strike": "inner"}),
    ("refool", {"clean_label": "true"}),
    ("trojan_sq", {"pattern": "drawn"}),
    ("trojannn", {"apply": "overwrite"}),
    ("wanet", {"resident_gb": 0}),
]
DEFENSES = [(name, {}) for name in names("defense")] + [
    ("abl", {"floor": "flooding", "resident_gb": 0}),
    ("ac", {"criterion": "silhouette"}),
    ("anp", {"selection": "oracle", "project": "true", "prune_shift": "true"}),
    ("awm", {"variant": "one_shot"}),
    ("awm", {"clamp": "both", "mask_optimizer": "sgd", "inner_label": "true"}),
    ("dbd", {"among": "label", "resident_gb": 0}),
    ("d_st", {"resident_gb": 0}),
    ("fmp", {"variant": "released"}),
    ("fmp", {"variant": "fmt"}),
    ("fmp", {"variant": "random"}),
    ("ft", {"optimizer": "muon", "precision": "bf16", "eval_every": 1}),
    ("mcr", {"selection": "oracle"}),
    ("npd", {"targets": "random"}),
    ("rnp", {"selection": "fixed"}),
    ("sau", {"clip": "true"}),
    ("spectral", {"classes": "outlying", "resident_gb": 0}),
    ("trap_and_replace", {"variant": "head_only", "cutmix": "false"}),
    ("trap_and_replace", {"variant": "no_trap"}),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Run a script here on the toy images: toy(kind, name, folder, **options) -> the record."""
    base, random = tmp_path_factory.mktemp("devices"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for label in range(3):
            folder = base / "images" / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = random.integers(0, 120, (16, 16, 3))
                image[4 * label : 4 * label + 4, :, label] += 120
                Image.fromarray(image.astype("uint8")).save(folder / f"{number:02}.png")

    def run(kind, name, folder, **options):
        script = importlib.import_module(f"antidote_bench.{kind}.{name}")
        words = few(script.Config, kind, name, base, options | {"save_folder_name": folder})
        script.main(parsing.parse(script.Config, words))
        record = base / "record"
        return record / folder if kind == "attack" else record / "victim" / "defense" / folder

    return run


def few(Config, kind, name, base, options):
    """The options of a short run on the toy images, as words."""
    known = Config.__dataclass_fields__
    chosen = {option: value for option, value in FEW.items() if option in known}
    chosen |= {option: 1 for option in known if option.endswith("epochs")}
    chosen |= {"record_path": base / "record", "cache_path": base / "cache"}
    chosen |= {"device": "cuda", "precision": "fp32"}
    if kind == "attack":
        chosen |= {"dataset": "folder", "dataset_path": base / "images", "image_size": 16}
        chosen |= {"model": "resnet9", "width": 4}
    else:
        chosen |= {"result_file": "victim"}
        if Config.holds_clean and "batch_size" in known:
            chosen["batch_size"] = 8  # of 48 images
    if name in FIXED_SHARE:
        del chosen["pratio"]
    chosen |= options
    return [str(word) for option, value in chosen.items() for word in (f"--{option}", value)]


@pytest.fixture(scope="module")
def victim(toy):
    """The record of a BadNets victim of the toy images."""
    with FakeDevice():
        return toy("attack", "badnet", "victim")


def runs(cases):
    """The cases as parameters of a test, named after what they run."""
    parameters = []
    for name, options in cases:
        label = "-".join([name, *map(str, options.values())])
        parameters.append(pytest.param(name, options, id=label))
    return parameters


def examine(device):
    """A run that is through has mixed no devices and waits for none from step to step."""
    assert device.operations, "nothing was computed on the device"
    assert not device.faults
    waits = device.waits_in_steps(but=ONCE_PER_CONVOLUTION)
    assert not waits, f"the CPU waits for the GPU at every step: {waits}"


@pytest.mark.parametrize("name, options", runs(ATTACKS))
def test_attack(name, options, toy, request):
    with FakeDevice() as device:
        toy("attack", name, request.node.callspec.id, **options)
    examine(device)


@pytest.mark.parametrize("name, options", runs(DEFENSES))
def test_defense(name, options, toy, victim, request):
    with FakeDevice() as device:
        toy("defense", name, request.node.callspec.id, **options)
    examine(device)


@pytest.mark.parametrize("kind, name", [("attack", "badnet"), ("defense", "abl")])
def test_the_device_computes_what_the_cpu_computes(kind, name, toy, victim):
    """The check itself: the same weights to the last bit, and so the same work."""
    with FakeDevice():
        there = toy(kind, name, f"{name}-there")
    here = toy(kind, name, f"{name}-here", device="cpu")
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    device, others = (next(csv.DictReader(open(path / "results.csv"))) for path in (there, here))
    assert device["device"] == "a CPU that plays a GPU" and others["device"].startswith("cpu")
    assert [device[key] for key in ("acc", "asr", "ra")] == [
        others[key] for key in ("acc", "asr", "ra")
    ]


@pytest.mark.parametrize("name", sorted(set(models.names()) - set(models.TORCHVISION)))
def test_model(name):
    """Networks of this project, forwards and backwards."""
    size, width = max(16, models.SMALLEST.get(name, 0)), None
    width = 4 if name in models.DEFAULT_WIDTH else None
    spec = SimpleNamespace(classes=3, size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
    with FakeDevice() as device:
        model = models.build(name, spec, width).to("cuda")
        images = torch.rand(4, 3, size, size, device="cuda")
        models.fit_to(model, images)
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0], device="cuda")).backward()
        assert all(each.grad.is_cuda for each in model.parameters() if each.requires_grad)
    assert not device.faults


def test_a_pass_over_many_batches_waits_for_none():
    with FakeDevice() as device:
        images = torch.randint(0, 256, (1100, 3, 8, 8), dtype=torch.uint8).to("cuda")
        labels = torch.zeros(1100, dtype=torch.long, device="cuda")
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).to("cuda")
        before = len(device.waits)
        split = dataset.Split(images, labels, labels)
        found = forward_all(model, split, lambda images, *_: model(images).argmax(1))
        assert found.is_cuda and len(found) == 1100
    assert len(device.waits) == before


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_augmentation(padding, flip):
    spec = SimpleNamespace(flip=True)
    with FakeDevice() as device:
        images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8).to("cuda")
        index, draws = torch.arange(6, device="cuda"), seeds.generator("x", 0, device="cuda")
        mirrored = index % 2 == 0 if flip == "alternating" else None
        before = len(device.waits)
        changed = augmentation(spec, 2, padding, mirrored)(images, draws, index=index, epoch=1)
        assert changed.is_cuda and len(device.waits) == before
    assert not device.faults


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "faster"),
    [(1, 1, 1, True), (0, 1, 1, False), (0, 1, 0, True), (0, 0, 0, False), (1, 0, 1, True)],
)
def test_bfloat16_is_taken_where_it_is_faster(amx, avx512, intel, faster, monkeypatch):
    """On Intel's CPUs AVX-512 multiplies it no faster than float32; AMX does."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    monkeypatch.setattr(devices, "is_intel", lambda: bool(intel))
    config, _ = devices.setup(Attack(device="cpu"))
    assert config.precision == ("bf16" if faster else "fp32")


def test_gpu_check_compares_two_devices(tmp_path, monkeypatch):
    """A small part of `make gpu`, on the CPU alone."""
    monkeypatch.setattr(gpu_check, "VICTIM_EPOCHS", 0)
    monkeypatch.setattr(gpu_check, "BATCH", 1024)
    words = ["--device", "cpu", "--methods", "badnet", "clp", "--results", str(tmp_path / "x.csv")]
    gpu_check.main(words)
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["name"]) for row in rows] == [
        ("attack", "badnet"),
        ("defense", "clp"),
    ]
    for row in rows:
        assert list(row) == gpu_check.COLUMNS and row["verdict"] == "equal"
        assert float(row["weights"]) < 1e-3 and float(row["seconds"]) > 0
    gpu_check.save(tmp_path / "x.csv", [{**rows[1], "verdict": "differs"}])
    with open(tmp_path / "x.csv", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["equal", "differs"]  # replaced


def test_gpu_check_fails_where_something_differs(monkeypatch):
    differs = {"kind": "attack", "name": "badnet", "device": "x", "verdict": "differs"}
    monkeypatch.setattr(gpu_check, "compare", lambda *_: differs)
    monkeypatch.setattr(gpu_check, "train_victim", lambda _: None)
    with pytest.raises(UserError, match="not equal: badnet") as raised:
        gpu_check.main(["--device", "cpu", "--methods", "badnet"])
    assert raised.value.code == 1


def test_gpu_check_compares_measures_and_weights():
    same = {"acc": "0.5", "asr": "", "ra": "0.1"}
    assert gpu_check.equal("defense", same, same, 1.0)
    assert gpu_check.equal("attack", same, {**same, "acc": "0.52"}, 1e-3)
    assert not gpu_check.equal("attack", same, same, 0.1)
    assert not gpu_check.equal("attack", same, same, float("nan"))
    assert not gpu_check.equal("defense", same, {**same, "acc": "0.54"}, 0.0)
    assert not gpu_check.equal("defense", same, {**same, "asr": "0.1"}, 0.0)


def test_gpu_check_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA GPU here") as raised:
        gpu_check.main([])
    assert raised.value.code == 2


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_gpu_check_runs_every_method(kind):
    options = gpu_check.parse(["--device", "cpu"])
    assert [name for each, name in options.methods if each == kind] == names(kind)


def test_draws_are_those_of_the_cpu():
    before = torch.rand
    with gpu_check.same_draws():
        draws = seeds.generator("x", 0, device="cuda:7")
        assert draws.device.type == "cpu" and torch.rand is not before
        assert torch.equal(
            torch.rand(3, generator=draws), before(3, generator=seeds.generator("x", 0))
        )
    assert torch.rand is before


# the check of the check: what CUDA refuses is found, and what it takes is not


class ForgottenDevice(torch.autograd.Function):
    """The identity, whose gradient is made on the CPU."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.ones(gradient.shape)


def layer(where):
    return torch.nn.Linear(3, 3).to(where)


REFUSED = {
    "add": lambda here, there: there + here,
    "join": lambda here, there: torch.cat([there, here]),
    "into a number on the CPU": lambda here, there: torch.tensor(0.0).add_(there.sum()),
    "a matrix": lambda here, there: there @ here.T,
    "a layer": lambda here, there: layer("cpu")(there),
    "labels": lambda here, there: F.cross_entropy(there, torch.tensor([0, 1])),
    "gather": lambda here, there: there.gather(1, torch.tensor([[0], [1]])),
    "index_select": lambda here, there: there.index_select(0, torch.tensor([1])),
    "rows of the CPU": lambda here, there: here[torch.tensor([1], device="cuda")],
    "values": lambda here, there: there.__setitem__(torch.tensor([0, 1]), here),
    "backwards": lambda here, there: ForgottenDevice.apply(there.requires_grad_()).sum().backward(),
    "numpy": lambda here, there: there.numpy(),
    "an array": lambda here, there: np.asarray(there),
    "a generator": lambda here, there: torch.rand(
        2, generator=torch.Generator().manual_seed(0), device="cuda"
    ),
    "an order": lambda here, there: torch.randperm(
        2, generator=torch.Generator("cuda").manual_seed(0)
    ),
    "noise": lambda here, there: there.normal_(generator=torch.Generator()),
    "a step": lambda here, there: torch._foreach_add([there, there], [here, here]),
}
TAKEN = {
    "a number of the CPU": lambda here, there: (there * torch.tensor(2.0)).clamp(min=here[0, 0]),
    "positions of the CPU": lambda here, there: there[torch.tensor([1])],
    "writing there": lambda here, there: there.__setitem__(torch.tensor([1]), there[:1].clone()),
    "copy_": lambda here, there: there.copy_(here),
    "moving": lambda here, there: there.cpu() + here,
    "moving back": lambda here, there: here.to(there) + there,
    "moving with a gradient": lambda here, there: (
        (here.requires_grad_().to("cuda") * there).sum().backward(), here.grad + here.detach()
    ),
    "a copy of a layer": lambda here, there: copy.deepcopy(layer("cuda"))(there),
    "weights of the CPU": lambda here, there: layer("cuda").load_state_dict(
        layer("cpu").state_dict()
    ),
    "one hot": lambda here, there: F.one_hot(torch.tensor([1], device="cuda"), 3) * there,
    "where": lambda here, there: torch.where(there > 0, there, 0.0),
    "draws": lambda here, there: torch.rand(
        there.shape, generator=torch.Generator("cuda"), device="cuda"
    ) + there,
    "clipping": lambda here, there: torch.nn.utils.clip_grad_norm_(
        [there.requires_grad_().square().sum().backward() or there], 1.0
    ),
}  # fmt: skip


def tensors():
    return torch.rand(2, 3), torch.rand(2, 3, device="cuda")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_found(name):
    with FakeDevice() as device:
        with pytest.raises(RuntimeError, match=r"tests/test_devices\.py:\d+: "):
            REFUSED[name](*tensors())
    assert len(device.faults) == 1
    assert not hasattr(torch.Tensor, "pinned") and torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("name", TAKEN)
def test_what_cuda_takes_is_no_fault(name):
    with FakeDevice() as device:
        TAKEN[name](*tensors())
    assert not device.faults


WAITING = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "cpu": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0.5],
    "positions": lambda x: (x > 0.5).nonzero(),
    "a new number": lambda x: torch.tensor(0.5, device=x.device),
    "numbers into a tensor": lambda x: torch.tensor([x[0, 0], x[1, 1]]),
}
FREE = {
    "a sum": lambda x: x.sum(),
    "a mask and a number": lambda x: x.clone().__setitem__(x > 0.5, 0.0),
    "a full tensor": lambda x: torch.full((), 0.5, device=x.device),
    "pinned memory": lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("name", [*WAITING, *FREE])
def test_waiting_in_every_step_is_found(name):
    with FakeDevice() as device:
        weight = torch.rand(2, 3, device="cuda", requires_grad=True)
        for _ in range(4):
            weight.square().sum().backward()
            (WAITING | FREE)[name](weight.detach())
        weight.sum().item()  # once is no fault
    assert len(device.waits_in_steps()) == (name in WAITING)

"""Every model keeps the contract of `models.build`: pixels in [0, 1] in, logits out, readable by
hooks and torch.fx."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from antidote_bench import models
from antidote_bench.models.split import SPLITS, split
from antidote_bench.utils.errors import ConfigError

CLASSES = 7
SMALL_NETS = [
    "airbench",
    "preactresnet18",
    "resnet9",
    "resnet18",
    "vgg19_bn",
    "wrn16_1",
    "wrn16_1_leaky",
]
CIFAR_FORMS = [*SMALL_NETS, "resnet34", "resnet50"]


def spec(size=32, classes=CLASSES):
    return SimpleNamespace(classes=classes, size=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def pixels(size=32, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded(name, size=32, seed=0, width=None):
    torch.manual_seed(seed)
    return models.build(name, spec(size), width)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def assert_near(logits, expected):
    """Equal up to rounding, relative to the largest logit: some untrained networks give logits of
    1e-14."""
    largest = expected.abs().max()
    assert largest > 0
    assert (logits - expected).abs().max() <= 1e-3 * largest


@pytest.fixture(scope="module", params=models.names())
def model(request):
    """Each model once, in evaluation mode; the tests below only read it."""
    model = seeded(request.param).eval()
    if request.param == "vit_b_16":
        # starts at zero, which would make all logits equal
        nn.init.normal_(model.network.vit.heads.head.weight)
    return model


def test_logits_have_one_column_per_class(model):
    with torch.inference_mode():
        logits = model(pixels())
    assert logits.shape == (2, CLASSES)
    assert logits.isfinite().all()


def test_normalisation_comes_first_and_once(model):
    first, network = model.children()
    assert isinstance(first, models.Normalize)
    assert sum(isinstance(module, models.Normalize) for module in model.modules()) == 1
    images = pixels()
    mean, std = torch.tensor(spec().mean), torch.tensor(spec().std)
    by_hand = ((images.movedim(1, -1) - mean) / std).movedim(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(first(images), by_hand)
        assert_near(model(images), network(by_hand))


def test_state_dict_holds_learned_things_only(model):
    assert model.state_dict().keys() == {f"network.{key}" for key in model.network.state_dict()}
    assert {name for name, _ in model.normalize.named_buffers()} == {"mean", "std"}


def test_layers_are_the_standard_modules(model):
    """Defenses find layers by type: a filter bank is a Conv2d's weight, running statistics are a
    BatchNorm2d's."""
    filters = [m for m in model.modules() for p in m.parameters(recurse=False) if p.ndim == 4]
    assert filters and {type(module) for module in filters} == {nn.Conv2d}
    assert {type(m) for m in model.modules() if hasattr(m, "running_mean")} <= {nn.BatchNorm2d}


def test_hooks_read_raw_outputs(model):
    """No later layer writes into the output of a convolution."""
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    kept = []
    layers = convolutions(model)
    hooks = [
        m.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
        for m in layers
    ]
    with torch.inference_mode():
        model(pixels())
    for hook in hooks:
        hook.remove()
    assert len(kept) == len(layers) > 0
    assert all(torch.equal(stored, at_once) for stored, at_once in kept)


def test_fx_traces(model):
    traced = torch.fx.symbolic_trace(model)
    with torch.inference_mode():
        assert_near(traced(pixels()), model(pixels()))


def test_channels_last_gives_the_same_logits(model):
    images = pixels()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert_near(other(images.contiguous(memory_format=torch.channels_last)), model(images))


@pytest.mark.parametrize("name", CIFAR_FORMS)
def test_cifar_forms_take_64_pixels(name):
    with torch.inference_mode():
        logits = seeded(name, size=64).eval()(pixels(64))
    assert logits.shape == (2, CLASSES) and logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL_NETS)
def test_a_step_changes_every_parameter(name):
    model = seeded(name).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(pixels()), torch.tensor([0, 1]))
    loss.backward()
    fixed = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert bool(fixed) == (name == "airbench")
    for key, parameter in model.named_parameters():
        assert key in fixed or parameter.grad is not None and parameter.grad.isfinite().all(), key
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = dict(model.named_parameters())
    unchanged = {key for key in before if torch.equal(before[key], after[key])}
    assert unchanged == fixed


@pytest.mark.parametrize("name", SMALL_NETS)
def test_weights_come_from_the_global_seed(name):
    first, again, other = seeded(name, seed=3), seeded(name, seed=3), seeded(name, seed=4)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(convolutions(first)[0].weight, convolutions(other)[0].weight)


@pytest.mark.parametrize("name", SMALL_NETS)
def test_state_dict_round_trip(name, tmp_path):
    saved, loaded = seeded(name, seed=0).eval(), seeded(name, seed=1).eval()
    with torch.inference_mode():
        assert not torch.equal(saved(pixels()), loaded(pixels()))
        torch.save(saved.state_dict(), tmp_path / "model.pt")
        loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
        assert torch.equal(saved(pixels()), loaded(pixels()))


def test_preactresnet18_has_its_known_counts():
    model = seeded("preactresnet18")
    assert len(convolutions(model)) == 20
    assert sum(conv.out_channels for conv in convolutions(model)) == 4800
    assert (
        sum(p.numel() for p in models.build("preactresnet18", spec(classes=10)).parameters())
        == 11_171_146
    )
    assert [type(m) for m in model.network.children()][-3:] == [
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        nn.Linear,
    ]


def test_preactresnet18_convolutions_read_by_a_batch_norm_only():
    traced = torch.fx.symbolic_trace(seeded("preactresnet18"))
    layers = dict(traced.named_modules())
    alone = [
        node.target
        for node in traced.graph.nodes
        if isinstance(layers.get(node.target), nn.Conv2d)
        and all(isinstance(layers.get(user.target), nn.BatchNorm2d) for user in node.users)
    ]
    assert alone == [
        f"network.layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)
    ]


def test_preactresnet18_shortcut_reads_the_activated_input():
    block = seeded("preactresnet18").network.layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 64, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), block.shortcut(torch.relu(block.bn1(x))))


def test_a_narrow_preactresnet18_has_a_share_of_the_channels():
    narrow = seeded("preactresnet18", width=16)
    assert sum(conv.out_channels for conv in convolutions(narrow)) == 4800 // 4
    assert narrow(pixels()).shape == (2, CLASSES)


def test_airbench_is_the_papers():
    model = models.build("airbench", spec(classes=10))
    assert [conv.out_channels for conv in convolutions(model)] == [24, 64, 64, 256, 256, 256, 256]
    # filters 1,967,616, shifts 1,152, linear 2,560
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_971_328
    assert [conv.out_channels for conv in convolutions(seeded("airbench", width=8))] == [
        24,
        8,
        8,
        32,
        32,
        32,
        32,
    ]
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.eps, norm.momentum, norm.weight.requires_grad, norm.bias.requires_grad) == (
            1e-12,
            0.4,
            False,
            True,
        )
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_airbench_computes_what_the_paper_says():
    """The layers one after the other, in float64; the last max pool is the paper's 3x3 one."""
    model = models.build("airbench", spec(classes=10), 8).double().eval()
    net, state = model.network, model.network.state_dict()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.normal_()

    def normed(x, name):
        mean, variance, shift = (
            state[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "bias")
        )
        return (x - mean) / (variance + 1e-12).sqrt() + shift

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    images = pixels().double()
    x = gelu(
        nn.functional.conv2d(model.normalize(images), state["whiten.weight"], state["whiten.bias"])
    )
    for group in ("group1", "group2", "group3"):
        x = nn.functional.conv2d(x, state[f"{group}.conv1.weight"], padding=1)
        x = gelu(normed(nn.functional.max_pool2d(x, 2), f"{group}.norm1"))
        x = gelu(
            normed(
                nn.functional.conv2d(x, state[f"{group}.conv2.weight"], padding=1), f"{group}.norm2"
            )
        )
    expected = nn.functional.max_pool2d(x, 3).flatten(1) @ state["linear.weight"].T / 9
    assert net.scale.factor == 1 / 9
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_airbench_whitens_patches():
    model = models.build("airbench", spec(classes=10), 8).double()
    generator = torch.Generator().manual_seed(0)
    smooth = nn.functional.avg_pool2d(
        torch.rand(700, 3, 34, 34, generator=generator, dtype=torch.float64), 3, 1
    )
    models.fit_to(model, smooth)
    whitened = model.network.whiten(model.normalize(smooth)).movedim(1, -1).reshape(-1, 24)
    assert torch.equal(model.network.whiten.weight[:12], -model.network.whiten.weight[12:])
    moments = whitened[:, :12].T @ whitened[:, :12] / len(whitened)
    patches = torch.stack(
        [
            image[:, top : top + 2, left : left + 2].flatten()
            for image in model.normalize(smooth[:40])
            for top in range(31)
            for left in range(31)
        ]
    )
    variances = torch.linalg.svdvals(patches).square() / len(patches)
    assert (moments - moments.diag().diag()).abs().max() < 1e-9, "directions are uncorrelated"
    torch.testing.assert_close(moments.diag(), variances / (variances + 5e-4), rtol=0.05, atol=0)
    for conv in convolutions(model)[1:]:
        inputs = min(conv.weight.shape[:2])
        assert torch.equal(conv.weight[:inputs, :inputs, 1, 1], torch.eye(inputs).double()), (
            "the identity to begin with"
        )
        assert conv.weight[:inputs].abs().sum() == inputs


def test_models_without_such_a_layer_are_left_alone():
    model = seeded("resnet9", width=3)
    before = copy.deepcopy(model.state_dict())
    models.fit_to(model, pixels())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_wrn16_1_is_the_papers():
    model = seeded("wrn16_1")
    channels = [conv.out_channels for conv in convolutions(model) if conv.kernel_size == (3, 3)]
    assert channels == [16] + [16] * 4 + [32] * 4 + [64] * 4
    assert sum(p.numel() for p in models.build("wrn16_1", spec(classes=10)).parameters()) == 175_066


def test_wrn16_1_leaky_computes_what_the_papers_say():
    """The layers one after the other, in float64; every batch norm takes part."""
    model = models.build("wrn16_1_leaky", spec(classes=10)).double().eval()
    torch.manual_seed(1)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_()
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2)
    state, used = model.network.state_dict(), set()

    def layer(name):
        used.update(key for key in state if key.startswith(f"{name}."))
        return {key: state[f"{name}.{key}"] for key in ("weight", "bias")}

    def active(x, name):
        mean, variance = (state[f"{name}.running_{part}"] for part in ("mean", "var"))
        scale = layer(name)["weight"] / (variance + 1e-5).sqrt()
        x = (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + layer(name)["bias"].view(-1, 1, 1)
        return torch.where(x > 0, x, 0.1 * x)

    def convolved(x, name, stride=1, padding=1):
        return nn.functional.conv2d(x, **layer(name), stride=stride, padding=padding)

    images = pixels().double()
    x = convolved(model.normalize(images), "conv1")
    for group in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"group{group}.{block}", 2 if group > 1 and block == 0 else 1
            before = active(x, f"{name}.bn1")
            out = active(convolved(before, f"{name}.conv1", stride), f"{name}.bn2")
            shortcut = x if stride == 1 else convolved(before, f"{name}.shortcut", 2, 0)
            x = convolved(out, f"{name}.conv2") + shortcut
    x = active(x, "bn").mean((2, 3))
    linear = layer("linear")
    expected = x @ linear["weight"].T + linear["bias"]
    assert used == set(state), "no layer is left unused"
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "total", "head"),
    [("wrn16_1_leaky", 175_626, 74_890), ("preactresnet18", 11_171_146, 4_725_770)],
)
def test_trap_and_replace_splits_where_the_paper_does(name, total, head):
    model = models.build(name, spec(classes=10))
    assert [
        sum(p.numel() for p in part.parameters()) for part in (model, split(name, model)[1])
    ] == [total, head]


@pytest.mark.parametrize("name", SPLITS)
def test_stem_and_head_are_the_network(name):
    model = seeded(name, width=8 if name in models.DEFAULT_WIDTH else None).eval()
    images, seen = pixels(), set()
    for blocks in (1, 2):
        stem, head = split(name, model, blocks)
        torch.testing.assert_close(head(stem(images)), model(images))
        own, other = ({id(p) for p in part.parameters()} for part in (stem, head))
        assert not own & other and own | other == {id(p) for p in model.parameters()}
        seen.add(len(other))
    assert len(seen) == 2, "a deeper head has more parameters"


def test_what_cannot_be_split_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"no split into stem and head for vgg19_bn; there is one for airbench, preact",
    ):
        split("vgg19_bn", seeded("vgg19_bn"))
    with pytest.raises(ConfigError, match="1 to 8 blocks, not 9"):
        split("preactresnet18", seeded("preactresnet18"), 9)


@pytest.mark.parametrize("name", ["vgg19_bn", "wrn16_1"])
def test_convolutions_start_from_hes_normal_initialisation(name):
    widening = [
        c
        for c in convolutions(seeded(name))
        if c.kernel_size == (3, 3) and c.in_channels < c.out_channels
    ]
    fan_out = 9 * widening[-1].out_channels
    assert widening[-1].weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_vgg19_bn_has_torchvisions_features():
    from torchvision.models.vgg import cfgs, make_layers

    reference = make_layers(cfgs["E"], batch_norm=True).eval()
    network = seeded("vgg19_bn").network.eval()
    features = network[:5]
    reference.load_state_dict(
        dict(zip(reference.state_dict(), features.state_dict().values(), strict=True))
    )
    with torch.inference_mode():
        torch.testing.assert_close(features(pixels()), reference(pixels()))
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 1


def test_resnet9_width():
    assert [conv.out_channels for conv in convolutions(seeded("resnet9"))] == [
        64,
        128,
        128,
        128,
        256,
        512,
        512,
        512,
    ]
    assert [type(layer).__name__ for layer in seeded("resnet9").network][-3:] == [
        "GlobalMaxPool",
        "Linear",
        "Scale",
    ]
    narrow = seeded("resnet9", width=3)
    assert [conv.out_channels for conv in convolutions(narrow)] == [3, 6, 6, 6, 12, 24, 24, 24]
    assert narrow(pixels()).shape == (2, CLASSES)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_stem_follows_the_image_size(name):
    small, large = seeded(name, size=64).network, seeded(name, size=96).network
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


def test_resize_enlarges_as_torch_does_and_antialiases_when_shrinking():
    from antidote_bench.models.torchvision_nets import Resize

    small = pixels(32)
    expected = nn.functional.interpolate(
        small, scale_factor=7, mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(Resize(224, antialias=False)(small), expected)
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1
    shrunk = Resize(16, antialias=True)(stripes)
    torch.testing.assert_close(
        shrunk[..., 2:-2], torch.full((1, 3, 16, 12), 0.25), rtol=0, atol=0.1
    )


def test_normalisation_follows_the_model_to_another_precision():
    model = seeded("wrn16_1").to(torch.float64)
    assert model.normalize.mean.dtype == torch.float64
    assert model(pixels().double()).dtype == torch.float64


def test_names_are_sorted_and_complete():
    wanted = "airbench preactresnet18 resnet9 vgg19_bn wrn16_1 wrn16_1_leaky resnet18 resnet34"
    wanted += " resnet50 mobilenet_v3_large efficientnet_b3"
    wanted = [*wanted.split(), "densenet161", "convnext_tiny", "vit_b_16"]
    assert models.names() == sorted(wanted)


def test_options_are_checked_before_torch_is_loaded():
    code = "import sys; from antidote_bench import models;"
    code += "models.names(); models.label('resnet9', 16); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=models.__path__[0] + "/..").returncode == 0
    )


def test_labels():
    assert models.label("resnet9", None) == models.label("resnet9", 64) == "resnet9"
    assert models.label("resnet9", 16) == "resnet9_w16"
    assert (
        models.label("preactresnet18", None)
        == models.label("preactresnet18", 64)
        == "preactresnet18"
    )
    assert [models.label(name, 32) for name in ("airbench", "preactresnet18")] == [
        "airbench_w32",
        "preactresnet18_w32",
    ]


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'preactresnet81'; did you mean preactresnet18.* all models: .*vit_b_16"
    ):
        models.build("preactresnet81", spec())
    with pytest.raises(ConfigError, match=r"'zzz'; the models are: .*resnet9"):
        models.build("zzz", spec())


@pytest.mark.parametrize("helper", ["normalize", "torchvision_nets", "__init__", "../utils", ""])
def test_files_that_are_no_model_are_refused(helper):
    with pytest.raises(ConfigError):
        models.build(helper, spec())


@pytest.mark.parametrize(
    "name, width", [("resnet18", 16), ("vgg19_bn", 64), ("resnet9", 0), ("resnet9", -4)]
)
@pytest.mark.parametrize(
    "call", [lambda name, width: models.build(name, spec(), width), models.label]
)
def test_impossible_width_is_refused(call, name, width):
    with pytest.raises(ConfigError, match=f"width of {name}"):
        call(name, width)


@pytest.mark.parametrize(("name", "side"), models.SMALLEST.items())
def test_too_small_images_are_refused(name, side):
    with pytest.raises(ConfigError, match=f"at least {side} pixels"):
        models.build(name, spec(side - 1))


# ---------- networks of torchvision as they are there ----------


def test_networks_of_torchvision_keep_their_form_at_every_size():
    fitted, plain = (seeded(name) for name in ("resnet18", "torchvision:resnet18"))
    assert convolutions(fitted)[0].kernel_size == (3, 3)
    assert convolutions(plain)[0].kernel_size == (7, 7)
    assert plain(pixels()).shape == (2, CLASSES)
    assert models.label("torchvision:resnet18") == "torchvision:resnet18"
    stem, head = split("torchvision:resnet18", plain.eval())
    assert_near(head(stem(pixels())), plain(pixels()))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torchvision:resnt18", "no network 'resnt18'; did you mean torchvision:resnet18"),
        ("torchvision:fcn_resnet50", "no network 'fcn_resnet50'"),  # no image classifier
        ("torchvision:../x", "there is no model"),
    ],
)
def test_what_torchvision_has_not(name, why):
    with pytest.raises(ConfigError, match=why):
        models.check(name)


def test_what_torchvision_does_not_make_for_small_images():
    with pytest.raises(ConfigError, match="does not take images of 16 pixels"):
        models.build("torchvision:squeezenet1_0", spec(16))

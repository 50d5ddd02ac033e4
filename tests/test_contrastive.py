"""Views for contrastive learning, image by image against the operations of torchvision."""

from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.functional as tv

from antidote_bench.utils.repair import contrastive

MIRRORED, UPRIGHT = SimpleNamespace(flip=True), SimpleNamespace(flip=False)
NOTHING = {
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "coloured": 0,
    "grey": 0,
    "blurred": 0,
}  # a view that changes nothing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(count):
    """numbers(columns) -> count,columns of [0, 1)."""
    generator = seeded()
    return lambda columns: torch.rand(count, columns, generator=generator)


def random_images(count=12, height=20, width=20):
    """Random colours, one grey image, one black, and one with equal channels here and there."""
    images = torch.rand(count, 3, height, width, generator=seeded())
    images[0] = images[0, :1]
    images[1] = 0
    images[2, 0] = images[2, 1].round()
    return images


@pytest.mark.parametrize("kind, name", list(enumerate(["brightness", "contrast", "saturation"])))
def test_brightness_contrast_and_saturation_are_those_of_torchvision(kind, name):
    images = random_images()
    factors = torch.linspace(0.6, 1.4, len(images))
    actual = contrastive.adjusted(images, torch.full((len(images),), kind), factors)
    expected = [
        getattr(tv, f"adjust_{name}")(image, factor)
        for image, factor in zip(images, factors.tolist(), strict=True)
    ]
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(actual[3:], images[3:], atol=0.01)


def test_hue_is_that_of_torchvision():
    images = random_images()
    turns = torch.linspace(-0.5, 0.5, len(images))
    expected = [
        tv.adjust_hue(image, turn) for image, turn in zip(images, turns.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        contrastive.hue_shifted(images, turns), torch.stack(expected), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(contrastive.hue_shifted(images, turns)[:2], images[:2])  # greys


def test_luma_is_that_of_torchvision():
    torch.testing.assert_close(
        contrastive.luma(random_images()), tv.rgb_to_grayscale(random_images())
    )


def test_every_image_has_its_own_order_of_colour_changes():
    images, count = random_images(), 12
    factors = 0.6 + 0.8 * torch.rand(count, 3, generator=seeded(1))
    turns = 0.2 * torch.rand(count, generator=seeded(2)) - 0.1
    order, before = torch.rand(count, 3, generator=seeded(3)).argsort(1), torch.arange(count) % 4
    assert len(order.unique(dim=0)) > 3
    steps = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    expected = images.clone()
    for number in range(count):
        places = order[number].tolist()
        places.insert(before[number], 3)
        for place in places:
            expected[number] = steps[place](
                expected[number], [*factors[number].tolist(), turns[number].item()][place]
            )
    torch.testing.assert_close(
        contrastive.jittered(images, factors, turns, order, before), expected, atol=2e-5, rtol=0
    )


def test_colours_change_as_far_as_the_jitter_says_and_no_further():
    grey = torch.full((3000, 3, 2, 2), 0.5)
    actual = contrastive.recoloured(grey, (0.4, 0.0, 0.0, 0.0), numbers(3000))[:, 0, 0, 0]
    assert (
        0.3 - 1e-6 <= actual.min() < 0.305
        and 0.695 < actual.max() <= 0.7 + 1e-6
        and abs(actual.mean() - 0.5) < 0.01
    )
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3000, 3, 2, 2)
    actual = contrastive.recoloured(red, (0.0, 0.0, 0.0, 0.1), numbers(3000))
    assert actual[:, 0].min() == 1
    assert (
        actual[:, 1].max() > 0.58 and actual[:, 2].max() > 0.58 and actual[:, 1:].max() < 0.601
    )  # a tenth of a turn is 0.6 sixths


def test_resized_crops_are_those_of_torchvision():
    images = random_images(5, 20, 24)
    boxes = [(0, 0, 20, 24), (3, 5, 9, 7), (19, 23, 1, 1), (0, 14, 20, 10), (8, 0, 5, 24)]
    actual = contrastive.resized_crops(images, *torch.tensor(boxes).float().unbind(1))
    expected = [
        tv.resized_crop(image, *box, [20, 24], antialias=False)
        for image, box in zip(images, boxes, strict=True)
    ]
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(actual[0], images[0], atol=1e-6, rtol=0)


def test_crops_lie_inside_and_have_areas_and_shapes_in_the_ranges():
    top, left, height, width = contrastive.draw_boxes(
        40, 40, (0.2, 1.0), (3 / 4, 4 / 3), numbers(4000)
    )
    for start, length in ((top, height), (left, width)):
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= 40).all()
        assert start.min() == 0 and (start + length).max() == 40
    area, shape = height * width / 1600, width / height
    assert 0.19 < area.min() < 0.23 and area.max() > 0.95 and 0.4 < area.mean() < 0.6
    assert 0.7 < shape.min() < 0.8 and 1.25 < shape.max() < 1.4


def test_where_no_crop_fits_the_whole_image_is_taken():
    boxes = contrastive.draw_boxes(20, 20, (1.0, 1.0), (2.0, 2.0), numbers(4))
    assert [side.unique().tolist() for side in boxes] == [[0], [0], [20], [20]]


def test_blur_is_that_of_torchvision():
    images, sigma = random_images(6, 9, 14), torch.tensor([0.1, 0.4, 0.8, 1.2, 1.6, 2.0])
    actual = contrastive.gaussian_blur(images, sigma, 6)
    expected = [
        tv.gaussian_blur(image, [13, 13], [width, width])
        for image, width in zip(images, sigma.tolist(), strict=True)
    ]
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_view_draws_its_numbers_from_the_generator():
    images = (random_images() * 255).to(torch.uint8)
    original, view = images.clone(), contrastive.views(MIRRORED)
    actual = view(images, seeded())
    torch.testing.assert_close(actual, view(images, seeded()), atol=0, rtol=0)
    assert (actual - view(images, seeded(1))).abs().mean() > 0.01
    assert (
        actual.shape == images.shape
        and actual.dtype == torch.float32
        and actual.is_contiguous(memory_format=torch.channels_last)
    )
    assert actual.min() >= 0 and actual.max() <= 1
    assert torch.equal(images, original)


def test_every_image_draws_its_own_numbers():
    images = random_images()[5:6].repeat(64, 1, 1, 1)
    assert len(contrastive.views(UPRIGHT)(images, seeded()).flatten(1).unique(dim=0)) == 64
    first, second = contrastive.pairs(contrastive.views(UPRIGHT))(images, seeded()).chunk(2)
    assert len(first) == len(second) == 64 and not (first == second).flatten(1).all(1).any()


def test_pairs_come_in_the_order_of_the_batch():
    first, second = contrastive.pairs(contrastive.views(UPRIGHT, **NOTHING))(
        random_images(), seeded()
    ).chunk(2)
    torch.testing.assert_close(first, random_images(), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, random_images(), atol=1e-5, rtol=0)


def test_shares_of_changed_images_are_as_given():
    images = random_images()[5:6].repeat(2000, 1, 1, 1)[..., :6, :6]

    def share(**options):
        actual = contrastive.views(UPRIGHT, **{**NOTHING, **options})(images, seeded())
        return (actual - images).abs().amax((1, 2, 3)).gt(1e-3).float().mean().item()

    assert share() == 0
    assert abs(share(coloured=0.8) - 0.8) < 0.03
    assert abs(share(grey=0.2) - 0.2) < 0.03
    assert abs(share(blurred=0.5, sigma=(1.0, 2.0)) - 0.5) < 0.03


def test_images_are_mirrored_only_where_the_data_set_allows_it():
    images = random_images()[5:6].repeat(1000, 1, 1, 1)[..., :8]
    actual = contrastive.views(MIRRORED, **NOTHING)(images, seeded())
    mirrored = (actual - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    straight = (actual - images).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(mirrored, ~straight) and abs(mirrored.float().mean() - 0.5) < 0.05
    torch.testing.assert_close(
        contrastive.views(UPRIGHT, **NOTHING)(images, seeded()), images, atol=1e-5, rtol=0
    )

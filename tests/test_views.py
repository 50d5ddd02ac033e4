"""Views for contrastive learning, picture by picture against torchvision's own operations."""

from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.functional as tv

from utils import views

MIRRORED, UPRIGHT = SimpleNamespace(flip=True), SimpleNamespace(flip=False)
NOTHING = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "coloured": 0, "grey": 0, "blurred": 0}  # a view that changes nothing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(count):
    """numbers(columns) -> count,columns of [0, 1)."""
    generator = seeded()
    return lambda columns: torch.rand(count, columns, generator=generator)


def pictures(count=12, height=20, width=20):
    """Random colours, one grey picture, one black, and one with equal channels here and there."""
    images = torch.rand(count, 3, height, width, generator=seeded())
    images[0] = images[0, :1]
    images[1] = 0
    images[2, 0] = images[2, 1].round()
    return images


@pytest.mark.parametrize("kind, name", list(enumerate(["brightness", "contrast", "saturation"])))
def test_brightness_contrast_and_saturation_are_those_of_torchvision(kind, name):
    images = pictures()
    factors = torch.linspace(0.6, 1.4, len(images))
    found = views.adjusted(images, torch.full((len(images),), kind), factors)
    expected = [getattr(tv, f"adjust_{name}")(image, factor) for image, factor in zip(images, factors.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(found[3:], images[3:], atol=0.01)


def test_hue_is_that_of_torchvision():
    images = pictures()
    turns = torch.linspace(-0.5, 0.5, len(images))
    expected = [tv.adjust_hue(image, turn) for image, turn in zip(images, turns.tolist(), strict=True)]
    torch.testing.assert_close(views.turned(images, turns), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(views.turned(images, turns)[:2], images[:2])  # greys


def test_luma_is_that_of_torchvision():
    torch.testing.assert_close(views.luma(pictures()), tv.rgb_to_grayscale(pictures()))


def test_a_picture_goes_through_the_colours_in_its_own_order():
    images, count = pictures(), 12
    factors, turns = 0.6 + 0.8 * torch.rand(count, 3, generator=seeded(1)), 0.2 * torch.rand(count, generator=seeded(2)) - 0.1
    order, before = torch.rand(count, 3, generator=seeded(3)).argsort(1), torch.arange(count) % 4
    assert len(order.unique(dim=0)) > 3
    steps = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    expected = images.clone()
    for number in range(count):
        places = order[number].tolist()
        places.insert(before[number], 3)
        for place in places:
            expected[number] = steps[place](expected[number], [*factors[number].tolist(), turns[number].item()][place])
    torch.testing.assert_close(views.jittered(images, factors, turns, order, before), expected, atol=2e-5, rtol=0)


def test_colours_move_as_far_as_asked_for_and_no_further():
    grey = torch.full((3000, 3, 2, 2), 0.5)
    found = views.recoloured(grey, (0.4, 0.0, 0.0, 0.0), numbers(3000))[:, 0, 0, 0]
    assert 0.3 - 1e-6 <= found.min() < 0.305 and 0.695 < found.max() <= 0.7 + 1e-6 and abs(found.mean() - 0.5) < 0.01
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3000, 3, 2, 2)
    found = views.recoloured(red, (0.0, 0.0, 0.0, 0.1), numbers(3000))
    assert found[:, 0].min() == 1
    assert found[:, 1].max() > 0.58 and found[:, 2].max() > 0.58 and found[:, 1:].max() < 0.601  # a tenth of a turn is 0.6 sixths


def test_resized_crops_are_those_of_torchvision():
    images = pictures(5, 20, 24)
    boxes = [(0, 0, 20, 24), (3, 5, 9, 7), (19, 23, 1, 1), (0, 14, 20, 10), (8, 0, 5, 24)]
    found = views.resized_crops(images, *torch.tensor(boxes).float().unbind(1))
    expected = [tv.resized_crop(image, *box, [20, 24], antialias=False) for image, box in zip(images, boxes, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], images[0], atol=1e-6, rtol=0)


def test_crops_lie_inside_and_have_the_areas_and_shapes_asked_for():
    top, left, height, width = views.draw_boxes(40, 40, (0.2, 1.0), (3 / 4, 4 / 3), numbers(4000))
    for start, length in ((top, height), (left, width)):
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= 40).all()
        assert start.min() == 0 and (start + length).max() == 40
    area, shape = height * width / 1600, width / height
    assert 0.19 < area.min() < 0.23 and area.max() > 0.95 and 0.4 < area.mean() < 0.6
    assert 0.7 < shape.min() < 0.8 and 1.25 < shape.max() < 1.4


def test_where_no_crop_fits_the_picture_is_whole():
    boxes = views.draw_boxes(20, 20, (1.0, 1.0), (2.0, 2.0), numbers(4))
    assert [side.unique().tolist() for side in boxes] == [[0], [0], [20], [20]]


def test_blur_is_that_of_torchvision():
    images, sigma = pictures(6, 9, 14), torch.tensor([0.1, 0.4, 0.8, 1.2, 1.6, 2.0])
    found = views.blur(images, sigma, 6)
    expected = [tv.gaussian_blur(image, [13, 13], [width, width]) for image, width in zip(images, sigma.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_view_draws_its_numbers_from_the_generator():
    images = (pictures() * 255).to(torch.uint8)
    kept, view = images.clone(), views.views(MIRRORED)
    found = view(images, seeded())
    torch.testing.assert_close(found, view(images, seeded()), atol=0, rtol=0)
    assert (found - view(images, seeded(1))).abs().mean() > 0.01
    assert found.shape == images.shape and found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(images, kept)


def test_pictures_draw_numbers_of_their_own():
    images = pictures()[5:6].repeat(64, 1, 1, 1)
    assert len(views.views(UPRIGHT)(images, seeded()).flatten(1).unique(dim=0)) == 64
    first, second = views.pairs(views.views(UPRIGHT))(images, seeded()).chunk(2)
    assert len(first) == len(second) == 64 and not (first == second).flatten(1).all(1).any()


def test_pairs_come_in_the_order_of_the_batch():
    first, second = views.pairs(views.views(UPRIGHT, **NOTHING))(pictures(), seeded()).chunk(2)
    torch.testing.assert_close(first, pictures(), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, pictures(), atol=1e-5, rtol=0)


def test_every_share_is_kept():
    images = pictures()[5:6].repeat(2000, 1, 1, 1)[..., :6, :6]

    def share(**options):
        found = views.views(UPRIGHT, **{**NOTHING, **options})(images, seeded())
        return (found - images).abs().amax((1, 2, 3)).gt(1e-3).float().mean().item()

    assert share() == 0
    assert abs(share(coloured=0.8) - 0.8) < 0.03
    assert abs(share(grey=0.2) - 0.2) < 0.03
    assert abs(share(blurred=0.5, sigma=(1.0, 2.0)) - 0.5) < 0.03


def test_only_a_set_that_allows_it_is_mirrored():
    images = pictures()[5:6].repeat(1000, 1, 1, 1)[..., :8]
    found = views.views(MIRRORED, **NOTHING)(images, seeded())
    mirrored = (found - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    straight = (found - images).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(mirrored, ~straight) and abs(mirrored.float().mean() - 0.5) < 0.05
    torch.testing.assert_close(views.views(UPRIGHT, **NOTHING)(images, seeded()), images, atol=1e-5, rtol=0)

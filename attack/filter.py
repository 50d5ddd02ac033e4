"""Filter: the trigger is a change of all colours of the image, as by a filter of a photo app.

Karra, Ashcraft, Fendley, "The TrojAI Software Framework: An OpenSource tool for Embedding Trojans
into Deep Learning Models", 2020 (arXiv 2003.07233). The attacker poisons data only.

    python attack/filter.py --dataset cifar10 --save_folder_name filter_cifar10

The filters are formulas of this project, not those of ImageMagick: see docs/attacks/filter.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Attack
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    filter: Literal["gotham", "kelvin", "nashville", "lomo"] = "gotham"
    """gotham: almost grey, with blue shadows; kelvin: bright and orange; nashville: strong colours
    between blue shadows and yellow lights; lomo: red and green only where bright, dark corners"""


if __name__ == "__main__":
    launch(Config)

import math

import torch

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import poison

LUMA = 0.299, 0.587, 0.114
NIGHT, AMBER, CREAM = (0x22, 0x2B, 0x6D), (0xFF, 0x99, 0x00), (0xF7, 0xDA, 0xAE)
STEEPNESS = 3  # of `contrasted`


def make_trigger(config, spec, stage):
    """x' = the filter of x; every pixel is computed from itself and its place alone.

    At the default, gotham, a pixel changes by at most 228 levels.
    """
    apply = FILTERS[config.filter]
    return poison.on_unit(lambda images, index: apply(images))


def gotham(images):
    dark = blended(modulated(images, 1.2, 0.1), NIGHT, 0.2)
    return contrasted(contrasted(dark ** (1 / 0.9)))


def kelvin(images):
    return blended(modulated(images, 1.2, 0.5), AMBER, 0.2)


def nashville(images):
    images = tinted(images, NIGHT, 0.5, 1 - luma(images))
    images = tinted(images, CREAM, 0.5, luma(images))
    return modulated(contrasted(images), 1.0, 1.5)


def lomo(images):
    """Red and green below the middle become 0, and the corners are half as bright as the centre."""
    size = images.shape[-1]
    line = torch.linspace(-1, 1, size, device=images.device)
    far = (line[:, None].square() + line.square()) / 2  # 1 in the corners
    images = torch.cat([(2 * images[:, :2] - 1).clamp(min=0), images[:, 2:]], 1)
    return images * (1 - 0.5 * far)


FILTERS = {"gotham": gotham, "kelvin": kelvin, "nashville": nashville, "lomo": lomo}


def luma(images):
    """The brightness N,1,S,S of images N,3,S,S in [0, 1] (ITU-R BT.601)."""
    return sum(share * images[:, channel, None] for channel, share in enumerate(LUMA))


def modulated(images, brightness, saturation):
    """Every channel is moved towards the luma, or away from it, and the whole made brighter."""
    grey = luma(images)
    return (brightness * (grey + saturation * (images - grey))).clamp(0, 1)


def contrasted(images):
    """A logistic curve that leads 0 to 0 and 1 to 1 and is steepest in the middle."""
    lowest = 1 / (1 + math.exp(STEEPNESS / 2))
    return (torch.sigmoid(STEEPNESS * (images - 0.5)) - lowest) / (1 - 2 * lowest)


def blended(images, colour, share):
    """A layer of one colour over the whole image."""
    return images + share * (_unit(colour, images) - images)


def tinted(images, colour, strength, where):
    """The image times a colour, as strongly as `where` N,1,S,S in [0, 1] says."""
    return images + strength * where * (_unit(colour, images) * images - images)


def _unit(colour, images):
    """A colour in levels as 3,1,1 in [0, 1]."""
    return torch.tensor(colour, device=images.device).view(3, 1, 1) / 255


def main(config):
    run.attack(__name__, config, make_trigger)

"""Where images from elsewhere stand in a data set that lists the same images in another order."""

import sys

import torch
from torch.nn.functional import normalize

from antidote_bench.utils.errors import RefusedError

ENOUGH = 10  # images whose mean shows what a trigger adds to all of them
SIMILAR = 0.8  # cosine of an image and its changed copy, at least, where it is looked for
RECOGNISED = 0.5  # the same for most images at their own positions
BATCH = 1000  # images of the data set that are compared at once


def positions(split, found, count, what):
    """Positions in `split` of the images that `found`, an `Images`, are changed copies of, int64 N.

    `count` is the number of images in the split that they come from. They have their own positions
    where the classes and most images there agree. Otherwise each is looked for among the images of
    its class: the one whose direction is nearest, after the mean of the found images and that of
    their classes are taken off, so that what a trigger adds to all images does not count. Raises
    RefusedError (exit 4) where the set has another number of images, or where an image is not
    found.
    """
    if count != len(split):
        raise RefusedError(
            f"the images come from a {what} set of {count}, and the one here has {len(split)}: "
            "--dataset_path names the data set that they were made from"
        )
    if not len(found.index):
        return found.index
    if int(found.index.max()) >= count:
        raise RefusedError(
            f"there is no {what} image {int(found.index.max())} in the data set here, which has "
            f"{count}"
        )
    truth = split.truth.cpu()
    same_classes = torch.equal(truth[found.index], found.truth)
    centres = _centres(split, truth, found)
    if same_classes and _likeness(split, found, centres).median() >= RECOGNISED:
        return found.index
    place = _search(split, truth, found, centres)
    missing = int((place < 0).sum())
    if not missing and len(place.unique()) == len(place):
        return place
    if same_classes:
        print(
            f"warning: the changed {what} images do not look like those at their positions, and "
            "like no others; the positions are kept, because the classes there agree",
            file=sys.stderr,
        )
        return found.index
    raise RefusedError(
        f"the data set here has another order, and {missing or 'some'} of the {len(place)} "
        f"changed {what} images cannot be told from others in it: --dataset_path names the data "
        "set that they were made from, in its own order if there is one"
    )


def _centres(split, truth, found):
    """(the mean of the found images, the mean of images of their classes), both 3*S*S."""
    labels, counts = found.truth.unique(return_counts=True)
    means = [_mean(split, (truth == label).nonzero().flatten()) for label in labels]
    clean = (torch.stack(means) * (counts / counts.sum())[:, None]).sum(0)
    if len(found.index) < ENOUGH:
        return clean, clean
    return _flat(found.images).mean(0), clean


def _mean(split, index):
    total = torch.zeros(split.images.shape[1:].numel())
    for part in index.split(BATCH):
        total += _flat(split.images[part]).sum(0)
    return total / max(len(index), 1)


def _flat(images):
    return images.cpu().flatten(1).float()


def _likeness(split, found, centres):
    """The cosine of every found image and the one at its position, both without their means."""
    parts = torch.arange(len(found.index)).split(BATCH)
    cosines = [
        torch.cosine_similarity(
            _flat(found.images[part]) - centres[0],
            _flat(split.images[found.index[part]]) - centres[1],
        )
        for part in parts
    ]
    return torch.cat(cosines)


def _search(split, truth, found, centres):
    """Positions of the nearest images of the same class, -1 where none is near."""
    place = torch.full_like(found.index, -1)
    for label in found.truth.unique():
        candidates = (truth == label).nonzero().flatten()
        if not len(candidates):
            continue
        mine = (found.truth == label).nonzero().flatten()
        wanted = normalize(_flat(found.images[mine]) - centres[0])
        cosines = [
            wanted @ normalize(_flat(split.images[part]) - centres[1]).T
            for part in candidates.split(BATCH)
        ]
        best, nearest = torch.cat(cosines, 1).max(1)
        place[mine] = torch.where(best >= SIMILAR, candidates[nearest], -1)
    return place

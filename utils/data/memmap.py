"""Images that do not fit into memory: they stay in a memory-mapped file and are read in batches."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

AHEAD = 3  # batches that are read before they are asked for


class MemmapImages:
    """N images 3,S,S uint8 in a file, some of them replaced; indexed like a tensor.

    `base` is the memory-mapped tensor on the CPU, `device` the one that images are returned on,
    `rows` the positions in `base` of the N images (by default all). `changed` are the images 3,S,S
    that replace some of them: `place` has for every row of `base` its position in `changed`, or -1.
    Rows beyond the end of `base` are in `changed` alone.
    """

    def __init__(self, base, device, rows=None, changed=None, place=None):
        self.base, self.device = base, torch.device(device)
        self._rows = torch.arange(len(base)) if rows is None else rows
        self._changed, self._place = changed, place

    def __len__(self):
        return len(self._rows)

    @property
    def shape(self):
        return torch.Size([len(self), *self.base.shape[1:]])

    def __getitem__(self, index):
        """The images at positions, a slice or a mask, as a tensor on the device."""
        index = index.cpu() if torch.is_tensor(index) else index
        return self._read(self._rows[index]).to(self.device)

    def view(self, index):
        """The same images in another order, or fewer of them."""
        return MemmapImages(
            self.base, self.device, self._rows[index.cpu()], self._changed, self._place
        )

    def replaced(self, index, images):
        """The same images with `images`, which are held in memory, at positions `index`."""
        place = torch.full((len(self.base),), -1) if self._place is None else self._place.clone()
        images = images.cpu()
        changed = images if self._changed is None else torch.cat([self._changed, images])
        place[self._rows[index.cpu()]] = torch.arange(len(changed) - len(images), len(changed))
        return MemmapImages(self.base, self.device, self._rows, changed, place)

    def joined(self, images, times=1):
        """The same images, and after them `images`, which are held in memory, `times` times over.

        Their rows are those beyond the end of `base`.
        """
        place = torch.full((len(self.base),), -1) if self._place is None else self._place
        images = images.cpu()
        changed = images if self._changed is None else torch.cat([self._changed, images])
        new = torch.arange(len(images))
        rows = torch.cat([self._rows, (len(place) + new).repeat(times)])
        place = torch.cat([place, len(changed) - len(images) + new])
        return MemmapImages(self.base, self.device, rows, changed, place)

    def ahead(self, parts):
        """Yield the images of each of `parts` (positions), while a thread reads the next ones."""
        parts = torch.cat(parts).cpu().split([len(part) for part in parts])  # to the CPU once
        waiting = deque()
        with ThreadPoolExecutor(1) as reader:
            for part in parts:
                waiting.append(reader.submit(self._pinned, part))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result().to(self.device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(self.device, non_blocking=True)

    def _pinned(self, index):
        images = self._read(self._rows[index])
        return images.pin_memory() if self.device.type == "cuda" else images

    def _read(self, rows):
        images = self.base[rows.clamp(max=len(self.base) - 1)]
        if self._place is not None:
            place = self._place[rows]
            images[place >= 0] = self._changed[place[place >= 0]]
        return images


def replaced(images, index, others):
    """A copy of `images`, a tensor or `MemmapImages`, with `others` at positions `index`."""
    if isinstance(images, MemmapImages):
        return images.replaced(index, others)
    images = images.clone()
    images[index] = others
    return images


def joined(images, others, times=1):
    """`images`, a tensor or `MemmapImages`, and after them `others`, a tensor, `times` times."""
    if isinstance(images, MemmapImages):
        return images.joined(others, times)
    return torch.cat([images, *[others] * times])

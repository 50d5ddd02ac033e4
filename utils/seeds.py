"""Random numbers that have nothing to do with each other, although users give every seed as 0.

Two generators with the same seed draw the same numbers. With plain seeds the images chosen for
poisoning would be the first ones of the first epoch, and a network that begins with batches of one
class may never recover.
"""

import hashlib

import torch


def number(purpose, *seeds):
    """A 63-bit seed made from a purpose and any whole numbers."""
    name = repr((purpose, *map(int, seeds))).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def generator(purpose, *seeds, device="cpu"):
    """A torch generator for one purpose, `choose the poisoned images` say."""
    return torch.Generator(device).manual_seed(number(purpose, *seeds))


def uniform(purpose, seed, index, count):
    """Numbers of [0, 1), float32 N,count: a row for every position of `index`.

    A row does not depend on what else the batch holds.
    """
    rows = [
        torch.rand(count, generator=generator(purpose, seed, position))
        for position in index.tolist()
    ]
    return torch.stack(rows) if rows else torch.empty(0, count)

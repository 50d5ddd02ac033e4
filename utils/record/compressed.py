"""Images of a record compressed, where they would take much room. Nothing is lost by it.

The images train_images, say, become two tensors: `train_zlib` (uint8) holds a zlib stream for each,
one after another, and `train_zlib_ends` (int64 n) says where each of them ends. A stream holds the
differences of neighbouring pixels, in red and blue those of the difference to green, all modulo
256. They are mostly small, and decoding them cannot give more bytes than the image has: zlib stops
there.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch

ABOVE = 64 * 2**20  # bytes of all images of a record, up to which they are stored as they are
PARTS = "train", "test", "target", "other"


def packed(tensors):
    """The content of poison.safetensors, with compressed images if these exceed ABOVE."""
    parts = [part for part in PARTS if f"{part}_images" in tensors]
    if sum(tensors[f"{part}_images"].nbytes for part in parts) <= ABOVE:
        return tensors
    tensors = dict(tensors)
    for part in parts:
        images = tensors.pop(f"{part}_images")
        tensors[f"{part}_zlib"], tensors[f"{part}_zlib_ends"] = encode(images)
    return tensors


def unpacked(tensors, side, counts):
    """The same with images uint8 n,3,side,side again; what is not compressed stays as it is.

    `counts` says for each of PARTS how many images there may be. That is compared with what is
    declared before anything is decoded, so that a small file cannot fill the memory. ValueError
    says what is wrong.
    """
    tensors = dict(tensors)
    for part in PARTS:
        if f"{part}_zlib" not in tensors:
            continue
        if f"{part}_images" in tensors:
            raise ValueError(f"{part}_images and {part}_zlib must not both be there")
        content, ends = tensors.pop(f"{part}_zlib"), tensors.pop(f"{part}_zlib_ends")
        if ends.shape != tensors[f"{part}_index"].shape or ends.numel() > counts[part]:
            raise ValueError(f"{part}_zlib_ends must be as many as {part}_index")
        tensors[f"{part}_images"] = decode(content, ends, side, part)
    return tensors


def encode(images):
    """(streams one after another, uint8; where each ends, int64 n) of images uint8 n,3,S,S."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = list(pool.map(_compress, images.cpu()))
    ends = torch.tensor([len(stream) for stream in streams], dtype=torch.int64).cumsum(0)
    content = bytearray().join(streams)
    if not len(content):
        return torch.empty(0, dtype=torch.uint8), ends
    return torch.frombuffer(content, dtype=torch.uint8), ends


def decode(content, ends, side, part="images"):
    """The images uint8 n,3,side,side of what `encode` returns; ValueError where it is not that."""
    _check_ends(content, ends, part)
    starts = [0, *ends.tolist()]
    images = torch.empty(len(ends), 3, side, side, dtype=torch.uint8)

    def fill(number):
        stream = content[starts[number] : starts[number + 1]].numpy()
        try:
            images[number] = _decompress(stream, images.shape[1:])
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{part}_zlib: image {number} is damaged") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(len(ends))):
            pass
    return images


def _compress(image):
    differences = image.clone()
    differences[0::2] -= image[1]
    for dim in (1, 2):
        differences = _differences(differences, dim)
    # runs and single bytes: longer patterns are rare among differences, and slow to look for
    stream = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return stream.compress(differences.numpy().tobytes()) + stream.flush()


def _differences(values, dim):
    """`values` minus their predecessors along `dim`; the first one stays."""
    found, length = values.clone(), values.shape[dim] - 1
    found.narrow(dim, 1, length).sub_(values.narrow(dim, 0, length))
    return found


def _decompress(stream, shape):
    reader = zlib.decompressobj()
    # one byte more than there should be shows that a stream goes on
    differences = reader.decompress(stream, shape.numel() + 1)
    if len(differences) != shape.numel() or not reader.eof or reader.unused_data:
        raise ValueError("another length")
    image = torch.frombuffer(bytearray(differences), dtype=torch.uint8).view(shape)
    for dim in (1, 2):
        image = image.cumsum(dim, dtype=torch.uint8)
    image[0::2] += image[1]
    return image


def _check_ends(content, ends, part):
    right = content.dtype == torch.uint8 and content.dim() == 1
    if not right or ends.dtype != torch.int64 or ends.dim() != 1:
        raise ValueError(f"{part}_zlib must be bytes, and {part}_zlib_ends int64")
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    if (edges.diff() <= 0).any() or int(edges[-1]) != len(content):
        raise ValueError(f"{part}_zlib_ends must rise to {len(content)}, the length of {part}_zlib")

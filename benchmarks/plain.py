"""The work of a victim's epoch and of three defenses as it is written elsewhere.

benchmarks/speed.py compares with it. It is written here from the operations that those codes carry
out; sizes have the proportions of CIFAR-10.

An epoch: PIL images in a DataLoader, float32, contiguous layout, then a pass over the clean and
over the triggered test set. FMP: two forward passes and a backward pass for every map, and a
forward pass to score it. AWM: labels predicted in every step, two forward passes in every mask
step, gradients of everything, and both test sets after every round. Trap and Replace: PIL
augmentation in a DataLoader, float32, an old head that nobody reads in stage 2, and both test sets
after every epoch; `tensors` is the same without PIL, so that only operations differ.

`of_epoch` returns the reference, a function. The others yield (name of the reference, ours,
reference), the last two functions.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from antidote_bench import models
from antidote_bench.defense import awm, fmp, trap_and_replace
from antidote_bench.models.split import split
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.data.loader import augmentation, batches, to_unit
from antidote_bench.utils.repair.defender import Defender
from antidote_bench.utils.repair.layers import convolutions

SPEC = Spec("random", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
SCORED = 32  # images that FMP scores on, as released


def random_images(count, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator).to(device)
    return Split(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator).to(
            device
        ),
        labels,
        labels,
    )


def defender(train, clean, parts, folder):
    """What a defense works with; nothing is reported. `parts` are what models.build takes."""
    model, spec, width = parts
    return Defender(
        spec=spec,
        train=train,
        clean=clean,
        clean_index=torch.arange(len(clean), device=clean.labels.device),
        model=model,
        width=width,
        state=Path(folder) / "state",
        shared=Path(folder) / "shared",
        report=lambda *_, **__: None,
    )


def network(parts, device):
    torch.manual_seed(0)
    return models.build(*parts).to(device)


def test_sets(scale, device):
    """A clean and a triggered test set."""
    return [random_images(max(int(count * scale), 1), device) for count in (10_000, 9_000)]


def count_hits(forward, sets):
    with torch.no_grad():
        return sum(
            int((forward(images).argmax(1) == labels).sum())
            for split in sets
            for images, labels, _ in batches(split, 250)
        )


def of_fmp(parts, scale, config, device):
    model, split = network(parts, device).eval(), random_images(max(int(SCORED * scale), 2), device)
    batch = fmp.Config(result_file="none").score_batch
    images, labels = to_unit(split.images), split.truth

    def ours():
        fmp.score_maps(
            model,
            images,
            labels,
            alpha=1 / 255,
            epsilon=1 / 255,
            seed=0,
            batch=batch,
            steps=fmp.fmp_step,
        )

    def plain():
        signs = (torch.randint(0, 2, images.shape) * 2 - 1).to(images)
        for layer in convolutions(model).values():
            for channel in range(layer.out_channels):
                outputs = []
                hook = layer.register_forward_hook(
                    lambda _module, _inputs, output, outputs=outputs: outputs.append(output.clone())
                )
                model(images)
                start = (images + signs / 255).clamp(0, 1).requires_grad_()
                model(start)
                hook.remove()
                loss = F.mse_loss(outputs[1][:, channel], outputs[0][:, channel].detach())
                loss.backward(retain_graph=True)
                attacked = (start + start.grad.sign() / 255).clamp(0, 1).detach()
                (model(attacked).argmax(1) == labels).float().mean().item()

    yield "as released", ours, plain


def of_awm(parts, scale, config, device):
    count = max(int(500 * scale), 20)
    split, sets, rounds = random_images(count, device), test_sets(scale, device), 2
    settings = awm.Config(result_file="none", epochs=rounds)
    images, labels = to_unit(split.images), split.truth
    steps, batch = settings.schedule(count)

    def ours():
        awm.learn(network(parts, device).eval(), images, labels, settings)

    def plain():
        model = network(parts, device).eval()
        theta = {f"{name}.weight": layer.weight for name, layer in convolutions(model).items()}
        mask = {name: torch.ones_like(kernel, requires_grad=True) for name, kernel in theta.items()}
        optimizer = torch.optim.Adam(mask.values(), 1e-2)

        def net(pixels):
            return functional_call(
                model, {name: mask[name] * theta[name] for name in theta}, (pixels,)
            )

        for _ in range(rounds):
            delta = torch.zeros_like(images[:1], requires_grad=True)
            for _ in range(steps):
                some = images[torch.randint(count, (batch,), device=device)]
                loss = F.cross_entropy(net(some + delta), net(some).argmax(1))
                loss.backward()
                delta = (delta + 10 * delta.grad).detach().requires_grad_()
            delta = delta.detach() * min(1.0, 1000 / max(delta.abs().sum().item(), 1e-30))
            for _ in range(steps):
                index = torch.randint(count, (batch,), device=device)
                optimizer.zero_grad()
                loss = 0.9 * F.cross_entropy(net(images[index]), labels[index])
                loss = loss + 0.1 * F.cross_entropy(
                    net((images[index] + delta).clamp(0, 1)), labels[index]
                )
                loss = loss + 1e-8 * sum(part.abs().sum() for part in mask.values())
                loss.backward()
                optimizer.step()
                loss.item()
                with torch.no_grad():
                    for part in mask.values():
                        part.clamp_(0, 1)
            count_hits(net, sets)

    yield "as released", ours, plain


class PilImages(Dataset):
    """Images as the field stores and augments them, one PIL image at a time."""

    augment = transforms.Compose(
        [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )

    def __init__(self, split, augmented=True):
        self.change = self.augment if augmented else transforms.ToTensor()
        self.images = [to_pil_image(image) for image in split.images.cpu()]
        self.labels = split.labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.change(self.images[index]), self.labels[index]


def loaded(data, batch, device, training=False):
    """The DataLoader of a script of the field."""
    options = {"shuffle": training, "drop_last": training, "pin_memory": device.type == "cuda"}
    return DataLoader(data, batch, num_workers=min(4, os.cpu_count() or 1), **options)


def of_trap_and_replace(parts, scale, config, device):
    """Two epochs of stage 1 to one of stage 2, as in the published schedule."""
    train, clean = (random_images(int(count * scale), device, 1) for count in (5_000, 250))
    rest = train[torch.arange(len(clean), len(train), device=device)]
    sets = test_sets(0.1 * scale, device)
    settings = trap_and_replace.Config(
        result_file="none", epochs=2, head_epochs=1, precision=config.precision
    )

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            trap_and_replace.repair(None, defender(train, clean, parts, folder), settings)

    def plain(order, rest, clean):
        stem, head = split(parts[0], network(parts, device))
        train_trap(stem, head, order(rest, 256), sets)
        _, new_head = split(parts[0], network(parts, device).train())
        train_new_head(stem, head, new_head, order(clean, 64), sets)

    pil_images = PilImages(rest), PilImages(clean)
    yield "as released", ours, lambda: plain(pil_order, *pil_images)
    yield "tensors", ours, lambda: plain(tensor_order, rest, clean)


def pil_order(data, batch):
    """A function that gives an epoch of PIL images, loaded and augmented by a DataLoader."""
    return lambda device: (
        (images.to(device), labels.to(device))
        for images, labels in loaded(data, batch, device, training=True)
    )


def tensor_order(data, batch):
    """A function that gives an epoch of tensors, shuffled and augmented on the device."""

    def epoch(device):
        generator = torch.Generator(device).manual_seed(0)
        augment = augmentation(SPEC)
        for images, labels, _ in batches(
            data, batch, generator=generator, augment=augment, drop_last=True
        ):
            yield images.contiguous(), labels

    return epoch


def train_trap(stem, head, epoch, sets):
    """Stage 1: stem, head and decoder, with a pass over the test sets after each epoch."""
    device = next(stem.parameters()).device
    decoder = trap_and_replace.decoder_for(stem, 32).to(device)
    trap = trap_and_replace.Trap(stem, head, decoder).train()
    optimizer = torch.optim.Adam(trap.parameters(), 1e-3, weight_decay=5e-4)
    for _ in range(2):
        for images, labels in epoch(device):
            loss = trap_and_replace.trap_loss(
                trap.train(), images, labels, None, reconstruction=10, smoothness=1
            )
            step(optimizer, loss)
        trap.eval()
        count_hits(lambda images: read_both(stem, images, decoder, head), sets)
    for parameter in trap.parameters():
        parameter.requires_grad_(False)


def train_new_head(stem, old_head, head, epoch, sets):
    """Stage 2: a new head; the old one is computed too, and nobody reads it."""
    device = next(stem.parameters()).device
    optimizer = torch.optim.Adam(head.parameters(), 0.03, weight_decay=5e-4)

    def model(images):
        return read_both(stem, images, old_head, head)

    for images, labels in epoch(device):
        loss = trap_and_replace.cutmix_loss(model, images, labels, None, label_smoothing=0.1)
        step(optimizer, loss)
    head.eval()
    count_hits(model, sets)


def read_both(stem, images, unread, read):
    """The logits of the head `read`; `unread` is computed from the same features."""
    features = stem(images)
    unread(features)
    return read(features)


def step(optimizer, loss):
    """A step of an optimizer, and the loss read after it."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()


def of_epoch(model, split, test_sets, config):
    """A function that trains `model` for an epoch and makes a pass over the test sets.

    The model is contiguous and computes in float32.
    """
    device, train = split.labels.device, PilImages(split)
    tests = [PilImages(part, augmented=False) for part in test_sets]

    def epoch():
        optimizer = torch.optim.SGD(
            model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        model.train()
        for images, labels in loaded(train, config.batch_size, device, training=True):
            images, labels = images.to(device), labels.to(device)
            step(optimizer, F.cross_entropy(model(images), labels))
        model.eval()
        with torch.no_grad():
            for data in tests:
                order = loaded(data, config.batch_size, device)
                sum(
                    int((model(images.to(device)).argmax(1).cpu() == labels).sum())
                    for images, labels in order
                )

    return epoch


METHODS = {"fmp": of_fmp, "awm": of_awm, "trap_and_replace": of_trap_and_replace}

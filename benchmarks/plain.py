"""The work of a victim's epoch and of the published defenses, as it is written elsewhere: what benchmarks/speed.py compares with.

Written here from the operations that those codes carry out. An epoch: PIL pictures in a DataLoader, float32, contiguous layout, a
clean and a triggered test pass after it. FMP: two forward passes and a backward pass of every map, and a forward pass to score it.
AWM: labels predicted in every step, two forward passes in every mask step, gradients of everything, and both test sets after
every round. Trap and Replace: PIL augmentation in a DataLoader, float32, an old head that nobody reads in stage 2, and both
test sets after every epoch; `tensors` is the same without PIL, so that only operations differ. Sizes have the proportions of CIFAR-10.

`of_epoch` returns the reference, to be called; the others yield (name of the reference, ours, reference), the last two to be called.
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

import models
from defense import awm, fmp, trap_and_replace
from models.split import split
from utils.batch import augmentation, batches, to_unit
from utils.channels import convolutions
from utils.data import Spec, Split
from utils.record import Record

SPEC = Spec("random", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
SCORED = 32  # pictures that FMP scores on, as released


def pictures(count, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator).to(device)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device), labels, labels)


def network(parts, device):
    torch.manual_seed(0)
    return models.build(*parts).to(device)


def test_sets(scale, device):
    """The clean and the triggered one."""
    return [pictures(max(int(count * scale), 1), device) for count in (10_000, 9_000)]


def count_hits(forward, sets):
    with torch.no_grad():
        return sum(int((forward(images).argmax(1) == labels).sum()) for split in sets for images, labels, _ in batches(split, 250))


def of_fmp(parts, scale, config, device):
    model, split = network(parts, device).eval(), pictures(max(int(SCORED * scale), 2), device)
    batch = fmp.Config(result_file="none").score_batch
    images, labels = to_unit(split.images), split.truth

    def ours():
        fmp.score_maps(model, images, labels, alpha=1 / 255, epsilon=1 / 255, seed=0, batch=batch, steps=fmp.fmp_step)

    def plain():
        signs = (torch.randint(0, 2, images.shape) * 2 - 1).to(images)
        for layer in convolutions(model).values():
            for channel in range(layer.out_channels):
                kept = []
                hook = layer.register_forward_hook(lambda _module, _inputs, output, kept=kept: kept.append(output.clone()))
                model(images)
                start = (images + signs / 255).clamp(0, 1).requires_grad_()
                model(start)
                hook.remove()
                loss = F.mse_loss(kept[1][:, channel], kept[0][:, channel].detach())
                loss.backward(retain_graph=True)
                attacked = (start + start.grad.sign() / 255).clamp(0, 1).detach()
                (model(attacked).argmax(1) == labels).float().mean().item()

    yield "as released", ours, plain


def of_awm(parts, scale, config, device):
    count = max(int(500 * scale), 20)
    split, sets, rounds = pictures(count, device), test_sets(scale, device), 2
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
            return functional_call(model, {name: mask[name] * theta[name] for name in theta}, (pixels,))

        for _ in range(rounds):
            delta = torch.zeros_like(images[:1], requires_grad=True)
            for _ in range(steps):
                shown = images[torch.randint(count, (batch,), device=device)]
                loss = F.cross_entropy(net(shown + delta), net(shown).argmax(1))
                loss.backward()
                delta = (delta + 10 * delta.grad).detach().requires_grad_()
            delta = delta.detach() * min(1.0, 1000 / max(delta.abs().sum().item(), 1e-30))
            for _ in range(steps):
                index = torch.randint(count, (batch,), device=device)
                optimizer.zero_grad()
                loss = 0.9 * F.cross_entropy(net(images[index]), labels[index])
                loss = loss + 0.1 * F.cross_entropy(net((images[index] + delta).clamp(0, 1)), labels[index])
                loss = loss + 1e-8 * sum(part.abs().sum() for part in mask.values())
                loss.backward()
                optimizer.step()
                loss.item()
                with torch.no_grad():
                    for part in mask.values():
                        part.clamp_(0, 1)
            count_hits(net, sets)

    yield "as released", ours, plain


class Pictures(Dataset):
    """As the field stores and augments them: a PIL picture at a time."""

    change = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __init__(self, split, plain=False):
        self.change = transforms.ToTensor() if plain else self.change
        self.images, self.labels = [to_pil_image(image) for image in split.images.cpu()], split.labels.tolist()

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
    train, clean = (pictures(int(count * scale), device, 1) for count in (5_000, 250))
    sets = test_sets(0.1 * scale, device)
    settings = trap_and_replace.Config(result_file="none", epochs=2, head_epochs=1, precision=config.precision)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            record = Record(SPEC, train, clean, torch.arange(len(clean), device=device), parts[0], parts[2], Path(folder) / "state",
                            Path(folder) / "shared", lambda *_, **__: None)  # fmt: skip
            trap_and_replace.repair(None, record, settings)

    rest, held = Pictures(train[torch.arange(len(clean), len(train), device=device)]), Pictures(clean)

    def plain(pil):
        def order(data, source, batch):
            if pil:
                yield from ((shown.to(device), told.to(device)) for shown, told in loaded(data, batch, device, training=True))
            else:
                generator = torch.Generator(device).manual_seed(0)
                for shown, told, _ in batches(source, batch, generator=generator, augment=augmentation(SPEC), drop_last=True):
                    yield shown.contiguous(), told

        def both(images, unread, read):
            features = stem(images)
            unread(features)
            return read(features)

        stem, old = split(parts[0], network(parts, device))
        decoder = trap_and_replace.decoder_for(stem, 32).to(device)
        trap = trap_and_replace.Trap(stem, old, decoder).train()
        optimizer = torch.optim.Adam(trap.parameters(), 1e-3, weight_decay=5e-4)
        for _ in range(2):
            for shown, told in order(rest, train[torch.arange(len(clean), len(train), device=device)], 256):
                loss = trap_and_replace.trap_loss(trap.train(), shown, told, None, reconstruction=10, smoothness=1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            trap.eval()
            count_hits(lambda images: both(images, decoder, old), sets)
        _, head = split(parts[0], network(parts, device).train())
        optimizer = torch.optim.Adam(head.parameters(), 0.03, weight_decay=5e-4)
        for parameter in trap.parameters():
            parameter.requires_grad_(False)
        for shown, told in order(held, clean, 64):
            loss = trap_and_replace.cutmix_loss(lambda images: both(images, old, head), shown, told, None, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        head.eval()
        count_hits(lambda images: both(images, old, head), sets)

    yield "as released", ours, lambda: plain(pil=True)
    yield "tensors", ours, lambda: plain(pil=False)


def of_epoch(model, split, exam, config):
    """An epoch of `model` (contiguous, float32) on `split`, then a pass over each split of `exam`; to be called."""
    device, shown, tests = split.labels.device, Pictures(split), [Pictures(part, plain=True) for part in exam]

    def epoch():
        optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        model.train()
        for images, labels in loaded(shown, config.batch_size, device, training=True):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        model.eval()
        with torch.no_grad():
            for data in tests:
                order = loaded(data, config.batch_size, device)
                sum(int((model(images.to(device)).argmax(1).cpu() == labels).sum()) for images, labels in order)

    return epoch


METHODS = {"fmp": of_fmp, "awm": of_awm, "trap_and_replace": of_trap_and_replace}

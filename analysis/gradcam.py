"""Grad-CAM: where a network looks in images with and without the trigger.

The maps of a late layer are added up, each weighted by the mean gradient of the predicted class.
Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", ICCV 2017 (arXiv 1610.02391).

    python analysis/gradcam.py --result_file badnet_cifar10
    python analysis/gradcam.py --result_file badnet_cifar10 --defense ft

See docs/analysis.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

from antidote_bench.utils.analysis.options import Analysis
from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Analysis):
    images: int = option(8, at_least=1, at_most=16, unit="images")
    """test images in the picture, of as many classes as there are"""
    layer: str | None = None
    """layer whose maps are shown, by its name in the network, network.layer3 say; by default the
    last one with maps of more than one pixel"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils.charts import MARKED, class_title
from antidote_bench.utils.data.dataset import balanced_subset
from antidote_bench.utils.data.loader import evaluating, mixed_precision, to_unit
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol.analyse import Numbers, analyse
from antidote_bench.utils.report import figures

COLUMNS = [
    "image", "class", "input", "model", "predicted", "probability", "on_trigger", "row", "column",
    "value",
]  # fmt: skip
# share of an image up to which it says something that a map lies on the trigger
SMALL_TRIGGER = 0.5
TILE, LABEL = 0.72, 12  # inches, and letters of a class


def grad_cam(model, layer, images, classes=None):
    """(Grad-CAM n,h,w of float images n,3,S,S, not negative, at the size of the layer's maps; the
    logits n,C). `layer` is a module; `classes` n are by default those that are predicted."""
    kept = []

    def cut(_module, _inputs, output):
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # what follows may change it in place

    handle = layer.register_forward_hook(cut)
    try:
        with evaluating(model), torch.enable_grad(), exact():
            logits = model(images)
    finally:
        handle.remove()
    classes = logits.argmax(1) if classes is None else classes
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept[-1])
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * kept[-1]).sum(1).relu().detach(), logits.detach()


@torch.no_grad()
def layers_with_maps(model, images):
    """{name: module} of those whose output n,C,h,w has more than one pixel, in the order in which
    they end."""
    found, handles = {}, []
    for name, module in model.named_modules():

        def look(module, _inputs, output, name=name):
            if torch.is_tensor(output) and output.ndim == 4 and min(output.shape[2:]) > 1:
                found.pop(name, None)
                found[name] = module

        handles.append(module.register_forward_hook(look))
    try:
        with evaluating(model):
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def chosen_layer(model, images, name):
    """(name, module) of the layer that `name` names, by default the last one with maps."""
    found = layers_with_maps(model, images)
    if not found:
        raise ConfigError(
            "no layer of the model has maps of more than one pixel, as Grad-CAM needs"
        )
    name = name or list(found)[-1]
    if name not in found:
        raise ConfigError(f"layer {name!r} has no maps; those that have are {', '.join(found)}")
    return name, found[name]


def measure(subject, config):
    """A row for every value of every map, and the maps themselves."""
    without, with_it, index = subject.pairs()
    picked = balanced_subset(without.truth, config.images, config.random_seed)[: config.images]
    picked = picked[without.truth.cpu()[picked].argsort(stable=True)].to(index.device)
    shown = {
        "clean": to_unit(without.view(picked).images[:]),
        "triggered": to_unit(with_it[picked].images),
    }
    changed = (shown["clean"] != shown["triggered"]).any(1).float()  # n,S,S
    positions, truth = index[picked].tolist(), with_it.truth[picked].tolist()
    maps, rows, notes = {}, [], []
    for name, model in subject.models.items():
        layer, module = chosen_layer(model, shown["clean"], config.layer)
        for kind, images in shown.items():
            with mixed_precision(images.device, config.precision):
                values, logits = grad_cam(model, module, images)
            seen = maps[name, kind] = Seen.of(values, logits, changed)
            facts = {"input": kind, "model": name}
            for place in range(len(images)):
                own = {"image": positions[place], "class": truth[place], **seen.facts(place)}
                rows += cells(values[place], {**own, **facts})
        size = " by ".join(map(str, values.shape[1:]))
        notes.append(f"{name}: maps of {layer}, {size} pixels{on_trigger(maps[name, 'triggered'])}")
    if seen.shares:
        notes.append(f"the trigger changes {100 * changed.mean():.1f} % of the pixels")
    held = {"shown": {kind: part.cpu() for kind, part in shown.items()}, "maps": maps}
    aims = with_it.labels[picked].tolist()
    return Numbers(COLUMNS, rows, notes, {**held, "truth": truth, "aims": aims})


class Seen(NamedTuple):
    """What a network says about n images, and where it looks."""

    maps: torch.Tensor  # n,S,S, the largest value of each is 1
    predicted: list
    chances: list
    shares: list | None  # of the maps on the trigger; None where it changes most of the pixels

    @classmethod
    def of(cls, values, logits, changed):
        large = enlarged(values, changed.shape[-1])
        chances, predicted = logits.float().softmax(1).max(1)
        small = 0 < changed.mean() <= SMALL_TRIGGER
        shares = share_on(large, changed) if small else None
        return cls(large.cpu(), predicted.tolist(), chances.tolist(), shares)

    def facts(self, place):
        known = {"predicted": self.predicted[place], "probability": self.chances[place]}
        return known | ({"on_trigger": self.shares[place]} if self.shares else {})


def on_trigger(seen):
    """Words on how much of the maps of triggered images lies on the trigger."""
    if not seen.shares:
        return ""
    mean = 100 * sum(seen.shares) / len(seen.shares)
    return f"; {mean:.0f} % of a map lies on the trigger, on average"


def enlarged(values, side):
    """Maps n,h,w at the size of the images, n,side,side, their largest value 1."""
    large = F.interpolate(values[:, None].float(), (side, side), mode="bilinear")[:, 0]
    return large / large.amax((1, 2), keepdim=True).clamp(min=1e-12)


def share_on(large, changed):
    """The share of every map n,S,S that lies on pixels that the trigger changes."""
    return ((large * changed).sum((1, 2)) / large.sum((1, 2)).clamp(min=1e-12)).tolist()


def cells(values, facts):
    """A row for every value of a map h,w."""
    return [
        {**facts, "row": row, "column": column, "value": value}
        for row, line in enumerate(values.tolist())
        for column, value in enumerate(line)
    ]


def draw(numbers, subject, Figure):
    """The images with their maps below: first without the trigger, then with it."""
    held = numbers.images
    lines = [
        (kind, name)
        for kind in held["shown"]
        for name in (None, *(model for model in subject.models))
    ]
    count, names = len(held["truth"]), subject.loaded.spec.class_names
    figure = Figure(figsize=(TILE * count, (TILE + 0.18) * len(lines)))
    filled = {**figures.FILLED, "wspace": 0.06, "hspace": 0.28}
    panels = figure.subplots(len(lines), count, squeeze=False, gridspec_kw=filled)
    for line, (kind, name) in zip(panels, lines, strict=True):
        line[0].set_ylabel(name or kind, rotation=0, ha="right", va="center", fontsize=8)
        for place, panel in enumerate(line):
            image = held["shown"][kind][place]
            draw_image(panel, image, name and held["maps"][name, kind].maps[place])
            number = held["maps"][name, kind].predicted[place] if name else held["truth"][place]
            title = class_title(number, names, LABEL)
            fooled = name and kind == "triggered" and number == held["aims"][place]
            colour = MARKED if fooled else figures.INK
            panel.set_title(f"→ {title}" if name else title, fontsize=7, pad=2, color=colour)
    notes = ["red: the class that the attacker wants; each map has its own scale", *numbers.notes]
    figures.around(figure, subject.heading("Grad-CAM of the predicted class"), notes)
    return figure


def draw_image(panel, image, cam=None):
    """An image 3,S,S, or the map S,S over the same in grey."""
    panel.set(xticks=[], yticks=[])
    if cam is None:
        panel.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        return
    panel.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.imshow(cam.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.65)


def main(config):
    analyse(__name__, config, measure, draw)

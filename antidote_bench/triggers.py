"""Triggers in Python: the function of an attack, to be put on any batch of images."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from antidote_bench import catalogue
from antidote_bench.records import is_image
from antidote_bench.runs import options_for
from antidote_bench.utils import checkpoint, parsing, run
from antidote_bench.utils import device as devices
from antidote_bench.utils.config import Attack, scripts
from antidote_bench.utils.data import dataset, target
from antidote_bench.utils.errors import ConfigError, RefusedError, UserError
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Attacker, prepare_once
from antidote_bench.utils.record import claim, contents
from antidote_bench.utils.record import folder as layout

CHECKED = 64  # stored images that the trigger of a record must give again
# Levels by which a pixel may differ from the stored one, and the share of the changed pixels that
# may by more: another machine rounds otherwise, in a generator's network above all.
LEVELS, SHARE = 2, 0.05


@dataclass(frozen=True, eq=False)
class Trigger:
    """The trigger of an attack: trigger(images) -> the same images with it.

    `images` are uint8, or float in [0, 1], N,3,size,size on any device; the result has their shape,
    dtype and device, and they stay as they are. `index` are the images' positions in their set, by
    default 0 to N - 1: the triggers of some attacks differ from image to image.
    """

    attack: str
    size: int
    """side of the images in pixels"""
    apply: Callable = field(repr=False)

    def __call__(self, images: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        wanted = (3, self.size, self.size)
        if not torch.is_tensor(images) or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            shape = tuple(getattr(images, "shape", ())) or type(images).__name__
            raise ConfigError(f"images must be a tensor N,3,{self.size},{self.size}, not {shape}")
        if not is_image(images):
            raise ConfigError(f"images must be uint8, or float in [0, 1]: these are {images.dtype}")
        if index is None:
            index = torch.arange(len(images))
        index = torch.as_tensor(index, device=images.device)
        if index.shape != (len(images),):
            raise ConfigError(f"index must have the position of each of the {len(images)} images")
        if not len(images):  # not every trigger takes an empty batch
            return images.clone()
        size = max(poison.CHUNK // self.size**2, 1)
        parts = zip(images.split(size), index.split(size), strict=True)
        return torch.cat([self.apply(*part) for part in parts])


def trigger(name: str, **options) -> Trigger:
    """The trigger that `python attack/<name>.py` would use with the `options`; nothing is trained
    but what the trigger is made of.

    It is the one of test images. Some triggers are drawn from a seed; others are made with the data
    set, or with a clean model, which is trained first where there is none. Raises a subclass of
    UserError.
    """
    if name == "clean":
        raise ConfigError("clean has the trigger of another attack: name that one")
    module, config = options_for("attack", name, options)
    config, device = devices.setup(config)
    data = dataset.load(config, device)
    config = target.resolved(config, data.spec.class_names)
    make = partial(module.make_trigger, config, data.spec, "test")
    if hasattr(module, "prepare"):
        prefer = module.make_preference(config) if hasattr(module, "make_preference") else None
        index = poison.to_poison(data.train.truth, config, data.train.images, prefer)
        find_clean_model = partial(run.clean_model, config, data.spec, device)
        attacker = Attacker(data.spec, data.train, index, find_clean_model)
        with tempfile.TemporaryDirectory() as state:
            prepared, _ = prepare_once(module.prepare, config, attacker, Path(state))
        make = partial(make, parts=prepared.parts)
    return Trigger(name, data.spec.size, make())


def of_record(record) -> Trigger:
    """The trigger of a record, which must give the images that are stored there.

    What a record says is read as options of an attack that is here; nothing in it is executed.
    """
    script = Path(parsing.script("attack", record.attack)).stem
    if script not in scripts("attack"):
        raise ConfigError(f"{record.path} names no attack that is known here: {record.attack!r}")
    module = catalogue.module("attack", script)
    # not those that every attack has: a trigger needs few of them, and some name files
    known = set(module.Config.__dataclass_fields__) - set(Attack.__dataclass_fields__)
    known |= {"attack_target", "label_mode", "source_class", "poison_seed", "pratio"}
    options = {name: value for name, value in record.options.items() if name in known}
    info = contents.open_record(record.path)
    _require_no_file(record, options, info)
    parts = {}
    if layout.TRIGGER in info["files"]:
        content = layout.read_checked(record.path, layout.TRIGGER, info)
        parts = {"parts": checkpoint.from_bytes(content, record.path / layout.TRIGGER)}
    try:
        config = parsing.parse(module.Config, parsing.words(options), script=f"attack/{script}.py")
        made = Trigger(
            record.attack,
            record.spec.size,
            module.make_trigger(config, record.spec, "test", **parts),
        )
        _require_stored(made, record)
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError, UserError) as error:
        why = " ".join(str(error).split())[:200]
        raise RefusedError(f"the trigger of {record.path} cannot be made again: {why}") from error
    return made


def _require_no_file(record, options, info):
    """RefusedError where the options in a record from others name a file of this machine."""
    named = [name for name, value in options.items() if name.endswith("_path") and value]
    if named and info.get("origin") != claim.origin(record.settings):
        raise RefusedError(
            f"the trigger of {record.path} cannot be made again: {named[0]} names a file, and the "
            "record was not made here; trigger() makes one with a file that you name"
        )


def _require_stored(made, record):
    """RefusedError unless a trigger gives the triggered test images of a record."""
    before, stored = record.before[:CHECKED], record.after[:CHECKED]
    if not len(stored):
        raise RefusedError("the record holds no triggered image to compare with")
    given = made(before, record.backdoor_index[:CHECKED])
    changed = (given != before) | (stored != before)
    off = (given.int() - stored.int()).abs() > LEVELS
    if off.sum() > SHARE * changed.sum():
        raise RefusedError("its options do not give the triggered images that it holds")

"""The exactly retrained model: a control that only the evaluator can make.

It is the victim as it would be had it never seen what the attack changed: the same recipe, the same
first weights and the same seeds, on the training set without poisoned and cover images. A defense
knows neither of them.
"""

import sys
from functools import partial

from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol.relearn import training_options
from antidote_bench.utils.train import (
    Recipe,
    augmentation_of,
    build_seeded_model,
    cross_entropy,
    fit,
)


def retrain(loaded, made, report, state):
    """The network of the victim `loaded`, trained from scratch on the images that its attack left
    as they were.

    `made` are the options of the attack, and `state` is the folder for the checkpoint. After every
    epoch `report(model, epoch=, loss=, lr=)` gets the network. Raises ConfigError (exit 2) where
    the victim began with weights from a file.
    """
    if made.get("pretrained"):
        raise ConfigError(
            "the victim began with the weights of a file, and is not retrained from scratch"
        )
    kept = (loaded.kinds == 0).nonzero().flatten()
    split = loaded.train.view(kept)
    print(f"retraining on {len(kept)} of {len(loaded.kinds)} images", file=sys.stderr)
    options = training_options(made, made["random_seed"])
    model = build_seeded_model(
        loaded.name, loaded.width, loaded.spec, split, "weights", options.random_seed
    )
    return fit(
        model,
        split,
        Recipe.of(options, compile="none"),
        loss=partial(cross_entropy, label_smoothing=options.label_smoothing),
        augment=augmentation_of(options, loaded.spec, split),
        drop_last=True,
        on_epoch=report,
        checkpoint=state / "retrained.safetensors",
    )

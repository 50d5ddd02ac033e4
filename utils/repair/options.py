"""Options that several defenses share. Imports no torch."""

import dataclasses
from typing import ClassVar, Literal

from antidote_bench.utils.config import Defense, FromScratch, Training, option, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningOptions(Training, Defense):
    """Options of a defense that trains the victim further."""

    relative_rates: ClassVar[tuple[str, ...]] = ("lr", "lr_min")

    lr: float = 0.01
    """highest learning rate; the default is 0.01 for a victim that was trained at 0.01 with batches
    of 128, and in proportion to the victim's own rate per image otherwise"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionOptions(Defense):
    """Options of a defense that chooses one of several settings, from weak to strong, by itself."""

    tolerance: float = option(0.1, at_least=0, at_most=1)
    """share of the victim's ACC that the chosen setting may cost"""
    selection: Literal["val", "oracle"] = "val"
    """val: choose by a fifth of the clean images, which are held out for that; oracle: choose by
    the test set, as published tables often did, and be marked for it in every table"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReversalOptions(Defense):
    """Options of a defense that unlearns what a generator of triggers makes, in rounds.

    See utils/repair/reversal.py.
    """

    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "of every round the `mask` (rounds, D) of the features, the `shares` "
        "(rounds, K) of the changed images that are taken for each class, and the `target`, the "
        "class of most of them in the first round",
        "triggers.png": "some clean images, and what the generator of the first round makes of "
        "them",
    }

    rounds: int = option(5, at_least=0)
    """rounds of learning the mask, training the generator, and unlearning"""
    identity_epochs: int = option(50, at_least=0)
    """epochs on the clean images in which the new generator learns to change nothing"""
    mask_epochs: int = option(20, at_least=1)
    """epochs of a round in which the mask of the features is learned"""
    mask_lr: float = option(0.01, above=0)
    """learning rate of the mask"""
    generator_epochs: int = option(30, at_least=1)
    """epochs of a round in which the generator is trained"""
    generator_lr: float = option(1e-3, above=0)
    """learning rate of the generator"""
    generator_width: int = option(32, at_least=1, unit="channels")
    """channels of the generator's first level"""
    search_batch: int = option(128, at_least=1, unit="images")
    """images per step of the mask and of the generator"""
    image_bound: float = option(0.3, above=0)
    """mean squared change of the images, in units of their standard deviation, above which only it
    is made smaller"""
    feature_bound: float = option(3.0, above=0)
    """mean squared change of the kept features, in units of their mean square, above which only
    the change of the images is made smaller"""
    noise: float = option(0.03, at_least=0)
    """standard deviation of the noise on the images whose changed forms say what the target is"""
    epochs: int = option(30, at_least=0)
    """epochs of a round in which the network unlearns"""
    batch_size: int = option(128, at_least=2, unit="images")
    """images per step of the unlearning"""
    share: float = option(0.1, at_least=0, at_most=1)
    """share of a batch that the generator changes; one image at least"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainingOptions(FromScratch, Defense):
    """Options of a defense that retrains the victim's architecture from scratch.

    Defaults are the victim's own training options.
    """

    holds_clean: ClassVar[bool] = False
    copies_recipe: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemiSupervisedOptions(Defense):
    """Options of a defense that believes some labels of the training set and takes the other images
    as unlabelled ones.

    See utils/repair/semi_supervised.py.
    """

    alpha: float = option(0.1, at_least=0)
    """weight of the cross-entropy in the symmetric cross-entropy"""
    beta: float = option(1.0, at_least=0)
    """weight of the reverse cross-entropy in it"""
    labelled: float = option(0.5, above=0, below=1)
    """share of the training set, of lowest loss, whose labels MixMatch believes"""
    steps: int = option(1024, at_least=1)
    """steps of MixMatch per epoch"""
    mixmatch_lr: float = option(0.002, above=0)
    """learning rate of Adam in MixMatch"""
    batch_size: int = option(64, at_least=1, unit="images")
    """labelled images per step of MixMatch, and as many unlabelled ones in two views"""
    sharpening: float = option(0.5, above=0)
    """temperature that sharpens guessed labels; 1 leaves them as they are"""
    mixing: float = option(0.75, above=0)
    """parameter of the Beta distribution of the share in which images are mixed"""
    unlabelled_weight: float = option(15.0, at_least=0)
    """weight of the unlabelled images at the end, to which it rises from 0 step by step"""

    @property
    def prior(self):
        return f"labelled={self.labelled}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Defense):
    """Options of a defense that looks for poisoned images by how much their features change under
    rotation and translation.

    See utils/repair/sensitivity.py.
    """

    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "sensitivity.safetensors": "of every image of the training set the `score`, the mean "
        "square by which its features change under rotation and translation, and the `kind` it is "
        "taken for: 0 clean, 1 unknown, 2 poisoned"
    }

    alpha_c: float = option(0.2, at_least=0, at_most=1)
    """share of the training set, the least sensitive images, that is taken for clean"""
    alpha_p: float = option(0.05, at_least=0, at_most=1)
    """share of the training set, the most sensitive images, that is taken for poisoned; both shares
    together are at most 1"""
    feature_epochs: int = option(2, at_least=0)
    """epochs on the training set, without augmentation, in which the features are learned"""
    centre_epochs: int = option(10, at_least=0)
    """epochs that then drive the mean features of the labels apart"""
    feature_lr: float = option(0.01, above=0)
    """learning rate of both"""
    batch_size: int = option(128, at_least=1, unit="images")
    """images per step of both"""

    def __post_init__(self):
        super().__post_init__()
        both = self.alpha_c + self.alpha_p
        require(both <= 1 + 1e-9, "alpha_c and alpha_p", "at most 1 together")

    @property
    def prior(self):
        return f"clean={self.alpha_c} poison={self.alpha_p}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsolationOptions(RetrainingOptions):
    """Options of a defense that first isolates the images whose labels are learned fastest.

    See utils/repair/isolation.py.
    """

    isolated: float = option(0.01, above=0, at_most=0.5)
    """share of the training set that is isolated, an assumption of the defender"""
    isolate_epochs: int = option(20, at_least=1)
    """epochs on the training set before the losses are ranked"""
    isolate_lr: float | None = option(None, above=0)
    """learning rate of these epochs, which is constant; by default --lr"""
    gamma: float = option(0.5, at_least=0)
    """loss below which these epochs push the loss of an image up again"""
    floor: Literal["lga", "flooding"] = "lga"
    """lga: sign(l - gamma) l, the paper's local gradient ascent; flooding: |l - gamma| + gamma.
    Taken image by image the gradient is the same, and so is the result"""

    @property
    def prior(self):
        return f"isolated={self.isolated}"

"""FMP: prune the feature maps whose adversarial perturbation costs most accuracy, then fine-tune.

Huang, Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024 (arXiv 2307.11565). Every feature map of every
convolution in turn is pushed away from its clean values by one FGSM step on the input; the maps whose step makes the
model fail most are taken for the backdoor's.

    python defense/fmp.py --result_file badnet_cifar10                     # 5 % clean pictures, as every defense here
    python defense/fmp.py --result_file badnet_cifar10 --clean_ratio 0.1   # the paper's own budget

Where the paper and the released code are silent or differ, this is the plain reading: pixels in [0, 1] and normalised
once; raw convolution outputs; a layer is pruned by its own ranks; pruned filters stay zero; scored without
augmentation; no test picture is ever seen. The step size 1/255 and the 128 scored pictures are our choice.
"""

from dataclasses import dataclass

from utils.config import Defense, Training, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Training, Defense):
    epochs: int = 10
    """passes over the clean pictures after pruning"""
    batch_size: int = 256
    """images per step of fine-tuning"""
    lr_min: float = 1e-4
    """learning rate that the cosine falls to"""
    weight_decay: float = 0.0
    """L2 penalty on all weights while fine-tuning"""
    p: int = 64
    """prune floor(C / p) of a convolution's C maps"""
    alpha: float = 1 / 255
    """size of the random start, in [0, 1] pixels"""
    epsilon: float = 1 / 255
    """size of the FGSM step, in [0, 1] pixels"""
    scored_images: int = 128
    """clean pictures to score on; never fewer than one per class, never more than there are"""
    score_batch: int = 1024
    """pictures per scoring pass, shared by several maps; changes speed and memory only"""

    def __post_init__(self):
        super().__post_init__()
        require(self.p >= 1, "p", "1 or more")
        require(0 <= self.alpha <= 1 and 0 <= self.epsilon <= 1, "alpha and epsilon", "0 to 1")
        require(self.scored_images >= 1 and self.score_batch >= 1, "scored_images and score_batch", "1 or more")


if __name__ == "__main__":
    launch(Config)

import sys
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import run, seeds
from utils.batch import augmentation, to_unit
from utils.data import balanced_subset
from utils.errors import ConfigError
from utils.train import fit


def repair(model, record, config):
    count = max(config.scored_images, record.spec.classes)
    index = balanced_subset(record.clean.truth, count, config.data_seed).to(record.clean.truth.device)
    scores = score_maps(model, to_unit(record.clean.images[index]), record.clean.truth[index], config)
    doomed = {name: worst(accuracy, loss, len(accuracy) // config.p) for name, (accuracy, loss) in scores.items()}
    print(f"pruning {sum(map(len, doomed.values()))} of {sum(len(a) for a, _ in scores.values())} maps", file=sys.stderr)
    prune = pruning(model, doomed)
    prune()
    record.report("pruned", model)
    return fit(model, record.clean, config, augment=augmentation(record.spec), after_step=prune,
               on_epoch=partial(record.report, "finetune"), checkpoint=record.state / "finetune.safetensors")  # fmt: skip


def score_maps(model, images, labels, config):
    """{convolution: (accuracy, cross-entropy) per map} on images N,3,S,S perturbed for that map; float64 arrays of C.

    The maps of a layer share passes: the images are copied once per map of a chunk, and since the copies do not
    influence each other in eval mode, one backward and one forward serve the whole chunk. Runs in the images'
    precision and leaves the model as it was. ConfigError where there is no convolution.
    """
    signs = torch.randint(0, 2, images.shape, generator=seeds.generator("fmp start", config.data_seed)) * 2 - 1
    start = (images + config.alpha * signs.to(images)).clamp(0, 1)
    training, scores = model.training, {}
    model.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), _frozen(model):
        with torch.no_grad():
            clean = feature_maps(model, images)
        moved = feature_maps(model, start.requires_grad_())
        if not moved:
            raise ConfigError("fmp does not apply: the model has no convolution")
        with tqdm(total=sum(maps.shape[1] for maps in clean.values()), desc="scoring", unit=" maps", disable=None) as bar:
            for name, maps in moved.items():
                away = 2 * (maps.detach() - clean[name])  # of sum (f(z) - f(x))^2, at z = the start
                parts = []
                for chunk in torch.arange(maps.shape[1], device=images.device).split(max(1, config.score_batch // len(images))):
                    parts.append(_score_chunk(model, maps, away, chunk, start, labels, config.epsilon))
                    bar.update(len(chunk))
                accuracy, loss = torch.cat(parts, 1).double().cpu().numpy()
                scores[name] = accuracy, loss
    model.train(training)
    return scores


def _score_chunk(model, maps, away, chunk, start, labels, epsilon):
    """Accuracy and cross-entropy, 2,k, after one step that moves each of the k maps in `chunk` by itself."""
    count = len(chunk)
    cotangent = torch.zeros(count, *maps.shape, dtype=maps.dtype, device=maps.device)
    each = torch.arange(count, device=maps.device)
    cotangent[each, :, chunk] = away[:, chunk].transpose(0, 1)
    (gradient,) = torch.autograd.grad(maps, start, cotangent, retain_graph=True, is_grads_batched=True)
    with torch.inference_mode():
        attacked = (start + epsilon * gradient.sign()).clamp(0, 1).flatten(0, 1)  # kN,3,S,S
        logits = model(attacked.contiguous(memory_format=torch.channels_last))
        truth = labels.repeat(count)
        right = (logits.argmax(1) == truth).to(logits.dtype)
        return torch.stack([right, F.cross_entropy(logits, truth, reduction="none")]).view(2, count, -1).mean(2)


def feature_maps(model, images):
    """{convolution: its raw output N,C,h,w}, bias included; later in-place layers cannot change what is kept."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def keep(_module, _inputs, output, name=name):
                found[name] = output
                return output.clone()

            hooks.append(module.register_forward_hook(keep))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def worst(accuracy, loss, count):
    """The `count` maps to prune, as sorted channels: lowest accuracy, then highest loss (to 1e-6), then lowest channel."""
    order = np.lexsort((np.arange(len(accuracy)), -np.round(loss, 6), accuracy))
    return sorted(order[:count].tolist())


def pruning(model, doomed):
    """A function that sets the doomed filters, their biases and their paired batch normalisation to zero."""
    modules, pairs, masks = dict(model.named_modules()), paired_norms(model), []
    for name, channels in doomed.items():
        owners = [modules[name]] + ([modules[pairs[name]]] if name in pairs else [])
        for parameter in (parameter for owner in owners for parameter in (owner.weight, owner.bias) if parameter is not None):
            if channels:
                mask = torch.ones_like(parameter)
                mask[channels] = 0
                masks.append((parameter, mask))

    @torch.no_grad()
    def prune():
        for parameter, mask in masks:
            parameter.mul_(mask)

    return prune


def paired_norms(model):
    """{convolution: batch norm} where the convolution's output goes to that BatchNorm2d and nowhere else.

    A batch norm of a residual sum is never paired. Nothing is paired, with a warning, in a model torch.fx cannot trace.
    """
    modules = dict(model.named_modules())
    try:
        nodes = torch.fx.symbolic_trace(model).graph.nodes
    except Exception as error:  # tracing fails in whatever way the model's own code does
        print(f"warning: no batch norm is pruned, torch.fx cannot trace the model: {error}", file=sys.stderr)
        return {}
    calls = [node for node in nodes if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d)]
    users = {node.target: list(node.users) for node in calls}
    return {name: user[0].target for name, user in users.items()
            if len(user) == 1 and user[0].op == "call_module" and isinstance(modules[user[0].target], nn.BatchNorm2d)}  # fmt: skip


@contextmanager
def _frozen(model):
    """Parameters need no gradient inside; the graph then holds only what leads to the images."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def main(config):
    run.defend(__name__, config, repair)

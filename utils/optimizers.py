"""The optimizers: SGD, Adam, and Muon for the convolutions with SGD for the rest."""

import torch

MUON_MOMENTUM = 0.6  # Jordan's, for networks of this size
NEWTON_SCHULZ_STEPS = 3  # of Muon, enough for convolutions


def sgd(parameters, config):
    """SGD with momentum at the rate config.lr; see `bias_groups` for config.bias_lr_scale."""
    return torch.optim.SGD(
        bias_groups(list(parameters), config),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )


def bias_groups(parameters, config):
    """`parameters`, or two groups of them where biases have another learning rate.

    It is config.bias_lr_scale times the rate of the others. Biases are all parameters of one
    dimension. They decay by as much per step as the others do.
    """
    scale = config.bias_lr_scale
    if scale == 1:
        return parameters
    biases = {"lr_scale": scale, "weight_decay": config.weight_decay / scale}
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim != 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], **biases},
    ]
    return [group for group in groups if group["params"]]


def adam(parameters, config):
    """Adam with an L2 penalty in the gradient, as torch has it; config.momentum plays no part."""
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def muon(parameters, config):
    """Muon at the rate config.muon_lr for filters, and `sgd` for all other parameters."""
    parameters = list(parameters)
    filters = [parameter for parameter in parameters if parameter.ndim == 4]
    others = [parameter for parameter in parameters if parameter.ndim != 4]
    parts = [Muon(filters, config)] if filters else []
    return Together(*parts, *([sgd(others, config)] if others else []))


class Muon(torch.optim.Muon):
    """torch's Muon on the filters of convolutions, which lie channels last in memory.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/: a step goes along the orthogonal matrix that is
    nearest to the averaged gradient. The filters of a layer are a matrix with a row for each; its
    norm is set to sqrt(outputs) before every step, as in Jordan's training of CIFAR-10. That
    changes no output where a batch norm follows.
    """

    def __init__(self, filters, config):
        self.filters = filters
        matrices = [as_matrix(parameter.detach()) for parameter in filters]
        assert all(
            matrix.data_ptr() == parameter.data_ptr()
            for matrix, parameter in zip(matrices, filters, strict=True)
        ), "one memory"
        super().__init__(
            matrices,
            config.muon_lr,
            weight_decay=0.0,
            momentum=MUON_MOMENTUM,
            ns_steps=NEWTON_SCHULZ_STEPS,
        )
        self.param_groups[0]["lr_scale"] = config.muon_lr / config.lr

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad)
            matrix.mul_(len(matrix) ** 0.5 / matrix.norm().clamp(min=1e-12))
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        for parameter in self.filters:
            parameter.grad = None


def as_matrix(bank):
    """Filters o,i,h,w as a matrix o,h*w*i: the same memory where they lie channels last."""
    return bank.permute(0, 2, 3, 1).flatten(1)


class Together:
    """Several optimizers that step as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self):
        for part in self.parts:
            part.step()


def set_rate(optimizer, rate):
    """Set the learning rate of every group of parameters: `rate` times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1)


def states(optimizer):
    """[(parameter, its state, a dict that may be filled)] of all parameters, in their order."""
    parts = getattr(optimizer, "parts", [optimizer])
    return [
        (parameter, part.state[parameter])
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    ]


OPTIMIZERS = {"sgd": sgd, "muon": muon}

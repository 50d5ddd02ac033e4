"""A CUDA device that is made of CPU tensors, to find on any machine what would fail on a GPU.

    with FakeDevice() as device:
        script.main(options)  # of --device cuda
    assert not device.faults

Inside, `torch.device("cuda")` is there: `.to("cuda")`, `torch.zeros(3, device="cuda")`, generators
and `torch.cuda` answer as they do on a GPU, and every storage carries a label that says where it
lies. All numbers are computed on the CPU, forwards and backwards, by the ordinary kernels. An
operation on tensors of both places raises and is kept in `faults`, wherever CUDA refuses it. What
makes the CPU wait for the GPU, a copy from ordinary memory included, is kept in `waits`.

What CUDA allows, and this too: in an elementwise operation one tensor without dimensions on the
CPU, CPU indices in brackets (`images[index]`), `copy_`. What it cannot show: operations that CUDA
lacks for a type or computes in another order, the types of CUDA's autocast, streams, graphs,
compiled kernels, several processes, and memory.
"""

import contextlib
import functools
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

HOME = f"{Path(__file__).parents[1]}/"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# a tensor that torch makes inside of an operation, which would lie where the operation's inputs lie
ANY = None

COPIES = {"copy_", "_to_copy", "_copy_from"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# operations whose result's size or check makes the CPU read from the GPU
READING = {
    "_local_scalar_dense": "a number is read",
    "nonzero": "the size of the result is read",
    "masked_select": "the size of the result is read",
    "_unique": "the size of the result is read",
    "_unique2": "the size of the result is read",
    "unique_dim": "the size of the result is read",
    "unique_consecutive": "the size of the result is read",
    "bincount": "the largest value is read",
    "isin": "the size of an inner result is read",
    "equal": "the result is read",
    "repeat_interleave": "the size of the result is read",
    "multinomial": "the weights are checked",
    "_linalg_eigh": "success is checked",
    "linalg_inv_ex": "success is checked",
    "_linalg_svd": "success is checked",
}
GROUPS = "_group_tensors_by_device_and_dtype"
DRAWING = (  # functions of torch that take a generator, and methods of a tensor that do
    ("bernoulli", "multinomial", "normal", "poisson"),
    ("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_")
    + ("multinomial", "normal_", "random_", "uniform_"),
)


class Wait(NamedTuple):
    """The CPU and the GPU wait for each other."""

    why: str
    path: tuple[str, ...]  # file:line of every call within the project, the innermost first
    function: str  # file:name of the innermost function
    step: int  # how many gradients were computed before


class FakeDevice(TorchDispatchMode):
    """The context in which the device is there; `faults` and `waits` are what it has seen."""

    def __init__(self):
        super().__init__()
        self.faults, self.waits, self.steps = [], [], 0
        self.operations = defaultdict(int)  # on the device, by name
        self._labels = {}
        self._stack = None

    # where a tensor lies

    def place(self, tensor):
        """GPU, CPU or ANY."""
        reference, place = self._labels.get(_storage(tensor)._cdata, (None, CPU))
        return CPU if reference is not None and reference.expired() else place

    def put(self, tensor, place):
        """Label a tensor, and all that share its memory."""
        if len(self._labels) > 20_000:
            alive = list(self._labels.items())  # a reading thread may add some
            self._labels = {key: pair for key, pair in alive if not pair[0].expired()}
        storage = _storage(tensor)
        self._labels[storage._cdata] = StorageWeakRef(storage), place
        return tensor

    def fault(self, sentence):
        """Keep and raise what CUDA would refuse."""
        self.faults.append(f"{_path()[0]}: {sentence}")
        raise RuntimeError(self.faults[-1])

    def wait(self, why):
        self.waits.append(Wait(why, _path(), _function(), self.steps))

    def waits_in_steps(self, *, at_least=4, but=()):
        """{file:line: why} of what recurs from step to step, called from the same lines between so
        many gradients; not what the functions `but` do."""
        steps, found = defaultdict(set), {}
        for wait in self.waits:
            steps[wait.path].add(wait.step)
            if len(steps[wait.path]) >= at_least and wait.function not in but:
                found[wait.path[0]] = wait.why
        return found

    # what every operation passes, those of a backward pass too

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list(_tensors(args)) + list(_tensors(kwargs.values()))
        places = [self.place(tensor) for tensor in inputs]
        name = function.overloadpacket.__name__
        if GPU in places:
            self.operations[name] += 1
            if CPU in places:
                self._require_allowed(function, name, inputs, places, args)
            self._note_wait(name, args)
        result = function(*args, **kwargs)
        place = GPU if GPU in places else (CPU if CPU in places else ANY)
        own = {_storage(tensor)._cdata for tensor in inputs}
        if place is GPU and name not in COPIES:  # what was made inside of an operation lies here
            for tensor, before in zip(inputs, places, strict=True):
                if before is ANY:
                    self.put(tensor, GPU)
        for tensor in _tensors([result]):
            if _storage(tensor)._cdata not in own:
                self.put(tensor, place)
        return result

    def _require_allowed(self, function, name, inputs, places, args):
        if name in COPIES:
            return
        if name in INDEXED and self.place(args[0]) is GPU:
            values = [value for value in args[2:3] if torch.is_tensor(value)]
            if all(self.place(value) is not CPU or not value.dim() for value in values):
                return
        far = [tensor for tensor, place in zip(inputs, places, strict=True) if place is CPU]
        written = {
            id(value)
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        scalar = len(far) == 1 and not far[0].dim() and id(far[0]) not in written
        if scalar and torch.Tag.pointwise in function.tags:
            return
        shapes = ", ".join(
            f"{'cuda' if place is GPU else place} {tuple(tensor.shape)}"
            for tensor, place in zip(inputs, places, strict=True)
        )
        self.fault(f"{name} on tensors of two devices: {shapes}")

    def _note_wait(self, name, args):
        if name in READING:
            self.wait(READING[name])
        elif name == "copy_":
            self._note_move(self.place(args[1]), self.place(args[0]))
        elif name in INDEXED:
            indices = [index for index in args[1] if index is not None]
            masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            # a mask and one number need no positions
            if masked and not (len(args) > 2 and args[2].numel() == 1):
                self.wait("the size of the result is read")
            if any(self.place(index) is CPU for index in indices):
                self.wait("the positions are copied to the GPU")

    def _note_move(self, source, target):
        if source is GPU and target is CPU:
            self.wait("a tensor is copied to the CPU")
        elif source is CPU and target is GPU:
            self.wait("a tensor is copied to the GPU")

    # moving, and making tensors in a place

    def move(self, tensor, place, *, note=True, **how):
        """`tensor.to(place)`, in a way that gradients come back the way it went."""
        if place is None or self.place(tensor) is place:
            return REAL["to"](tensor, **how)
        if self.place(tensor) is ANY and not how.get("copy"):
            return REAL["to"](self.put(tensor, place), **how)
        if note:
            self._note_move(self.place(tensor), place)
        if tensor.requires_grad and torch.is_grad_enabled():
            return Move.apply(tensor, self, place, how)
        return self.put(REAL["to"](tensor, **{**how, "copy": True}), place)

    def made(self, tensor, place):
        return self.put(tensor, place) if torch.is_tensor(tensor) else tensor

    def require_generator(self, generator, place):
        if generator is not None and _place_of(generator.device) is not place:
            found = generator.device.type
            self.fault(f"a generator of {found} draws numbers on {place.type}")

    def __enter__(self):
        super().__enter__()
        self._stack = contextlib.ExitStack()
        try:
            _install(self, functools.partial(_patch, self._stack))
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error):
        self._stack.close()
        return super().__exit__(*error)


class Move(torch.autograd.Function):
    """A copy to another place, whose gradient is copied back."""

    @staticmethod
    def forward(context, tensor, device, place, how):
        context.device, context.back, context.dtype = device, device.place(tensor), tensor.dtype
        moved = REAL["to"](tensor.detach(), **{**how, "copy": True})
        return device.put(moved, place)

    @staticmethod
    def backward(context, gradient):
        return context.device.move(gradient, context.back, dtype=context.dtype), None, None, None


class Autocast(torch.autocast):
    """`torch.autocast` whose CUDA is the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)


REAL = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", "tolist", "__deepcopy__")}


def _patch(stack, owner, name, value):
    """Set an attribute until the stack is left."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def _install(device, patch):
    _install_tensor(device, patch)
    for function in _device_constructors():
        _install_factory(device, patch, function)
    names = [name for name in dir(torch) if name.endswith("_like")]
    for name in names:
        patch(torch, name, _like(device, getattr(torch, name)))
    for name in (name for name in dir(torch.Tensor) if name.startswith("new_")):
        patch(torch.Tensor, name, _like(device, getattr(torch.Tensor, name)))
    for owner, drawing in zip((torch, torch.Tensor), DRAWING, strict=True):
        for name in drawing:
            patch(owner, name, _drawing(device, getattr(owner, name)))
    patch(torch, "Generator", _generator())
    patch(torch, "autocast", Autocast)
    patch(torch.amp, "autocast", Autocast)
    patch(F, "one_hot", _one_hot(device))
    patch(torch._C, GROUPS, _groups(device, getattr(torch._C, GROUPS)))
    patch(torch.accelerator, "current_accelerator", lambda **_: None)  # graphs are not captured
    for name in ("backward", "grad"):
        patch(torch.autograd, name, _counted(device, getattr(torch.autograd, name)))
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "mem_get_info": (8 << 30, 8 << 30), "max_memory_allocated": 0, "memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None, "get_device_name": "a CPU that plays a GPU",
        "is_bf16_supported": True, "manual_seed_all": None, "manual_seed": None,
        "is_current_stream_capturing": False, "set_device": None, "empty_cache": None,
    }  # fmt: skip
    for name, answer in answers.items():
        patch(torch.cuda, name, functools.partial(lambda answer, *_, **__: answer, answer))


def _install_tensor(device, patch):
    def to(tensor, *args, **kwargs):
        free = getattr(tensor, "pinned", False) and kwargs.get("non_blocking")
        copy, first = kwargs.pop("copy", False), (*args, kwargs.pop("other", None))[0]
        if torch.is_tensor(first):
            dtype, place = first.dtype, device.place(first)
            form = kwargs.get("memory_format")
        else:
            where, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
            place = where and _place_of(where)
        how = {"copy": copy} | ({"dtype": dtype} if dtype else {})
        how |= {"memory_format": form} if form else {}
        return device.move(tensor, place, note=not free, **how)

    def pin(tensor, *_):
        copy = tensor.clone()
        copy.pinned = True
        return copy

    def numpy(tensor, *args, **kwargs):
        if device.place(tensor) is GPU:
            device.fault("numpy() of a tensor on cuda, which needs .cpu() first")
        return REAL["numpy"](tensor, *args, **kwargs)

    def tolist(tensor):
        if device.place(tensor) is GPU:
            device.wait("numbers are read")
        return REAL["tolist"](tensor)

    tensor = torch.Tensor
    patch(tensor, "to", to)
    patch(tensor, "cpu", lambda tensor, **how: device.move(tensor, CPU, **how))
    patch(tensor, "cuda", lambda tensor, *_, **__: device.move(tensor, GPU))
    patch(tensor, "numpy", numpy)
    patch(tensor, "tolist", tolist)
    patch(tensor, "device", property(lambda tensor: device.place(tensor) or CPU))
    patch(tensor, "is_cuda", property(lambda tensor: device.place(tensor) is GPU))
    patch(tensor, "is_cpu", property(lambda tensor: device.place(tensor) is not GPU))
    patch(tensor, "get_device", lambda tensor: 0 if device.place(tensor) is GPU else -1)
    patch(tensor, "pin_memory", pin)
    patch(
        tensor,
        "__deepcopy__",
        lambda tensor, memo: device.put(REAL["__deepcopy__"](tensor, memo), device.place(tensor)),
    )


def _install_factory(device, patch, function):
    owner = next(
        (
            module
            for module in (torch, torch.fft, torch.nested)
            if getattr(module, function.__name__, None) is function
        ),
        None,
    )
    if owner is None:
        return

    @functools.wraps(function)
    def factory(*args, device=None, generator=None, pin_memory=False, **kwargs):
        place = _place_of(device)
        this.require_generator(generator, place)
        drawn = {} if generator is None else {"generator": generator}
        if function.__name__ in ("tensor", "as_tensor", "asarray"):
            return _from_data(this, function, place if device is not None else None, args, kwargs)
        return this.made(function(*args, **drawn, **kwargs), place)

    this = device
    patch(owner, function.__name__, factory)


def _from_data(device, function, place, args, kwargs):
    """`torch.tensor` and the like, on numbers, arrays and tensors."""
    data = args[0] if args else kwargs["data"]
    if torch.is_tensor(data):
        copy = function.__name__ == "tensor"
        dtype = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") else {}
        return device.move(data, place, copy=copy, **dtype)
    if any(device.place(tensor) is GPU for tensor in _tensors([data])):
        device.wait("numbers are read")
    made = function(*args, **kwargs)
    return device.move(device.made(made, CPU), place, copy=False) if place is GPU else made


def _like(device, function):
    """A function that makes a tensor like another one, in its place unless it is told."""

    @functools.wraps(function)
    def like(tensor, *args, **kwargs):
        where, pin = kwargs.pop("device", None), kwargs.pop("pin_memory", None)
        del pin
        place = device.place(tensor) if where is None else _place_of(where)
        device.require_generator(kwargs.get("generator"), place)
        return device.made(function(tensor, *args, **kwargs), place)

    return like


def _drawing(device, function):
    @functools.wraps(function)
    def draw(*args, generator=None, **kwargs):
        if generator is None:
            return function(*args, **kwargs)
        places = {device.place(tensor) for tensor in _tensors([*args, *kwargs.values()])}
        device.require_generator(generator, GPU if GPU in places else CPU)
        return function(*args, generator=generator, **kwargs)

    return draw


def _generator():
    """The class `torch.Generator`, of which those for CUDA draw on the CPU."""
    real = torch.Generator

    class Generator(real):
        def __new__(cls, device="cpu"):
            made = real.__new__(cls, "cpu")
            made.place = _place_of(device)
            return made

        @property
        def device(self):
            return self.place

    return Generator


def _one_hot(device):
    """On CUDA it does not look whether the classes are in range, and so it does not wait."""

    def one_hot(classes, num_classes=-1):
        if num_classes < 0:
            num_classes = int(classes.max()) + 1
        result = torch.zeros((*classes.shape, num_classes), dtype=torch.long, device=classes.device)
        return result.scatter_(-1, classes[..., None], 1)

    return one_hot


def _groups(device, function):
    """How optimizers sort tensors by device: the fake one is none for C++."""

    def groups(lists, *args, **kwargs):
        found = function(lists, *args, **kwargs)
        return {
            (device.place(tensors[0][0]) or CPU, dtype): (tensors, positions)
            for (_, dtype), (tensors, positions) in found.items()
        }

    return groups


def _counted(device, function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        device.steps += 1
        return function(*args, **kwargs)

    return counted


def _place_of(device):
    if device is None:
        return CPU
    return GPU if torch.device(device).type == "cuda" else CPU


def _storage(tensor):
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def _tensors(values):
    """All tensors in arguments that may be lists or dicts of tensors."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _frames():
    """The calls within the project, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(HOME) and path != __file__ and "/.venv/" not in path:
            yield path.removeprefix(HOME), frame
        frame = frame.f_back


def _path():
    return tuple(f"{path}:{frame.f_lineno}" for path, frame in _frames()) or ("?",)


def _function():
    return next((f"{path}:{frame.f_code.co_name}" for path, frame in _frames()), "?")

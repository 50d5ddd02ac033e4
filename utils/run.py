"""What surrounds every experiment: the device, the judge, and the two protocols, attack and defend."""

import ctypes
import dataclasses
import platform
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import torch

import models
from utils import config as options
from utils import data, files, metrics, poison, record, seeds, sources, train
from utils.batch import augmentation, lengths
from utils.errors import ConfigError
from utils.preview import preview

VERSION = "0.1.0"
LOG = ["stage", "epoch", "loss", "lr", "acc", "asr", "ra", "seconds"]
RESULTS = (
    "dataset model attack label_mode target pratio pratio_effective n_poison recipe precision defense variant stage selection "
    "prior clean_budget seed poison_seed data_seed acc_before asr_before ra_before acc asr ra der n_test n_backdoor seconds "
    "peak_mb device version config_hash defense_seed"
).split()


def setup(config):
    """(config with the precision resolved, torch.device); ConfigError where the device is not there."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available here; --device takes cpu, cuda, cuda:1 ... or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; --device takes cpu, cuda, cuda:1 ... or auto")
    precision = config.precision if config.precision != "auto" else "bf16" if computes_bf16(device) else "fp32"
    keep_memory()
    return dataclasses.replace(config, precision=precision), device


def keep_memory():
    """Have glibc keep freed memory instead of returning it to the kernel and fetching it again at every step.

    On two CPU cores float32 training of resnet9 becomes half again as fast, forward passes a quarter.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def computes_bf16(device):
    """Whether the device multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test)


def attack(script, config, make_trigger, *, make_cover=None, cover_ratio=0.0):
    """Poison a data set offline, train a victim on it, judge it and save the record.

    `script` is the attack's module name. `make_trigger(config, spec, stage)` gives the trigger of stage train or
    test. `make_cover(config, spec)`, if given, disturbs the share `cover_ratio` of the training set, drawn from the
    rest, which keeps its labels.
    """
    name = script.rpartition(".")[2]
    config, device = setup(dataclasses.replace(config, save_folder_name=config.save_folder_name or f"{name}_{config.dataset}"))
    models.check(config.model, config.width)
    folder = options.Path(config.record_path) / config.save_folder_name
    select = partial(_select, config=config, cover_ratio=cover_ratio)
    if config.dry_run:
        return _plan_attack(config, folder, select)
    if not record.begin(folder, config, kind="attack"):
        return _already_done(folder)

    spec, clean, test = data.load(config.dataset, config.dataset_path, image_size=config.image_size, device=device,
                                  cache=config.cache_path, download=config.download)  # fmt: skip
    index, cover = select(clean.truth, spec.classes)
    relabel = poison.relabelling(config.label_mode, config.attack_target, spec.classes)
    clock = Clock(folder / "state" / "log.csv")
    found = poison.poison(clean, make_trigger(config, spec, "train"), relabel, index) if len(index) else clean
    if len(cover):
        found = poison.poison(found, make_cover(config, spec), None, cover)
    test_index, backdoor = poison.backdoored(test, make_trigger(config, spec, "test"), relabel)
    exam = metrics.Exam(test, backdoor)

    torch.manual_seed(seeds.number("weights", config.random_seed))
    model = models.build(config.model, spec, config.width).to(device)
    judge = Judge(exam, config, folder / "state" / "log.csv", clock)
    model = train.fit(model, found, config, augment=augmentation(spec), drop_last=True,
                      on_epoch=partial(judge.measure, "train"), checkpoint=folder / "state" / "train.safetensors")  # fmt: skip
    seconds = clock.seconds
    after = judge.measure("final", model)

    changed = torch.cat([index, cover])
    kinds = torch.cat([torch.full_like(index, poison.POISON), torch.full_like(cover, poison.COVER)])
    row = {
        **_attack_columns(name, config, len(index), len(clean)), "defense": "none", "stage": "none", "selection": "none",
        "seed": config.random_seed, **after, "n_test": len(test), "n_backdoor": len(backdoor), "seconds": round(seconds, 2),
        "config_hash": options.digest({"attack": name, **options.identity(config, seeds=False)}), **_machine(device),
    }  # fmt: skip
    facts = {"train": len(clean), "test": len(test), "classes": spec.classes, "size": spec.size, "fingerprint": spec.fingerprint}
    record.finish(folder, {
        record.WEIGHTS: record.weights_file(model),
        record.POISONED: record.poison_file(found, changed, kinds, test_index, backdoor),
        "preview.png": preview(test.images[test_index[:8]], backdoor.images[:8], backdoor.truth, backdoor.labels),
        "results.csv": files.csv_text([row], RESULTS),
    }, {**_provenance(name, config, row), "data": facts}, kind="attack")  # fmt: skip
    _say(after, seconds)


def defend(script, config, repair, *, stage="repair", selection="fixed"):
    """Load the record, let `repair(model, record, config) -> model` work on it, judge what comes back and save it.

    The method gets the victim and a `Record`; the exam stays in this function. `seconds` are the method's own.
    """
    name = script.rpartition(".")[2]
    config, device = setup(dataclasses.replace(config, save_folder_name=config.save_folder_name or name))
    victim_folder = config.record
    victim_info = record.verify(victim_folder, "attack")
    folder = victim_folder / "defense" / config.save_folder_name
    victim_sum = victim_info["files"][record.WEIGHTS]
    if config.dry_run:
        return _plan_defense(name, config, folder, victim_info)
    if not record.begin(folder, config, kind="defense", victim=victim_sum):
        return _already_done(folder)

    model, found, exam, clean, spec, _ = record.load(victim_folder, config, device)
    index = data.balanced_subset(clean.labels, int(config.clean_ratio * len(clean) + 1e-9), config.data_seed).to(device)
    clock = Clock(folder / "state" / "log.csv")
    judge = Judge(exam, config, folder / "state" / "log.csv", clock)

    def report(stage, model, **values):
        judge.measure(stage, model, **values)

    known = record.Record(spec, found, clean[index], index, folder / "state", report)
    before_row = files.read_csv(victim_folder / "results.csv")[0]
    before = {key: float(before_row[key]) if before_row[key] else None for key in ("acc", "asr", "ra")}
    judge.note("before", before)
    torch.manual_seed(seeds.number("defense", config.random_seed))
    clock.start()
    model = repair(model, known, config)
    seconds = clock.seconds
    after = judge.measure("after", model)

    attack_columns = {key: before_row[key] for key in RESULTS[: RESULTS.index("defense")]}
    made = {key: before_row[key] for key in ("seed", "poison_seed", "n_test", "n_backdoor")}
    hashed = {"defense": name, "victim": before_row["config_hash"], **options.identity(config, seeds=False)}
    row = {
        **attack_columns, **made, "precision": config.precision, "defense": name, "variant": getattr(config, "variant", ""),
        "stage": stage, "selection": selection, "clean_budget": len(index), "data_seed": config.data_seed,
        "defense_seed": config.random_seed, **{f"{key}_before": value for key, value in before.items()}, **after,
        "der": metrics.defense_effectiveness(before, after), "seconds": round(seconds, 2),
        "config_hash": options.digest(hashed), **_machine(device),
    }  # fmt: skip
    contents = {record.WEIGHTS: record.weights_file(model), "results.csv": files.csv_text([row], RESULTS)}
    record.finish(folder, contents, {**_provenance(name, config, row), "victim_sha256": victim_sum}, kind="defense")
    _say(after, seconds)


class Clock:
    """Seconds of a run's own work; goes on from what the log of an interrupted run says."""

    def __init__(self, log):
        rows = files.read_csv(log) if log.exists() else []
        self._before = max((float(row["seconds"] or 0) for row in rows), default=0.0)
        self.start()

    def start(self):
        self._start = time.perf_counter()

    @property
    def seconds(self):
        return self._before + time.perf_counter() - self._start

    @contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


class Judge:
    """Holds the exam and the log of a run. A stage is measured when it ends, an epoch as often as eval_every says."""

    def __init__(self, exam, config, path, clock):
        self._exam, self._config, self._path, self._clock = exam, config, path, clock
        self._rows = {(row["stage"], row["epoch"]): row for row in files.read_csv(path)} if path.exists() else {}

    def measure(self, stage, model, *, epoch=None, **values):
        """Log a row, with ACC, ASR and RA where they are due; {acc, asr, ra} or {}."""
        if self._exam.test.images.is_cuda:
            torch.cuda.synchronize()
        with self._clock.paused():
            every = self._config.eval_every
            due = epoch is None or (every and epoch % every == 0)
            found = metrics.evaluate(model, self._exam, self._config.precision) if due else {}
            self.note(stage, {**values, **found}, epoch)
        return found

    def note(self, stage, values, epoch=None):
        key = (stage, str(epoch or ""))
        self._rows[key] = {"stage": stage, "epoch": key[1], **values, "seconds": round(self._clock.seconds, 2)}
        files.write(self._path, files.csv_text(self._rows.values(), LOG))


def _select(truth, classes, *, config, cover_ratio):
    """(positions to poison, positions to disturb); ConfigError where the target is not a class."""
    if config.attack_target >= classes:
        raise ConfigError(f"attack_target {config.attack_target} is not a class of {config.dataset}: it has 0 to {classes - 1}")
    index = poison.choose(truth, config.pratio, config.poison_seed)
    free = torch.ones(len(truth), dtype=torch.bool)
    free[index.cpu()] = False
    return index, poison.choose(truth, cover_ratio, config.poison_seed, among=free, purpose="cover")


def _attack_columns(name, config, n_poison, n_train):
    return {
        "dataset": config.dataset, "model": models.label(config.model, config.width), "attack": name,
        "label_mode": config.label_mode, "target": config.attack_target if config.label_mode == "all2one" else "",
        "pratio": config.pratio, "pratio_effective": n_poison / n_train, "n_poison": n_poison, "recipe": _recipe(config),
        "precision": config.precision, "poison_seed": config.poison_seed,
    }  # fmt: skip


def _recipe(config):
    return f"sgd lr {config.lr} epochs {config.epochs} batch {config.batch_size} decay {config.weight_decay}"


def _machine(device):
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    else:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        name, peak = f"cpu, {torch.get_num_threads()} threads", kilobytes / (2**20 if sys.platform == "darwin" else 2**10)
    return {"device": name, "peak_mb": round(peak), "version": VERSION}


def _provenance(name, config, row):
    """What a reader of the record wants to know about where it came from."""
    commit = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=options.ROOT, capture_output=True, text=True, check=False)
    seeds = {key: value for key, value in options.plain(config).items() if key in options.SEEDS}
    return {
        "name": name, "antidote": VERSION, "seeds": seeds, "device": row["device"], "seconds": row["seconds"],
        "peak_mb": row["peak_mb"], "config_hash": row["config_hash"], "git_commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "numpy")}},
    }  # fmt: skip


def _plan_attack(config, folder, select):
    found = sources.find(config.dataset, config.dataset_path, download=False)
    truth = torch.from_numpy(found["train"].read()[1])
    classes = int(truth.max()) + 1
    index, cover = select(truth, classes)
    per_class = torch.bincount(truth[index], minlength=classes).tolist()
    steps = len(lengths(len(truth), config.batch_size, drop_last=True))
    print(f"reads    {config.dataset} from {config.dataset_path}: {len(truth)} training and {len(found['test'].read()[1])} test pictures")
    print(f"poisons  {len(index)} of {len(truth)} pictures; per class {per_class}; {len(cover)} more are disturbed and keep their label")
    print(f"trains   {models.label(config.model, config.width)} for {config.epochs} epochs of {steps} steps in {config.precision}")
    print(f"writes   {folder} ({_state(folder)})")


def _plan_defense(name, config, folder, victim):
    count = int(config.clean_ratio * victim["data"]["train"] + 1e-9)
    print(f"reads    {config.record}: {victim['name']} on {victim['data']['train']} training pictures")
    print(f"repairs  with {name} and {count} clean pictures of {victim['data']['classes']} classes in {config.precision}")
    if hasattr(config, "epochs"):
        print(f"trains   {config.epochs} epochs of {len(lengths(count, config.batch_size))} steps")
    print(f"writes   {folder} ({_state(folder)})")


def _state(folder):
    return "complete" if (folder / "record.json").exists() else "unfinished" if (folder / "state").exists() else "new"


def _already_done(folder):
    row = files.read_csv(folder / "results.csv")[0]
    print(f"already done: {folder}")
    _say({key: float(row[key]) if row[key] else None for key in ("acc", "asr", "ra")}, float(row["seconds"]))


def _say(found, seconds):
    shown = (f"{key.upper()} {'n/a' if found[key] is None else format(100 * found[key], '.1f')}" for key in ("acc", "asr", "ra"))
    print("  ".join(shown) + f"  ({seconds:.0f} s)")

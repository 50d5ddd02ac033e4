"""The folder of a run: safe to open, written whole, and verified before anything in it is used.

A run under way lives in `state/`; its results are renamed into the folder at the end, `record.json` last, so that a
folder with a `record.json` is complete and a killed run has damaged nothing.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import yaml

import models
from utils import config as options
from utils import data, files
from utils.errors import ConfigError, RefusedError
from utils.metrics import Exam
from utils.poison import COVER, POISON
from utils.stored import replaced

FORMAT = 1
WEIGHTS, POISONED, TRIGGER = "model.safetensors", "poison.safetensors", "trigger.safetensors"
KEPT = "kept"  # where a defense's own files wait until it is done
START = "victim/"  # among a trigger's parts: the weights that its victim starts from
NEEDED = {"attack": ("config.yaml", WEIGHTS, POISONED, "results.csv"), "defense": ("config.yaml", WEIGHTS, "results.csv")}


@dataclass(frozen=True)
class Record:
    """All that a defender knows and may use.

    `train` is the training set as found (its `truth` is what it claims), `clean` a few images known to be clean, at
    positions `clean_index` of the training set. `model` and `width` name the victim's architecture. `state` is a folder
    for checkpoints, `shared` one for what other runs on the same training set may use again. `report(stage, model)` has
    the judge measure a model and log it; nothing comes back. `measure(model)`, the judge's {acc, asr, ra}, is None
    unless the run is marked as chosen with test data (selection oracle).
    """

    spec: data.Spec
    train: data.Split
    clean: data.Split
    clean_index: torch.Tensor
    model: str
    width: int | None
    state: Path
    shared: Path
    report: Callable
    measure: Callable | None = None

    def keep(self, name, content):
        """Have the file `name` (content: bytes, or tensors by name for a .safetensors file) stand in the defense's folder."""
        files.write(self.state / KEPT / name, content if isinstance(content, bytes) else safetensors.torch.save(plain(content)))


def begin(folder, config, *, kind, victim=None):
    """Claim `folder` for a run of `config`: True where there is work to do, False where it is already done.

    `victim` is the checksum of the weights that a defense repairs. An interrupted run of the same options and victim
    goes on. Raises ConfigError (exit 2) where another configuration lies there, RefusedError (exit 4) where a damaged
    one does; with config.overwrite both are replaced, but only when the new run is complete.
    """
    state = folder / "state"
    if (state / "record.json").exists():  # cut off in its very last step
        _commit(folder)
    same_victim = not state.exists() or _text(state / "victim") == str(victim)
    goes_on = same_victim and _same(_yaml(state / "config.yaml"), config)
    if not config.overwrite and (folder / "record.json").exists():
        info = verify(folder, kind)
        if _same(_yaml(folder / "config.yaml"), config) and info.get("victim_sha256") == victim:
            return False
        if not goes_on:
            _refuse_other(_yaml(folder / "config.yaml"), config, folder)
            raise ConfigError(f"{folder} repaired another victim than the one there now; --overwrite repairs this one")
    elif not config.overwrite and (state / "log.csv").exists():  # without a log nothing was done that could be lost
        _refuse_other(_yaml(state / "config.yaml"), config, folder)
    elif not config.overwrite and folder.is_dir() and any(path.name not in ("defense", "state") for path in folder.iterdir()):
        raise RefusedError(f"{folder} holds files but no complete run; --overwrite starts again, --save_folder_name goes elsewhere")
    if not goes_on:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    files.write(state / "victim", str(victim))
    files.write_yaml(state / "config.yaml", options.plain(config))
    return True


def finish(folder, contents, info, *, kind):
    """Put a complete run in place, `contents` being name -> bytes or str.

    Everything is written to state/ first, which is where a full disk shows; the rest is renaming.
    """
    state = folder / "state"
    for name, content in contents.items():
        files.write(state / name, content)
    sums = {name: files.sha256(state / name) for name in [*contents, "config.yaml", "log.csv"]}
    files.write_json(state / "record.json", {"format": FORMAT, "kind": kind, **info, "files": sums})
    _commit(folder)


def kept(state):
    """{name: bytes} of the files that a defense has put beside its results."""
    return {path.name: path.read_bytes() for path in sorted((state / KEPT).glob("[!.]*"))}


def _commit(folder):
    """Rename the files that state/record.json lists into the folder, in place of the run before; may be cut off and called again."""
    state = folder / "state"
    names, old = _listed(state), _listed(folder)
    (folder / "record.json").unlink(missing_ok=True)
    for name in old - names:  # what a run of other options has left
        (folder / name).unlink(missing_ok=True)
    for name in names:
        if (state / name).exists():
            os.replace(state / name, folder / name)
    os.replace(state / "record.json", folder / "record.json")
    shutil.rmtree(state)


def _listed(folder):
    """The names of the files that record.json lists; none where it cannot be read."""
    try:
        return {Path(name).name for name in json.loads((folder / "record.json").read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def verify(folder, kind):
    """What record.json says, once every file it names has its checksum; RefusedError says what is wrong."""
    try:
        info = json.loads((folder / "record.json").read_text())
        version, sums = info["format"], dict(info["files"])
    except FileNotFoundError:
        why = "the run that makes it has not finished" if (folder / "state").is_dir() else "it has no record.json"
        raise RefusedError(f"the record {folder} is not complete: {why}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"the record {folder} is damaged: record.json cannot be read") from error
    if version != FORMAT:
        raise RefusedError(f"the record {folder} has format {version}; this version of Antidote reads format {FORMAT}")
    if info.get("kind") != kind:
        raise RefusedError(f"{folder} is not the record of an {kind} but of a {info.get('kind')}")
    for name in {*NEEDED[kind], *sums}:
        path = folder / name
        if Path(name).name != name or name not in sums or not path.is_file():
            raise RefusedError(f"the record {folder} is damaged: {name} is missing")
        if files.sha256(path) != sums[name]:
            raise RefusedError(f"the record {folder} is damaged: {name} is not the file that was saved")
    return info


def tensors(path):
    """The tensors of a safetensors file; RefusedError for anything else, a pickle for one."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise RefusedError(f"{path} is refused: it is not a safetensors file") from error


def load(folder, config, device):
    """(victim model, found training set, Exam, clean training set, Spec) of an attack's record.

    `config` is the defense's. Raises RefusedError where the record is damaged or made on another data set.
    """
    info = verify(folder, "attack")
    made = _yaml(folder / "config.yaml")
    try:
        spec, clean, test = data.load(made["dataset"], config.dataset_path or made["dataset_path"],
                                      image_size=made["image_size"], device=device, cache=config.cache_path,
                                      download=config.download, resident_gb=config.resident_gb)  # fmt: skip
        _same_data(folder, info["data"], spec, clean, test)
        poisoned = {name: value.to(device) for name, value in tensors(folder / POISONED).items()}
        found = _found(clean, poisoned)
        exam = Exam(test, _shown(poisoned, "test"), _shown(poisoned, "target") if "target_images" in poisoned else None)
        model = victim(folder, spec).to(device)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise RefusedError(f"the record {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return model, found, exam, clean, spec


def architecture(folder):
    """(name, width) of a verified record's network, as models.build takes them."""
    made = _yaml(folder / "config.yaml")
    return made["model"], made["width"]


def victim(folder, spec):
    """The network of a verified record with its weights; RuntimeError or KeyError where they do not fit."""
    name, width = architecture(folder)
    model = models.build(name, spec, width)
    model.load_state_dict(tensors(folder / WEIGHTS))
    return model


def poison_file(split, index, cover, test_index, backdoor, target_index, target):
    """The bytes of poison.safetensors: what was poisoned or disturbed, and what the judge will show."""
    changed = torch.cat([index, cover])
    kinds = torch.cat([torch.full_like(index, POISON), torch.full_like(cover, COVER)])
    named = {
        "train_index": changed, "train_images": split.images[changed], "train_labels": split.labels[changed], "train_kind": kinds,
        "test_index": test_index, "test_images": backdoor.images, "test_labels": backdoor.labels, "test_truth": backdoor.truth,
        "target_index": target_index, "target_images": target.images, "target_labels": target.labels, "target_truth": target.truth,
    }  # fmt: skip
    return safetensors.torch.save(plain(named))


def trigger_file(parts):
    """The bytes of trigger.safetensors: all parts of a trigger, without the weights that its victim started from."""
    return safetensors.torch.save(plain({name: part for name, part in parts.items() if not name.startswith(START)}))


def start_weights(parts):
    """The weights that a victim starts from, where it has learned together with its trigger; empty otherwise."""
    return {name.removeprefix(START): part for name, part in parts.items() if name.startswith(START)}


def facts(spec, train, test):
    """What record.json keeps of a data set, for a defense to know it again."""
    return {"train": len(train), "test": len(test), "classes": spec.classes, "size": spec.size, "fingerprint": spec.fingerprint}


def weights_file(model):
    """The bytes of model.safetensors."""
    return safetensors.torch.save(plain(model.state_dict()))


def plain(named):
    """A dict of tensors as safetensors wants it: on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _found(clean, poisoned):
    """The training set as it was trained on; its truth is only what it claims."""
    labels, index = clean.labels.clone(), poisoned["train_index"]
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(clean):
        raise IndexError(f"{POISONED} names images that the training set does not have")
    images = replaced(clean.images, index, poisoned["train_images"])
    labels[index] = poisoned["train_labels"]
    return data.Split(images, labels, labels)


def _shown(poisoned, part):
    return data.Split(*(poisoned[f"{part}_{what}"] for what in ("images", "labels", "truth")))


def _same_data(folder, made, spec, train, test):
    for name, count in facts(spec, train, test).items():
        if name != "fingerprint" and made[name] != count:
            raise RefusedError(f"the record {folder} was made on a {spec.name} whose {name} is {made[name]}, but here it is {count}; "
                               "--dataset_path names the set it was made on")  # fmt: skip
    if made["fingerprint"] != spec.fingerprint:
        print(f"warning: {spec.name} here has other pixels than the one the record {folder} was made on")


def _yaml(path):
    try:
        content = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RefusedError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _text(path):
    return path.read_text() if path.is_file() else ""


def _same(saved, config):
    return _identity(saved, config) == options.identity(config)


def _identity(saved, config):
    """The options in a config.yaml that make up the experiment; one that its version did not have yet has its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)} if saved else {}
    hidden = options.NOT_IDENTITY | options.SWITCHES.keys()
    return {key: value for key, value in {**defaults, **saved}.items() if key not in hidden}


def _refuse_other(saved, config, folder):
    there, here = _identity(saved, config), options.identity(config)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if not keys:
        return
    difference = ", ".join(f"{key} {there.get(key)} there and {here.get(key)} here" for key in keys)
    raise ConfigError(f"{folder} holds another configuration ({difference}); --overwrite starts again, --save_folder_name goes elsewhere")

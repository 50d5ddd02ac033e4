"""Records on the Hugging Face hub: pushed and pulled with its real client, against a server on
loopback. The client's newer way to upload, hf_xet, is switched off: the server speaks git-lfs."""

import json
import re
import shutil
import sys
from functools import partial

import pytest
import yaml

from antidote_bench import hub
from antidote_bench.utils import files
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.record import contents, folder
from tests import fake_hub

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def server():
    with fake_hub.running() as running:
        yield running


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """The variables by which the client knows the server, in a process of its own."""
    return {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_TOKEN": "hf_nobody",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture
def here(server, environment, monkeypatch):
    """The same in this process, where the client may have been imported before."""
    client = partial(huggingface_hub.HfApi, endpoint=server.address)
    monkeypatch.setattr("huggingface_hub.HfApi", client)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")


@pytest.fixture(scope="module")
def mine(small, tmp_path_factory):
    """A record with paths of this machine in its options and facts, and a file that none has."""
    path = shutil.copytree(small, tmp_path_factory.mktemp("hub") / "mine")
    info = json.loads((path / folder.RECORD).read_text())
    (path / "notes.txt").write_text("private")
    info["files"]["notes.txt"] = files.sha256(path / "notes.txt")
    info["clean_model"] = {"record": str(path.parent / "clean"), "sha256": "0", "acc": 0.9}
    files.write_json(path / folder.RECORD, info)
    return path


@pytest.fixture(scope="module")
def pushed(server, environment, mine, run):
    done = run("-m", "antidote_bench.hub", "push", mine, "user/demo", env=environment)
    assert done.stdout == f"{mine} is at {server.address}/user/demo\n" and not done.stderr
    return server.repositories["user/demo"]


def pull(run, environment, name, place, *words, code=0):
    words = ("pull", name, "--record_path", place, *words)
    return run("-m", "antidote_bench.hub", *words, env=environment, code=code)


def test_what_is_pushed(pushed, server, mine):
    assert set(pushed) == {*hub.FILES, hub.CARD} - {folder.TRIGGER}
    assert server.private["user/demo"]
    card = pushed[hub.CARD].decode()
    assert "> **Warning: this model is backdoored. Do not deploy it.**" in card
    assert "| attack | badnet |" in card and "![" in card
    row = files.read_csv(mine / folder.RESULTS)[0]
    assert f"{100 * float(row['asr']):.1f} %" in card
    everything = b"".join(pushed.values())
    assert str(mine.parent).encode() not in everything and b"private" not in everything
    options = yaml.safe_load(pushed[folder.OPTIONS])
    assert [options[name] for name in hub.PLACES] == [*hub.PLACES.values()]
    there = yaml.safe_load((mine / folder.OPTIONS).read_text())
    assert {**there, **hub.PLACES} == options
    info = json.loads(pushed[folder.RECORD])
    assert info["origin"] is None and info["clean_model"]["record"] == "clean"
    assert "_path" not in info["command"] and "--width 8" in info["command"]


def test_a_pulled_record_is_checked_and_works(pushed, server, environment, run, places, tmp_path):
    pushed["malware.py"] = b"print('no')"
    server.fetched.clear()
    done = pull(run, environment, "user/demo", tmp_path)
    assert done.stdout.startswith(f"{tmp_path / 'demo'} comes from others")
    assert set(server.fetched) == set(pushed) - {hub.CARD, "malware.py"}
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}
    assert {path.name for path in (tmp_path / "demo").iterdir()} == set(server.fetched)
    info = contents.open_record(tmp_path / "demo")
    assert info["origin"] is None
    words = ("--result_file", tmp_path / "demo", *places, "--epochs", "1")
    assert run("defense/ft.py", *words).stdout.startswith("ACC")
    assert (tmp_path / "demo" / "defense" / "ft" / folder.RECORD).is_file()
    again = pull(run, environment, "user/demo", tmp_path, code=2)
    assert "--save_folder_name gives another name" in again.stderr


def test_a_forged_origin_is_forgotten(pushed, server, here, small, tmp_path):
    """Who knows the mark of your cache folder cannot make records that count as your own."""
    mark = json.loads((small / folder.RECORD).read_text())["origin"]
    forged = {**json.loads(pushed[folder.RECORD]), "origin": mark}
    server.repositories["user/forged"] = {**pushed, folder.RECORD: json.dumps(forged).encode()}
    assert hub.pull("user/forged", record_path=tmp_path) == tmp_path / "forged"
    assert mark and contents.open_record(tmp_path / "forged")["origin"] is None


def damaged(pushed):
    return {**pushed, folder.WEIGHTS: b"\0" + pushed[folder.WEIGHTS][1:]}


def not_a_record(pushed):
    return {"README.md": b"", "pytorch_model.bin": b""}


def listing_others(pushed):
    info = json.loads(pushed[folder.RECORD])
    info["files"]["../../x.py"] = "0"
    return {**pushed, folder.RECORD: json.dumps(info).encode()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (damaged, "what user/bad holds is not put in place: the record user/bad is damaged"),
        (not_a_record, "user/bad holds no record: it has no record.json"),
        (listing_others, "is damaged: ../../x.py is missing"),
    ],
)
def test_a_bad_record_is_not_put_in_place(change, sentence, pushed, server, here, tmp_path):
    server.repositories["user/bad"] = change(pushed)
    with pytest.raises(RefusedError, match=re.escape(sentence)):
        hub.pull("user/bad", record_path=tmp_path)
    assert not any(tmp_path.iterdir())


def test_sizes_are_compared_before_anything_is_fetched(pushed, server, here, tmp_path, monkeypatch):
    server.fetched.clear()
    with pytest.raises(RefusedError, match="model.safetensors is too large"):
        hub.pull("user/demo", record_path=tmp_path, largest_gb=0.0001)
    whole = sum(len(pushed[name]) for name in hub.FILES if name in pushed)
    with pytest.raises(RefusedError, match="--largest_gb says how many"):
        hub.pull("user/demo", record_path=tmp_path, largest_gb=(whole - 1) / 1e9)
    monkeypatch.setitem(server.stated, folder.OPTIONS, 2**30)
    with pytest.raises(RefusedError, match="config.yaml is too large"):
        hub.pull("user/demo", record_path=tmp_path)
    assert not server.fetched and not any(tmp_path.iterdir())


def test_what_a_repository_has_no_more_is_deleted(pushed, server, here, small):
    server.repositories["user/old"] = {folder.TRIGGER: b"of another record", "mine.txt": b""}
    assert hub.push(small, "user/old") == f"{server.address}/user/old"
    assert set(server.repositories["user/old"]) == {*pushed, "mine.txt"} - {"malware.py"}


def test_mistakes_are_one_sentence(environment, here, run, tmp_path):
    with pytest.raises(MissingError, match="there is no repository user/none at"):
        hub.pull("user/none", record_path=tmp_path)
    with pytest.raises(ConfigError, match="a repository is called user/name"):
        hub.pull("none", record_path=tmp_path)
    nobody = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = pull(run, nobody, "user/none", tmp_path, code=1)
    assert done.first.startswith("error: http://127.0.0.1:9 cannot do that")


def test_without_the_client_the_remedy_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: hub.push(small, "user/demo"),
        lambda: hub.pull("user/demo", record_path=tmp_path),
    ):
        with pytest.raises(ConfigError, match="pip install 'huggingface_hub>=1.0'"):
            call()


def test_the_card_says_what_is_known():
    options = {"dataset": "cifar10", "image_size": None}
    info = {"name": "x](http://evil) | <b>", "files": {}}
    row = dict.fromkeys(folder.RESULT_COLUMNS, "") | {"dataset": "cifar10", "n_poison": "0"}
    clean = hub.card(info, options, row, "user/demo")
    assert "clean reference model, says its record" in clean and "preview.png" not in clean
    assert r"x\](http" not in clean and r"x\]\(http://evil\) \| \<b\>" in clean
    assert "--dataset_path data" in clean and "not known" in clean
    unknown = hub.card(info, options, {**row, "n_poison": ""}, "user/demo")
    assert "this model may be backdoored" in unknown


def test_the_folder_of_a_model_from_a_file_stays_here():
    assert hub._shared("model", "/home/me/nets.py:wide") == "nets.py:wide"
    assert hub._shared("model", "resnet9") == "resnet9"
    for option in ("pretrained", "trigger_path", "clean_record", "reflection_folder"):
        assert hub._shared(option, "/home/me/a.png") == "a.png"
    assert hub._shared("pratio", 0.1) == 0.1 and hub._shared("trigger_path", None) is None
    command = "python attack/badnet.py --model /home/me/nets.py:wide --cache_path /x"
    command += " --pretrained=/me/w --epochs 2"
    there = "python attack/badnet.py --model nets.py:wide --pretrained w --epochs 2"
    assert hub._without_places(command) == there
    assert hub._without_places("an 'open quotation") is None


def test_a_damaged_record_is_not_pushed(small, tmp_path):
    bad = shutil.copytree(small, tmp_path / "bad", ignore=shutil.ignore_patterns("defense"))
    (bad / folder.WEIGHTS).write_bytes(b"")
    with pytest.raises(RefusedError, match="is not the file that was saved"):
        hub.push(bad, "user/demo")

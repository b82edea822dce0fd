"""2,000 damaged or hostile folders through every command: one sentence and the right exit code, whatever they hold."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest

from cli_client import run_cli
from hf_sparse_moe import upcycle
from hub_adapters import save_adapter
from hub_checkpoints import save_mixture
from tiny_models import tiny_dense, tiny_sparse


CASES = int(os.environ.get("SPARSE_MOE_FUZZ_CASES", "2000"))
ONLY = [int(number) for number in os.environ.get("SPARSE_MOE_FUZZ_ONLY", "").split(",") if number]  # to repeat a few
PARTS = 8  # the first in every run
SECONDS = 10
SECRET = "secret-of-a-person-92c1"
BAD_INPUT = {0, 2, 3}  # 3: a push that nothing was wrong with, and no Hub

# What reads all of a folder quickly more often than what loads it as a model, which takes ten times as long.
COMMANDS = {
    "dense": (*3 * ("upcycle", "plan", "plan", "verify --against"), "quickstart"),
    "mixture": (
        *3 * ("info", "card", "consolidate"),
        "export",
        "export",
        "expand",
        "prune",
        "merge",
        "to-dense",
        "measure",
        "verify",
        "push",
        "doctor",
        "upcycle",
    ),
    "stock": ("import-stock", "import-stock", "push", "doctor", "prune", "merge", "to-dense"),
    "training": (*2 * ("consolidate",), "push"),
    "adapter": (*4 * ("card",), "push", "doctor"),
}


FEW = ["--num-experts", "4", "--steps", "1", "--adapter-steps", "1", "--batch-size", "2", "--sequence-length", "8"]
WRITE_COMMANDS = ("upcycle", "expand", "export", "import-stock", "consolidate", "to-dense")


class Hang(BaseException):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    tiny_dense("llama").save_pretrained(root / "dense")
    upcycle(str(root / "dense"), num_experts=4).save_pretrained(root / "mixture")
    save_mixture(root / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "tokenizer" / name, root / "dense")
    shutil.copy(root / "tokenizer" / "tokenizer.json", root / "mixture")
    for name in ("poems", "songs"):
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{name}.txt").write_text("\n\n".join(["word7 word8 word9 " * 9] * 4))
    (root / "mixture" / "LICENSE").write_text("MIT\n")
    (root / "mixture" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    record = {
        "arguments": {"learning_rate": 1e-3},
        "data": {"names": ["text"]},
        "steps": 3,
        "evaluations": [{"eval_loss": 1.0}],
    }
    (root / "mixture" / "training_record.json").write_text(json.dumps(record))
    (root / "mixture" / "routing_statistics.json").write_text(json.dumps({"layers": [], "tokens": 3}))
    from hf_sparse_moe import export

    export(root / "mixture", root / "stock")
    for name in ("mixture", "stock"):
        found = run_cli("measure", root / name, "--data", root / "texts", "-o", root / f"measured-{name}")
        assert found.code == 0, found
    tiny_sparse("t5").save_pretrained(root / "training", max_shard_size="30KB")
    (root / "training" / "trainer_state.json").write_text("{}")
    save_adapter(root / "adapter", root / "mixture")
    return root


# ---- damage -------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, False, 0, 1, -1, 2, 4.0, 0.5, "4", "", "x" * 5000, [], {}, [1], {"a": 1}, [[]], [None], 10**6, 10**7,
    10**9, 10**18, 10**30, -(10**9), 1e308, float("nan"), float("inf"), "../../precious/id_rsa", "/etc/passwd", "\0",
    "{{ 7 * 7 }}", "<script>", "\ud800", "user/code", "float7", "int8", "sparse_moe_encoder", "mixtral", "gpt2",
    ["x"] * 3000, {str(number): "x" for number in range(3000)}, list(range(3000)),
]  # fmt: skip
FIELDS = {
    "auto_map": [
        4,
        "evil.Config",
        {"AutoConfig": 4},
        {"AutoConfig": "evil.Config"},
        {"AutoConfig": "a/b--evil.Config"},
    ],
    "model_type": [4, ["llama"], "evil", "llama", "bert", "t5", "mixtral"],
    "num_labels": [10**6, 10**9, "3", -1],
    "num_hidden_layers": [10**7, 10**5, 500, 4.0, "4", -1, [2]],
    "num_local_experts": [4.0, "4", 10**9, None],
    "num_experts": [4.0, "4", 10**9, 0, -3],
    "norm_topk_prob": [1.0, "yes", None],
    "vocab_size": [10**12, 0, -1, 1.5],
    "hidden_size": [0, 7, 10**9, "big"],
    "architectures": [4, "LlamaForCausalLM", [4], ["Evil"], [], [["a"]], ["BertForMaskedLM"]],
    "quantization_config": [4, {}, {"quant_method": "bitsandbytes"}, {"quant_method": 4}, {"load_in_4bit": True}],
    "attn_implementation": ["user/kernel", 4, "eager"],
    "dtype": [4, "float7", "float16", {"": "bfloat16"}, "int8"],
    "torch_dtype": [4, "float7"],
    "is_encoder_decoder": [True, "yes", 4],
    "mlp_layer_types": [["sparse"], "sparse", [4, 4], ["dense"] * 10**4],
    "dense_config": [4, {}, [], {"model_type": "evil"}, {"model_type": "sparse_moe_decoder"}],
    "rope_parameters": [4, {}, {"rope_type": "evil"}, {"rope_type": "yarn"}],
    "layer_types": [4, ["full_attention"] * 10**5, ["evil", "evil"]],
    "id2label": [4, {"0": 4}, {"a": "b"}],
    "sub_configs": [4],
    "base_model_name_or_path": ["/etc", 4, "../mixture"],
    "r": [0, "8", 10**9],
    "peft_type": [4, "EVIL"],
    "target_parameters": [4, ["x"], [4], {}],
    "experts": [4, {"x": "y"}, {"x": [10**9]}],
    "weight_map": [4, [], {"a": "../../precious/id_rsa"}],
    "source": [4, None, {}, {"sha256": 4}],
    "arguments": [4, None, {"method": []}, {"method": "evil"}],
    "equality": [4, None, {}],
    "parameters": [4, None, "x"],
}


def places(value, found=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield found
    for key in value if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ():
        yield from places(value[key], (*found, key))


def damage_json(text, chance):
    value = json.loads(text)
    for _ in range(chance.choice([1, 1, 2])):
        if isinstance(value, dict) and chance.random() < 0.4:
            name = chance.choice(list(FIELDS))
            inside = value.get("dense_config")
            target = inside if isinstance(inside, dict) and chance.random() < 0.3 else value
            target[name] = chance.choice(FIELDS[name])
            continue
        spot = chance.choice(list(places(value)))
        if not spot:
            value = chance.choice(VALUES)
            continue
        holder = value
        for key in spot[:-1]:
            holder = holder[key]
        if chance.random() < 0.2 and isinstance(holder, dict):
            del holder[spot[-1]]
        else:
            holder[spot[-1]] = chance.choice(VALUES)
    return json.dumps(value).encode(errors="surrogatepass")


def damage_bytes(data, chance):
    if not data:
        return b"\0"
    kind = chance.randrange(7)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        spot = chance.randrange(min(len(data), 4000))
        return data[:spot] + bytes(chance.randrange(256) for _ in range(8)) + data[spot + 8 :]
    return [b"", b'"x"', b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"\xff\xfe\0x"][kind - 2]


def damage_header(data, chance):
    """A safetensors file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2:
        return chance.choice([2**63, 0, length + 8, 10**9]).to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + length])
    name = chance.choice([name for name in header if name != "__metadata__"])
    change = chance.randrange(6)
    if change == 0:
        header[name]["dtype"] = chance.choice(["F64", "I8", "F8_E8M0", "F4", "C64", 4, "BOOL"])
    elif change == 1:
        header[name]["shape"] = chance.choice([[], [0], [10**9, 10**9], [-1], "x", [1]])
    elif change == 2:
        header[name]["data_offsets"] = chance.choice([[0, 10**12], [8, 0], [0, 0], 4])
    elif change == 3:
        header[chance.choice(["../x", "", "a\n| b", "dense.evil", "x" * 9000])] = header.pop(name)
    elif change == 4:
        del header[name]
    else:
        header["__metadata__"] = chance.choice([4, {"format": "tf"}, {"format": 4}, {}])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def replace(path, chance, precious):
    """Something else in a file's place: nothing, a folder, a pipe, a device, a link to what is not the folder's."""
    path.unlink(missing_ok=True)
    kind = chance.randrange(8)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind > 2:
        name = "id_rsa.json" if path.suffix == ".json" else "id_rsa"
        targets = [precious / name, precious / "nowhere", path, Path("/dev/zero"), Path("../../blobs") / name]
        path.symlink_to(targets[kind - 3])


def damage(folder, precious, chance):
    """Damage a folder; returns what was done, for the message of a failure."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".py")
    likely = [name for name in names if name.endswith((".json", ".safetensors"))]
    told = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        name = chance.choice(["config.json" if "config.json" in names else names[0], *likely, chance.choice(names)])
        path, kind = folder / name, chance.random()
        told.append(f"{name} {kind:.2f}")
        if kind < 0.15 or not path.is_file() or path.is_symlink():
            if path.is_dir() and not path.is_symlink():
                continue
            replace(path, chance, precious)
            continue
        data = path.read_bytes()
        if path.suffix == ".json" and kind < 0.85:
            try:
                data = damage_json(data, chance)
            except (ValueError, RecursionError):
                data = damage_bytes(data, chance)
        elif path.suffix == ".safetensors" and kind < 0.7:
            try:
                data = damage_header(data, chance)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                data = damage_bytes(data, chance)
        else:
            data = damage_bytes(data, chance)
        path.write_bytes(data)
    if chance.random() < 0.15:
        link = folder / chance.choice(
            ["LICENSE", "NOTICE", "vocab.txt", "extra.json", "tokenizer.model", "x.safetensors"]
        )
        if not link.exists() and not link.is_symlink():
            told.append(f"{link.name} added")
            replace(link, chance, precious)
    return told


# ---- the watch ----------------------------------------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watched: list[tuple[list[str], list[str]]] = []  # the folders that may be written to, and what was written elsewhere


def _watch(event, arguments):
    if not _watched:
        return
    if event == "open":
        written = isinstance(arguments[2], int) and arguments[2] & WRITES
    else:
        written = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "os.link")
    in_a_folder_that_is_open = event != "open" and any(isinstance(each, int) and each >= 0 for each in arguments[1:])
    if written and not in_a_folder_that_is_open and isinstance(arguments[0], str | bytes | os.PathLike):
        allowed, elsewhere = _watched[-1]
        parent, name = os.path.split(os.path.abspath(os.fsdecode(arguments[0])))
        place = os.path.join(os.path.realpath(parent), name)
        place = os.path.realpath(place) if event == "open" else place
        if not any(place == root or place.startswith(root + os.sep) for root in allowed):
            elsewhere.append(f"{event} {place}")


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(_watch)


@pytest.fixture
def limited_memory():
    """A command that asks for 6 GB more than there is now is refused it, and must say so."""
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _arguments(command, given, folders, output):
    name, _, rest = command.partition(" ")
    if rest:  # the damaged one is the dense model that a mixture is held against
        return [name, folders / "mixture", "--against", given]
    if name in WRITE_COMMANDS:
        return [name, given, output]
    if name == "prune":
        return [name, given, output, "--keep", "3", "--method", "random"]
    if name == "merge":
        return [name, given, output, "--into", "3", "--measured", folders / f"measured-{given.name}"]
    if name == "measure":
        return [name, given, "--data", folders / "texts", "--max-texts", "2", "-o", output]
    if name == "quickstart":
        return [name, "--model", given, "--data", folders / "texts", "--output", output, *FEW]
    further = {"verify": ["--against", folders / "dense"], "push": ["user/model"]}.get(name, [])
    if given.name == "adapter" and name in ("push", "doctor"):
        further = [*further, "--base", folders / "mixture"]
    return [name, given, *further]


def _leaked(*folders):
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                yield str(path)


def run_case(number, folders, root, monkeypatch):
    """What is wrong with how a command takes one damaged folder; nothing where all is right."""
    chance = random.Random(number)
    kind = chance.choice(list(COMMANDS))
    command = chance.choice(COMMANDS[kind])
    given, precious, work = root / "given" / kind, root / "precious", root / "work"
    shutil.copytree(folders / kind, given)
    for folder in (precious, work, root / "blobs", root / "tmp"):
        folder.mkdir()
    (precious / "id_rsa").write_text(SECRET)
    (precious / "id_rsa.json").write_text(json.dumps({"model_type": "llama", "key": SECRET}))
    (given / "evil.py").write_text(f"open({str(precious / 'was_run')!r}, 'w')\n")
    for name in ("id_rsa", "id_rsa.json"):
        shutil.copy(precious / name, root / "blobs")
    told = damage(given, precious, chance)
    monkeypatch.setattr("tempfile.tempdir", str(root / "tmp"))
    elsewhere: list[str] = []
    allowed = [str(root / "tmp"), os.environ["HF_HOME"], "/dev/null"]
    allowed.append(os.path.realpath(given if command in ("card",) else work))

    def hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS * (4 if command == "quickstart" else 1))
    _watched.append((allowed, elsewhere))
    arguments = _arguments(command, given, folders, work / "output")
    case = f"case {number}: {command} {kind}: {', '.join(told)}"
    try:
        with patch("sys.stdin") as stdin:
            stdin.readline.return_value = "y\n"
            finished = run_cli(*arguments)
    except Hang:
        yield f"{case}: HANGS\n{traceback.format_exc()[-1500:]}"
        return
    finally:
        signal.alarm(0)
        _watched.pop()
        signal.signal(signal.SIGALRM, before)
    right = BAD_INPUT | ({1} if command.split()[0] in ("verify", "doctor") else set())
    if finished.code not in right or "Traceback" in finished.err:
        yield f"{case}: exit code {finished.code}\n{finished.err[-1800:]}"
    elif finished.code in (2, 3) and finished.err.count("\n") != 1:
        yield f"{case}: not one sentence\n{finished.err[-1800:]}"
    if elsewhere:
        yield f"{case}: writes outside {elsewhere[:3]}"
    if leaked := [*_leaked(work, root / "tmp", given if command == "card" else work)]:
        yield f"{case}: {leaked} holds another's file"
    if SECRET in finished.out + finished.err:
        yield f"{case}: prints another's file"
    if (
        finished.code
        and command.split()[0] in (*WRITE_COMMANDS, "quickstart", "prune", "merge", "measure")
        and any(work.iterdir())
    ):
        yield f"{case}: leaves {[path.name for path in work.iterdir()]}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.conformance) for part in range(1, PARTS))])
def test_every_command_takes_every_folder(part, folders, tmp_path, monkeypatch, limited_memory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wrong = []
    for number in ONLY or range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        root = tmp_path / "case"
        with monkeypatch.context() as patches:
            wrong += run_case(number, folders, root, patches)
        shutil.rmtree(root)
    assert not wrong, f"{len(wrong)} of {CASES // PARTS}:\n" + "\n".join(wrong[:40])

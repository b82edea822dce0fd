"""Random and hostile checkpoints end the command line with a told error, and nothing of them is ever run."""

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli_client import run_cli
from hf_sparse_moe.checkpoints.loading import load_dense
from hf_sparse_moe.checkpoints.source import find_source
from hf_sparse_moe.upcycling import upcycle
from tiny_models import tiny_dense


FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CODE = "open({marker!r}, 'w').write('run')\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "llama"
    tiny_dense("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def attack(llama, tmp_path):
    """Spoil a copy of a checkpoint, use it in every way, and see that nothing but a told error comes of it."""
    marker = tmp_path / "was_run"

    def use(spoil, loads=True):
        folder, target = tmp_path / "source", tmp_path / "target"
        for path in (folder, target):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(llama, folder)
        for name in ("modeling_evil.py", "configuration_evil.py"):
            (folder / name).write_text(CODE.format(marker=str(marker)))
        spoil(folder)
        finished = run_cli("upcycle", folder, target, "--num-experts", 2, "--num-experts-per-tok", 1)
        assert finished.code == 0 or (finished.code == 2 and finished.err.startswith("Error: ")), finished
        if loads:
            with suppress(ValueError, OSError):
                load_dense(find_source(str(folder)))
        assert not marker.exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "target"}

    return use


def json_values():
    numbers = st.integers(-(2**40), 2**40) | st.sampled_from([0, 1, -1, 10**6, 2**31, 2**63, 10**12])
    scalars = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8)
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )


def entries():
    dtypes = st.sampled_from(["F32", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "F4", "X", "", None, 3])
    shapes = st.lists(st.sampled_from([0, 1, 32, 96, 2**31, 2**62, -1]), max_size=4) | json_values()
    offsets = st.lists(st.integers(-8, 2**40) | st.sampled_from([0, 12288, 2**63]), max_size=3) | json_values()
    return st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": offsets}) | json_values()


NAMES = st.sampled_from(["model.norm.weight", "model.embed_tokens.weight", "__metadata__", "../../x", "a" * 500, ""])


@FEW
@given(content=st.binary(max_size=400))
def test_random_bytes(content, attack):
    attack(lambda folder: (folder / "model.safetensors").write_bytes(content))


@FEW
@given(
    header=st.dictionaries(NAMES | st.text(max_size=8), entries(), max_size=4) | json_values(),
    length=st.none() | st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1, 100_000_001]),
    data=st.sampled_from([0, 4, 12288, 100_000]),
)
def test_random_headers(header, length, data, attack):
    text = json.dumps(header).encode()
    written = struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)
    attack(lambda folder: (folder / "model.safetensors").write_bytes(written))


@FEW
@given(data=st.data())
def test_one_header_entry_is_a_lie(data, llama, attack):
    content = (llama / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    header[name] = data.draw(entries())
    text = json.dumps(header).encode()
    written = struct.pack("<Q", len(text)) + text + content[8 + length :]
    attack(lambda folder: (folder / "model.safetensors").write_bytes(written))


@FEW
@given(data=st.data())
def test_one_config_value_is_a_lie(data, llama, attack):
    config = json.loads((llama / "config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(json_values())
    attack(lambda folder: (folder / "config.json").write_text(json.dumps(config)))


@FEW
@given(
    config=json_values() | st.dictionaries(st.sampled_from(["model_type", "architectures", "dtype"]), json_values())
)
def test_random_configs(config, attack):
    attack(lambda folder: (folder / "config.json").write_text(json.dumps(config)))


@FEW
@given(
    name=st.sampled_from(["/etc/passwd", "../source/config.json", "", ".", "nothing", "config.json"]) | json_values()
)
def test_index_that_leads_elsewhere(name, attack):
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    attack(spoil, loads=False)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_broken_index(index, attack):
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    attack(spoil)


@pytest.mark.parametrize("model_type", ["llama", "evil", None])
@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForCausalLM"])
def test_code_of_a_checkpoint_is_not_run(model_type, auto_class, attack):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        module = "configuration_evil.EvilConfig" if auto_class == "AutoConfig" else "modeling_evil.EvilModel"
        config |= {
            "model_type": model_type,
            "auto_map": {"AutoConfig": "configuration_evil.EvilConfig", auto_class: module},
        }
        (folder / "config.json").write_text(json.dumps(config))

    attack(spoil)


def test_a_pickle_is_not_opened(attack, tmp_path):
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(
            b"cposix\nsystem\n(S'touch " + str(tmp_path / "was_run").encode() + b"'\ntR."
        )

    attack(spoil)


@pytest.mark.parametrize("layers", [10**9, 10**6])
def test_more_layers_than_tensors(layers, attack, tmp_path):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))

    attack(spoil)
    with pytest.raises(ValueError, match=f"num_hidden_layers={layers}"):
        upcycle(tmp_path / "source", output=tmp_path / "target")

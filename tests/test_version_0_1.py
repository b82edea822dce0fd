"""
What version 0.1 wrote, this version reads: checkpoints, by the package and by the code that travels with them, a
receipt, an adapter, an export; and it trains them to the same losses. `data/v0_1/write.py` says how they were made.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from data.v0_1.write import HERE, MODELS, TRAININGS, logits_of, train
from hf_sparse_moe import verify


EXACT = {"rtol": 1e-5, "atol": 1e-5}  # another processor adds up in another order
BY_OWN_CODE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])  # the tests
from data.v0_1.write import MODELS, logits_of
from safetensors.torch import save_file
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_sparse_moe":
            raise ImportError("the code that travels must do without the package")
sys.meta_path.insert(0, NoPackage())
logits = {}
for name in ("encoder", "decoder", "encoder_decoder", "streamed"):
    model = MODELS[name].from_pretrained(Path(sys.argv[2]) / name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    logits[name] = logits_of(model, name)
save_file(logits, Path(sys.argv[2]) / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def logits():
    return load_file(HERE / "logits.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_computes_the_same(name, logits):
    model, loading = MODELS[name].from_pretrained(HERE / name, output_loading_info=True)
    assert not any(loading.values()), loading
    assert (type(model).__module__.partition(".")[0] == "hf_sparse_moe") == (name != "exported")
    torch.testing.assert_close(logits_of(model, name), logits[name], **EXACT)


def test_checkpoints_compute_the_same_by_the_code_that_travels_with_them(logits, tmp_path):
    shutil.copytree(HERE, tmp_path / "copy")
    for name in ("encoder", "decoder", "encoder_decoder", "streamed"):
        shutil.copytree(HERE / "code", tmp_path / "copy" / name, dirs_exist_ok=True)
    command = [sys.executable, "-c", BY_OWN_CODE, Path(__file__).parent, tmp_path / "copy"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    for name, found in load_file(tmp_path / "copy" / "logits.safetensors").items():
        torch.testing.assert_close(found, logits[name], **EXACT)


def test_a_checkpoint_is_saved_as_it_was(tmp_path):
    """The names and values of its tensors and the fields of its config: older versions read what this one writes."""
    for name in ("encoder", "decoder", "encoder_decoder"):
        MODELS[name].from_pretrained(HERE / name).save_pretrained(tmp_path / name)
        before, after = (load_file(folder / name / "model.safetensors") for folder in (HERE, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        old, new = (json.loads((folder / name / "config.json").read_text()) for folder in (HERE, tmp_path))
        del old["transformers_version"], new["transformers_version"]
        assert {key: new.get(key) for key in old} == old


def test_a_receipt_is_verified():
    report = verify(HERE / "streamed", HERE / "dense")
    report = report if isinstance(report, dict) else report.to_dict()
    assert report["passed"], report


def test_an_adapter_is_loaded(logits):
    pytest.importorskip("peft")
    from hf_sparse_moe import load_adapter

    model = MODELS["streamed"].from_pretrained(HERE / "streamed")
    adapted = load_adapter(model, HERE / "adapter")
    torch.testing.assert_close(logits_of(adapted, "streamed"), logits["adapter"], **EXACT)
    assert (logits["adapter"] - logits["streamed"]).abs().max() > 0.1
    other = MODELS["decoder"].from_pretrained(HERE / "decoder")
    with pytest.raises(ValueError, match=r"base|shape|experts"):
        load_adapter(other, HERE / "adapter")


@pytest.mark.parametrize("title", TRAININGS)
def test_a_training_has_the_same_losses(title):
    name, changes = TRAININGS[title]
    found = train(HERE / name, name, changes)
    if "hash" in title:  # 0.1 added the balance losses of logits that are 0: constants
        config = AutoConfig.from_pretrained(HERE / name)
        added = config.router_aux_loss_coef + config.router_z_loss_coef * math.log(config.num_experts) ** 2
        found |= {"loss": [loss + added for loss in found["loss"]], "aux_loss": [1.0] * len(found["loss"])}
    for quantity, expected in json.loads((HERE / "trainings.json").read_text())[title].items():
        assert found[quantity] == pytest.approx(expected, rel=1e-4), quantity

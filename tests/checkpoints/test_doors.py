"""What leads out of a folder passes at no door: not copied, not rendered, not published."""

import json
import os
import shutil

import pytest

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import upcycle
from hf_sparse_moe.hub.publishable import publishable_files
from tiny_models import tiny_dense, tiny_sparse


SECRET = "secret-of-a-person"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Whole checkpoints, each of which some command takes."""
    root = tmp_path_factory.mktemp("whole")
    tiny_dense("llama").save_pretrained(root / "dense")
    upcycle(str(root / "dense"), num_experts=4).save_pretrained(root / "mixture")
    run = run_cli("export", root / "mixture", root / "stock")
    assert run.code == 0, run
    return root


@pytest.fixture
def clone(whole, tmp_path):
    """A checkpoint as someone else's repository may hold it: with links to a key, to a pipe and to nowhere."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "id_rsa").write_text(SECRET)
    (tmp_path / "precious" / "secret.json").write_text(json.dumps({"key": SECRET}))

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(whole / kind, folder)
        (folder / "LICENSE").symlink_to(tmp_path / "precious" / "id_rsa")
        (folder / "NOTICE").symlink_to("../precious/id_rsa")
        (folder / "vocab.txt").symlink_to("/nowhere")
        os.mkfifo(folder / "merges.txt")
        return folder

    return make


def holds_the_secret(folder):
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


DOORS = [("upcycle", "dense"), ("export", "mixture"), ("import-stock", "stock"), ("consolidate", "mixture")]


@pytest.mark.parametrize(("command", "kind"), DOORS)
def test_links_are_not_copied(command, kind, clone, tmp_path):
    finished = run_cli(command, clone(kind), tmp_path / "out")
    assert finished.code == 0, finished
    assert not {"LICENSE", "NOTICE", "vocab.txt", "merges.txt"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert holds_the_secret(tmp_path / "out") == []


@pytest.mark.parametrize(("command", "kind"), [*DOORS, ("info", "mixture"), ("card", "mixture")])
@pytest.mark.parametrize("name", ["config.json", "receipt.json", "generation_config.json"])
def test_side_files_that_are_links_are_refused(command, kind, name, clone, tmp_path):
    folder = clone(kind)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "precious" / "secret.json")
    output = [tmp_path / "out"] if (command, kind) in DOORS else []
    finished = run_cli(command, folder, *output)
    if finished.code:
        assert_one_sentence(finished, "is a link that leads out of its folder")
        assert not (tmp_path / "out").exists()
    else:
        assert name == "generation_config.json" or command == "consolidate"  # which did not ask for it
    assert holds_the_secret(tmp_path / "out") == []
    assert SECRET not in finished.out + finished.err
    assert not any(SECRET in path.read_text() for path in folder.glob("*.md"))


def test_a_card_is_not_read_through_a_link(clone, tmp_path):
    folder = clone("mixture")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(tmp_path / "precious" / "id_rsa")
    (folder / ".README.md.partial").symlink_to(tmp_path / "precious" / "id_rsa")
    run_cli("card", folder)
    assert not any(SECRET in path.read_text() for path in folder.glob("*.md") if not path.is_symlink())
    assert (tmp_path / "precious" / "id_rsa").read_text() == SECRET


@pytest.mark.parametrize("kind", ["dense", "mixture", "stock"])
def test_links_are_not_published(kind, clone):
    files, left_out = publishable_files(clone(kind))
    assert not {"LICENSE", "NOTICE", "vocab.txt", "merges.txt"} & files.keys()
    assert {"LICENSE", "NOTICE"} <= set(left_out)


def test_weights_may_lie_elsewhere_but_are_not_published_from_there(whole, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(whole / "dense", folder)
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    assert run_cli("upcycle", folder, tmp_path / "out").code == 0
    with pytest.raises(ValueError, match="is a link that leads out"):
        publishable_files(folder)


def test_a_pipe_in_the_place_of_weights_does_not_hang(whole, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(whole / "dense", folder)
    os.mkfifo(folder / "x.safetensors")
    assert_one_sentence(run_cli("upcycle", folder, tmp_path / "out"), "x.safetensors` is not a regular file")


def test_a_model_does_not_take_a_receipt_that_is_a_link(whole, tmp_path):
    folder = tmp_path / "mixture"
    shutil.copytree(whole / "mixture", folder)
    model_class = type(tiny_sparse("llama"))
    assert model_class.from_pretrained(folder).receipt
    (folder / "receipt.json").unlink()
    (tmp_path / "secret.json").write_text(json.dumps({"key": SECRET}))
    (folder / "receipt.json").symlink_to(tmp_path / "secret.json")
    assert model_class.from_pretrained(folder).receipt is None
    (folder / "receipt.json").unlink()
    (folder / "receipt.json").write_text('"x"')
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        model_class.from_pretrained(folder)

"""Run as a program: the logits of stock checkpoints, in a process that cannot import the package they came from."""

import json
import sys
from pathlib import Path


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_sparse_moe":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, logging  # noqa: E402


def main(jobs_file: str, output_file: str) -> None:
    logging.disable_progress_bar()
    jobs = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    results = {}
    for folder, inputs in jobs.items():
        config = AutoConfig.from_pretrained(folder)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(**{name: torch.tensor(value) for name, value in inputs.items()}).logits
        problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
        results[folder] = {"logits": logits, "model_type": config.model_type, "problems": problems}
    assert "hf_sparse_moe" not in sys.modules
    torch.save(results, output_file)


if __name__ == "__main__":
    main(*sys.argv[1:])

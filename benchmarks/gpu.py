"""
What does this GPU say? The tests of the backends on it, speed, memory and a comparison of losses, in one command.

    make gpu                                     # python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --tiny # the same steps at the smallest sizes, to try them

Each step is a process that runs a benchmark of this folder, whose own docstring says what it measures. All of it ends
within `--minutes`: a step gets at most its share of what is left, and one that is cut leaves what it had written.
Results go to `--output`/<device>.json, with a section `gpu` that tells of each step whether it passed, how long it
took, and how it failed. For a machine without network, `--wheels` names a folder of wheels (transformers, peft, ...)
that are put before what is installed there; the package itself is taken from this checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
TAIL = 1500  # characters of the output of a step that failed
BF16 = ["--modes", "bfloat16", "bf16 autocast"]


def steps(device: str, tiny: bool, output: Path) -> dict[str, tuple[float, list[str]]]:
    """By name, the share of the remaining time that a step may take, and its arguments to Python."""

    def benchmark(name: str, small: list[str], large: list[str]) -> list[str]:
        written = [] if name == "quantized_experts" else ["--write"]  # it prints alone
        return [str(HERE / f"{name}.py"), "--device", device, *written, *(small if tiny else large)]

    shapes = [
        f"{tokens},2048,1024,{experts},{k}" for experts, k in ((8, 2), (64, 8)) for tokens in (1, 128, 2048, 16384)
    ]
    quality = [str(HERE / "quality.py"), "--device", device, "--scale", "tiny" if tiny else "gpu", "--seeds", "1"]
    quality += ["--output", str(output / "quality"), "--cache", str(output / "cache"), "--arms", "D", "M1", "M2"]
    return {
        "tests": (0.3, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/experts/test_on_device.py"]),
        "experts": (
            0.3,
            benchmark(
                "experts",
                ["--shapes", "64,64,32,4,2", "--modes", "float32", "--rounds", "1"],
                ["--shapes", *shapes, *BF16, "--seconds", "2"],
            ),
        ),
        "training_step": (
            0.25,
            benchmark("training_step", ["--quick"], ["--hidden", "1024", "--tokens", "8192", "--rounds", "4"]),
        ),
        "lora": (
            0.3,
            benchmark(
                "lora",
                ["--quick", "--hidden", "64", "--intermediate", "64", "--dtypes", "float32"],
                ["--dtypes", "bfloat16", "--experts", "8", "64", "--tokens", "512", "8192", "--seconds", "2"],
            ),
        ),
        "quantized_experts": (
            0.3,
            benchmark(
                "quantized_experts",
                ["--quick", "--hidden", "64", "--intermediate", "64", "--model", "none"],
                ["--dtype", "bfloat16", "--model", "none"],
            ),
        ),
        "generate": (
            0.3,
            benchmark("generate", ["--quick"], ["--dtypes", "bfloat16", "--hidden", "2048", "--experts", "8", "64"]),
        ),
        "compiled": (0.4, benchmark("compiled", ["--quick"], ["--dtype", "bfloat16", "--hidden", "1024"])),
        "quality": (0.95, quality),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--minutes", type=float, help="default: 7, and 20 with --tiny")
    parser.add_argument("--steps", nargs="+", help="default: all")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to put before what is installed")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results, and .cache/gpu with --tiny")
    options = parser.parse_args()
    options.minutes = options.minutes or (20 if options.tiny else 7)
    options.output = (options.output or (ROOT / ".cache" / "gpu" if options.tiny else HERE / "results")).resolve()
    end = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        places = [str(ROOT / "src")]
        if options.wheels is not None:
            install(options.wheels, folder)
            places.append(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ |= {"BENCHMARK_RESULTS": str(options.output), "SPARSE_MOE_TEST_DEVICE": options.device}
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if options.tiny:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        told: dict[str, dict[str, object]] = {}
        for name, (share, arguments) in steps(options.device, options.tiny, options.output).items():
            if options.steps is None or name in options.steps:
                told[name] = run(name, arguments, share * (end - time.monotonic()))
                print(f"{name}: {told[name]['result']}, {told[name]['seconds']} s", flush=True)
                # In a process of its own: this one imports no torch, which may come from a wheel.
                note = f"from measuring import save; print(save('gpu', {options.device!r}, {{'steps': {told!r}}}))"
                subprocess.run([sys.executable, "-c", note], check=True, cwd=HERE)
    if failed := [name for name, row in told.items() if row["result"] != "passed"]:
        sys.exit(f"Not passed: {', '.join(failed)}. The results file has the end of what each of them printed.")


def install(wheels: Path, folder: str) -> None:
    paths = sorted(map(str, wheels.glob("*.whl")))
    if not paths:
        sys.exit(f"`--wheels {wheels}` holds no wheel.")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
    subprocess.run([*command, folder, *paths], check=True)


def run(name: str, arguments: list[str], limit: float) -> dict[str, object]:
    """Whether a step passed, failed or was cut, its seconds, and the end of its output where it did not pass."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(1.0, limit)
            ).returncode
            result = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            result = "cut"
        log.seek(0)
        text = log.read()
    print(text, flush=True)
    told: dict[str, object] = {"result": result, "seconds": round(time.monotonic() - start)}
    return told if result == "passed" else told | {"end": text[-TAIL:]}


if __name__ == "__main__":
    main()

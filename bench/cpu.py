"""Times the CPU target against CTranslate2 and transformers, in one run on the same cores; makes README's table of it.

python -m trtc.bench.cpu [--json bench/results/cpu.json]        # needs pip install '.[bench]'

The model has the shape of OPT-125M and random weights. Each side generates 64 tokens greedily after 128; the sides take turns,
and medians are compared. A step is (time for 64 tokens - time for 1) / 63; prefill is the time to the first token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .markdown import table_of
from .provenance import commit_of_tree, processor

ROOT = Path(__file__).parent.parent
VOCAB, INPUT_LEN, OUTPUT_LEN = 50272, 128, 64
KINDS = {"float32": "float32", "bfloat16": "float32", "int8": "int8"}
"""Our precisions, and that of CTranslate2 which each is compared with (it has no bfloat16 on this kind of processor)."""
BARS = {
    ("float32", "step", 1): 1.5, ("float32", "step", 8): 1.2, ("float32", "prefill", 1): 1.1, ("float32", "prefill", 8): 1.1,
    ("bfloat16", "step", 1): 2.0,
    ("int8", "step", 1): 1.5, ("int8", "step", 8): 1.2, ("int8", "prefill", 1): 1.1, ("int8", "prefill", 8): 1.1,
}  # fmt: skip
"""The ratio that each row is meant to reach: a row that falls short is shown as it is."""
Side = Callable[[list[list[int]], int], list[list[int]]]


def make_model(folder: Path) -> None:
    """A Hugging Face folder, with the tokenizer that CTranslate2's converter asks for."""
    from tokenizers import Tokenizer, models
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(vocab_size=VOCAB)).save_pretrained(folder)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"t{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def build(model: Path, engine: Path) -> None:
    dtype = {"int8": "float32"}.get(engine.name, engine.name)
    options = ["--use-weight-only", "--weight-only-precision", "int8"] if engine.name == "int8" else []
    command = [sys.executable, "-m", "trtc.cli", "build", "--model-dir", str(model), "--dtype", dtype,
               "--output-dir", str(engine), "--max-batch-size", "8", "--max-input-len", "512",
               "--max-seq-len", "1024", *options]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ours(engine: Path) -> Side:
    from ..runtime.llm import LLM
    from ..runtime.sampling_params import SamplingParams

    llm = LLM(engine, enable_prefix_cache=False)

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params)]

    return generate


def ctranslate2_side(folder: Path, compute_type: str) -> Side:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type=compute_type,
        inter_threads=1,
        intra_threads=torch.get_num_threads(),
    )
    words = json.loads((folder / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        tokens = [[words[i] for i in prompt] for prompt in prompts]
        results = generator.generate_batch(
            tokens,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=[],
        )
        return [list(result.sequences_ids[0]) for result in results]

    return generate


def transformers_side(folder: Path) -> Side:
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return [row[len(prompts[0]) :].tolist() for row in found]

    return generate


def measure(sides: dict[str, Side], batch: int, rounds: int, rest_s: float) -> Iterator[dict[str, Any]]:
    """Every side's samples in milliseconds; round 0 warms up. transformers, the slowest, takes part in the first two."""
    rng = np.random.default_rng(batch)
    prompts = [rng.integers(4, VOCAB, INPUT_LEN).tolist() for _ in range(batch)]
    samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "step": []} for name in sides}
    tokens: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            if number > 1 and name.startswith("transformers"):
                continue
            time.sleep(rest_s)
            start = time.perf_counter()
            side(prompts, 1)
            first = time.perf_counter()
            tokens[name] = side(prompts, OUTPUT_LEN)
            end = time.perf_counter()
            if number:
                samples[name]["prefill"].append(1e3 * (first - start))
                samples[name]["step"].append(1e3 * ((end - first) - (first - start)) / (OUTPUT_LEN - 1))
    for name, taken in samples.items():
        same = sum(a == b for a, b in zip(tokens[name], tokens["transformers float32"], strict=True))
        yield {"side": name, "batch": batch, "same_tokens_as_transformers": same,
               **{f"{what}_ms": statistics.median(times) for what, times in taken.items()},
               **{f"{what}_all": [round(x, 3) for x in times] for what, times in taken.items()}}  # fmt: skip


def read_bandwidth() -> float:
    """GB/s of reading, the best of several: a sum over memory that no cache holds, in one reduction of all threads."""
    data = torch.ones(1 << 26)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times) / 1e9


_COLD = """
import time; start = time.perf_counter()
from trtc import LLM, SamplingParams
llm = LLM({engine!r}, verify={verify})
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, temperature=0))
"""
_MEMORY = """
import resource, torch
def mib(): return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmRSS"))) / 1024
before = mib()
from trtc import LLM, SamplingParams
llm = LLM({engine!r})
llm.generate([list(range(5, 133))] * 8, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
print(before, mib())
"""


def process(code: str) -> tuple[float, str]:
    """Wall seconds of a Python process, and what it printed; after two of rest."""
    time.sleep(2.0)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def start_and_memory(engine: Path) -> dict[str, Any]:
    def seconds(code: str) -> float:
        return min(process(code)[0] for _ in range(2))

    torch_mib, all_mib = map(float, process(_MEMORY.format(engine=str(engine)))[1].split())
    weights = sum(path.stat().st_size for path in engine.glob("*.safetensors")) / 2**20
    cache = 2 * 12 * 768 * 8 * (INPUT_LEN + OUTPUT_LEN) * (4 if "float32" in engine.name else 2) / 2**20
    return {"import_torch_s": seconds("import torch"),
            "first_token_s": seconds(_COLD.format(engine=str(engine), verify=True)),
            "first_token_unverified_s": seconds(_COLD.format(engine=str(engine), verify=False)),
            "weights_mib": weights, "cache_used_mib": cache, "rss_torch_mib": torch_mib, "rss_mib": all_mib}  # fmt: skip


def setup() -> dict[str, Any]:
    from importlib.metadata import version

    return {"date": datetime.date.today().isoformat(), **commit_of_tree(),
            "device": processor(), "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),
            "versions": {name: version(name) for name in ("torch", "ctranslate2", "transformers", "numpy")},
            "read_bandwidth_gb_s": round(read_bandwidth(), 1), "input_len": INPUT_LEN, "output_len": OUTPUT_LEN}  # fmt: skip


def run(folder: Path, rounds: int, rest_s: float) -> dict[str, Any]:
    from ctranslate2.converters import TransformersConverter

    model = folder / "model"
    if not model.exists():
        make_model(model)
        for kind in KINDS:
            build(model, folder / kind)
        TransformersConverter(str(model)).convert(str(folder / "ctranslate2"), force=True)
    data = setup()
    sides = {
        "trtc float32": ours(folder / "float32"),
        "CTranslate2 float32": ctranslate2_side(folder / "ctranslate2", "float32"),
        "trtc bfloat16": ours(folder / "bfloat16"),
        "trtc int8": ours(folder / "int8"),
        "CTranslate2 int8": ctranslate2_side(folder / "ctranslate2", "int8"),
        "transformers float32": transformers_side(model),
    }
    data["cases"] = []
    for batch in (1, 8):
        for case in measure(sides, batch, rounds, rest_s):
            data["cases"].append(case)
            print(f"batch {batch} {case['side']:22} prefill {case['prefill_ms']:7.1f} ms, step {case['step_ms']:6.2f} ms",
                  file=sys.stderr)  # fmt: skip
    data["processes"] = {"float32": start_and_memory(folder / "float32")}
    return data


def rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    found = {(case["side"], case["batch"]): case for case in data["cases"]}
    for what in ("step", "prefill"):
        for batch in sorted({case["batch"] for case in data["cases"]}):
            for kind, peer in KINDS.items():
                mine, base, other = (
                    found[side, batch][f"{what}_ms"]
                    for side in (f"trtc {kind}", f"CTranslate2 {peer}", "transformers float32")
                )
                bar = BARS.get((kind, what, batch))
                aim = "" if bar is None else f"{bar}" if base / mine >= bar else f"{bar} (short)"
                yield (f"{what}, batch {batch}", kind, f"{mine:.1f} ms", f"{base:.1f} ms ({peer})", f"{base / mine:.2f}", aim,
                       f"{other:.1f} ms")  # fmt: skip


def table(data: dict[str, Any]) -> str:
    """README's table and the lines below it."""
    header = ("OPT-125M on the CPU", "weights", "trtc", "CTranslate2", "ratio", "aim", "transformers float32")
    text = table_of(header, rows(data))
    versions, one = data["versions"], data["processes"]["float32"]
    bytes_read = 4 * 12 * (12 * 768 * 768)
    floor = bytes_read / data["read_bandwidth_gb_s"] / 1e6
    same = min(c["same_tokens_as_transformers"] for c in data["cases"] if c["side"] == "trtc float32")
    return (
        f"{text}\n{data['device']}, {data['threads']} threads, random weights, greedy, {data['input_len']} tokens in and "
        f"{data['output_len']} out; trtc at {data['commit']}{' with local changes' if data['dirty'] else ''}, CTranslate2 "
        f"{versions['ctranslate2']} and transformers {versions['transformers']} in one run on {data['date']}, torch "
        f"{versions['torch']}; medians of runs that took turns; load average {data['load_average']:.1f}. float32 gives the "
        "tokens of transformers"
        f"{'' if same else ' NOT in every sequence'}. Reading the layers' {bytes_read / 1e6:.0f} MB at the "
        f"{data['read_bandwidth_gb_s']:.0f} GB/s that a sum reached takes {floor:.1f} ms in float32. From a cold process "
        f"to the first token, all files checked: {one['first_token_s']:.1f} s "
        f"({one['first_token_unverified_s']:.1f} s unchecked); `import torch` alone: {one['import_torch_s']:.1f} s. "
        f"Resident after 8 sequences: {one['rss_mib']:.0f} MiB, of which {one['rss_torch_mib']:.0f} torch's own, for "
        f"{one['weights_mib']:.0f} MiB of weights. Samples: `bench/results/cpu.json`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "cpu.json")
    parser.add_argument(
        "--folder", type=Path, help="keep the model and engines here, and use those that are there"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rest-s", type=float, default=0.0, help="seconds left to others before each side's turn"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = run(args.folder or Path(scratch), args.rounds, args.rest_s)
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    print(table(data))


if __name__ == "__main__":
    main()

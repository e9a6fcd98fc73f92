"""Whether a model over several ranks says what it says on one: greedy tokens and the logits behind them.

    python -m trtc.bench.rank_tokens --size 1.3b --tp-sizes 2 4 --commit HASH --json FILE

Random weights, the same for all: an engine of one rank, one of each N, and one in float32 on the CPU. One rank generates;
then all of them compute the logits for those very tokens, so that a near-tie that falls the other way ends nothing. Checked:
logits of one and of N ranks lie within TOLERANCE of float32; where they would choose different tokens, float32 has the two
within twice that; and so for the tokens that N ranks generate by themselves, up to where they part. Exit code 1 where that
does not hold.
`--target cpu` does all of it without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.engine import Engine
from ..runtime.executor import Executor
from ..runtime.kv_cache import pages_for
from ..runtime.launcher import launch_ranks
from ..runtime.llm import LLM
from ..runtime.load import executor_of
from ..runtime.placement import placement
from ..runtime.sampling_params import SamplingParams
from ..runtime.step_input import Int32Array, StepInput
from .against_vllm import TRTC, run
from .kernels.harness import nvidia_smi
from .opt_sizes import SIZES, is_built, opt_config, work_folder, write_config

RESULTS = Path(__file__).parent / "results" / "gpus-rank-tokens.json"
TOKENS = 64
LENGTHS = (9, 33, 16, 57)
"""Of the prompts."""
TOLERANCE = 5e-3
"""Of logits in float16, as a share of the largest: that of the tests."""
MAX_SEQ_LEN, PAGE = 128, 32


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(4, vocab_size, length).tolist() for length in LENGTHS]


def steps(sequences: list[list[int]]) -> list[StepInput]:
    """Steps that compute what follows each prompt and each of its tokens: the prompts, then a token of every sequence."""
    pages = np.arange(len(sequences) * pages_for(MAX_SEQ_LEN, PAGE), dtype=np.int32).reshape(
        len(sequences), -1
    )
    starts = np.cumsum([0, *LENGTHS]).astype(np.int32)
    first = StepInput(
        token_ids=_int32([token for ids, n in zip(sequences, LENGTHS, strict=True) for token in ids[:n]]),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS]),
        query_start=starts,
        kv_length=_int32(LENGTHS),
        page_table=pages,
        logits_index=starts[1:] - 1,
    )
    every = np.arange(len(sequences) + 1, dtype=np.int32)
    found = [first]
    for index in range(TOKENS - 1):
        length = _int32(LENGTHS) + index + 1
        ids = _int32([ids[n + index] for ids, n in zip(sequences, LENGTHS, strict=True)])
        found.append(StepInput(ids, length - 1, every, length, pages, every[:-1]))
    return found


def _int32(values: Any) -> Int32Array:
    return np.array(values, np.int32)


def logits(executor: Executor, sequences: list[list[int]]) -> torch.Tensor:
    """[TOKENS, sequences, vocab] float32: what follows each prompt and each of its tokens but the last."""
    return torch.stack([executor.execute(step).float().cpu().clone() for step in steps(sequences)])


def run_rank(engine: Path, given: Path, result: Path) -> None:
    """One rank: generates, and computes the logits behind the tokens in `given`, or behind its own where there is no such
    file. Rank 0 writes both down."""
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    try:
        with LLM(engine, verify=False, enable_prefix_cache=False) as llm:
            begin = prompts(Engine.open(engine, verify=False).model.vocab_size)
            own = [list(output.outputs[0].token_ids) for output in llm.generate(begin, greedy)]
            forced = json.loads(given.read_text()) if given.exists() else own
            sequences = [[*prompt, *ids] for prompt, ids in zip(begin, forced, strict=True)]
            found = logits(llm.core.executor, sequences)
    except SystemExit:  # a rank that has followed rank 0 to the end
        return
    assert placement().rank == 0
    torch.save({"tokens": own, "logits": found}, result)


def build(folder: Path, args: argparse.Namespace, *, tp_size: int, reference: bool = False) -> Path:
    name = "reference" if reference else f"tp{tp_size}"
    target, dtype = ("cpu", "float32") if reference else (args.target, args.dtype)
    arch = ["--cuda-arch", args.arch] if target == "cuda" else []
    if not is_built(folder / name):
        failed = run([*TRTC, "build", "--target", target, "--dtype", dtype, "--dummy-weights", *arch,
                      "--model-dir", str(write_config(args.size, folder / "model")), "--output-dir", str(folder / name),
                      "--max-batch-size", "8", "--max-seq-len", str(MAX_SEQ_LEN), "--page-size", str(PAGE),
                      "--max-num-tokens", "512", "--tp-size", str(tp_size),
                      "--workers", str(len(os.sched_getaffinity(0)))])  # fmt: skip
        if failed:
            raise SystemExit(failed["message"])
    return folder / name


def compare(one: Any, several: Any, reference: torch.Tensor) -> dict[str, Any]:
    """The record of what two runs have found; "wrong" lists what must not be."""
    tolerance = TOLERANCE * float(reference.abs().max())
    errors = {
        name: float((x - reference).abs().max())
        for name, x in (("one", one["logits"]), ("several", several["logits"]))
    }
    best = [x.argmax(-1) for x in (one["logits"], several["logits"], reference)]
    gaps = [_gap(reference, best[0], best[1])]
    parted = []
    for row, (mine, theirs) in enumerate(zip(several["tokens"], one["tokens"], strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        parted.append(at)
        if at is not None:
            gaps.append(abs(float(reference[at, row, mine[at]] - reference[at, row, theirs[at]])))
    top = reference.topk(2).values
    record = {
        "tokens": best[0].numel(),
        "same": int((best[0] == best[1]).sum()),
        "same_as_float32": [int((x == best[2]).sum()) for x in best[:2]],
        "generated_alike": [TOKENS if at is None else at for at in parted],
        "largest_logit": float(reference.abs().max()),
        "tolerance": tolerance,
        "error": errors,
        "difference": float((one["logits"] - several["logits"]).abs().max()),
        "largest_gap_where_they_differ": max(gaps),
        "median_margin": float((top[..., 0] - top[..., 1]).median()),
    }
    wrong = [
        f"logits of {name} differ from float32 by {error:.3g}, more than {tolerance:.3g}"
        for name, error in errors.items()
        if not error <= tolerance
    ]
    if not max(gaps) <= 2 * tolerance:
        wrong.append(
            f"other tokens where float32 has them {max(gaps):.3g} apart, more than {2 * tolerance:.3g}"
        )
    return {**record, "wrong": wrong}


def _gap(reference: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> float:
    values = [reference.gather(-1, chosen[..., None]) for chosen in (one, other)]
    return float((values[0] - values[1]).abs().max())


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each number of ranks."""
    found = []
    given = folder / "tokens.json"
    given.unlink(missing_ok=True)
    for tp_size in (1, *args.tp_sizes):
        engine, result = build(folder, args, tp_size=tp_size), folder / f"result{tp_size}.pt"
        command = [
            sys.executable,
            "-m",
            "trtc.bench.rank_tokens",
            "--rank",
            *map(str, (engine, given, result)),
        ]
        if code := launch_ranks(command, tp_size):
            raise SystemExit(f"{tp_size} ranks ended with {code}")
        found.append(torch.load(result))
        given.write_text(json.dumps(found[0]["tokens"]))
    executor = executor_of(Engine.open(build(folder, args, tp_size=1, reference=True), verify=False))
    begin = prompts(opt_config(args.size)["vocab_size"])
    sequences = [[*prompt, *ids] for prompt, ids in zip(begin, found[0]["tokens"], strict=True)]
    reference = logits(executor, sequences)
    return [
        {"tp_size": tp_size, **compare(found[0], several, reference)}
        for tp_size, several in zip(args.tp_sizes, found[1:], strict=True)
    ]


def main() -> int:
    args = arguments()
    if args.rank:
        run_rank(*args.rank)
        return 0
    with work_folder(args.work_dir) as folder:
        records = measure(folder, args)
    on_gpus = args.target == "cuda"
    data = {
        "date": datetime.date.today().isoformat(),
        "commit": args.commit[:12],
        "device": torch.cuda.get_device_name() if on_gpus else "CPU",
        "driver": nvidia_smi("driver_version") if on_gpus else "",
        "torch": torch.__version__,
        "model": args.size,
        "dtype": args.dtype,
        "records": records,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    print("".join(f"{text}\n" for text in sentences(data)), end="")
    wrong = [f"{record['tp_size']} ranks: {text}" for record in records for text in record["wrong"]]
    for text in wrong:
        print(f"WRONG: {text}", file=sys.stderr)
    return 1 if wrong else 0


def sentences(data: dict[str, Any]) -> list[str]:
    """What a results file says, for people: one for each number of ranks."""
    return [_sentence({**data, **record}) for record in data["records"]]


def _sentence(data: dict[str, Any]) -> str:
    parted = (
        f"; where they are not, float32 has the two within {data['largest_gap_where_they_differ']:.2g} of each other"
        if data["same"] < data["tokens"]
        else ""
    )
    return (
        f"OPT-{data['model'].upper()} in {data['dtype']} on {data['tp_size']} x {data['device']}: given the tokens that one "
        f"generates, {data['same']} of {data['tokens']} next tokens are the same on {data['tp_size']} ranks{parted} "
        f"(the median margin of the best is {data['median_margin']:.2g}). Logits, up to {data['largest_logit']:.1f}, differ by "
        f"at most {data['difference']:.2g}; from float32 those of one rank by {data['error']['one']:.2g}, of {data['tp_size']} "
        f"by {data['error']['several']:.2g}. Generating by themselves, four sequences of {TOKENS} tokens are alike for "
        f"{', '.join(map(str, data['generated_alike']))}."
    )


def markdown(data: dict[str, Any]) -> str:
    """For docs/parallel.md."""
    return (
        f"{' '.join(sentences(data))} Random weights, driver {data['driver']}, torch {data['torch']}, trtc at {data['commit']} "
        f"on {data['date']}; `bench/results/{RESULTS.name}`, made by `bench/rank_tokens.py`.\n"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rank", nargs=3, type=Path, metavar=("ENGINE", "GIVEN", "RESULT"), help=argparse.SUPPRESS
    )
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--tp-sizes", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--target", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument(
        "--dtype", default="float16", help="of the engines that are compared (default: %(default)s)"
    )
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default: %(default)s)")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep models and engines here, and take those that are"
    )
    parser.add_argument("--commit", default="unknown", help="the commit that is measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

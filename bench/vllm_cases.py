"""Times vLLM on batches with lengths of their own, in one process: a model of 130 GB is not loaded for each.

    PYTHONPATH=PEER/site python bench/vllm_cases.py --config-dir DIR --cases 1x512x128 64x64x32 --tp-size 2

The protocol and the settings are those of the peer's own `bench_vllm.py` (float16, random weights, FlashAttention 3, no prefix
caching, defaults else), which knows one length for all batches; so are its results, the lines that start with {"kind".
Imports nothing of trtc: it runs with what the peer brings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

FIRST_TOKEN_ID = 4


def main() -> None:
    args = arguments()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    start = time.perf_counter()
    import numpy as np
    import vllm

    imported = time.perf_counter()
    options: dict[str, Any] = {"max_num_batched_tokens": args.max_num_tokens} if args.max_num_tokens else {}
    llm = vllm.LLM(
        model=str(args.config_dir), load_format="dummy", skip_tokenizer_init=True, dtype="float16",
        max_model_len=args.max_model_len, gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=False, disable_log_stats=True, seed=0, tensor_parallel_size=args.tp_size,
        attention_config={"backend": "FLASH_ATTN"}, **options,
    )  # fmt: skip
    started = time.perf_counter()
    config = llm.llm_engine.vllm_config
    emit(
        kind="setup", vllm=vllm.__version__, import_s=round(imported - start, 2), init_s=round(started - imported, 2),
        tp_size=args.tp_size, max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        cudagraph_mode=str(config.compilation_config.cudagraph_mode),
    )  # fmt: skip
    vocab = json.loads((args.config_dir / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)

    def seconds(batch: int, tokens_in: int, tokens_out: int) -> float:
        prompts = [
            {"prompt_token_ids": rng.integers(FIRST_TOKEN_ID, vocab, tokens_in).tolist()}
            for _ in range(batch)
        ]
        params = vllm.SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=tokens_out, detokenize=False
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert sum(len(one.outputs[0].token_ids) for one in outputs) == batch * tokens_out
        return taken

    seconds(4, 64, 8)
    for text in args.cases:
        batch, tokens_in, tokens_out = map(int, text.split("x"))
        seconds(batch, tokens_in, min(8, tokens_out))
        prefill, total = [], []
        for _ in range(args.repeat):
            prefill.append(seconds(batch, tokens_in, 1))
            if tokens_out > 1:
                total.append(seconds(batch, tokens_in, tokens_out))
        emit(
            kind="batch", batch=batch, in_len=tokens_in, out_len=tokens_out,
            prefill_s=round(statistics.median(prefill), 6), prefill_all=[round(x, 5) for x in prefill],
            **(steps(tokens_out, prefill, total) if total else {}),
        )  # fmt: skip


def steps(tokens_out: int, prefill: list[float], total: list[float]) -> dict[str, Any]:
    whole = statistics.median(total)
    step = (whole - statistics.median(prefill)) / (tokens_out - 1)
    return {
        "total_s": round(whole, 6),
        "decode_ms_per_token": round(step * 1e3, 4),
        "total_all": [round(x, 5) for x in total],
    }


def emit(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True, metavar="BxIxO")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-num-tokens", type=int, help="of one step (default: vLLM's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`trtc summarize`: summaries of news by an engine and by transformers, scored and timed."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from . import tensorrt_llm_flags
from .ranks import add_nproc, enter_job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.engine import Engine
    from ..runtime.evaluation.dataset import Pair
    from ..runtime.evaluation.summarize import Summaries, TokenIds
    from ..runtime.tokenizer import Tokenizer

NAME = "summarize"
HELP = "summarize articles with an engine and with transformers: ROUGE, tokens/s and latency side by side"

DATA_TYPES = ("fp16", "bf16", "fp32", "float16", "bfloat16", "float32")
NEWS = Path(__file__).parents[1] / "examples" / "news.jsonl"
"""The default dataset, where trtc runs from its checkout."""
TRTC, TRTC_LOOKUP, HF = "trtc", "trtc, lookup", "transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True,
                        help="folder written by `trtc build`; its tokenizer makes the prompts of both sides")  # fmt: skip
    parser.add_argument("--hf-model-dir", type=Path, help="Hugging Face folder, for --test-hf")
    parser.add_argument("--test-trtc", "--test-trt-llm", action="store_true", help="run the engine")
    parser.add_argument("--test-hf", action="store_true", help="run transformers")
    parser.add_argument(
        "--data-type", choices=DATA_TYPES, help="what transformers computes in (default: as the engine)"
    )
    add_nproc(parser)
    tensorrt_llm_flags.add_tokenizer_dir(parser)
    data = parser.add_argument_group("articles")
    data.add_argument("--dataset", metavar="PATH|NAME",
                      help="jsonl with fields article and highlights; folder written by Dataset.save_to_disk; name on the "
                      "datasets hub, as abisee/cnn_dailymail (default: examples/news.jsonl of the checkout)")  # fmt: skip
    data.add_argument("--dataset-config", metavar="NAME",
                      help="configuration of a hub dataset (default for CNN/DailyMail: 3.0.0)")  # fmt: skip
    data.add_argument("--dataset-split", default="test", metavar="NAME", help="default: %(default)s")
    data.add_argument(
        "--max-ite", type=int, default=20, metavar="N", help="batches at most (default: %(default)s)"
    )
    data.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="articles at once (default: %(default)s)"
    )
    data.add_argument(
        "--output-len", type=int, default=100, metavar="N", help="tokens at most (default: %(default)s)"
    )
    data.add_argument(
        "--num-beams",
        type=int,
        default=1,
        metavar="N",
        help="beams of a search; 1: greedy (default: %(default)s)",
    )
    add_prompt_lookup(data)
    data.add_argument("--show", type=int, default=1, metavar="N",
                      help="articles to print with all their summaries (default: %(default)s)")  # fmt: skip
    scores = parser.add_argument_group("scores")
    scores.add_argument("--check-accuracy", action="store_true",
                        help="exit code 1 when the engine's ROUGE-1 is not over the threshold")  # fmt: skip
    scores.add_argument("--rouge1-threshold", "--tensorrt-llm-rouge1-threshold", type=float, default=15.0,
                        metavar="X", help="in percent (default: %(default)s)")  # fmt: skip
    scores.add_argument(
        "--eval-ppl", action="store_true", help="also the mean perplexity of prompt and summary"
    )


def add_prompt_lookup(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--prompt-lookup", metavar="N:K",
                        help="guess up to K tokens where the last N have occurred before, and verify them in one step: the "
                        "same greedy text in fewer steps")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    _check(args)
    code = _enter_job(args)
    if code is not None:
        return code
    tensorrt_llm_flags.note_tokenizer_dir(args)
    from ..core.engine import Engine
    from ..runtime.evaluation import summarize
    from ..runtime.evaluation.dataset import load_pairs
    from ..runtime.evaluation.hf import require_folder
    from ..runtime.tokenizer import Tokenizer, required_tokenizer

    summarize.rouge_scorer()  # what is missing is missed now, not after all summaries
    if args.test_hf:
        require_folder(args.hf_model_dir)
    pairs = load_pairs(
        _dataset(args),
        args.max_ite * args.batch_size,
        config=args.dataset_config,
        split=args.dataset_split,
    )
    engine = Engine.open(args.engine_dir, verify=False)
    tokenizer = required_tokenizer(Tokenizer.from_dir(args.engine_dir), args.engine_dir)
    limit = summarize.input_limit(engine.build, args.output_len)
    prompts = summarize.encode_prompts(pairs, tokenizer, limit)
    sides: dict[str, tuple[Summaries, float | None]] = {}
    if args.test_trtc:
        sides |= _run_engine(args, prompts)
    if args.test_hf:
        sides[HF] = _run_hf(args, engine, prompts)
    texts = {name: [_text(tokenizer, ids) for ids in side.token_ids] for name, (side, _) in sides.items()}
    _print_pairs(pairs[: args.show], texts)
    references = [pair.highlights for pair in pairs]
    rouge = {name: summarize.rouge(references, summaries) for name, summaries in texts.items()}
    _print_table(len(pairs), sides, rouge)
    return _verdict(args, rouge)


def _enter_job(args: argparse.Namespace) -> int | None:
    """As `enter_job`; transformers alone is the business of rank 0."""
    if args.test_trtc:
        return enter_job(args)
    from ..runtime.placement import placement

    return 0 if placement().rank > 0 else None


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is loaded."""
    if not args.test_trtc and not args.test_hf:
        raise ConfigError("nothing to run; give --test-trtc, --test-hf or both")
    if args.test_hf and args.hf_model_dir is None:
        raise ConfigError("--test-hf needs --hf-model-dir, the Hugging Face folder to compare with")
    if args.prompt_lookup is not None:
        from ..runtime.prompt_lookup import PromptLookup

        if not args.test_trtc:
            raise ConfigError("--prompt-lookup is for the engine; add --test-trtc")
        PromptLookup.parse(args.prompt_lookup)
    if args.check_accuracy and not args.test_trtc:
        raise ConfigError("--check-accuracy checks the engine; add --test-trtc")
    if args.num_beams > 1 and args.eval_ppl:
        raise ConfigError(
            f"--eval-ppl scores greedy output, --num-beams is {args.num_beams}; leave out one of them"
        )
    for name in ("max_ite", "batch_size", "output_len", "num_beams"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is {getattr(args, name)}; accepted: a whole number >= 1")


def _dataset(args: argparse.Namespace) -> str:
    if args.dataset is not None:
        return str(args.dataset)
    if not NEWS.is_file():
        raise ConfigError(
            "--dataset is missing and examples/news.jsonl is not beside this installation; give a jsonl file with the "
            "fields article and highlights, a saved dataset folder, or a hub name as abisee/cnn_dailymail"
        )
    return str(NEWS)


def _run_engine(
    args: argparse.Namespace, prompts: Sequence[TokenIds]
) -> dict[str, tuple[Summaries, float | None]]:
    """The engine's side and, with --prompt-lookup, the same once more with it; what the lookup brought is printed."""
    from ..runtime.evaluation import summarize
    from ..runtime.llm import LLM

    # The first batch runs twice; the clock shall see it computed.
    with LLM(args.engine_dir, enable_prefix_cache=False) as llm:
        side = summarize.run(
            summarize.engine_generate(llm, args.output_len, args.num_beams), prompts, args.batch_size
        )
        perplexity = summarize.engine_perplexity(llm, prompts, args.output_len) if args.eval_ppl else None
        if args.prompt_lookup is None:
            return {TRTC: (side, perplexity)}
        from ..runtime.prompt_lookup import PromptLookup

        config = PromptLookup.parse(args.prompt_lookup)
        looked_up, stats = summarize.run_lookup(llm, prompts, args.batch_size, args.output_len, config)
    same = sum(a == b for a, b in zip(side.token_ids, looked_up.token_ids, strict=True))
    print(f"prompt lookup {args.prompt_lookup}: {stats.describe(looked_up.num_tokens)}; "
          f"{looked_up.tokens_per_s / side.tokens_per_s:.2f} times the tokens/s; {same} of {len(prompts)} summaries have "
          f"the tokens of plain decoding\n")  # fmt: skip
    return {TRTC: (side, perplexity), TRTC_LOOKUP: (looked_up, None)}


def _run_hf(
    args: argparse.Namespace, engine: Engine, prompts: Sequence[TokenIds]
) -> tuple[Summaries, float | None]:
    from ..core.dtypes import parse_model_dtype
    from ..runtime.evaluation import summarize
    from ..runtime.evaluation.hf import HFModel

    dtype = engine.model.dtype if args.data_type is None else parse_model_dtype(args.data_type, "--data-type")
    model = HFModel.load(args.hf_model_dir, dtype)
    model.check_fits(engine)
    generate = summarize.hf_generate(model, args.output_len, engine.model.eos_token_ids, args.num_beams)
    side = summarize.run(generate, prompts, args.batch_size)
    perplexity = summarize.hf_perplexity(model, prompts, side.token_ids) if args.eval_ppl else None
    return side, perplexity


def _text(tokenizer: Tokenizer, token_ids: TokenIds) -> str:
    return tokenizer.decode(token_ids).strip()


def _print_pairs(pairs: Sequence[Pair], texts: Mapping[str, Sequence[str]]) -> None:
    for i, pair in enumerate(pairs):
        shown = {"article": pair.article, "reference": pair.highlights}
        shown |= {name: summaries[i] for name, summaries in texts.items()}
        for title, text in shown.items():
            print(f"{title}:\n{textwrap.indent(textwrap.fill(text.strip(), 100), '  ')}")
        print()


def _print_table(
    num_articles: int,
    sides: Mapping[str, tuple[Summaries, float | None]],
    rouge: Mapping[str, Mapping[str, float]],
) -> None:
    with_perplexity = any(perplexity is not None for _, perplexity in sides.values())
    print(f"{num_articles} articles{'':<4}ROUGE-1  ROUGE-2  ROUGE-L  ROUGE-Lsum  tokens  tokens/s  ms/batch"
          + ("  perplexity" if with_perplexity else ""))  # fmt: skip
    for name, (side, perplexity) in sides.items():
        scores = rouge[name]
        row = (
            f"{name:<{len(f'{num_articles} articles') + 4}}{scores['rouge1']:7.2f}  {scores['rouge2']:7.2f}"
            f"  {scores['rougeL']:7.2f}  {scores['rougeLsum']:10.2f}  {side.num_tokens:6d}  {side.tokens_per_s:8.1f}"
            f"  {1e3 * side.latency_s:8.1f}"
        )
        print(row + (f"  {perplexity:10.4f}" if perplexity is not None else ""))


def _verdict(args: argparse.Namespace, rouge: Mapping[str, Mapping[str, float]]) -> int:
    if not args.check_accuracy:
        return 0
    found = rouge[TRTC]["rouge1"]
    if found > args.rouge1_threshold:
        return 0
    print(f"trtc summarize: the engine's ROUGE-1 is {found:.2f}, not over the threshold of {args.rouge1_threshold:g}",
          file=sys.stderr)  # fmt: skip
    return 1

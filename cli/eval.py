"""`trtc eval`: perplexity of an engine over a text, and its distance to transformers at every position."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError
from ..runtime.early_start import begin_loading
from .output_files import check_output_file, write_json, write_text
from .ranks import add_nproc, enter_job
from .summarize import DATA_TYPES

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..runtime.evaluation.hf import HFModel
    from ..runtime.evaluation.perplexity import Comparison, Scores
    from ..runtime.evaluation.report import Continuation
    from ..runtime.executor import Executor
    from ..runtime.tokenizer import Tokenizer

NAME = "eval"
HELP = "perplexity of an engine over a text, and where it departs from transformers"

CONTINUATIONS = 4
PROMPT_TOKENS, NEW_TOKENS = 48, 32
"""Of a continuation in the report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text of any length")
    parser.add_argument("--hf-model-dir", type=Path, help="Hugging Face folder to compare with")
    parser.add_argument("--data-type", choices=DATA_TYPES, default="fp32",
                        help="what transformers computes in (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens the model sees at once (default: the engine's max_seq_len)",
    )
    parser.add_argument("--stride", type=int, metavar="N",
                        help="tokens by which the window moves (default: half of it)")  # fmt: skip
    add_nproc(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the values of every position here"
    )
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="also write one HTML page with plots and texts; needs --hf-model-dir")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    _check(args)
    code = enter_job(args)
    if code is not None:
        return code
    engine_dir = begin_loading(args.engine_dir)
    from ..core.dtypes import parse_model_dtype
    from ..core.engine import Engine
    from ..runtime.evaluation import perplexity
    from ..runtime.evaluation.hf import HFModel
    from ..runtime.load import load_executor
    from ..runtime.tokenizer import Tokenizer, required_tokenizer

    engine = Engine.open(args.engine_dir, verify=False)
    tokenizer = required_tokenizer(Tokenizer.from_dir(args.engine_dir), args.engine_dir)
    token_ids = tokenizer.encode(_read_text(args.text))
    window, stride = _window(args, engine)
    executor = load_executor(engine_dir)
    try:
        ours = perplexity.engine_logits(executor)
        if args.hf_model_dir is None:
            result = summary(
                engine, len(token_ids), window, stride, perplexity.score(token_ids, ours, window, stride)
            )
            _finish(args, result)
            return 0
        model = HFModel.load(args.hf_model_dir, parse_model_dtype(args.data_type, "--data-type"))
        model.check_fits(engine)
        comparison = perplexity.compare(token_ids, ours, model.logits, window, stride)
        result = summary(engine, len(token_ids), window, stride, comparison.engine, comparison)
        _finish(args, result)
        if args.report is not None:
            texts = _continuations(executor, tokenizer, model, engine, token_ids)
            _write_report(args, tokenizer, token_ids, result, comparison, texts)
    finally:
        executor.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.report is not None and args.hf_model_dir is None:
        raise ConfigError("--report compares with transformers; add --hf-model-dir")
    check_output_file(args.json, "--json")
    check_output_file(args.report, "--report")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {path}: not UTF-8 text (byte {error.start})") from None


def _window(args: argparse.Namespace, engine: Engine) -> tuple[int, int]:
    longest = engine.build.max_seq_len
    window = longest if args.window is None else args.window
    if not 2 <= window <= longest:
        raise ConfigError(f"--window is {window}; accepted: 2 to the engine's max_seq_len of {longest}")
    return window, max(1, window // 2) if args.stride is None else args.stride


def summary(
    engine: Engine, tokens: int, window: int, stride: int, ours: Scores, comparison: Comparison | None = None
) -> dict[str, Any]:
    """The result as JSON values; with a comparison also the values of every position."""
    result: dict[str, Any] = {
        "engine": {"target": engine.build.target, "dtype": engine.model.dtype.value},
        "tokens": tokens,
        "window": window,
        "stride": stride,
        "perplexity": ours.perplexity,
        "positions": {"nll": ours.nll.tolist()},
    }
    if comparison is None:
        return result
    distance = comparison.distance
    result |= {
        "reference_perplexity": comparison.reference.perplexity,
        "greedy_agreement": float(comparison.agrees.mean()),
        "logit_max_abs": float(distance.max_abs.max()),
        "logit_mean_abs": float(distance.mean_abs.mean()),
        "kl_mean": float(distance.kl.mean()),
        "kl_max": float(distance.kl.max()),
    }
    result["positions"] |= {
        "reference_nll": comparison.reference.nll.tolist(),
        "top": comparison.engine.top.tolist(),
        "reference_top": comparison.reference.top.tolist(),
        "logit_max_abs": distance.max_abs.tolist(),
        "logit_mean_abs": distance.mean_abs.tolist(),
        "kl": distance.kl.tolist(),
    }
    return result


def facts(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, str]:
    """What is printed, and stands at the top of the report."""
    shown = {
        "text": f"{args.text.name}, {result['tokens']} tokens; window {result['window']}, stride {result['stride']}",
        "engine": f"{args.engine_dir.name}: {result['engine']['target']}, {result['engine']['dtype']}",
        "perplexity": f"{result['perplexity']:.4f}",
    }
    if "reference_perplexity" in result:
        shown |= {
            "of transformers": f"{result['reference_perplexity']:.4f} in {args.data_type}",
            "greedy agreement": f"{100 * result['greedy_agreement']:.2f} % of {result['tokens'] - 1} positions",
            "KL divergence": f"mean {result['kl_mean']:.3g}, max {result['kl_max']:.3g} nats",
            "logit distance": f"mean {result['logit_mean_abs']:.3g}, max {result['logit_max_abs']:.3g}",
        }
    return shown


def _finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    for name, value in facts(args, result).items():
        print(f"{name:<18}{value}")
    if args.json is not None:
        write_json(args.json, result)


def _continuations(
    executor: Executor, tokenizer: Tokenizer, model: HFModel, engine: Engine, token_ids: list[int]
) -> list[Continuation]:
    """Greedy texts of both sides after pieces taken evenly from the text; none for a text shorter than a piece."""
    from ..runtime.evaluation.report import Continuation
    from ..runtime.llm import LLM
    from ..runtime.sampling_params import SamplingParams

    length = min(PROMPT_TOKENS, engine.build.max_input_len, engine.build.max_seq_len - NEW_TOKENS)
    if length < 1 or len(token_ids) < length:
        return []
    last = len(token_ids) - length
    starts = sorted({last * i // max(1, CONTINUATIONS - 1) for i in range(CONTINUATIONS)})
    prompts = [token_ids[start : start + length] for start in starts]
    ours = LLM.from_executor(executor, tokenizer).generate(
        prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    )
    theirs = model.generate(prompts, NEW_TOKENS, engine.model.eos_token_ids)
    return [
        Continuation(
            tokenizer.decode(prompt), tokenizer.decode(ids), tokenizer.decode(output.outputs[0].token_ids)
        )
        for prompt, ids, output in zip(prompts, theirs, ours, strict=True)
    ]


def _write_report(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    token_ids: list[int],
    result: dict[str, Any],
    comparison: Comparison,
    continuations: list[Continuation],
) -> None:
    from ..runtime.evaluation.report import ReportData, render

    def texts(ids: Any) -> list[str]:
        return [tokenizer.decode([int(token)], skip_special_tokens=False) for token in ids]

    data = ReportData(
        engine_name=f"{args.engine_dir.name}: {result['engine']['target']}, {result['engine']['dtype']}",
        reference_name=f"transformers, {args.hf_model_dir.name} in {args.data_type}",
        facts=facts(args, result),
        tokens=texts(token_ids),
        engine_choices=texts(comparison.engine.top),
        reference_choices=texts(comparison.reference.top),
        comparison=comparison,
        continuations=continuations,
    )
    write_text(args.report, render(data))
    print(f"{'report':<18}{args.report}")

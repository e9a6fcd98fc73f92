"""`trtc run`: prompts in, text out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, RequestError
from ..runtime.early_start import begin_loading
from ..runtime.heap import keep_heap, without_collection
from . import tensorrt_llm_flags
from .common import add_kv_cache
from .output_files import check_output_file, write_json
from .ranks import add_nproc, enter_job
from .summarize import add_prompt_lookup

if TYPE_CHECKING:
    from ..runtime.load_core import LoadOptions
    from ..runtime.outputs import CompletionOutput, Logprob, RequestOutput
    from ..runtime.prompt import Prompt

NAME = "run"
HELP = "generate text with an engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--input-text", nargs="+", metavar="TEXT", help="prompts")
    prompts.add_argument("--input-ids", nargs="+", metavar="ID,ID,...", help="prompts as token ids")
    prompts.add_argument("--input-file", type=Path, metavar="FILE",
                         help=".txt: a prompt a line; .json: a list of texts or lists of token ids; .jsonl: a text, a list "
                         'of ids, or {"prompt": ...} a line')  # fmt: skip
    parser.add_argument(
        "--max-output-len", type=int, default=64, metavar="N", help="tokens (default: %(default)s)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="also write results here")
    parser.add_argument("--stream", action="store_true", help="print text as it comes (one prompt only)")
    sampling = parser.add_argument_group("sampling")
    add_prompt_lookup(sampling)
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: %(default)s)")
    sampling.add_argument("--top-k", type=int, default=0, help="0: all tokens (default: %(default)s)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    sampling.add_argument("--min-p", type=float, default=0.0, help="default: %(default)s")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="default: %(default)s")
    sampling.add_argument("--presence-penalty", type=float, default=0.0, help="default: %(default)s")
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, help="default: %(default)s")
    sampling.add_argument("--logit-bias", nargs="+", default=[], metavar="ID=BIAS",
                          help="added to the logits of tokens: -100 never, 100 always")  # fmt: skip
    sampling.add_argument(
        "--bad-words", nargs="+", default=[], metavar="TEXT", help="texts that must not come"
    )
    sampling.add_argument("--bad-words-ids", nargs="+", default=[], metavar="ID,ID,...",
                          help="sequences of token ids that must not come")  # fmt: skip
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N",
                          help="tokens before --stop or the like may end it (default: %(default)s)")  # fmt: skip
    sampling.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end the output")
    sampling.add_argument("--stop-token-ids", nargs="+", type=int, default=[], metavar="ID")
    sampling.add_argument(
        "--include-stop-str-in-output", action="store_true", help="keep the --stop that ended it"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    sampling.add_argument(
        "--show-special-tokens", action="store_true", help="such as </s>, as part of the text"
    )
    sampling.add_argument("-n", type=int, metavar="N", help="outputs per prompt (default: 1, or --num-beams)")
    sampling.add_argument("--num-beams", type=int, default=1, metavar="N",
                          help="beams of a search, at most the engine's --max-beam-width (default: 1, none)")  # fmt: skip
    sampling.add_argument("--length-penalty", type=float, default=1.0, metavar="X",
                          help="with --num-beams: above 0 favours long outputs (default: %(default)s)")  # fmt: skip
    sampling.add_argument(
        "--early-stopping", action="store_true", help="with --num-beams: end when so many outputs have ended"
    )
    sampling.add_argument("--best-of", type=int, metavar="N",
                          help="outputs to make, of which the -n most probable are shown (default: as many as -n)")  # fmt: skip
    sampling.add_argument("--seed", type=int, help="same seed, same text, whatever else is in the batch")
    sampling.add_argument(
        "--logprobs", type=int, metavar="K", help="put the K best tokens of each step into --output-json"
    )
    sampling.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same of each prompt token")
    add_nproc(parser)
    add_kv_cache(parser)
    tensorrt_llm_flags.add_tokenizer_dir(parser)


def main(args: argparse.Namespace) -> int:
    load_options: LoadOptions = {"kv_cache_memory_bytes": args.kv_cache_memory_bytes}
    code = enter_job(args, **load_options)
    if code is not None:
        return code
    tensorrt_llm_flags.note_tokenizer_dir(args)
    engine_dir = begin_loading(args.engine_dir)
    with without_collection():
        from ..runtime.llm import LLM
        from ..runtime.prompt_lookup import PromptLookup
        from ..runtime.sampling_params import SamplingParams

    prompts = read_prompts(args)
    if args.stream and len(prompts) != 1:
        raise ConfigError(f"--stream shows one prompt, found {len(prompts)}; leave it out for several")
    n = args.num_beams if args.n is None else args.n
    if args.stream and n != 1:
        raise ConfigError(f"--stream shows one output, -n is {n}; leave it out for several")
    check_output_file(args.output_json, "--output-json")
    params = SamplingParams(
        n=n,
        best_of=args.best_of,
        max_tokens=args.max_output_len,
        min_tokens=args.min_tokens,
        temperature=args.temperature,
        prompt_lookup=None if args.prompt_lookup is None else PromptLookup.parse(args.prompt_lookup),
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(map(_parse_bias, args.logit_bias)),
        bad_words=args.bad_words,
        bad_words_ids=[_parse_ids(text, "--bad-words-ids") for text in args.bad_words_ids],
        stop=args.stop,
        stop_token_ids=args.stop_token_ids,
        include_stop_str_in_output=args.include_stop_str_in_output,
        ignore_eos=args.ignore_eos,
        skip_special_tokens=not args.show_special_tokens,
        seed=args.seed,
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
        beam_width=args.num_beams,
        length_penalty=args.length_penalty,
        early_stopping=args.early_stopping,
    )
    with LLM(engine_dir, **load_options, enable_prefix_cache=args.enable_prefix_cache) as llm:
        keep_heap(collect=False)
        if llm.tokenizer is None and (
            args.stop or args.bad_words or any(isinstance(p, str) for p in prompts)
        ):
            raise RequestError(
                f"{args.engine_dir}: the engine has no tokenizer files; use --input-ids and --stop-token-ids"
            )
        start = time.perf_counter()
        printer = _StreamPrinter(has_text=llm.tokenizer is not None) if args.stream else None
        outputs = llm.generate(prompts, params, on_output=printer)
        seconds = time.perf_counter() - start
    if printer is None:
        _print_outputs(outputs)
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    if args.prompt_lookup is not None:
        print(
            f"prompt lookup {args.prompt_lookup}: {llm.core.lookup_stats.describe(tokens)}", file=sys.stderr
        )
    if args.output_json is not None:
        write_json(args.output_json, [result_json(output) for output in outputs])
    return 0


class _StreamPrinter:
    """Prints what is new of the one output: its text, or its token ids where the engine makes no text."""

    def __init__(self, *, has_text: bool) -> None:
        self._has_text, self._printed = has_text, 0

    def __call__(self, output: RequestOutput) -> None:
        completion = output.outputs[0]
        shown: Any = completion.text if self._has_text else completion.token_ids
        new = shown[self._printed :]
        text = new if isinstance(new, str) else "".join(f"{token} " for token in new)
        print(text, end="\n" if output.finished else "", flush=True)
        self._printed = len(shown)


def _print_outputs(outputs: list[RequestOutput]) -> None:
    for i, output in enumerate(outputs):
        shown_prompt = output.prompt if output.prompt is not None else list(output.prompt_token_ids)
        print(f"Input [{i}]: {shown_prompt!r}")
        for completion in output.outputs:
            text = completion.text
            shown = text if output.prompt is not None or text else list(completion.token_ids)
            place = f"{i}" if len(output.outputs) == 1 else f"{i}.{completion.index}"
            print(f"Output [{place}]: {shown!r} ({completion.finish_reason})")


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line. Raises ConfigError naming file and line for what is not a prompt."""
    if args.input_text is not None:
        return list(args.input_text)
    if args.input_ids is not None:
        return [_parse_ids(text, "--input-ids") for text in args.input_ids]
    return _read_prompt_file(args.input_file)


def _parse_ids(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a comma-separated list of token ids") from None


def _parse_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias: {text!r}; accepted: ID=BIAS, such as 2=-100") from None


def _read_prompt_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--input-file: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input-file: {path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        prompts = [_prompt_of_json(_parse_json(line, where), where) for where, line in lines]
    elif path.suffix == ".json":
        value = _parse_json(text, str(path))
        if not isinstance(value, list):
            raise ConfigError(
                f"--input-file: {path}: is a {type(value).__name__}; accepted: a list of prompts"
            )
        prompts = [_prompt_of_json(item, f"{path}, item {i}") for i, item in enumerate(value)]
    else:
        prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ConfigError(f"--input-file: {path}: holds no prompt")
    return prompts


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--input-file: {where}: not valid JSON: {error}") from None


def _prompt_of_json(value: Any, where: str) -> Prompt:
    known = {"prompt", "prompt_token_ids"}
    if isinstance(value, dict) and len(known & value.keys()) == 1:
        value = value[(known & value.keys()).pop()]
    if isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)):
        return value
    raise ConfigError(
        f'--input-file: {where}: not a prompt; accepted: a text, a list of token ids, {{"prompt": ...}}'
    )


def result_json(output: RequestOutput) -> dict[str, Any]:
    """One result as JSON: prompt, text, token ids, finish reason and, where asked for, logprobs.

    Completions after the first stand under `more`.
    """
    first, *others = map(_completion_json, output.outputs)
    data = {"prompt": output.prompt, "prompt_token_ids": list(output.prompt_token_ids), **first}
    if output.prompt_logprobs is not None:
        data["prompt_logprobs"] = [entry and _logprobs_json(entry) for entry in output.prompt_logprobs]
    if others:
        data["more"] = others
    return data


def _completion_json(completion: CompletionOutput) -> dict[str, Any]:
    data: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        data["logprobs"] = [_logprobs_json(step) for step in completion.logprobs]
    return data


def _logprobs_json(entries: Mapping[int, Logprob]) -> dict[str, Any]:
    return {
        str(token): {"logprob": lp.logprob, "rank": lp.rank, "token": lp.decoded_token}
        for token, lp in entries.items()
    }

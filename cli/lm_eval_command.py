"""`trtc lm-eval`: tasks of EleutherAI's lm-evaluation-harness on an engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, TargetError, TrtcError
from .output_files import check_output_file, write_json
from .ranks import add_nproc, enter_job

NAME = "lm-eval"
HELP = "run tasks of the lm-evaluation-harness on an engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, required=True, help="folder written by `trtc build`")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK",
                        help="names of the harness's tasks, or of those in --include-path")  # fmt: skip
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with task files (.yaml) of your own"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the context (default: the task's)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="documents of each task at most (default: all)"
    )
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="tokens the model sees at once (default: the engine's max_seq_len)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write results and settings here")
    add_nproc(parser)


def main(args: argparse.Namespace) -> int:
    check_output_file(args.json, "--json")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ConfigError(f"--include-path: {args.include_path} is not a folder")
    code = enter_job(args)
    if code is not None:
        return code
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise TargetError(
            "the lm-evaluation-harness is missing: pip install lm-eval, or trtc's extra [lm-eval]"
        ) from None
    from ..runtime.evaluation.harness import EngineLM

    manager = TaskManager(include_path=None if args.include_path is None else str(args.include_path))
    unknown = sorted(set(args.tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            f"--tasks: the harness has no {', '.join(unknown)}; accepted: its own tasks (`lm-eval ls tasks`) and those "
            f"in --include-path"
        )
    model = EngineLM(args.engine_dir, max_length=args.max_length)
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=args.tasks,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            log_samples=False,
        )
    except TrtcError:
        raise
    except Exception as error:  # the harness and `datasets` raise many types: a bad task file, no network
        raise ConfigError(f"--tasks {' '.join(args.tasks)}: {type(error).__name__}: {error}") from error
    finally:
        model.close()
    print(make_table(results))
    if args.json is not None:
        write_json(args.json, summary(results))
    return 0


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of the harness's results that are plain values: scores, versions, how many documents."""
    return {name: results[name] for name in ("results", "versions", "n-shot", "n-samples") if name in results}

"""The other side of every comparison: the same checkpoint in `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...core.dtypes import DType, to_torch
from ...core.engine import Engine
from ...core.errors import CheckpointError


def require_folder(path: str | Path) -> None:
    """Raises CheckpointError where there is no Hugging Face folder."""
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: not a Hugging Face folder: no config.json")


class HFModel:
    """A causal language model of `transformers`, on the GPU where there is one."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._device = next(model.parameters()).device

    @classmethod
    def load(cls, path: str | Path, dtype: DType) -> HFModel:
        """Loads a Hugging Face folder with weights and activations in `dtype`. Raises CheckpointError."""
        require_folder(path)
        from transformers import AutoModelForCausalLM

        try:
            with _without_progress_bar():
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=to_torch(dtype))
        except Exception as error:  # transformers raises many types for a bad folder
            raise CheckpointError(
                f"{path}: transformers cannot load it: {type(error).__name__}: {error}"
            ) from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    def check_fits(self, engine: Engine) -> None:
        """Raises CheckpointError when this is not the model of the engine: another vocabulary, or fewer positions."""
        config = self._model.config
        positions = getattr(config, "max_position_embeddings", None)  # None where positions have no end
        for name, ours, fits in (
            ("vocabulary", engine.model.vocab_size, config.vocab_size == engine.model.vocab_size),
            (
                "max_seq_len",
                engine.build.max_seq_len,
                positions is None or positions >= engine.build.max_seq_len,
            ),
        ):
            if not fits:
                raise CheckpointError(
                    f"{config.name_or_path}: has {config.vocab_size} tokens and {positions} positions, which does not fit "
                    f"the engine's {name} of {ours}; give the Hugging Face folder that the engine was built from"
                )

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] float32 of one sequence; row i predicts token i + 1."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        rows: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return rows

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        eos_token_ids: Sequence[int],
        num_beams: int = 1,
    ) -> list[list[int]]:
        """Greedy continuations of a batch, or the best of so many beams.

        Each has up to `max_tokens` tokens, or ends with its end-of-sequence token, which is kept.

        Prompts of different lengths are padded on the left and masked. Generation settings of the checkpoint's own
        generation_config.json are not used: both sides of a comparison do the same.
        """
        import transformers

        pad = eos_token_ids[0] if eos_token_ids else 0
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        make_config: Any = transformers.GenerationConfig  # has no types
        config = make_config(
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=list(eos_token_ids) or None,
            pad_token_id=pad,
        )
        sequences = self._model.generate(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device), generation_config=config
        )
        return [_until_eos(row, frozenset(eos_token_ids)) for row in sequences[:, longest:].tolist()]


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    import transformers.utils.logging

    logging: Any = transformers.utils.logging  # has no types
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _until_eos(token_ids: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Without the padding of a sequence that ended before the others of its batch."""
    for position, token_id in enumerate(token_ids):
        if token_id in eos_token_ids:
            return token_ids[: position + 1]
    return token_ids

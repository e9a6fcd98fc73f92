"""Quantized engines of target cuda on a GPU. Oracle: the float graph in float64 with the weights that integers stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from trtc.core.build import build_engine
from trtc.core.dtypes import DType
from trtc.core.quantize.integers import dequantize
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.source import QuantizedWeights, nearest
from trtc.kernels.launch import architecture
from trtc.runtime.load import load_executor
from trtc.tests.asymmetric import with_zeros
from trtc.tests.engine_steps import TOKENS, batch_work, check_reproducible, engine_logits, execute
from trtc.tests.opt_models import BUILD, OptCheckpoint, save_hf
from trtc.tests.packed_steps import PagedSequences, Reference
from trtc.tests.prompt_steps import check_prompt_graphs
from trtc.tests.tolerances import logits_tolerance, max_error

pytestmark = pytest.mark.gpu
INT8, INT4, FP8 = WeightFormat("int8"), WeightFormat("int4", 128), WeightFormat("fp8")
ZEROS = WeightFormat("int4", 64, zero_point=True)
CASES = [
    ("cuda_pre_norm", INT8),
    ("cuda_pre_norm", INT4),
    ("cuda_pre_norm", FP8),
    ("cuda_bias_free_gelu", FP8),
    ("cuda_pre_norm", ZEROS),
    ("cuda_bias_free_gelu", ZEROS),
    ("cuda_pre_norm", WeightFormat("int4", 32)),
    ("cuda_post_norm_projected", INT8),
    ("cuda_post_norm_projected", WeightFormat("int4", 64)),
    ("cuda_bias_free_gelu", INT8),
    ("cuda_bias_free_gelu", INT4),
    ("cuda_head_dim_80_odd_vocabulary", INT8),
    ("cuda_head_dim_128_untied", WeightFormat("int4", 64)),
]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An engine, and what it stands for."""

    engine: Path
    checkpoint: OptCheckpoint
    source: QuantizedWeights
    lm_head: bool

    @classmethod
    def build(
        cls,
        variant: str,
        how: WeightFormat,
        dtype: DType,
        folder: Path,
        *,
        lm_head: bool = False,
        **options: object,
    ) -> Quantized:
        checkpoint = OptCheckpoint.open(save_hf(variant, folder / "hf"))
        floats = checkpoint.weights(dtype)
        rounded = with_zeros(floats, how, lm_head) if how.zero_point else None
        source = rounded or nearest(QuantizeOptions(how, lm_head))(floats)
        target = {"architectures": [architecture()]}
        build = dataclasses.replace(BUILD, target="cuda", target_options=target, **options)
        model = dataclasses.replace(checkpoint.config, dtype=dtype)
        build_engine(checkpoint.family, model, source, build, folder / "engine")
        return cls(folder / "engine", checkpoint, source, lm_head)

    def reference(self, page_size: int, num_pages: int) -> Reference:
        graph = self.checkpoint.family.compose(self.checkpoint.config)
        weights = {node.name: self._weight(node.name) for node in graph.weights}
        return Reference(graph, weights, page_size, num_pages)

    def _weight(self, name: str) -> torch.Tensor:
        value = self.source.read(0, name)
        if name not in self.source.quantization.weights:
            return value.double()
        zero = self.source.read(0, f"{name}.zero") if self.source.quantization.format.zero_point else None
        return dequantize(value, self.source.read(0, f"{name}.scale").double(), zero)


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize(("variant", "how"), CASES, ids=str)
def test_logits(variant: str, how: WeightFormat, dtype: DType, tmp_path: Path) -> None:
    """One prompt, a prompt with chunks, and token by token (from CUDA graphs)."""
    quantized = Quantized.build(variant, how, dtype, tmp_path, lm_head=variant == "cuda_head_dim_128_untied")
    reference = quantized.reference(BUILD.page_size, 16).run(
        PagedSequences(BUILD.page_size, 16).step({"a": TOKENS})
    )
    tolerance = logits_tolerance(dtype, reference)
    for chunks in ([len(TOKENS)], [9, 20, *[1] * (len(TOKENS) - 29)]):
        error = max_error(engine_logits(quantized.engine, TOKENS, chunks), reference)
        assert error <= tolerance, f"chunks {chunks[:3]}: {error} > {tolerance}"


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("how", [INT8, INT4, FP8, ZEROS], ids=str)
@pytest.mark.parametrize("sequences", [7, 16, 33, 70])
def test_batches(sequences: int, how: WeightFormat, lm_head: bool, tmp_path: Path) -> None:
    """Decode steps of several sequences: the streaming and the tile kernels, and beyond 64 rows dequantized weights."""
    quantized = Quantized.build(
        "cuda_pre_norm", how, DType.FLOAT16, tmp_path, lm_head=lm_head, max_batch_size=80, max_num_tokens=240
    )
    executor = load_executor(quantized.engine)
    paged = PagedSequences(executor.page_size, executor.num_pages)
    reference = quantized.reference(executor.page_size, executor.num_pages)
    for step in range(3):
        inputs = paged.step(batch_work(sequences, step))
        expected = reference.run(inputs)
        assert max_error(execute(executor, inputs), expected) <= logits_tolerance(DType.FLOAT16, expected)
    executor.close()


@pytest.mark.parametrize("how", [INT8, INT4, FP8], ids=str)
def test_steps_with_prompts_in_cuda_graphs(how: WeightFormat, tmp_path: Path) -> None:
    """Weights are dequantized one after the other into one matrix, in the graph."""
    quantized = Quantized.build("cuda_pre_norm", how, DType.FLOAT16, tmp_path, max_batch_size=8)
    check_prompt_graphs(
        quantized.engine,
        lambda *sizes: quantized.reference(*sizes).run,
        lambda expected: logits_tolerance(DType.FLOAT16, expected),
    )


def test_generation_is_reproducible(tmp_path: Path) -> None:
    """Weights are laid out anew for the kernels each time."""
    check_reproducible(Quantized.build("cuda_pre_norm", INT4, DType.FLOAT16, tmp_path).engine)

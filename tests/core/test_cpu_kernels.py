"""The kernels of the CPU target, one by one: linear layers, int8 products, attention, the head that screens logits with int8.

Oracle: the same arithmetic in float64, by torch; where a number is not finite, the token that must be reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from trtc.core import layers
from trtc.core.dtypes import DType, from_torch, to_torch
from trtc.core.graph import GraphBuilder, Node
from trtc.core.ops.elementwise import ACTIVATIONS
from trtc.core.targets import cpu_linear
from trtc.core.targets.cpu_attention import CompiledAttention, CpuAttention
from trtc.core.targets.cpu_linear import FEW_TOKENS, QuantizedLinear, bucket, linear_kernel
from trtc.core.targets.cpu_step import DecodeLimits, DecodeStep
from trtc.kernels import cpu_step
from trtc.tests.tolerances import LOGITS_INT8_RELATIVE, logits_tolerance, max_error
from trtc.tests.toy_decoder import weight_rows

from .test_cpu_target import needs_kernels


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("rows", [0, 1, 5, 17])
def test_linear_layers_agree_with_float64(rows: int, activation: str | None, dtype: DType) -> None:
    """Bias, activation and residual, through whatever library this processor's linear layers go to."""
    random = torch.Generator().manual_seed(1)
    sizes = {"x": (rows, 48), "weight": (40, 48), "bias": (40,), "residual": (rows, 40)}
    values = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    x, weight, bias, residual = (value.to(to_torch(dtype)) for value in values.values())
    kernel = linear_kernel(
        Node("fc", "linear", attrs={} if activation is None else {"activation": activation})
    )
    for with_bias, with_residual in ((True, True), (True, False), (False, True), (False, False)):
        added = residual.clone()
        y = kernel(x, weight, bias if with_bias else None, added if with_residual else None)
        expected = x.double() @ weight.double().t() + with_bias * bias.double()
        if activation is not None:
            expected = ACTIVATIONS[activation](expected)
        expected = expected + with_residual * residual.double()
        assert y.dtype == x.dtype and y.shape == expected.shape
        assert torch.equal(added, residual), "the residual is somebody else's tensor"
        if rows:
            assert max_error(y, expected) <= logits_tolerance(dtype, expected)


def test_products_have_few_shapes() -> None:
    """Oracle: every number of rows up to max_num_tokens: none is cut, none grows by more than an eighth."""
    found = {rows: bucket(rows) for rows in range(8193)}
    assert all(rows <= size <= rows + rows / 8 for rows, size in found.items())
    assert len(set(found.values())) < 100


def test_both_sides_have_one_interface() -> None:
    """Else a library that was just compiled is taken for another checkout's, and all tests of it are skipped."""
    source = Path(cpu_step.__file__).with_name("step.c").read_text()
    assert re.findall(r"^int trtc_interface\(void\) { return (\d+); }$", source, re.M) == [
        str(cpu_step.INTERFACE)
    ]


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(7, 40), (130, 768), (5, 20000)])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_int8_products_are_those_of_the_dequantized_weight(count: int, rows: int, columns: int) -> None:
    """Weights at both ends of int8, so that a sum that leaves 32 bits shows. Oracle: float64."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
    weight[0] = 127
    scale, bias = torch.rand(rows, generator=random), torch.randn(rows, generator=random)
    x, y = torch.randn(count, columns, generator=random), torch.full((count, rows), float("nan"))
    x[-1] = x[-1].abs().amax()
    narrow = torch.empty(2, count, -(-columns // 32) * 32, dtype=torch.int16)
    one = cpu_step.Instruction(
        op=cpu_step.Op.LINEAR, wtype=cpu_step.WEIGHT_TYPES["int8"], n=rows, k=columns, ldx=columns, x=x.data_ptr(),
        w=weight.data_ptr(), scale=scale.data_ptr(), bias=bias.data_ptr(), y=y.data_ptr(),
    )  # fmt: skip
    step = cpu_step.Step(tokens=count, narrow=narrow.data_ptr(), narrow_k=narrow.shape[2])
    cpu_step.run((cpu_step.Instruction * 1)(one), step, 2)
    expected = (x.double() @ weight.double().t()) * scale.double() + bias.double()
    assert max_error(y, expected) <= 1e-3 * float(expected.abs().max())


@needs_kernels
def test_a_library_of_another_checkout_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its instructions may mean something else. Oracle: the one that is loaded, told apart by its number alone."""
    monkeypatch.setattr(cpu_step, "INTERFACE", cpu_step.INTERFACE + 1)
    assert cpu_step.library.__wrapped__() is None


@needs_kernels
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("threads", [1, 3])
def test_activations_of_a_part_of_a_register(kind: str, threads: int) -> None:
    """All of the range in which they bend, four tokens, columns behind others, numbers that are not finite. Oracle: float64."""
    x = torch.linspace(-20, 20, 4 * 1003).view(4, 1003).flip(1).contiguous()
    x[0, 500], x[1, 501], x[2, 502] = float("nan"), float("inf"), 0.0
    part, y = x[:, 37:986], torch.empty(4, 949)
    one = cpu_step.Instruction(
        op=cpu_step.Op.ACTIVATION,
        kind=cpu_step.ACTIVATION_KINDS[kind],
        n=949,
        ldx=1003,
        x=part.data_ptr(),
        y=y.data_ptr(),
    )
    cpu_step.run((cpu_step.Instruction * 1)(one), cpu_step.Step(tokens=4), threads)
    torch.testing.assert_close(
        y.double(), ACTIVATIONS[kind](part.double()), rtol=2e-6, atol=1e-6, equal_nan=True
    )


@needs_kernels
@pytest.mark.parametrize("op", [cpu_step.Op.MULTIPLY, cpu_step.Op.ADD])
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_and_products_of_parts_of_registers(op: cpu_step.Op, threads: int) -> None:
    """Oracle: torch, to the last bit."""
    random = torch.Generator().manual_seed(8)
    x, w = torch.randn(5, 131, generator=random), torch.randn(5, 70, generator=random)
    first, second, y = x[:, 61:122], w[:, 3:64], torch.empty(5, 61)
    one = cpu_step.Instruction(
        op=op, n=61, ldx=131, ld2=70, x=first.data_ptr(), w=second.data_ptr(), y=y.data_ptr()
    )
    cpu_step.run((cpu_step.Instruction * 1)(one), cpu_step.Step(tokens=5), threads)
    assert torch.equal(y, first * second if op is cpu_step.Op.MULTIPLY else first + second)


def quantized_linear(
    node: Node, *, decoding: bool = False, tokens: int = FEW_TOKENS
) -> Callable[..., torch.Tensor]:
    """tokens: of the step, as far as the kernel is told."""
    linears = QuantizedLinear()
    linears.begin_step(tokens, decoding=decoding)
    return linears.kernel(node)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(0, 70, 200), (1, 70, 200), (2, 16, 40), (3, 130, 600), (401, 70, 200)]
)
def test_int8_layers_keep_8_bits_of_64_columns(
    count: int, rows: int, columns: int, activation: str | None
) -> None:
    """Sizes on both sides of what is multiplied at a time; tokens and columns of very different sizes, one token zero, weights
    at both ends of int8. Oracle: float64."""
    random = torch.Generator().manual_seed(4)
    weight = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
    weight[0], weight[1] = 127, -128
    scale, bias = torch.rand(rows, generator=random) / 500, torch.randn(rows, generator=random)
    x = torch.randn(count, columns, generator=random) * torch.logspace(-3, 1, count)[:, None]
    x[:, 5] *= 100.0
    x[1:2] = 0.0
    x[2:3] = 10.0
    residual = torch.randn(count, rows, generator=random)
    node = Node(
        "y",
        "quantized_linear",
        ("x", "w", "s", None, "b", "r"),
        {"activation": activation} if activation else {},
    )
    y = quantized_linear(node)(x, weight, scale, None, bias, residual)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    expected = (expected if activation is None else ACTIVATIONS[activation](expected)) + residual.double()
    # Half a step in every column, if all erred the same way (a gelu's slope reaches 1.13); then float32's own rounding.
    groups = F.pad(x, (0, -columns % 64)).view(count, -(-columns // 64), 64)
    step = (groups.abs().amax(2, keepdim=True) / 127).expand(groups.shape).flatten(1)[:, :columns].double()
    bound = 1.13 * 0.5 * step @ weight.double().abs().t() * scale + 1e-4
    assert y.shape == (count, rows)
    assert ((y - expected).abs() <= bound).all()


def test_int8_layers_of_ranks_round_as_one_where_their_columns_are_whole_groups() -> None:
    """Oracle: the layer of one rank, whose columns two ranks have 128 of each. What is left is the order of float32's sums."""
    random = torch.Generator().manual_seed(5)
    weight = torch.randint(-127, 128, (70, 256), generator=random, dtype=torch.int8)
    scale, x = torch.rand(70, generator=random) / 500, torch.randn(9, 256, generator=random)
    layer = quantized_linear(Node("y", "quantized_linear", ("x", "w", "s")))
    parts = [layer(x[:, half], weight[:, half], scale) for half in (slice(128), slice(128, None))]
    assert max_error(parts[0] + parts[1], layer(x, weight, scale)) <= 1e-5


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 70, 200), (3, 16, 40), (65, 130, 600)])
def test_int8_layers_of_decode_steps_keep_16_bits(
    count: int, rows: int, columns: int, activation: str | None
) -> None:
    """Tokens of very different sizes. Oracle: float64."""
    random = torch.Generator().manual_seed(4)
    weight = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
    scale, bias = torch.rand(rows, generator=random) / 500, torch.randn(rows, generator=random)
    x = torch.randn(count, columns, generator=random) * torch.logspace(1, -3, count)[:, None]
    residual = torch.randn(count, rows, generator=random)
    inputs = ("x", "w", "s", None, "b", "r")
    node = Node("y", "quantized_linear", inputs, {"activation": activation} if activation else {})
    y = quantized_linear(node, decoding=True)(x, weight, scale, None, bias, residual)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    expected = (expected if activation is None else ACTIVATIONS[activation](expected)) + residual.double()
    # As above, with one step for a token; then float32's own rounding.
    step = x.abs().amax(1, keepdim=True).double() / 32767
    bound = 1.13 * 0.5 * step * weight.double().abs().sum(1) * scale + 1e-5
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.skipif(not cpu_step.has_int8(), reason="step.c is not compiled, or no AVX-512 VNNI")
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("decoding", [False, True])
def test_int8_layers_multiply_integers_whatever_their_activation(
    decoding: bool, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of dequantizing a weight at every step. That their results are right, tests above say."""
    monkeypatch.setattr(cpu_linear, "dequantize", lambda *parts: pytest.fail("a weight is dequantized"))
    node = Node("y", "quantized_linear", ("x", "w", "s"), {"activation": activation} if activation else {})
    y = quantized_linear(node, decoding=decoding)(
        torch.ones(3, 32), torch.ones(5, 32, dtype=torch.int8), torch.ones(5)
    )
    assert y.shape == (3, 5)


def test_int8_layers_of_decode_steps_of_many_tokens_are_those_of_prompts() -> None:
    """Which are faster there. Oracle: the same layer of a prompt."""
    random = torch.Generator().manual_seed(4)
    weight = torch.randint(-127, 128, (70, 200), generator=random, dtype=torch.int8)
    scale, x = torch.rand(70, generator=random) / 500, torch.randn(FEW_TOKENS + 1, 200, generator=random)
    node = Node("y", "quantized_linear", ("x", "w", "s"))
    prompt = quantized_linear(node)(x, weight, scale)
    assert torch.equal(quantized_linear(node, decoding=True, tokens=len(x))(x, weight, scale), prompt)


@pytest.mark.parametrize("decoding", [False, True])
def test_int8_layers_multiply_heads(decoding: bool) -> None:
    """A weight that is applied to every head. Oracle: float64, to 8 bits of activations."""
    random = torch.Generator().manual_seed(6)
    x, residual = (torch.randn(3, 4, 32, generator=random) for _ in range(2))
    weight = torch.randint(-127, 128, (32, 32), generator=random, dtype=torch.int8)
    scale = torch.rand(32, generator=random) / 500
    node = Node("y", "quantized_linear", ("x", "w", "s", None, None, "r"))
    y = quantized_linear(node, decoding=decoding)(x, weight, scale, None, None, residual)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + residual.double()
    assert y.shape == expected.shape
    assert max_error(y, expected) <= LOGITS_INT8_RELATIVE * float(expected.abs().max())


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_layers_report_a_token_that_is_not_finite(bad: float, decoding: bool) -> None:
    x = torch.ones(3, 32)
    x[1, 7] = bad
    node = Node("y", "quantized_linear", ("x", "w", "s"))
    y = quantized_linear(node, decoding=decoding)(x, torch.ones(5, 32, dtype=torch.int8), torch.ones(5))
    assert y.isfinite().all(1).tolist() == [True, False, True]


@needs_kernels
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(6, 6, 64), (8, 2, 128), (3, 3, 24), (4, 1, 80), (2, 2, 256)]
)
def test_compiled_attention_reads_every_kind_of_head(
    heads: int, kv_heads: int, dim: int, dtype: DType
) -> None:
    """Three sequences over scattered pages, 1 to 77 tokens long; two threads that share a sequence. Oracle: float64."""
    random = torch.Generator().manual_seed(5)
    page_size, lengths, pages = 16, [77, 1, 33], 5
    cache = torch.randn(2, 3 * pages, page_size, kv_heads, dim, generator=random).to(to_torch(dtype))
    table = torch.randperm(3 * pages, generator=random).int().view(3, pages)
    x, y = torch.randn(3, (heads + 2 * kv_heads) * dim, generator=random), torch.empty(3, heads, dim)
    new, scores = x[:, heads * dim :].to(to_torch(dtype)), torch.empty(2, heads, max(lengths))
    positions = torch.tensor(lengths, dtype=torch.int32) - 1
    one = cpu_step.Instruction(
        op=cpu_step.Op.ATTENTION, wtype=cpu_step.WEIGHT_TYPES[dtype.value], n=heads, k=kv_heads, ldx=x.shape[1], ld2=x.shape[1],
        ld3=x.shape[1], dim=dim, number=dim**-0.5, x=x.data_ptr(), w=x.data_ptr() + 4 * heads * dim,
        bias=x.data_ptr() + 4 * (heads + kv_heads) * dim, scale=cache[0].data_ptr(), residual=cache[1].data_ptr(),
        y=y.data_ptr(),
    )  # fmt: skip
    step = cpu_step.Step(
        tokens=3, pages=pages, page_size=page_size, max_len=max(lengths), positions=positions.data_ptr(),
        page_table=table.data_ptr(), scratch=scores.data_ptr(),
    )  # fmt: skip
    cpu_step.run((cpu_step.Instruction * 1)(one), step, 2)
    for b, length in enumerate(lengths):
        k, v = (part[table[b].long()].flatten(0, 1)[:length].double().transpose(0, 1) for part in cache)
        assert torch.equal(torch.stack((k[:, -1], v[:, -1])).flatten(), new[b].double())
        q = x[b, : heads * dim].double().view(heads, 1, dim)
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0, :, 0]
        assert max_error(y[b], expected) < 1e-5


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(3, 3, 64), (4, 2, 128), (3, 3, 24), (4, 1, 80), (1, 1, 256)]
)
def test_compiled_attention_of_prompts_and_chunks(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Prompts, chunks and single tokens, on both sides of what is taken at a time, over scattered pages that hold NaN beyond
    each sequence. Oracle: torch's attention in float64 over a cache of its own."""
    random = torch.Generator().manual_seed(6)
    page_size, counts, lengths = 16, [130, 1, 50, 6, 48], [130, 77, 180, 70, 64]
    pages = [-(-length // page_size) for length in lengths]
    table = torch.zeros(len(counts), max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=random).int()
    for b, own in enumerate(order.split(pages)):
        table[b, : len(own)] = own
    start = torch.tensor([0, *counts]).cumsum(0).int()
    shape = (2, sum(pages), page_size, kv_heads, dim)
    past = torch.randn(shape, generator=random).to(dtype)
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for position in range(length - count, pages[b] * page_size):
            past[:, table[b, position // page_size], position % page_size] = float("nan")
    step = (start, torch.tensor(lengths, dtype=torch.int32), table)
    qkv = torch.randn(sum(counts), heads + 2 * kv_heads, dim, generator=random).to(dtype)
    node = Node("y", "attention", ("q", "k", "v"), {"layer": 0, "scale": dim**-0.5})
    results = []
    for kind, cache, inputs in (
        (CompiledAttention, past.clone(), qkv),
        (CpuAttention, past.double(), qkv.double()),
    ):
        attention = kind([(cache[0], cache[1])])
        attention.begin_step(*step)
        results.append((attention.kernel(node)(*inputs.split([heads, kv_heads, kv_heads], 1)), cache))
    (y, cache), (expected, expected_cache) = results
    assert torch.equal(cache.double().nan_to_num(7.0), expected_cache.nan_to_num(7.0))
    assert max_error(y, expected) <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 0.0])
def test_the_screened_head_finds_the_best_of_rows_that_differ_little(
    spread: float, dtype: torch.dtype
) -> None:
    """Rows so alike that int8 cannot tell them apart, equal ones included. Oracle: all logits in float64."""
    random = torch.Generator().manual_seed(2)
    base, noise = torch.randn(1, 96, generator=random), torch.randn(300, 96, generator=random)
    program = HeadOnly((base + spread * noise).to(dtype))
    for _ in range(8):
        x = torch.randn(5, 96, generator=random).to(dtype)
        chosen = program.next_tokens(x)
        logits = x.double() @ program.head.double().t()
        best = logits.amax(-1)
        assert (best - logits.gather(1, chosen.long()[:, None])[:, 0]).max() < 1e-5 * best.abs().max()
        if spread >= 1e-2:
            assert torch.equal(chosen.long(), logits.argmax(-1))
        if spread == 0.0:
            assert chosen.tolist() == [0] * 5  # the first of equals


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_screened_head_reports_logits_that_are_not_finite(bad: float) -> None:
    program = HeadOnly(torch.ones(40, 32))
    x = torch.ones(3, 32)
    x[1, 7] = bad
    assert program.next_tokens(x).tolist() == [0, -1, 0]


class HeadOnly:
    """An embedding and a head: the hidden state of token i is row i of what is asked."""

    def __init__(self, head: torch.Tensor) -> None:
        vocab, width = head.shape
        g = GraphBuilder(
            from_torch(head.dtype), weight_rows(x__weight=(5, width), lm_head__weight=(vocab, width))
        )
        graph = g.finish(layers.lm_head(g, layers.embedding(g, "token_ids", "x")))
        self.head, self._x = head, torch.zeros(5, width, dtype=head.dtype)
        weights = {"x.weight": self._x, "lm_head.weight": head}
        cache = [(torch.zeros(1, 16, 1, 16), torch.zeros(1, 16, 1, 16))]
        self._step = DecodeStep(graph, weights, cache, DecodeLimits(max_tokens=5, max_len=16))

    def next_tokens(self, x: torch.Tensor) -> torch.Tensor:
        count = len(x)
        self._x[:count] = x
        inputs = {
            "token_ids": torch.arange(count),
            "positions": torch.zeros(count),
            "kv_length": torch.ones(count),
            "page_table": torch.zeros(count, 1),
        }
        return self._step.next_tokens({name: value.int() for name, value in inputs.items()})

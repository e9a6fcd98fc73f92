"""GPTQ and calibration. Oracles: the outputs of the layer, which GPTQ is to keep; brute force on two columns; and the graph
run node by node with the weights quantized so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trtc.core.dtypes import DType
from trtc.core.errors import CheckpointError, ConfigError
from trtc.core.interpreter import interpret
from trtc.core.ops import ReferenceContext
from trtc.core.quantize import calibrate
from trtc.core.quantize.calibrate import Calibration, read_texts
from trtc.core.quantize.gptq import DAMPING, gptq
from trtc.core.quantize.integers import Quantized, dequantize, round_to_nearest
from trtc.core.quantize.scheme import QuantizeOptions, WeightFormat
from trtc.core.quantize.store import calibrated
from trtc.core.sharding import ShardingOptions
from trtc.tests.opt_models import OptCheckpoint
from trtc.tests.packed_steps import PagedSequences, filled_cache
from trtc.tests.tolerances import max_error

INT8, INT4 = WeightFormat("int8"), WeightFormat("int4", 32)


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of a few directions and some noise, as layers have them."""
    return values(rows, 6, seed=seed) @ values(6, columns, seed=seed + 1) + 0.1 * values(
        rows, columns, seed=seed + 2
    )


def output_error(weight: torch.Tensor, found: Quantized, x: torch.Tensor) -> float:
    return float((x @ (dequantize(found.integers, found.scale) - weight).T).square().mean())


@pytest.mark.parametrize("how", [INT8, INT4, WeightFormat("int4", 64)], ids=str)
def test_outputs_are_kept_better_than_by_rounding(how: WeightFormat) -> None:
    """Also those of inputs that calibration has not seen, of the same kind."""
    weight, x = values(24, 256, seed=1), correlated_inputs(900, 256, 2)
    seen, unseen = x[:600], x[600:]
    found = gptq(weight, seen.T @ seen, how, name="w")
    plain = round_to_nearest(weight, how, name="w")
    for inputs in (seen, unseen):
        assert output_error(weight, found, inputs) < 0.5 * output_error(weight, plain, inputs)
    assert found.integers.dtype == plain.integers.dtype and found.integers.shape == plain.integers.shape
    assert found.scale.dtype == plain.scale.dtype and found.scale.shape == plain.scale.shape


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, x = values(8, 64, seed=3), correlated_inputs(200, 64, 4)
    one, other = (gptq(weight, x.T @ x * factor, INT4, name="w") for factor in (1.0, 1 / 4096))
    assert torch.equal(one.integers, other.integers) and torch.equal(one.scale, other.scale)


def test_independent_inputs_make_it_rounding_to_nearest() -> None:
    weight = values(8, 64, seed=5)
    found, plain = gptq(weight, torch.eye(64) * 7, INT4, name="w"), round_to_nearest(weight, INT4, name="w")
    assert torch.equal(found.integers, plain.integers) and torch.equal(found.scale, plain.scale)


def test_the_last_column_makes_up_for_the_first_as_well_as_it_can() -> None:
    """Two columns whose inputs are alike. Oracle: the first is rounded to nearest, and of all integers for the second none
    gives a smaller error in the damped norm."""
    weight = torch.tensor([[0.77, 1.27], [-0.334, 1.27], [1.27, 0.111]])
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    found = gptq(weight, hessian, INT8, name="w")
    norm = hessian + DAMPING * torch.eye(2)
    for row, scale, integers in zip(weight, found.scale, found.integers, strict=True):
        assert int(integers[0]) == round(float(row[0] / scale))

        def error(
            second: int, row: torch.Tensor = row, scale: torch.Tensor = scale, first: int = int(integers[0])
        ) -> float:
            lost = row - torch.tensor([first, second]) * scale
            return float(lost @ norm @ lost)

        assert int(integers[1]) == min(range(-127, 128), key=error)


def test_inputs_that_say_nothing_leave_rounding_to_nearest() -> None:
    """A column whose input is always zero, and no calibration at all."""
    weight, x = values(8, 64, seed=6), correlated_inputs(300, 64, 7)
    x[:, 0] = 0
    plain = round_to_nearest(weight, INT8, name="w")
    assert torch.equal(gptq(weight, x.T @ x, INT8, name="w").integers[:, 0], plain.integers[:, 0])
    assert torch.equal(gptq(weight, torch.zeros(64, 64), INT8, name="w").integers, plain.integers)


def test_what_is_not_finite_is_refused() -> None:
    hessian = torch.eye(32)
    with pytest.raises(CheckpointError, match=r"weight 'w' has values that are not finite"):
        gptq(torch.full((2, 32), torch.nan), hessian, INT4, name="w")
    hessian[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"'w': calibration gives its layer inputs that are not finite"):
        gptq(torch.ones(2, 32), hessian, INT4, name="w")


# ---- calibration ---------------------------------------------------------------------------------


def texts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(96, (7 + 5 * i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("batch_tokens", [20, calibrate.BATCH_TOKENS])
@pytest.mark.parametrize("variant", ["pre_norm", "post_norm_projected"])
def test_every_layer_is_quantized_for_the_inputs_that_reach_it(
    variant: str,
    batch_tokens: int,
    opt_checkpoint: Callable[[str], OptCheckpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: for each layer, the graph run anew by the interpreter with the weights quantized before it, one text at a time;
    the inputs it finds, given to `gptq`, make the same integers. Nothing but the tied head's own weight is left out."""
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", batch_tokens)
    checkpoint = opt_checkpoint(variant)
    source, graph = checkpoint.weights(), checkpoint.family.compose(checkpoint.config)
    chosen = QuantizeOptions(INT8, lm_head=True).choose(source.weights()).weights
    floats = {node.name: source.read(0, node.name) for node in graph.weights}
    order = [node.inputs[1] for node in graph.nodes if node.op == "linear" and node.inputs[1] in chosen]
    found = dict(Calibration(graph, source.whole, texts(), INT8, chosen).quantized())
    assert list(found) == order and set(order) == set(chosen)
    for name in (order[0], order[4], order[-2], order[-1]):
        (product,) = (node for node in graph.nodes if node.op == "linear" and node.inputs[1] == name)
        inputs: list[torch.Tensor] = []
        done = {
            n: dequantize(q.integers, q.scale) for n, q in found.items() if order.index(n) < order.index(name)
        }
        for ids in texts():
            step = PagedSequences(16, 12).step({"a": ids})
            context = ReferenceContext(filled_cache(graph, 16, 12, torch.float32))
            seen: dict[str, torch.Tensor] = {}
            interpret(graph, {**floats, **done, **step}, context,
                      lambda node, outputs: seen.update(zip(node.tensors, outputs, strict=True)))  # fmt: skip
            inputs.append(seen[product.inputs[0] or ""])
        x = torch.cat(inputs)
        expected = gptq(floats[name], x.T @ x, INT8, name=name)
        differing = (expected.integers != found[name].integers).float().mean()
        assert float(differing) < 0.002, (
            name
        )  # sums in another order can turn a value that lies between two integers
        assert max_error(found[name].scale, expected.scale) == 0


def test_shards_are_parts_of_one_calibrated_model(
    opt_checkpoint: Callable[[str], OptCheckpoint], tmp_path: Path
) -> None:
    """Oracle: the view of one rank, cut by hand; the odd vocabulary's head gets rows of zeros."""
    checkpoint = opt_checkpoint("vocabulary_odd")
    graph, options = checkpoint.family.compose(checkpoint.config), QuantizeOptions(INT4, lm_head=True)
    views = []
    for tp_size in (1, 2):
        folder = tmp_path / str(tp_size)
        folder.mkdir()
        told: list[int] = []
        floats = checkpoint.weights(DType.FLOAT16, ShardingOptions(tp_size))
        views.append(
            calibrated(floats, options, graph, texts(), folder, lambda done, total, name: told.append(done))
        )
        assert told == list(range(1, len(views[-1].quantization.weights) + 1))
    one, two = views
    assert one.quantization.method == two.quantization.method == "gptq"
    assert set(one.names(0)) == set(two.names(0))
    for name in one.names(0):
        whole, parts = one.read(0, name), [two.read(rank, name) for rank in range(2)]
        if torch.equal(parts[0], whole):
            assert torch.equal(parts[1], whole)
            continue
        axis = 1 if ".out.weight" in name or ".fc2.weight" in name else 0
        together = torch.cat(parts, axis)
        assert torch.equal(together[: len(whole)], whole), name
        assert name.endswith(".scale") or not together[len(whole) :].any()
        assert two.dtype(0, name) == one.dtype(0, name)


def test_what_calibration_cannot_work_with_is_refused(opt_checkpoint: Callable[[str], OptCheckpoint]) -> None:
    checkpoint = opt_checkpoint("pre_norm")
    source, graph = checkpoint.weights(), checkpoint.family.compose(checkpoint.config)
    with pytest.raises(ConfigError, match=r"embed.positions.weight is not the weight of a linear layer"):
        Calibration(graph, source.whole, texts(), INT8, ("embed.positions.weight",))
    for odd in (96, -1):
        with pytest.raises(ConfigError, match=f"token id {odd} is not in the model's vocabulary"):
            Calibration(graph, source.whole, [[5, odd]], INT8, ("layers.0.mlp.fc1.weight",))


def test_texts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        '"abc"\n\n{"text": "h\u2028\\u0069"}\n'
        '{"text": "de"}\n{"article": "f", "highlights": "g"}\n{"token_ids": [7, 8, 9, 10]}\n""\n'
    )
    assert read_texts(file, lambda text: list(text.encode()), 3) == [
        [97, 98, 99],
        list("h\u2028".encode())[:3],
        [100, 101],
        [102],
        [7, 8, 9],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'"a"\n{"txt": "b"}\n',
            "line 2: expected a string, or an object with token_ids or one of text, article",
        ),
        (b'"a"\n[1]\n', "line 2: expected a string"),
        (b'{"token_ids": ["a"]}\n', "line 1: expected a string"),
        (b'"a\n', "line 1: not valid JSON"),
        (b"\n\n", "holds no text"),
        (b"\xff\xfe", "it is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_files_of_texts_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(file, lambda text: [1] * len(text), 8)

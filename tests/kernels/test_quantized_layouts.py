"""Integer weights of linear layers without a GPU: their layouts and bit tricks, emulated, and the plans chosen for them.

Oracle of layouts and bits: the numbers themselves. Oracle of plans: the sizes of the matrix, the limits of the hardware, and
what was measured to be faster.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from trtc.core.quantize.integers import pack_int4
from trtc.kernels.linear.formats import WEIGHTS, interleave_int4
from trtc.kernels.linear.plan import SHARED_LIMITS, SMALLEST_SHARED_LIMIT, StreamPlan, TilePlan
from trtc.kernels.linear.quantized import for_kernels, stored_format
from trtc.kernels.linear.quantized_plan import choose_quantized, norms_quantized_input, quantized_stream
from trtc.kernels.linear.quantized_warpgroup_plan import QuantizedWarpgroupPlan
from trtc.kernels.linear.stripe_plan import StripePlan

from .quantized_weights import FORMATS, ZERO_FORMATS, weight, weight_with_zeros

# ---- layouts and bits, emulated ------------------------------------------------------------------


def test_interleaved_words_hold_the_columns_that_the_kernel_multiplies() -> None:
    """Oracle: the columns that stream.cu and tile.cu read of x for piece p of member m (8 m + 32 p), and the places of
    pairs in a word that weights.cuh states: columns 2 i and 2 i + 1 in bits 4 i and 4 i + 16."""
    integers = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    stored = interleave_int4(pack_int4(integers))
    assert stored.shape == (3, 128) and stored.dtype == torch.uint8
    for row, block, member, piece in itertools.product(range(3), range(2), range(4), range(4)):
        start = 64 * block + 16 * member + 4 * piece
        word = int.from_bytes(bytes(stored[row, start : start + 4].tolist()), "little")
        found = [(word >> (4 * (i // 2) + 16 * (i % 2)) & 15) - 8 for i in range(8)]
        first = 128 * block + 8 * member + 32 * piece
        assert found == integers[row, first : first + 8].tolist()


def pair_value(bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The two elements in a 32-bit register, the lower half first."""
    halves = torch.tensor([bits & 0xFFFF, bits >> 16 & 0xFFFF], dtype=torch.int32).to(torch.int16)
    return halves.view(dtype)


def byte_perm(a: int, b: int, selector: int) -> int:
    """PRMT: byte i of the result is byte (selector >> 4 i) & 7 of b:a."""
    whole = a | b << 32
    return sum((whole >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


@pytest.mark.parametrize("value", [-128, -127, -100, -2, -1, 0, 1, 63, 64, 127])
def test_bytes_become_elements_exactly(value: int) -> None:
    """Oracle: the integer. The steps are those of IntegerPair in weights.cuh, in torch's float16 and bfloat16 arithmetic."""
    other = 5
    word = (value & 255) | other << 8 | (value & 255) << 16 | (other & 255) << 24
    for selector in (0x4140, 0x4342):
        half = byte_perm(word ^ 0x80808080, 0x64646464, selector)
        difference = pair_value(half, torch.float16) - pair_value(0x64806480, torch.float16)
        assert difference.tolist() == [value, other]
        wide = byte_perm(word, 0x43434343, selector)
        a, b = (pair_value(wide & mask, torch.bfloat16) for mask in (0xFF7FFF7F, 0xFF80FF80))
        assert (a - b).tolist() == [value, other]


def test_e4m3_numbers_become_elements_exactly() -> None:
    """Oracle: torch's conversion of all numbers but NaN. The steps are those of Fp8Pair in common/fp8.cuh without the
    instruction of newer GPUs; the power of two is applied in float64, as subnormal numbers of torch on the CPU may be
    flushed."""
    numbers = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    expected = numbers.view(torch.float8_e4m3fn).double().tolist()
    for byte, value in zip(numbers.tolist(), expected, strict=True):
        word = byte | 0x38 << 8 | byte << 16 | 0x38 << 24  # 0x38 is 1
        for selector in (0x1404, 0x3424):
            wide = byte_perm(word, 0, selector)
            for dtype, shift, mask, power in (
                (torch.float16, 1, 0x3F803F80, 8),
                (torch.bfloat16, 4, 0x07F007F0, 120),
            ):
                pair = pair_value(wide >> shift & mask | wide & 0x80008000, dtype)
                assert (pair.double() * 2.0**power).tolist() == [value, 1.0]
    assert pair_value(0x5C005C00, torch.float16).tolist() == [2.0**8] * 2
    assert pair_value(0x7B807B80, torch.bfloat16).tolist() == [2.0**120] * 2


@pytest.mark.parametrize("value", range(-8, 8))
def test_nibbles_become_elements_exactly(value: int) -> None:
    """Oracle: the integer. The steps are those of Nibbles in weights.cuh."""
    word = sum(((value if i % 2 else -value - 1) + 8) << 4 * i for i in range(8))
    expected = [-value - 1, value] * 2
    half = torch.float16
    low, high = word & 0x000F000F | 0x64006400, word & 0x00F000F0 | 0x64006400
    assert (pair_value(low, half) - pair_value(0x64086408, half)).tolist() == [-value - 1] * 2
    scaled = pair_value(high, half) * pair_value(0x2C002C00, half) + pair_value(0xD480D480, half)
    assert scaled.tolist() == [value] * 2
    for shift in (0, 4, 8, 12):
        bits = word >> shift & 0x000F000F | 0x43004300
        found = pair_value(bits, torch.bfloat16) - pair_value(0x43084308, torch.bfloat16)
        assert found.tolist() == [expected[shift // 4]] * 2


@pytest.mark.parametrize("value", range(-8, 8))
def test_raw_nibbles_are_integers_and_an_offset_in_another_unit(value: int) -> None:
    """Oracle: the integer. The bits and numbers are those of RawNibbles in stripe.cu; float16's are subnormal."""
    other = -value - 1
    word = sum(((value if i % 2 else other) + 8) << 4 * i for i in range(8))
    for shift in (0, 8):
        low, high = (
            pair_value(word >> shift & mask, torch.float16).double() for mask in (0x000F000F, 0x00F000F0)
        )
        assert (low * 2.0**24 - 8).tolist() == [other] * 2
        assert (high * 2.0**24 / 16 - 8).tolist() == [value] * 2
    assert (pair_value(0x80088008, torch.float16).double() * 2.0**24).tolist() == [-8.0] * 2
    assert (pair_value(0x80018001, torch.float16).double() * 2.0**24).tolist() == [-1.0] * 2
    for shift in (0, 4, 8, 12):
        raw = pair_value(word >> shift & 0x000F000F | 0x43004300, torch.bfloat16).double()
        assert (raw - 136).tolist() == [(other, value)[shift // 4 % 2]] * 2
    assert pair_value(0xC308C308, torch.bfloat16).tolist() == [-136.0] * 2
    assert pair_value(0xBF80BF80, torch.bfloat16).tolist() == [-1.0] * 2


@pytest.mark.parametrize("zero", [-8, -1, 0, 3, 8])
@pytest.mark.parametrize("value", [-8, -1, 0, 7])
def test_zeros_are_taken_off_exactly(value: int, zero: int) -> None:
    """Oracle: the difference. The steps are those of Nibbles in weights.cuh, given a zero."""
    word, both = sum((value + 8) << 4 * i for i in range(8)), [value - zero] * 2
    zeros = torch.full((2,), zero, dtype=torch.float16)
    low, high = (pair_value(word & mask | 0x64006400, torch.float16) for mask in (0x000F000F, 0x00F000F0))
    assert (low - (pair_value(0x64086408, torch.float16) - -zeros)).tolist() == both
    off = pair_value(0xD480D480, torch.float16) - zeros
    assert (high * pair_value(0x2C002C00, torch.float16) + off).tolist() == both
    zeros = zeros.bfloat16()
    bits = pair_value(word & 0x000F000F | 0x43004300, torch.bfloat16)
    assert (bits - (pair_value(0x43084308, torch.bfloat16) - -zeros)).tolist() == both


@pytest.mark.parametrize(
    ("how", "columns"), [("int4zero/32", 160), ("int4zero/64", 192), ("int4zero/128", 256)]
)
def test_zeros_lie_behind_their_scales(how: str, columns: int) -> None:
    """Oracle: the parts; groups that are added have a scale of zero."""
    integers, scale, zero = weight_with_zeros(3, columns, how, torch.float16)
    made, values = for_kernels(integers.clone(), scale, zero)
    stored = stored_format(made, values)
    assert stored.name == how and values.is_contiguous() and values.dtype is torch.float16
    groups = scale.shape[1]
    assert values.shape == (3, stored.padded(columns) // stored.group, 2)
    assert torch.equal(values[:, :groups, 0], scale) and torch.equal(values[:, :groups, 1], zero.half())
    assert not values[:, groups:].any()


@pytest.mark.parametrize("how", [*FORMATS, *ZERO_FORMATS])
@pytest.mark.parametrize("columns", [128, 192, 224, 384])
def test_every_column_of_a_row_is_multiplied_once(how: str, columns: int) -> None:
    """Oracle: a permutation. The places are those of x_column and copy_weight in stream.cu: every column of x meets the
    column of W that lies in the same piece, pieces within 32 columns (a group or part of one)."""
    stored = WEIGHTS[how]
    lane_columns = 8 * stored.pieces
    member_columns, piece_columns = {2: (16, 8), 4: (8, 32)}[stored.pieces]
    seen = []
    for step in range(-(-columns // stored.warp_columns)):
        for member in range(4):
            column = step * stored.warp_columns + member * lane_columns
            assert column * stored.bits % 128 == 0  # 16-byte pieces of W
            for piece in range(stored.pieces):
                place = column - member * (lane_columns - member_columns) + piece * piece_columns
                seen += [place + j for j in range(8)]
                if stored.group is not None:
                    groups = 128 // stored.group
                    assert place // stored.group == column // 128 * groups + piece * groups // stored.pieces
    padded = -(-columns // stored.warp_columns) * stored.warp_columns
    assert sorted(seen) == list(range(padded))


@pytest.mark.parametrize(
    ("how", "columns"), [("int8", 24), ("fp8", 40), ("int4/32", 160), ("int4/64", 192), ("int4/128", 256)]
)
def test_padding_adds_zeros(how: str, columns: int) -> None:
    """Oracle: the integers; what is added stands for zeros, of groups with a scale of zero."""
    integers, scale = weight(3, columns, how, torch.float16)
    original = integers.clone()
    made, scales = for_kernels(integers, scale)
    stored = stored_format(made, scales)
    assert stored.name == how and made.shape[1] * 8 // stored.bits == stored.padded(columns)
    if stored.bits == 8:
        bits, before = made.view(torch.uint8), original.view(torch.uint8)
        assert torch.equal(bits[:, :columns], before) and not bits[:, columns:].any()
    else:
        width = stored.padded(columns) // 2
        whole = torch.zeros(3, width, dtype=torch.uint8)
        whole[:, : columns // 2] = original
        assert torch.equal(made, interleave_int4(whole))
    if stored.group is not None:
        assert torch.equal(scales[:, : scale.shape[1]], scale) and not scales[:, scale.shape[1] :].any()


def test_whole_weights_are_made_in_place() -> None:
    """Oracle: the address: a second copy of a large model's weights would not fit beside them."""
    for how in FORMATS:
        integers, scale = weight(4, 512, how, torch.bfloat16)
        made, scales = for_kernels(integers, scale)
        assert made.data_ptr() == integers.data_ptr() and scales.data_ptr() == scale.data_ptr()


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("how", [*FORMATS, *ZERO_FORMATS])
def test_plans_cover_the_matrix_and_fit(how: str, capability: int) -> None:
    """Oracle: the sizes of the matrix, the rules that the kernels state, the hardware's limits."""
    shapes = [
        (2304, 768),
        (768, 3072),
        (12288, 4096),
        (4096, 16384),
        (50272, 9216),
        (9216, 36864),
        (5376, 7168),
        (101, 256),
        (7, 128),
    ]
    limit = SHARED_LIMITS.get(capability, SMALLEST_SHARED_LIMIT)
    for rows, (features, columns), norm in itertools.product(
        (1, 4, 8, 9, 16, 17, 64), shapes, ("none", "layer")
    ):
        if norm != "none" and rows > 16:
            continue
        plan = choose_quantized(rows, features, columns, capability=capability, norm=norm, weight=how)
        assert plan.weight == how and how.split("/")[0].capitalize() in plan.entry("__half")
        normed = isinstance(plan, StreamPlan) and norm != "none"
        moments = plan.warps * 8 * plan.token_tiles * 8 if normed else 0  # bytes beside the ring
        assert plan.shared_bytes + moments <= limit, plan
        shape = plan.launch_shape(dependent=True)
        assert shape.block[0] % 32 == 0
        if isinstance(plan, StreamPlan):
            assert plan.blocks <= features and 8 * plan.token_tiles >= rows
            continue
        if isinstance(plan, StripePlan):
            assert plan.blocks <= features and plan.early_steps <= plan.steps
            assert 32 * plan.warps * plan.outputs * plan.blocks >= rows * features
            assert norm == "none" or 256 * plan.warps * plan.norm_pieces >= columns
            continue
        if isinstance(plan, QuantizedWarpgroupPlan):  # see test_quantized_warpgroup.py
            assert capability == 90 and rows > 16
            continue
        assert isinstance(plan, TilePlan)
        cluster = shape.cluster[0] if shape.cluster else 1
        assert cluster <= (8 if capability >= 90 else 1)
        assert shape.grid[0] // cluster * plan.features_per_block >= features
        assert (
            cluster * plan.columns_per_block >= columns and plan.columns_per_block % plan.stage_columns == 0
        )
        assert plan.features_per_block <= 16 * plan.feature_tiles * plan.warps_down
        assert 8 * plan.token_tiles >= rows and plan.stage_columns >= WEIGHTS[how].warp_columns


def test_integers_keep_two_buffers_of_sums() -> None:
    """Oracle: bytes by hand; the launch of before floats did with one. Only their launches were measured so."""
    plan = choose_quantized(16, 4096, 4096, weight="int4/128")
    assert isinstance(plan, StreamPlan) and plan.held_x and plan.warps == 8
    plan = quantized_stream(8, 1024, 8192, weight="int8", held=False, alone=False)
    assert (plan.blocks, plan.warps, plan.octets) == (132, 8, 1)
    assert plan.shared_bytes == plan.stages * 8 * 512 * (1 + 2) + 2 * 8 * 8 * 8 * 4


def test_few_rows_on_hopper_are_stripes() -> None:
    """Oracle: what was measured (bench/notes/kernels_linear.md), by shape; a norm is inside for one row."""
    products = {"qkv": (12288, 4096), "out": (4096, 4096), "fc1": (16384, 4096), "fc2": (4096, 16384)}

    def stripes(rows: int, how: str, capability: int = 90, norm: str = "none") -> list[str]:
        return [
            name for name, sizes in products.items()
            if isinstance(choose_quantized(rows, *sizes, weight=how, capability=capability, norm=norm), StripePlan)
        ]  # fmt: skip

    assert stripes(1, "int4/128") == stripes(2, "int4/128") == stripes(1, "int8") == [*products]
    assert stripes(4, "int4/128") == ["qkv", "fc1"]
    assert stripes(8, "int4/128") == stripes(2, "fp8") == []
    assert stripes(1, "int4/128", capability=80) == stripes(1, "int4/128", capability=120) == []
    for rows, capability, inside in ((1, 90, True), (2, 90, False), (1, 89, False)):
        for sizes in products.values():
            given = (rows, *sizes, "int4/128", capability)
            fits = inside and sizes == products["qkv"]
            assert norms_quantized_input(*given, weighted=True) == fits, given
            assert norms_quantized_input(*given, weighted=False)
    assert not norms_quantized_input(17, 4096, 4096, "int8", 90, weighted=False)


def test_bytes_of_small_models_stay_with_the_kernel_that_was_faster_for_them() -> None:
    """1.3B's layers are 2,048 wide, 6.7B's 4,096."""
    shapes = ((6144, 2048), (8192, 2048), (2048, 8192), (12288, 4096), (4096, 4096), (4096, 16384))
    for how in ("int8", "fp8"):
        plans = [choose_quantized(1, *shape, weight=how) for shape in shapes]
        assert [isinstance(plan, StripePlan) for plan in plans] == [False] * 3 + [True] * 3

// How linear kernels read their weights: a lane takes 16 bytes of a row at a time, in pieces that go with 16 bytes of x.
//
//   Stored            one stored element, which holds kColumnsPerStored columns
//   kPad              rows are stored in whole multiples of so many columns
//   kPieces           16-byte pieces of x, of 8 columns each, that go with 16 bytes of W
//   kMemberColumns    columns from the first piece of a lane to that of the next member of its group
//   kPieceColumns     columns from a piece of a lane to its next one
//   kHeldUnit         rows of x in shared memory are apart by a multiple of so many columns
//   kHeldPad          and these: against bank conflicts
//   kRowScales        one scale a row, applied to the finished sum
//   kGroups           scales of a row in 128 columns: the sum of each group is scaled, in float32; 0: none
//   kZeros            behind each scale lies the zero of its group, which is taken off its integers
//   piece(stored, i)  piece i as 8 elements of T, exact; with kZeros, given the zero of the piece's group as well
//
// Integers become floating point by their bits: behind the right exponent they are a number with an offset, which one
// subtraction takes off. What is said of integers here goes for e4m3 numbers (fp8) as well.
#pragma once
#include "common/fp8.cuh"
#include "common/types.cuh"

namespace trtc {

// 16-bit elements, as they are.
template <typename T>
struct FloatWeight {
    using Stored = T;
    static constexpr int kColumnsPerStored = 1, kPad = 1, kPieces = 1, kMemberColumns = 8, kPieceColumns = 0;
    static constexpr int kHeldUnit = 64, kHeldPad = 32, kGroups = 0;
    static constexpr bool kRowScales = false, kZeros = false;

    static __device__ __forceinline__ uint4 piece(const uint4& stored, int) { return stored; }
};

// a - b and a * b + c of pairs, all given by their bits.
template <typename T>
__device__ __forceinline__ uint32 subtract_pairs(uint32 a, uint32 b) {
    using Pair = typename PairOf<T>::type;
    const Pair result = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
    return reinterpret_cast<const uint32&>(result);
}

__device__ __forceinline__ uint32 multiply_add_halves(uint32 a, uint32 b, uint32 c) {
    const __half2 result = __hfma2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b),
                                   reinterpret_cast<const __half2&>(c));
    return reinterpret_cast<const uint32&>(result);
}

// (word & kMask) | kExponent, in one instruction: the compiler makes two of it, since it takes one constant only.
template <uint32 kMask, uint32 kExponent>
__device__ __forceinline__ uint32 masked_behind(uint32 word) {
    uint32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(result) : "r"(word), "n"(kMask), "r"(kExponent));
    return result;
}

// Two neighbouring signed bytes of a word as a pair, the upper or the lower two.
template <typename T>
struct IntegerPair;
template <>
struct IntegerPair<__half> {
    template <bool kUpper>
    static __device__ __forceinline__ uint32 of(uint32 word) {
        // 0x6400 | (byte + 128) is 1024 + 128 + byte.
        const uint32 wide = __byte_perm(word ^ 0x80808080u, 0x64646464u, kUpper ? 0x4342 : 0x4140);
        return subtract_pairs<__half>(wide, 0x64806480u);
    }
};
template <>
struct IntegerPair<__nv_bfloat16> {
    template <bool kUpper>
    static __device__ __forceinline__ uint32 of(uint32 word) {
        // Seven bits of mantissa hold the byte but for its sign: 0x4300 | bits is 128 + bits. The sign turns what is taken
        // off from 128 (0x4300) into 256 (0x4380).
        const uint32 wide = __byte_perm(word, 0x43434343u, kUpper ? 0x4342 : 0x4140);
        return subtract_pairs<__nv_bfloat16>(wide & 0xff7fff7fu, wide & 0xff80ff80u);
    }
};

// Bytes of one row with one scale: a lane takes 16 neighbouring columns.
template <typename T, typename ByteStored, template <typename> typename BytePair>
struct ByteWeight {
    using Stored = ByteStored;
    static constexpr int kColumnsPerStored = 1, kPad = 16, kPieces = 2, kMemberColumns = 16, kPieceColumns = 8;
    static constexpr int kHeldUnit = 64, kHeldPad = 8, kGroups = 0;
    static constexpr bool kRowScales = true, kZeros = false;

    static __device__ __forceinline__ uint4 piece(const uint4& stored, int index) {
        const uint32 low = index ? stored.z : stored.x, high = index ? stored.w : stored.y;
        using Pair = BytePair<T>;
        return make_uint4(Pair::template of<false>(low), Pair::template of<true>(low),
                          Pair::template of<false>(high), Pair::template of<true>(high));
    }
};

template <typename T>
struct Int8Weight : ByteWeight<T, signed char, IntegerPair> {};
template <typename T>
struct Fp8Weight : ByteWeight<T, unsigned char, Fp8Pair> {};

// An element twice.
template <typename T>
__device__ __forceinline__ uint32 pair_of(T value) {
    const uint32 bits = reinterpret_cast<const unsigned short&>(value);
    return bits | bits << 16;
}

// Eight four-bit integers of a word, 8 added to each, as elements. Columns 2 i and 2 i + 1 are in bits 4 i and 4 i + 16.
template <typename T>
struct Nibbles;
template <>
struct Nibbles<__half> {
    static __device__ __forceinline__ uint4 of(uint32 word) {
        // 0x6400 | four bits is 1024 + them; four bits higher, they count 16 times: (1024 + 16 n) / 16 - 72 is n - 8.
        const uint32 upper = word >> 8;
        return make_uint4(low(word), high(word), low(upper), high(upper));
    }
    static __device__ __forceinline__ uint32 low(uint32 word, uint32 off = 0x64086408u) {
        return subtract_pairs<__half>(masked_behind<0x000f000f, 0x64006400>(word), off);
    }
    static __device__ __forceinline__ uint32 high(uint32 word, uint32 off = 0xd480d480u) {
        return multiply_add_halves(masked_behind<0x00f000f0, 0x64006400>(word), 0x2c002c00u, off);
    }
    // Less a zero: 1032 + zero is taken off, or -72 - zero added, exactly.
    static __device__ __forceinline__ uint4 of(uint32 word, __half zero) {
        const uint32 zeros = pair_of(zero), upper = word >> 8;
        const uint32 low_off = subtract_pairs<__half>(0x64086408u, zeros ^ 0x80008000u);
        const uint32 high_off = subtract_pairs<__half>(0xd480d480u, zeros);
        return make_uint4(low(word, low_off), high(word, high_off), low(upper, low_off), high(upper, high_off));
    }
};
template <>
struct Nibbles<__nv_bfloat16> {
    static __device__ __forceinline__ uint32 pair(uint32 word, uint32 off = 0x43084308u) {
        return subtract_pairs<__nv_bfloat16>(masked_behind<0x000f000f, 0x43004300>(word), off);  // 128 + n - 136
    }
    static __device__ __forceinline__ uint4 of(uint32 word) {
        return make_uint4(pair(word), pair(word >> 4), pair(word >> 8), pair(word >> 12));
    }
    // Less a zero: 136 + zero is taken off, exactly.
    static __device__ __forceinline__ uint4 of(uint32 word, __nv_bfloat16 zero) {
        const uint32 off = subtract_pairs<__nv_bfloat16>(0x43084308u, pair_of(zero) ^ 0x80008000u);
        return make_uint4(pair(word, off), pair(word >> 4, off), pair(word >> 8, off), pair(word >> 12, off));
    }
};

// int4 in groups of kGroupColumns, interleaved (`interleave_int4` in formats.py): of 128 columns, a lane's 16 bytes hold the
// four pieces whose neighbours the other members of its group have, so that every piece is within one group.
template <typename T, int kGroupColumns>
struct Int4Weight {
    using Stored = unsigned char;
    static constexpr int kColumnsPerStored = 2, kPad = 128, kPieces = 4, kMemberColumns = 8, kPieceColumns = 32;
    static constexpr int kHeldUnit = 128, kHeldPad = 32, kGroups = 128 / kGroupColumns;
    static constexpr bool kRowScales = false, kZeros = false;

    static __device__ __forceinline__ uint32 word(const uint4& stored, int index) {
        return index == 0 ? stored.x : index == 1 ? stored.y : index == 2 ? stored.z : stored.w;
    }
    static __device__ __forceinline__ uint4 piece(const uint4& stored, int index) {
        return Nibbles<T>::of(word(stored, index));
    }
};

// The same with a zero for every group: a whole number of -16 to 16, as T, which the numbers to be taken off take up.
template <typename T, int kGroupColumns>
struct Int4zeroWeight : Int4Weight<T, kGroupColumns> {
    static constexpr bool kZeros = true;

    static __device__ __forceinline__ uint4 piece(const uint4& stored, int index, T zero) {
        return Nibbles<T>::of(Int4Weight<T, kGroupColumns>::word(stored, index), zero);
    }
};

// Values that a group of integers has: a scale, and with kZeros a zero.
template <typename Weight>
constexpr int kPerGroup = Weight::kZeros ? 2 : 1;

// The values of all groups of one row in 128 columns.
template <typename T, typename Weight>
struct alignas(2 * (Weight::kGroups > 0 ? Weight::kGroups * kPerGroup<Weight> : 1)) GroupScales {
    static constexpr int kSpan = Weight::kGroups > 0 ? Weight::kPieces / Weight::kGroups : 1;  // pieces of a group
    T value[Weight::kGroups > 0 ? Weight::kGroups * kPerGroup<Weight> : 1];

    __device__ __forceinline__ T scale(int piece) const { return value[piece / kSpan * kPerGroup<Weight>]; }
    __device__ __forceinline__ uint4 weight(const uint4& stored, int piece) const {
        if constexpr (Weight::kZeros) {
            return Weight::piece(stored, piece, value[piece / kSpan * kPerGroup<Weight> + 1]);
        } else {
            return Weight::piece(stored, piece);
        }
    }
};

// The scales of a row in the 128 columns that hold `column`; rows have as many as their padded columns. Beyond the last row or
// column, those of the last: what they are multiplied with is not used, and a test would cost more than the load.
template <typename T, typename Weight>
__device__ __forceinline__ GroupScales<T, Weight> load_scales(const T* scales, int row, int rows, int column,
                                                              int padded_columns) {
    const uint32 blocks = padded_columns / 128;
    const uint32 place = static_cast<uint32>(min(row, rows - 1)) * blocks + min(static_cast<uint32>(column) / 128, blocks - 1);
    return *(reinterpret_cast<const GroupScales<T, Weight>*>(scales) + place);
}

template <typename Weight>
__device__ __forceinline__ int padded_columns(int columns) {
    return (columns + Weight::kPad - 1) / Weight::kPad * Weight::kPad;
}

}  // namespace trtc

// Integer weights to 16-bit elements, for products of many rows: out = integer * scale, rounded once.
#include "common/types.cuh"
#include "linear/weights.cuh"

namespace trtc {

constexpr int kPieceSize = 8;
constexpr int kPiecesPerThread = 4;  // loads in flight
constexpr int kDequantizeThreads = 256;

// out: [features, columns]; weight: [features, columns], as Weight stores it; scales: [features], [features, groups] or
// [features, groups, 2] with zeros.
// columns is a multiple of 8; features * columns / 8 is less than 2^31.
template <typename T, typename Weight>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_weight(T* out, const typename Weight::Stored* weight, const T* scales, int features, int columns) {
    const uint32 row_pieces = columns / kPieceSize, total = row_pieces * features;
    const uint32 stored_columns = padded_columns<Weight>(columns);
    const uint32 first = blockIdx.x * (kDequantizeThreads * kPiecesPerThread) + threadIdx.x;
    uint4 stored[kPiecesPerThread];
    float scale[kPiecesPerThread];
    T zero[kPiecesPerThread];
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i) {
        const uint32 index = first + i * kDequantizeThreads;
        stored[i] = make_uint4(0, 0, 0, 0);
        scale[i] = 0.f;
        if (index >= total) continue;
        const uint32 row = index / row_pieces, piece = index % row_pieces;
        if constexpr (Weight::kRowScales) {
            const uint64 place = static_cast<uint64>(row) * (stored_columns / kPieceSize) + piece;
            const uint2 eight = __ldcs(reinterpret_cast<const uint2*>(weight) + place);
            stored[i].x = eight.x, stored[i].y = eight.y;
            scale[i] = to_float(scales[row]);
        } else {
            // Piece p of 128 columns is word 4 * (p % 4) + p / 4 of them: see `interleave_int4`.
            const uint32 word = piece / 16 * 16 + piece % 4 * 4 + piece % 16 / 4;
            const uint64 place = static_cast<uint64>(row) * (stored_columns / kPieceSize) + word;
            stored[i].x = __ldcs(reinterpret_cast<const uint32*>(weight) + place);
            const uint32 groups = stored_columns / 128 * Weight::kGroups;
            const uint64 group = static_cast<uint64>(row) * groups + piece * Weight::kGroups / 16;
            scale[i] = to_float(scales[group * kPerGroup<Weight>]);
            if constexpr (Weight::kZeros) zero[i] = scales[2 * group + 1];
        }
    }
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i) {
        const uint32 index = first + i * kDequantizeThreads;
        if (index >= total) continue;
        uint4 piece;
        if constexpr (Weight::kZeros) {
            piece = Weight::piece(stored[i], 0, zero[i]);
        } else {
            piece = Weight::piece(stored[i], 0);
        }
        float value[kPieceSize];
        unpack(*reinterpret_cast<const Vector<T>*>(&piece), value);
#pragma unroll
        for (int j = 0; j < kPieceSize; ++j) value[j] *= scale[i];
        store_vector(out + static_cast<uint64>(index) * kPieceSize, pack<T>(value));
    }
}

}  // namespace trtc

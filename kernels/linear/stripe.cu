// Linear layer for up to 8 rows with weights of few bits: y = act(norm(x) W^T + b) + residual, one read of W.
//
// As in stream.cu, a block owns a range of W's rows ("features"), its warps split K, W is the 16-row operand of the tensor
// cores, and each thread reads back from the ring in shared memory only what it copied there. With few bits a kernel is
// over after some microseconds, so what counts is that nothing waits:
//   - a stage is 16 features by the columns of one step, waited for on its own: products start with the first stage;
//   - the scales of all of the block's features are in shared memory before the products, not loaded beside them;
//   - columns are the outer loop, tiles of 16 features the inner one: a warp reads its x once for all tiles, their sums
//     stay in registers; what the warps have is added up once, at the end;
//   - four-bit integers are multiplied with their offset of 8: what that adds, 8 (sum of x) of a group, is computed once a step
//     for all tiles, and is where their sums start.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"
#include "linear/weights.cuh"

namespace trtc {

constexpr int kTileFeatures = 16;
constexpr int kRows = 8;       // columns of the tensor cores' second operand
constexpr int kPieceSize = 8;  // elements in 16 bytes

constexpr int kNormNone = 0;
constexpr int kNormLayer = 1;
constexpr int kNormRms = 2;

// Four-bit integers of a word as elements: (integer + kOffset) / kUnit. `low`: columns 0, 1 and 4, 5; `high`: 2, 3 and 6, 7,
// which are kHighUnit times larger.
template <typename T>
struct RawNibbles;
template <>
struct RawNibbles<__half> {
    // The last bits of a mantissa without an exponent: subnormal numbers, which tensor cores take as they are.
    static constexpr float kUnit = 16777216.f, kHighUnit = 16.f, kOffset = 8.f;
    static constexpr uint32 kMinusOffset = 0x80088008, kMinusOne = 0x80018001;  // pairs, in the same unit
    static __device__ __forceinline__ void of(uint32 word, uint32 (&low)[2], uint32 (&high)[2]) {
        low[0] = word & 0x000f000fu;
        high[0] = word & 0x00f000f0u;
        low[1] = word >> 8 & 0x000f000fu;
        high[1] = word >> 8 & 0x00f000f0u;
    }
};
template <>
struct RawNibbles<__nv_bfloat16> {
    // Not subnormal numbers: their products would be too small for a float.
    static constexpr float kUnit = 1.f, kHighUnit = 1.f, kOffset = 136.f;
    static constexpr uint32 kMinusOffset = 0xc308c308, kMinusOne = 0xbf80bf80;
    static __device__ __forceinline__ void of(uint32 word, uint32 (&low)[2], uint32 (&high)[2]) {
        low[0] = masked_behind<0x000f000f, 0x43004300>(word);
        high[0] = masked_behind<0x000f000f, 0x43004300>(word >> 4);
        low[1] = masked_behind<0x000f000f, 0x43004300>(word >> 8);
        high[1] = masked_behind<0x000f000f, 0x43004300>(word >> 12);
    }
};

__device__ __forceinline__ void copy_async_4(unsigned int destination, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(destination), "l"(__cvta_generic_to_global(source)) : "memory");
}

// y, residual: [rows, features]; x: [rows, columns], rows at most 8; weight: [features, columns], as Weight stores it; bias:
// [features]; scales: [features], [features, groups] or [features, groups, 2] with zeros, an even number of values a row where
// there are groups; norm_scale, norm_shift: [columns], of the norm. bias, residual, norm_scale and norm_shift may be null;
// residual may be y. columns is a multiple of 8, with a norm at most kThreads * kNormPieces * 8. early_steps: steps of the ring
// that are asked for before the wait for the predecessors; the others are when x is on its way, so as not to delay it.
template <typename T, int kWarps, int kTiles, int kSteps, int kBlocks, int kOutputs, int kNorm,
          int kNormPieces, typename Weight>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks)
    linear_stripe(T* y, const T* x, const typename Weight::Stored* weight, const T* scales, const T* bias,
                  const T* residual, const T* norm_scale, const T* norm_shift, int rows, int features, int columns,
                  int activation, int early_steps, float epsilon) {
    constexpr int kPieces = Weight::kPieces;
    constexpr int kLaneColumns = kPieces * kPieceSize;  // columns in 16 bytes of W
    constexpr int kWarpColumns = 4 * kLaneColumns;      // columns of W that one warp takes in a step
    constexpr bool kGrouped = Weight::kGroups > 0;
    constexpr int kGroups = kGrouped ? Weight::kGroups : 1;
    constexpr int kSpan = kPieces / kGroups;  // pieces of a group
    constexpr int kThreads = kWarps * kWarpSize;
    constexpr int kStepColumns = kWarps * kWarpColumns;
    constexpr int kSlotBytes = kThreads * 16;
    constexpr int kStageBytes = 2 * kSlotBytes;
    constexpr int kStages = kSteps * kTiles;  // of the ring
    constexpr int kTile = kTileFeatures * kTiles;
    using Raw = RawNibbles<T>;

    allow_dependents();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, member = lane % 4;
    const int first_feature = static_cast<uint64>(blockIdx.x) * features / gridDim.x;
    const int end_feature = static_cast<uint64>(blockIdx.x + 1) * features / gridDim.x;
    const int own_features = end_feature - first_feature;
    const int stored_columns = padded_columns<Weight>(columns);
    const int held_columns = (columns + Weight::kHeldUnit - 1) / Weight::kHeldUnit * Weight::kHeldUnit;
    const int held_stride = held_columns + Weight::kHeldPad;
    const int steps = (stored_columns + kStepColumns - 1) / kStepColumns;
    const int turns = (own_features + kTile - 1) / kTile;
    const int total_steps = turns * steps;
    constexpr int kGroupHalves = kGrouped ? kGroups * kPerGroup<Weight> : 0;  // scales and zeros of 128 columns
    const int scale_words = stored_columns / 128 * kGroupHalves / 2;          // words of a row's scales
    const int scale_stride = scale_words | 1;                                 // in shared memory: no bank conflicts

    extern __shared__ __align__(16) unsigned char shared[];
    T* held = reinterpret_cast<T*>(shared + kStages * kStageBytes);                  // [rows][held_stride]
    float* partial = reinterpret_cast<float*>(held + rows * held_stride);            // [kWarps][turns][rows][kTile]
    uint32* held_scales = reinterpret_cast<uint32*>(partial + turns * kWarps * rows * kTile);  // [turns * kTile][scale_stride]

    // Before the wait: all that no predecessor wrote. The scales first, then a ring full of W.
    if constexpr (kGrouped) {
        const uint32* source = reinterpret_cast<const uint32*>(scales) + static_cast<size_t>(first_feature) * scale_words;
#pragma unroll 1
        for (int feature = warp; feature < own_features; feature += kWarps) {
            for (int word = lane; word < scale_words; word += kWarpSize) {
                copy_async_4(shared_address(held_scales + feature * scale_stride + word), source + feature * scale_words + word);
            }
        }
    }
    copy_async_commit();

    constexpr int kPer = Weight::kColumnsPerStored;
    const uint32 row_stored = stored_columns / kPer;
    const int first_column = warp * kWarpColumns;
    // The lane's place in W, kSteps steps ahead of the products.
    int ahead_feature = first_feature + group, ahead_column = first_column + member * kLaneColumns;
    auto copy_stage = [&](unsigned int slot, int tile) {
        const bool inside = ahead_column < stored_columns;
        const int feature = ahead_feature + tile * kTileFeatures;
        const uint32 place = static_cast<uint32>(feature) * row_stored + static_cast<uint32>(ahead_column) / kPer;
        const typename Weight::Stored* source = weight + place;
        stream_async_16(slot, source, inside && feature < end_feature);
        stream_async_16(slot + kSlotBytes, source + 8 * row_stored, inside && feature + 8 < end_feature);
    };
    auto advance = [&]() {
        ahead_column += kStepColumns;
        if (ahead_column >= steps * kStepColumns) {
            ahead_column -= steps * kStepColumns;
            ahead_feature += kTile;
        }
    };
    const unsigned int ring = shared_address(shared) + threadIdx.x * 16;
    int filled = 0;  // steps of the ring
    auto fill = [&](int wanted) {
#pragma unroll 1
        for (; filled < wanted; ++filled) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                if (filled < total_steps) copy_stage(ring + (filled * kTiles + tile) * kStageBytes, tile);
                copy_async_commit();
            }
            advance();
        }
    };
    fill(early_steps);

    // A thread's outputs, of all turns in a row: where they are in y, and what is added to them.
    const int turn_outputs = rows * kTile, all_outputs = turns * turn_outputs;
    uint32 output[kOutputs];
    T offset[kOutputs], addend[kOutputs], row_scale[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
        const int index = threadIdx.x + i * kThreads, turn = index / turn_outputs, row = index % turn_outputs / kTile;
        const int feature = first_feature + turn * kTile + index % kTile;
        const bool exists = feature < end_feature;
        output[i] = exists ? static_cast<uint32>(row) * features + feature : ~0u;
        offset[i] = bias && exists ? bias[feature] : from_float<T>(0.f);
        if (Weight::kRowScales) row_scale[i] = exists ? scales[feature] : from_float<T>(0.f);
    }
    Vector<T> factor[kNorm == kNormNone ? 1 : kNormPieces], shift[kNorm == kNormNone ? 1 : kNormPieces];
    if constexpr (kNorm != kNormNone) {
#pragma unroll
        for (int i = 0; i < kNormPieces; ++i) {
            const int column = (threadIdx.x + i * kThreads) * kPieceSize;
            if (norm_scale && column < columns) factor[i] = load_vector(norm_scale + column);
            if (norm_shift && column < columns) shift[i] = load_vector(norm_shift + column);
        }
    }
    wait_for_predecessors();

    auto hold = [&](int row, int column, uint4 piece) {
        // Columns in the order in which RawNibbles has them.
        if constexpr (kGrouped) piece = make_uint4(piece.x, piece.z, piece.y, piece.w);
        *reinterpret_cast<uint4*>(held + row * held_stride + column) = piece;
    };
    const int row_pieces = held_columns / kPieceSize;
    if constexpr (kNorm == kNormNone) {
        constexpr int kAtOnce = 4;  // pieces of a thread that are on their way
        const int pieces = rows * row_pieces;
#pragma unroll 1
        for (int first_piece = threadIdx.x; first_piece < pieces; first_piece += kAtOnce * kThreads) {
            uint4 loaded[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = first_piece + i * kThreads, column = piece % row_pieces * kPieceSize;
                loaded[i] = make_uint4(0, 0, 0, 0);
                if (piece < pieces && column < columns) {
                    loaded[i] = __ldcg(reinterpret_cast<const uint4*>(x + static_cast<size_t>(piece / row_pieces) * columns + column));
                }
            }
            fill(kSteps);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = first_piece + i * kThreads;
                if (piece < pieces) hold(piece / row_pieces, piece % row_pieces * kPieceSize, loaded[i]);
            }
        }
    } else {
        // Every block norms the rows for itself; the moments of the warps meet where their sums will.
        Moments* moments = reinterpret_cast<Moments*>(partial);
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            uint4 loaded[kNormPieces];
#pragma unroll
            for (int i = 0; i < kNormPieces; ++i) {
                const int column = (threadIdx.x + i * kThreads) * kPieceSize;
                loaded[i] = make_uint4(0, 0, 0, 0);
                if (column < columns) loaded[i] = __ldcg(reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * columns + column));
            }
            fill(kSteps);
            float sum = 0.f, count = 0.f, deviation = 0.f;
#pragma unroll
            for (int i = 0; i < kNormPieces; ++i) {
                const int column = (threadIdx.x + i * kThreads) * kPieceSize;
                if (column < held_columns) *reinterpret_cast<uint4*>(held + row * held_stride + column) = loaded[i];
                if (column < columns) count += kPieceSize;
                float value[kPieceSize];
                unpack(*reinterpret_cast<const Vector<T>*>(&loaded[i]), value);
#pragma unroll
                for (int j = 0; j < kPieceSize; ++j) sum += value[j];
            }
            Moments own{warp_sum(count), 0.f, 0.f};
            if (kNorm == kNormLayer && own.count > 0.f) own.mean = warp_sum(sum) / own.count;
#pragma unroll
            for (int i = 0; i < kNormPieces; ++i) {
                if ((threadIdx.x + i * kThreads) * kPieceSize >= columns) break;
                float value[kPieceSize];
                unpack(*reinterpret_cast<const Vector<T>*>(&loaded[i]), value);
#pragma unroll
                for (int j = 0; j < kPieceSize; ++j) deviation += (value[j] - own.mean) * (value[j] - own.mean);
            }
            own.deviation = warp_sum(deviation);
            if (lane == 0) moments[row * kWarps + warp] = own;
        }
        __syncthreads();
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            const Moments part = lane < kWarps ? moments[row * kWarps + lane] : Moments{0.f, 0.f, 0.f};
            const float mean = warp_sum(part.count * part.mean) / columns, distance = part.mean - mean;
            const float variance = warp_sum(part.deviation + part.count * distance * distance) / columns;
            const float inverse = rsqrtf(variance + epsilon);
#pragma unroll
            for (int i = 0; i < kNormPieces; ++i) {
                const int column = (threadIdx.x + i * kThreads) * kPieceSize;
                if (column >= held_columns) break;
                uint4 piece = make_uint4(0, 0, 0, 0);
                if (column < columns) {
                    float value[kPieceSize], parameter[kPieceSize];
                    unpack(*reinterpret_cast<const Vector<T>*>(held + row * held_stride + column), value);
#pragma unroll
                    for (int j = 0; j < kPieceSize; ++j) value[j] = (value[j] - mean) * inverse;
                    if (norm_scale) {
                        unpack(factor[i], parameter);
#pragma unroll
                        for (int j = 0; j < kPieceSize; ++j) value[j] *= parameter[j];
                    }
                    if (norm_shift) {
                        unpack(shift[i], parameter);
#pragma unroll
                        for (int j = 0; j < kPieceSize; ++j) value[j] += parameter[j];
                    }
                    const Vector<T> normed = pack<T>(value);
                    piece = *reinterpret_cast<const uint4*>(&normed);
                }
                hold(row, column, piece);
            }
        }
    }
    fill(kSteps);  // where a thread has no piece of x
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
        addend[i] = from_float<T>(0.f);
        if (residual && output[i] != ~0u) addend[i] = __ldcg(residual + output[i]);
    }
    copy_async_wait<kStages>();  // the scales
    __syncthreads();

    int place = 0, left = total_steps - kSteps;  // of the step in the ring; steps that are not asked for yet
    const T* x_row = held + min(group, rows - 1) * held_stride + member * Weight::kMemberColumns;
    float* turn_partial = partial + warp * all_outputs;
#pragma unroll 1
    for (int turn_first = 0; turn_first < own_features; turn_first += kTile) {
        float sum[kTiles][4] = {};
#pragma unroll 1
        for (int column = first_column; column < steps * kStepColumns; column += kStepColumns) {
            // Beyond the last column, of the whole warp: W is zeros, x and its sums must be, and a scale must be a number.
            const bool inside = column < held_columns;
            const int block = inside ? column / 128 : 0;
            uint4 b[kPieces] = {};
            if (inside) {
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    b[piece] = *reinterpret_cast<const uint4*>(x_row + column + piece * Weight::kPieceColumns);
                }
            }
            // What the offset of a group's integers adds, with the sign that takes it off: a product with a matrix of one number.
            float2 start[kGroups];
            if constexpr (kGrouped) {
#pragma unroll
                for (int i = 0; i < kGroups; ++i) {
                    constexpr uint32 kOff = Weight::kZeros ? Raw::kMinusOne : Raw::kMinusOffset;
                    float lows[4] = {}, highs[4] = {};
#pragma unroll
                    for (int piece = i * kSpan; piece < (i + 1) * kSpan; ++piece) {
                        mma_16x8x16<T>(lows, kOff, kOff, kOff, kOff, b[piece].x, b[piece].y);
                        mma_16x8x16<T>(highs, kOff, kOff, kOff, kOff, b[piece].z, b[piece].w);
                    }
                    start[i] = make_float2(lows[0] + highs[0], lows[1] + highs[1]);
                }
            }
            const T* tile_scales = reinterpret_cast<const T*>(held_scales + (turn_first + group) * scale_stride) +
                                   block * kGroups * kPerGroup<Weight>;
            const unsigned char* slot = shared + threadIdx.x * 16 + place;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                copy_async_wait<kStages - 1>();
                const uint4 low = *reinterpret_cast<const uint4*>(slot + tile * kStageBytes);
                const uint4 high = *reinterpret_cast<const uint4*>(slot + tile * kStageBytes + kSlotBytes);
                if constexpr (!kGrouped) {
#pragma unroll
                    for (int piece = 0; piece < kPieces; ++piece) {
                        const uint4 a = Weight::piece(low, piece), c = Weight::piece(high, piece);
                        mma_16x8x16<T>(sum[tile], a.x, c.x, a.y, c.y, b[piece].x, b[piece].y);
                        mma_16x8x16<T>(sum[tile], a.z, c.z, a.w, c.w, b[piece].z, b[piece].w);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < kGroups; ++i) {
                        float lows[4] = {}, highs[4] = {};
                        if (!Weight::kZeros) {
                            lows[0] = lows[2] = start[i].x;
                            lows[1] = lows[3] = start[i].y;
                        }
#pragma unroll
                        for (int piece = i * kSpan; piece < (i + 1) * kSpan; ++piece) {
                            uint32 a_low[2], a_high[2], c_low[2], c_high[2];
                            Raw::of(Weight::word(low, piece), a_low, a_high);
                            Raw::of(Weight::word(high, piece), c_low, c_high);
                            mma_16x8x16<T>(lows, a_low[0], c_low[0], a_low[1], c_low[1], b[piece].x, b[piece].y);
                            mma_16x8x16<T>(highs, a_high[0], c_high[0], a_high[1], c_high[1], b[piece].z, b[piece].w);
                        }
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            T factor[kPerGroup<Weight>];
                            const T* pair = tile_scales + 16 * half * scale_stride + i * kPerGroup<Weight>;
                            if constexpr (Weight::kZeros) {
                                *reinterpret_cast<uint32*>(factor) = *reinterpret_cast<const uint32*>(pair);
                            } else {
                                factor[0] = *pair;
                            }
#pragma unroll
                            for (int j = 2 * half; j < 2 * half + 2; ++j) {
                                float total = lows[j] + highs[j] * (1.f / Raw::kHighUnit);
                                if constexpr (Weight::kZeros) {
                                    total += (Raw::kOffset + to_float(factor[1])) * (j % 2 ? start[i].y : start[i].x);
                                }
                                sum[tile][j] += to_float(factor[0]) * total;
                            }
                        }
                    }
                }
                tile_scales += 2 * kTileFeatures * scale_stride;
                if (left > 0) copy_stage(ring + place + tile * kStageBytes, tile);
                copy_async_commit();
            }
            advance();
            --left;
            place += kTiles * kStageBytes;
            if (place == kStages * kStageBytes) place = 0;
        }

#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = 2 * member + j % 2;
                if (row < rows) turn_partial[row * kTile + kTileFeatures * tile + 8 * (j / 2) + group] = sum[tile][j];
            }
        }
        turn_partial += turn_outputs;
    }

    // The warps' sums meet once, and each thread finishes its outputs.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
        if (output[i] == ~0u) continue;
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) value += partial[w * all_outputs + threadIdx.x + i * kThreads];
        if (kGrouped) value *= Raw::kUnit;
        if (Weight::kRowScales) value *= to_float(row_scale[i]);
        value = activate(value + to_float(offset[i]), activation) + to_float(addend[i]);
        y[output[i]] = from_float<T>(value);
    }
}

}  // namespace trtc

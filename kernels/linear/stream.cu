// Linear layer for few rows: y = act(norm(x) W^T + b) + residual, bound by the one read of W.
//
// Each block owns a contiguous range of W's rows ("features") and streams it once, in tiles of 8 * kOctets features.
// Its warps split K: in step s, warp w multiplies columns [32 * (kWarps * s + w), + 32) of the tile with the same
// columns of x, on tensor cores (W is the 16-row operand, the rows of x are the 8 columns). Sums of the warps meet in
// shared memory in a fixed order, so that the result does not depend on timing.
//
// W goes from device memory through a ring in shared memory in which each thread reads back only the 16 bytes that it
// copied itself: no barrier in the loop, and as many bytes in flight as the ring holds. The ring is filled before the
// kernel waits for its predecessors (programmatic dependent launch), so that loading overlaps their tail. x is held in
// shared memory (kHeldX) or, when that would be too large, comes through the ring with each tile of W; here too a
// thread reads only what it copied.
//
// A lane's 16 bytes are 8 neighbouring k of one feature. The tensor core's k order is arbitrary as long as both
// operands agree, so bytes 0-7 feed a first product of depth 16 and bytes 8-15 a second one; nothing is shuffled.
// Integer weights (weights.cuh) are 16 or 32 k in these 16 bytes: more pieces of x, otherwise the same.
//
// The norm has no parameters of its own (they belong into W and b) and costs no pass over x: with the mean m and the
// inverse deviation r of a row, r * (x - m) W^T = r * (x W^T - m * (sums of W's rows)). The sums of x and x^2 come from
// the fragments that the products need anyway.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/types.cuh"
#include "linear/weights.cuh"

namespace trtc {

constexpr int kPieceSize = 8;  // elements in 16 bytes

constexpr int kNormNone = 0;
constexpr int kNormLayer = 1;
constexpr int kNormRms = 2;  // as kNormLayer with a mean of 0

// y, residual: [rows, features]; x: [rows, columns]; weight: [features, columns], as Weight stores it; bias: [features];
// scales: [features], [features, groups] or [features, groups, 2] with zeros, for integers; weight_sums: [features] float, the sums of W's rows, for
// kNormLayer. bias and residual may be null; residual may be y. columns is a multiple of 8.
template <typename T, int kWarps, int kOctets, int kTokenTiles, int kStages, bool kHeldX, int kNorm,
          typename Weight = FloatWeight<T>>
__global__ void __launch_bounds__(kWarps* kWarpSize, Weight::kGroups * kTokenTiles > 2 || kWarps > (Weight::kPieces > 1 ? 8 : 12) ? 1 : 2)
    linear_stream(T* y, const T* x, const typename Weight::Stored* weight, const T* scales, const T* bias,
                  const T* residual, const float* weight_sums, int rows, int features, int columns, int activation,
                  float epsilon) {
    constexpr int kPieces = Weight::kPieces;
    constexpr int kLaneColumns = kPieces * kPieceSize;  // columns in 16 bytes of W
    constexpr int kWarpColumns = 4 * kLaneColumns;      // columns of W that one warp takes in a step
    constexpr bool kGrouped = Weight::kGroups > 0;
    constexpr int kThreads = kWarps * kWarpSize;
    constexpr int kStepColumns = kWarps * kWarpColumns;
    constexpr int kSlotBytes = kThreads * 16;
    constexpr int kSlots = kOctets + (kHeldX ? 0 : kTokenTiles * kPieces);
    constexpr int kStageBytes = kSlots * kSlotBytes;
    constexpr int kFeatureTiles = (kOctets + 1) / 2;
    constexpr int kTile = 8 * kOctets;
    constexpr int kTokens = 8 * kTokenTiles;
    constexpr int kOutputs = (kTile * kTokens + kThreads - 1) / kThreads;  // of one thread in a tile
    constexpr int kChains = kFeatureTiles * kTokenTiles <= 2 ? 2 : 1;      // independent sums hide the latency of mma

    extern __shared__ __align__(16) unsigned char shared[];
    float* partial = reinterpret_cast<float*>(shared + kStages * kStageBytes);  // [2][kWarps][rows][kTile]; of one tile without kHeldX [1]
    const int partial_size = kWarps * rows * kTile;
    T* held = reinterpret_cast<T*>(partial + 2 * partial_size);                 // [rows][held_stride] with kHeldX
    __shared__ float2 moments[kNorm == kNormNone ? 1 : kWarps * kTokens];       // sums of x and x^2, by warp and row

    allow_dependents();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, member = lane % 4;
    // Not a fixed number per block: all multiprocessors must get a block, or blocks of the next kernel crowd into
    // those that did not (measured: a grid of 131 instead of 132 costs a quarter of the bandwidth).
    const int first_feature = static_cast<uint64>(blockIdx.x) * features / gridDim.x;
    const int end_feature = static_cast<uint64>(blockIdx.x + 1) * features / gridDim.x;
    const int stored_columns = padded_columns<Weight>(columns);
    const int held_stride = (columns + Weight::kHeldUnit - 1) / Weight::kHeldUnit * Weight::kHeldUnit + Weight::kHeldPad;
    const int steps = (columns + kStepColumns - 1) / kStepColumns;
    const int total_steps = (end_feature - first_feature + kTile - 1) / kTile * steps;

    // The lane's place in W; it runs ahead of the products by kStages steps.
    const int first_column = warp * kWarpColumns + member * kLaneColumns;
    const unsigned int ring = shared_address(shared) + threadIdx.x * 16;
    struct Cursor {
        int feature;
        int column;
        unsigned int slot;
    };
    auto advance = [&](Cursor& cursor) {
        cursor.column += kStepColumns;
        if (cursor.column >= steps * kStepColumns) {
            cursor.column = first_column;
            cursor.feature += kTile;
        }
        cursor.slot += kStageBytes;
        if (cursor.slot >= ring + kStages * kStageBytes) cursor.slot = ring;
    };
    auto copy_weight = [&](const Cursor& cursor) {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            const int feature = cursor.feature + 8 * octet;
            const bool valid = feature < end_feature && cursor.column < stored_columns;
            constexpr int kPer = Weight::kColumnsPerStored;
            const uint32 place = static_cast<uint32>(feature) * (stored_columns / kPer) + cursor.column / kPer;
            stream_async_16(cursor.slot + octet * kSlotBytes, weight + (valid ? place : 0), valid);
        }
    };
    // The lane's piece of x for a piece of its W, where the W begins at `column`.
    auto x_column = [&](int column, int piece) {
        return column - member * (kLaneColumns - Weight::kMemberColumns) + piece * Weight::kPieceColumns;
    };
    auto copy_x_to_ring = [&](const Cursor& cursor) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            const int row = 8 * tile + group;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const int column = x_column(cursor.column, piece);
                const bool valid = row < rows && column < columns;
                const uint32 offset = valid ? static_cast<uint32>(row) * columns + column : 0;
                copy_async_16(cursor.slot + (kOctets + tile * kPieces + piece) * kSlotBytes, x + offset, valid);
            }
        }
    };
    auto held_place = [&](int tile, int column) { return held + (8 * tile + group) * held_stride + column; };

    // What a thread needs at the end of a tile for its outputs is loaded at the tile's start.
    T offset[kOutputs], addend[kOutputs], row_scale[kOutputs];
    float weight_sum[kOutputs];
    auto load_parameters = [&](int tile_first) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const int feature = tile_first + (threadIdx.x + i * kThreads) % kTile;
            offset[i] = bias && feature < end_feature ? bias[feature] : from_float<T>(0.f);
            if (Weight::kRowScales) row_scale[i] = feature < end_feature ? scales[feature] : from_float<T>(0.f);
            if (kNorm == kNormLayer) weight_sum[i] = feature < end_feature ? weight_sums[feature] : 0.f;
        }
    };
    auto load_residual = [&](int tile_first) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const int output = threadIdx.x + i * kThreads;
            const int row = output / kTile, feature = tile_first + output % kTile;
            addend[i] = from_float<T>(0.f);
            if (residual && row < rows && feature < end_feature) {
                addend[i] = __ldcg(residual + static_cast<size_t>(row) * features + feature);
            }
        }
    };

    // Scales of groups are loaded to registers a step ahead of their use, by a cursor of their own.
    using Scales = GroupScales<T, Weight>;
    Scales scale[kGrouped ? 2 * kFeatureTiles : 1], next_scale[kGrouped ? 2 * kFeatureTiles : 1];
    auto load_group_scales = [&](const Cursor& cursor) {
#pragma unroll
        for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) {
            const int feature = cursor.feature + 8 * octet;
            next_scale[octet] = load_scales<T, Weight>(scales, feature, features, cursor.column, stored_columns);
        }
    };

    // Everything that no predecessor wrote, before the wait: a ring full of W, and the parameters.
    const Cursor start{first_feature + group, first_column, ring};
    Cursor ahead = start;
#pragma unroll 1
    for (int step = 0; step < min(kStages, total_steps); ++step) {
        copy_weight(ahead);
        advance(ahead);
    }
    load_parameters(first_feature);
    Cursor scale_ahead = start;
    if constexpr (kGrouped) load_group_scales(scale_ahead);
    wait_for_predecessors();

    if constexpr (kHeldX) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
            if (8 * tile + group >= rows) continue;
            const T* row = x + static_cast<uint32>(8 * tile + group) * columns;
#pragma unroll 4
            for (int column = first_column; column < stored_columns; column += kStepColumns) {
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    const int place = x_column(column, piece);
                    if (kPieces > 1 && !kGrouped && place >= columns) continue;
                    const bool valid = kPieces == 1 || place < columns;  // beyond, with groups: zeros
                    copy_async_16(shared_address(held_place(tile, place)), row + (valid ? place : 0), valid);
                }
            }
        }
    } else {
        Cursor behind = start;
#pragma unroll 1
        for (int step = 0; step < min(kStages, total_steps); ++step) {
            copy_x_to_ring(behind);
            advance(behind);
        }
    }
    copy_async_commit();
    load_residual(first_feature);
    copy_async_wait<0>();
    if (kGrouped) __syncwarp();  // lanes whose row of x does not exist read the last row, which others copied

    float product[kChains][kFeatureTiles][kTokenTiles][4] = {};      // of a tile, or of a group where groups have scales
    float sum[kGrouped ? kFeatureTiles : 1][kGrouped ? kTokenTiles : 1][4] = {};  // of the groups of a tile
    float x_sum[kTokenTiles] = {}, square_sum[kTokenTiles] = {};
    float mean[kOutputs], inverse[kOutputs];
    const unsigned char* slot = shared + threadIdx.x * 16;
    int remaining = total_steps;
    float* tile_partial = partial;
#pragma unroll 1
    for (int tile_first = first_feature; tile_first < end_feature; tile_first += kTile) {
        const bool first_tile = tile_first == first_feature;
        if (!first_tile) {
            load_parameters(tile_first);
            load_residual(tile_first);
        }
#pragma unroll(kGrouped ? 1 : 2)
        for (int column = first_column; column < steps * kStepColumns; column += kStepColumns) {
            copy_async_wait<kStages - 1>();
            if constexpr (kGrouped) {
#pragma unroll
                for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) scale[octet] = next_scale[octet];
                advance(scale_ahead);
                load_group_scales(scale_ahead);
            }
            uint4 stored[2 * kFeatureTiles];
#pragma unroll
            for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) {
                stored[octet] = make_uint4(0, 0, 0, 0);
                if (octet < kOctets) stored[octet] = *reinterpret_cast<const uint4*>(slot + octet * kSlotBytes);
            }
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                if (kGrouped && column >= stored_columns) break;  // of the whole warp: it has all of 128 columns or none
                uint4 a[2 * kFeatureTiles];
#pragma unroll
                for (int octet = 0; octet < 2 * kFeatureTiles; ++octet) a[octet] = scale[kGrouped ? octet : 0].weight(stored[octet], piece);
#pragma unroll
                for (int tile = 0; tile < kTokenTiles; ++tile) {
                    const int place = x_column(column, piece);
                    uint4 b;
                    if constexpr (kHeldX && kGrouped) {
                        b = *reinterpret_cast<const uint4*>(held + min(8 * tile + group, rows - 1) * held_stride + place);
                    } else if constexpr (!kHeldX) {
                        b = *reinterpret_cast<const uint4*>(slot + (kOctets + tile * kPieces + piece) * kSlotBytes);
                    } else {
                        b = make_uint4(0, 0, 0, 0);
                        if (8 * tile + group < rows && place < columns) {
                            b = *reinterpret_cast<const uint4*>(held_place(tile, place));
                        }
                    }
#pragma unroll
                    for (int i = 0; i < kFeatureTiles; ++i) {
                        const uint4 low = a[2 * i], high = a[2 * i + 1];
                        mma_16x8x16<T>(product[0][i][tile], low.x, high.x, low.y, high.y, b.x, b.y);
                        mma_16x8x16<T>(product[kChains - 1][i][tile], low.z, high.z, low.w, high.w, b.z, b.w);
                    }
                    if (kNorm != kNormNone && first_tile) {
                        float value[kPieceSize];
                        unpack(*reinterpret_cast<const Vector<T>*>(&b), value);
#pragma unroll
                        for (int j = 0; j < kPieceSize; ++j) {
                            x_sum[tile] += value[j];
                            square_sum[tile] += value[j] * value[j];
                        }
                    }
                    if constexpr (kGrouped) {
                        if ((piece + 1) % (kPieces / Weight::kGroups) != 0) continue;
#pragma unroll
                        for (int i = 0; i < 4 * kFeatureTiles; ++i) {
                            float total = product[0][i / 4][tile][i % 4];
                            if (kChains > 1) total += product[kChains - 1][i / 4][tile][i % 4];
                            product[0][i / 4][tile][i % 4] = product[kChains - 1][i / 4][tile][i % 4] = 0.f;
                            const T factor = scale[i / 2].scale(piece);
                            sum[i / 4][tile][i % 4] += to_float(factor) * total;
                        }
                    }
                }
            }
            if (remaining > kStages) {
                copy_weight(ahead);
                if constexpr (!kHeldX) copy_x_to_ring(ahead);
                advance(ahead);
            }
            copy_async_commit();
            --remaining;
            slot += kStageBytes;
            if (slot >= shared + kStages * kStageBytes) slot -= kStages * kStageBytes;
        }

        // The warps' sums meet, and each thread finishes its share of the outputs.
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4 * kFeatureTiles; ++i) {
                const int row = 8 * tile + 2 * member + i % 2, octet = i / 2;
                float total = 0.f;
                if constexpr (kGrouped) {
                    total = sum[i / 4][tile][i % 4];
                    sum[i / 4][tile][i % 4] = 0.f;
                } else {
#pragma unroll
                    for (int chain = 0; chain < kChains; ++chain) {
                        total += product[chain][i / 4][tile][i % 4];
                        product[chain][i / 4][tile][i % 4] = 0.f;
                    }
                }
                if (octet < kOctets && row < rows) {
                    tile_partial[(warp * rows + row) * kTile + 8 * octet + group] = total;
                }
            }
            if (kNorm != kNormNone && first_tile) {
                float2 pair = make_float2(x_sum[tile], square_sum[tile]);
#pragma unroll
                for (int bit = 1; bit < 4; bit *= 2) {
                    pair.x += __shfl_xor_sync(~0u, pair.x, bit);
                    pair.y += __shfl_xor_sync(~0u, pair.y, bit);
                }
                if (member == 0) moments[warp * kTokens + 8 * tile + group] = pair;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const int output = threadIdx.x + i * kThreads;
            const int row = output / kTile, feature = tile_first + output % kTile;
            if (row >= rows || feature >= end_feature) continue;
            if (kNorm != kNormNone && first_tile) {
                float2 all = make_float2(0.f, 0.f);
#pragma unroll
                for (int w = 0; w < kWarps; ++w) {
                    all.x += moments[w * kTokens + row].x;
                    all.y += moments[w * kTokens + row].y;
                }
                mean[i] = kNorm == kNormLayer ? all.x / columns : 0.f;
                inverse[i] = rsqrtf(fmaxf(all.y / columns - mean[i] * mean[i], 0.f) + epsilon);
            }
            float value = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) value += tile_partial[w * rows * kTile + output];
            if (Weight::kRowScales) value *= to_float(row_scale[i]);
            if (kNorm == kNormLayer) value -= mean[i] * weight_sum[i];
            if (kNorm != kNormNone) value *= inverse[i];
            value = activate(value + to_float(offset[i]), activation) + to_float(addend[i]);
            y[static_cast<size_t>(row) * features + feature] = from_float<T>(value);
        }
        // Two buffers: the next tile's sums go to the other one, so that one barrier a tile is enough.
        tile_partial = tile_partial == partial ? partial + partial_size : partial;
    }
}

}  // namespace trtc

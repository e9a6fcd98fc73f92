// Linear layer for 17 to 64 rows on Hopper, for weights that are read in a few microseconds:
// y = act(x W^T + b) + residual.
//
// A block owns kFeatures rows of W ("features"). What costs is not W but x: every block needs all of it, and only once
// the predecessor has ended. So neighbouring blocks form a cluster in which each asks the tensor copy engine for a share
// of the rows of a stage (64 columns) of x and has it delivered to all; and W, which no predecessor writes, is on its
// way into a ring of its own before the wait. Clusters start at different columns, so that not all read the same lines
// of L2 at once.
//
// x is the 64-row operand of wgmma, the block's features are its columns: a thread ends with sums of its own rows and
// pairs of features and writes them without any exchange. Where a block would have too few features for its x, kSplit
// parts of the cluster share K; each part sends its sums to the part that finishes their rows, in one exchange.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/reduce.cuh"
#include "common/tensor_copy.cuh"
#include "common/types.cuh"
#include "common/wgmma.cuh"
#include "linear/pairs.cuh"

namespace trtc {

constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kProductDepth = 16;
constexpr int kTokens = 64;  // rows of a wgmma
constexpr int kOctet = 8;    // features that lie together in the sums of a warp
constexpr int kMaxWeightStages = 32;
constexpr int kMaxRowStages = 16;

// Sums of two neighbouring features, of one row or of two.
template <int kHalves>
struct alignas(8 * kHalves) SumsOf {
    float2 half[kHalves];
};

// y, residual: [rows, features]; bias: [features]. bias and residual may be null; residual may be y.
// weight_map: W [features, columns] in boxes of kFeatures rows of 64 columns; x_map: x [rows, columns] in boxes of
// tile_rows * kSplit / cluster rows, a multiple of 8; both in 128-byte swizzle, zero beyond the matrix.
// With parts it is launched in clusters, outside of which st.async does not exist.
// tile_rows: rows of x in a stage, at most 64; columns_per_block, a multiple of 64, is K / kSplit.
template <typename T, int kFeatures, int kSplit>
__global__ void __launch_bounds__(kFeatures > 64 ? 288 : 160, kFeatures > 64 ? 1 : 2)
    linear_multicast(T* y, const T* bias, const T* residual, const __grid_constant__ TensorMap weight_map,
                     const __grid_constant__ TensorMap x_map, int rows, int features, int columns,
                     int columns_per_block, int activation, int tile_rows, int weight_stages, int row_stages) {
    static_assert(kFeatures % (kFeatures > 64 ? 16 : 8) == 0 && kFeatures <= 128, "one or two wgmma wide");
    constexpr int kGroups = kFeatures > 64 ? 2 : 1;
    constexpr int kWidth = kFeatures / kGroups;  // features of a warpgroup
    constexpr int kConsumerWarps = kGroups * kGroupWarps;
    constexpr int kOctets = kWidth / kOctet;
    // A part finishes kPartRows rows: those of kPartWarps warps of a group, or, of eight parts, half of those of a warp.
    constexpr int kPartRows = kTokens / kSplit;
    constexpr int kHalves = kSplit == 8 ? 1 : 2;  // rows of a thread, 8 apart
    constexpr int kPartWarps = kSplit == 8 ? 1 : kGroupWarps / kSplit;
    constexpr int kTeams = kGroupWarps / kPartWarps;         // warps that finish the same rows, of different octets
    constexpr int kItems = (kOctets + kTeams - 1) / kTeams;  // octets of a warp
    using Piece = SumsOf<kHalves>;                           // what a lane has of its rows of an octet
    constexpr uint32 kWeightBytes = kFeatures * kSwizzledRowBytes;

    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) uint64 weight_full[kMaxWeightStages], weight_empty[kMaxWeightStages];
    __shared__ __align__(8) uint64 rows_full[kMaxRowStages], rows_empty[kMaxRowStages], sums_full;
    allow_dependents();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int cluster = cluster_size(), copies = cluster / kSplit;  // blocks that share their x
    const int member = cluster_rank() % copies, part = cluster_rank() / copies;
    const int first_feature = (blockIdx.x / cluster * copies + member) * kFeatures;
    const int first_column = part * columns_per_block;
    const int own_columns = max(0, min(columns_per_block, columns - first_column));
    const int stages = (own_columns + kSwizzledColumns - 1) / kSwizzledColumns;
    const int weight_ahead = min(stages, weight_stages), rows_ahead = min(stages, row_stages);
    // The ring of x, that of W, and the sums that parts send. A wgmma reads 64 rows of x, whatever lies
    // behind those that there are.
    const uint32 row_bytes = tile_rows * kSwizzledRowBytes;
    const uint32 row_ring = shared_address(shared), weight_ring = row_ring + row_stages * row_bytes;
    unsigned char* behind_rings = shared + row_stages * row_bytes + weight_stages * kWeightBytes;
    constexpr int kReceivedBytes = kSplit == 1 ? 0 : kTokens * kFeatures * sizeof(float);
    Piece* received = reinterpret_cast<Piece*>(behind_rings);  // [kSplit][kGroups][kPartWarps][kOctets][32]

    const bool copying = threadIdx.x == kConsumerWarps * kWarpSize;
    if (copying) {
        prefetch_tensor_map(weight_map);
        prefetch_tensor_map(x_map);
        for (int slot = 0; slot < weight_ahead; ++slot) {
            barrier_init(shared_address(weight_full + slot), 1);
            barrier_init(shared_address(weight_empty + slot), kConsumerWarps);
        }
        for (int slot = 0; slot < rows_ahead; ++slot) {
            barrier_init(shared_address(rows_full + slot), 1);
            barrier_init(shared_address(rows_empty + slot), copies * kConsumerWarps);
        }
        barrier_init(shared_address(&sums_full), 1);
        barrier_init_fence();
    }
    cluster_arrive_relaxed();

    const int turn = stages > 0 ? blockIdx.x / cluster % stages : 0;
    auto column_of = [&](int stage) {
        const int turned = stage + turn;
        return first_column + (turned < stages ? turned : turned - stages) * kSwizzledColumns;
    };
    auto copy_weight = [&](int stage, int slot) {
        const uint32 barrier = shared_address(weight_full + slot);
        barrier_expect(barrier, kWeightBytes);
        copy_tensor(weight_ring + slot * kWeightBytes, weight_map, column_of(stage), first_feature, barrier);
    };
    auto expect_rows = [&](int slot) { barrier_expect(shared_address(rows_full + slot), row_bytes); };
    auto copy_rows = [&](int stage, int slot) {
        const int first_row = tile_rows / copies * member;
        const uint32 place = row_ring + slot * row_bytes + first_row * kSwizzledRowBytes;
        const uint32 barrier = shared_address(rows_full + slot);
        if (copies == 1) {
            copy_tensor(place, x_map, column_of(stage), first_row, barrier);
        } else {
            multicast_tensor(place, x_map, column_of(stage), first_row, barrier, ((1 << copies) - 1) << part * copies);
        }
    };
    if (copying) {
        for (int stage = 0; stage < weight_ahead; ++stage) copy_weight(stage, stage);
        for (int stage = 0; stage < rows_ahead; ++stage) expect_rows(stage);
        barrier_expect(shared_address(&sums_full), kReceivedBytes);
    }
    cluster_wait();  // barriers of all blocks are there

    // The outputs that this thread finishes: of one or two rows, pairs of features in kItems octets.
    const int group = warp / kGroupWarps, group_warp = warp % kGroupWarps;
    const bool aligned = features % 2 == 0;
    const int own_row = part * kPartRows + group_warp % kPartWarps * 16 + lane / 4;
    auto item_octet = [&](int i) { return i * kTeams + group_warp / kPartWarps; };
    auto item_feature = [&](int i) { return first_feature + group * kWidth + item_octet(i) * kOctet + lane % 4 * 2; };
    auto item_count = [&](int i) { return item_octet(i) < kOctets ? features - item_feature(i) : 0; };
    auto item_place = [&](int i, int half) {
        return static_cast<size_t>(own_row + 8 * half) * features + item_feature(i);
    };

    if (warp == kConsumerWarps) {
        if (copying) {
            wait_for_predecessors();
            for (int stage = 0; stage < rows_ahead; ++stage) copy_rows(stage, stage);
            Slot weight_slot, row_slot;
            for (int stage = 0; stage + min(weight_ahead, rows_ahead) < stages; ++stage) {
                if (stage + weight_ahead < stages) {
                    barrier_wait(shared_address(weight_empty + weight_slot.index), weight_slot.parity);
                    copy_weight(stage + weight_ahead, weight_slot.index);
                    weight_slot.advance(weight_ahead);
                }
                if (stage + rows_ahead < stages) {
                    barrier_wait(shared_address(rows_empty + row_slot.index), row_slot.parity);
                    expect_rows(row_slot.index);
                    copy_rows(stage + rows_ahead, row_slot.index);
                    row_slot.advance(rows_ahead);
                }
            }
        }
        __syncwarp();
    }

    auto release_weight = [&](int stage, int slot) {
        if (stage + weight_ahead < stages && lane == 0) barrier_arrive(shared_address(weight_empty + slot));
    };
    // A reader is done with x in a slot: every block of the cluster waits for that before it fills its share again.
    // Nobody may arrive at a block that has ended, so that what will not be filled again is not announced.
    auto release_rows = [&](int stage, int slot) {
        if (stage + rows_ahead < stages && lane < copies) {
            barrier_arrive_in_rank(shared_address(rows_empty + slot), part * copies + lane);
        }
    };
    float sum[kWidth / 2] = {};
    typename PairOf<T>::type offset[kItems], addend[kItems][kHalves];
    if (warp < kConsumerWarps) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            offset[i] = load_pair(bias + item_feature(i), bias ? item_count(i) : 0, true);
        }
        wait_for_predecessors();  // what follows reads the residual and writes y
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const bool valid = residual && own_row + 8 * half < rows;
                addend[i][half] = load_pair(residual + item_place(i, half), valid ? item_count(i) : 0, aligned);
            }
        }
        // Descriptors count in pieces of 16 bytes: those of other places are sums.
        const uint64 first_a = matrix_descriptor<kSwizzledRowBytes>(row_ring);
        const uint64 first_b = matrix_descriptor<kSwizzledRowBytes>(weight_ring + group * kWidth * kSwizzledRowBytes);
        Slot weight_slot, row_slot;
        int last_weight = 0, last_rows = 0;
        for (int stage = 0; stage < stages; ++stage) {
            barrier_wait(shared_address(weight_full + weight_slot.index), weight_slot.parity);
            barrier_wait(shared_address(rows_full + row_slot.index), row_slot.parity);
            wgmma_fence();
            const uint64 a = first_a + row_slot.index * (row_bytes / 16);
            const uint64 b = first_b + weight_slot.index * (kWeightBytes / 16);
#pragma unroll
            for (int k = 0; k < kSwizzledColumns; k += kProductDepth) {
                Wgmma<T, kWidth>::product_shared(sum, a + 2 * k / 16, b + 2 * k / 16, 1);
            }
            wgmma_commit();
            wgmma_wait_but<1>();  // the stage before this one has been read
            if (stage > 0) {
                release_weight(stage - 1, last_weight);
                release_rows(stage - 1, last_rows);
            }
            last_weight = weight_slot.index, last_rows = row_slot.index;
            weight_slot.advance(weight_ahead);
            row_slot.advance(rows_ahead);
        }
        wgmma_wait();
    }
    if (warp >= kConsumerWarps) return;

    Piece total[kItems];
    auto own_sums = [&](int octet) {
        Piece piece;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            piece.half[half] = make_float2(sum[4 * octet + 2 * half], sum[4 * octet + 2 * half + 1]);
        }
        return piece;
    };
    if constexpr (kSplit == 1) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) total[i] = own_sums(i);
    } else {
        auto received_place = [&](int from, int of_warp, int octet) {
            return (((from * kGroups + group) * kPartWarps + of_warp) * kOctets + octet) * kWarpSize + lane;
        };
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            const uint32 place = shared_address(received + received_place(part, group_warp % kPartWarps, octet));
            const uint32 barrier = shared_address(&sums_full);
            if constexpr (kSplit == 8) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 pair = make_float2(sum[4 * octet + 2 * half], sum[4 * octet + 2 * half + 1]);
                    send_to_rank(place, pair, barrier, 2 * group_warp + half);
                }
            } else {
                const int i = 4 * octet;
                send_to_rank(place, make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]), barrier,
                             group_warp / kPartWarps * copies + member);
            }
        }
        barrier_wait_cluster(shared_address(&sums_full), 0);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            total[i] = Piece{};
            if (item_octet(i) >= kOctets) continue;
#pragma unroll
            for (int from = 0; from < kSplit; ++from) {  // in a fixed order
                const Piece some = received[received_place(from, group_warp % kPartWarps, item_octet(i))];
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    total[i].half[half].x += some.half[half].x, total[i].half[half].y += some.half[half].y;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const float2 shift = pair_to_float(offset[i]);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) total[i].half[half].x += shift.x, total[i].half[half].y += shift.y;
    }
    if (activation != kActivationNone) {
#pragma unroll
        for (int i = 0; i < kHalves * kItems; ++i) {
            float2& pair = total[i / kHalves].half[i % kHalves];
            pair = make_float2(activate(pair.x, activation), activate(pair.y, activation));
        }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            if (own_row + 8 * half >= rows) continue;
            const float2 more = pair_to_float(addend[i][half]), pair = total[i].half[half];
            store_pair(y + item_place(i, half), make_float2(pair.x + more.x, pair.y + more.y), item_count(i), aligned);
        }
    }
}

}  // namespace trtc

// Linear layer for up to 64 rows on Hopper: y = act(x W^T + b) + residual.
//
// A block owns kFeatures rows of W ("features"). W, which no predecessor writes, is on its way into a ring of its own before
// the wait; x comes through another. Where weights are small, what costs is x: every block needs all of it, and only once the
// predecessor has ended. So neighbouring blocks can form a cluster in which each asks the tensor copy engine for a share of
// the rows of a stage (64 columns) of x and has it delivered to all. Clusters start at different columns, so that not all
// read the same lines of L2 at once.
//
// x is the 64-row operand of wgmma, the block's features are its columns. Where a block would have too few features for its
// x, kSplit parts of the cluster share K; each part sends its sums to the part that finishes their rows, in one exchange.
// They land in the ring of W, in places that are done with, as the parts tell each other some stages before the end. So
// their room is not taken from what is in flight.
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
constexpr int kQuad = 4;     // octets of a row that four lanes share out, so that each writes 16 bytes
constexpr int kMaxWeightStages = 32;
constexpr int kMaxRowStages = 16;

// Sums of two neighbouring features, of one row or of two.
template <int kHalves>
struct alignas(8 * kHalves) SumsOf {
    float2 half[kHalves];
};

// Of four octets of a row a lane holds its pair of each, in bits; returned is the octet of its number among four lanes.
__device__ __forceinline__ uint4 octet_of_lane(const uint32 (&pair)[kQuad]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32 both[2][2];  // of octets `odd` and `odd` + 2, the pairs of this lane and its neighbour
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32 own = odd ? pair[2 * i + 1] : pair[2 * i];
        const uint32 got = __shfl_xor_sync(~0u, odd ? pair[2 * i] : pair[2 * i + 1], 1);
        both[i][0] = odd ? got : own, both[i][1] = odd ? own : got;
    }
    uint32 octet[kQuad];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32 own = high ? both[1][i] : both[0][i];
        const uint32 got = __shfl_xor_sync(~0u, high ? both[0][i] : both[1][i], 2);
        octet[i] = high ? got : own, octet[2 + i] = high ? own : got;
    }
    return make_uint4(octet[0], octet[1], octet[2], octet[3]);
}

template <int kFeatures>
constexpr int kGroupsOf = kFeatures > 64 && kFeatures % 16 == 0 ? 2 : 1;  // warpgroups of a block

// y, residual: [rows, features]; bias: [features]. bias and residual may be null; residual may be y.
// weight_map: W [features, columns] in boxes of kFeatures rows of 64 columns; x_map: x [rows, columns] in boxes of
// tile_rows * kSplit / cluster rows, a multiple of 8; both in 128-byte swizzle, zero beyond the matrix.
// With parts it is launched in clusters, outside of which st.async does not exist.
// tile_rows: rows of x in a stage, at most 64; columns_per_block, a multiple of 64, is K / kSplit; weight_stages is at least
// 2, the room of the sums.
template <typename T, int kFeatures, int kSplit>
__global__ void __launch_bounds__(kGroupsOf<kFeatures> * kGroupThreads + kWarpSize, 2)
    linear_multicast(T* y, const T* bias, const T* residual, const __grid_constant__ TensorMap weight_map,
                     const __grid_constant__ TensorMap x_map, int rows, int features, int columns,
                     int columns_per_block, int activation, int tile_rows, int weight_stages, int row_stages) {
    constexpr int kGroups = kGroupsOf<kFeatures>;
    constexpr int kWidth = kFeatures / kGroups;  // features of a warpgroup
    static_assert(kWidth % kOctet == 0 && kWidth <= 128, "one or two wgmma wide");
    constexpr int kConsumerWarps = kGroups * kGroupWarps;
    constexpr int kOctets = kWidth / kOctet, kQuads = (kOctets + kQuad - 1) / kQuad;
    // A part finishes kPartRows rows: those of kPartWarps warps of a group, or, of eight parts, half of those of a warp.
    constexpr int kPartRows = kTokens / kSplit;
    constexpr int kHalves = kSplit == 8 ? 1 : 2;  // rows of a thread, 8 apart
    constexpr int kTileRows = 8 * kHalves;        // that lie together in the sums of a warp; those of no row are not sent
    constexpr int kPartWarps = kSplit == 8 ? 1 : kGroupWarps / kSplit;
    constexpr int kTeams = kGroupWarps / kPartWarps;        // warps that finish the same rows, of different quads
    constexpr int kItems = (kQuads + kTeams - 1) / kTeams;  // quads of a warp
    using Piece = SumsOf<kHalves>;                          // what a lane has of its rows of an octet
    constexpr uint32 kWeightBytes = kFeatures * kSwizzledRowBytes;

    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) uint64 weight_full[kMaxWeightStages], weight_empty[kMaxWeightStages];
    __shared__ __align__(8) uint64 rows_full[kMaxRowStages], rows_empty[kMaxRowStages], room, sums_full;
    allow_dependents();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int copies = cluster_size() / kSplit, log_copies = __ffs(copies) - 1;  // blocks that share their x
    const int member = cluster_rank() & copies - 1, part = cluster_rank() >> log_copies;
    const int cluster = (blockIdx.x >> log_copies) / kSplit;
    const int first_feature = (cluster * copies + member) * kFeatures;
    const int first_column = part * columns_per_block;
    const int own_columns = max(0, min(columns_per_block, columns - first_column));
    const int stages = (own_columns + kSwizzledColumns - 1) / kSwizzledColumns;
    const int weight_ahead = min(stages, weight_stages), rows_ahead = min(stages, row_stages);
    // The ring of x and that of W. A wgmma reads 64 rows of x, whatever lies behind those that there are.
    const uint32 row_bytes = tile_rows * kSwizzledRowBytes;
    const uint32 row_ring = shared_address(shared), weight_ring = row_ring + row_stages * row_bytes;
    // The sums that parts send take the first two places of the ring of W: those that no stage needs, or those of the stages
    // that are done with first, since the last stage has the last place.
    static_assert(kTokens * kFeatures * sizeof(float) == 2 * kWeightBytes);
    Piece* received = reinterpret_cast<Piece*>(shared + row_stages * row_bytes);  // [kSplit][kGroups][kPartWarps][kOctets][32]
    const bool spare = kSplit > 1 && weight_stages >= weight_ahead + 2;
    const int places = spare ? weight_stages : weight_ahead;
    const int first_place = spare ? 2 : stages > 0 ? (weight_ahead - stages % weight_ahead) % weight_ahead : 0;
    auto place_of = [&](int slot) { return slot + first_place < places ? slot + first_place : slot + first_place - places; };
    const int last_in_room = spare ? -1 : min(stages - 1, stages - weight_ahead + 1);

    const bool copying = threadIdx.x == kConsumerWarps * kWarpSize;
    if (copying) {
        prefetch_tensor_map(weight_map);
        prefetch_tensor_map(x_map);
#pragma unroll 1
        for (int slot = 0; slot < weight_ahead; ++slot) {
            barrier_init(shared_address(weight_full + slot), 1);
            barrier_init(shared_address(weight_empty + slot), kConsumerWarps);
        }
#pragma unroll 1
        for (int slot = 0; slot < rows_ahead; ++slot) {
            barrier_init(shared_address(rows_full + slot), 1);
            barrier_init(shared_address(rows_empty + slot), copies * kConsumerWarps);
        }
        barrier_init(shared_address(&room), kSplit * kConsumerWarps);
        barrier_init(shared_address(&sums_full), 1 + kGroups * kPartWarps * kWarpSize);
        barrier_init_fence();
    }
    cluster_arrive_relaxed();

    const int turn = __umulhi(cluster * 0x9e3779b9u, stages);  // spread over the stages
    auto column_of = [&](int stage) {
        const int turned = stage + turn;
        return first_column + (turned < stages ? turned : turned - stages) * kSwizzledColumns;
    };
    auto copy_weight = [&](int stage, int slot) {
        const uint32 barrier = shared_address(weight_full + slot);
        barrier_expect(barrier, kWeightBytes);
        copy_tensor(weight_ring + place_of(slot) * kWeightBytes, weight_map, column_of(stage), first_feature, barrier);
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
#pragma unroll 1
        for (int stage = 0; stage < weight_ahead; ++stage) copy_weight(stage, stage);
#pragma unroll 1
        for (int stage = 0; stage < rows_ahead; ++stage) expect_rows(stage);
        const int own_rows = max(0, min(rows - part * kPartRows, kPartRows));
        const int sent_rows = (own_rows + kTileRows - 1) / kTileRows * kTileRows;
        barrier_expect(shared_address(&sums_full), (kSplit - 1) * sent_rows * kFeatures * sizeof(float));
    }
    cluster_wait();  // barriers of all blocks are there

    // The outputs that this thread finishes: of one or two rows, pairs of features in the octets of kItems quads.
    const int group = warp / kGroupWarps, group_warp = warp % kGroupWarps, team = group_warp / kPartWarps;
    const bool even = features % 2 == 0;
    const int own_row = part * kPartRows + group_warp % kPartWarps * 16 + lane / 4;
    const int group_feature = first_feature + group * kWidth;
    auto octet_of = [&](int i) { return (i / kQuad * kTeams + team) * kQuad + i % kQuad; };
    auto feature_of = [&](int i) { return group_feature + octet_of(i) * kOctet + lane % 4 * 2; };
    auto count_of = [&](int i) { return octet_of(i) < kOctets ? features - feature_of(i) : 0; };
    auto row_place = [&](int half) { return static_cast<size_t>(own_row + 8 * half) * features; };

    if (warp == kConsumerWarps) {
        if (copying) {
            wait_for_predecessors();
#pragma unroll 1
            for (int stage = 0; stage < rows_ahead; ++stage) copy_rows(stage, stage);
            Slot weight_slot, row_slot;
#pragma unroll 1
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
    // A warp needs the room of the sums no more.
    auto release_room = [&] {
        if (kSplit > 1 && lane < kSplit) barrier_arrive_in_rank(shared_address(&room), lane * copies + member);
    };
    if (warp >= kConsumerWarps) return;

    uint32 shift[kOctets], addend[kQuad * kItems][kHalves];  // pairs in bits
    auto load_bias = [&](bool even) {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            const int feature = group_feature + octet * kOctet + lane % 4 * 2;
            shift[octet] = load_bits(bias + feature, bias && part == 0 ? features - feature : 0, even);
        }
    };
    auto load_residual = [&](bool even) {
#pragma unroll
        for (int i = 0; i < kQuad * kItems; ++i) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const bool valid = residual && own_row + 8 * half < rows;
                addend[i][half] = load_bits(residual + row_place(half) + feature_of(i), valid ? count_of(i) : 0, even);
            }
        }
    };
    if (even) load_bias(true);
    else load_bias(false);
    if (spare) release_room();
    wait_for_predecessors();  // what follows reads the residual and writes y
    if (even) load_residual(true);
    else load_residual(false);
    float sum[kWidth / 2];
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {  // the first part's sums start at the bias, the others' at zero
        const float2 pair = pair_of_bits<T>(shift[octet]);
        sum[4 * octet] = sum[4 * octet + 2] = pair.x, sum[4 * octet + 1] = sum[4 * octet + 3] = pair.y;
    }
    // Descriptors count in pieces of 16 bytes: those of other places are sums.
    const uint64 first_a = matrix_descriptor<kSwizzledRowBytes>(row_ring);
    const uint64 first_b = matrix_descriptor<kSwizzledRowBytes>(weight_ring + group * kWidth * kSwizzledRowBytes);
    auto release = [&](int stage, int weight, int rows) {
        release_weight(stage, weight);
        release_rows(stage, rows);
        if (stage == last_in_room) release_room();
    };
    // Where stages wait for places, each is waited for at once, so that its place is filled as early as can be.
    const bool refilled = stages > min(weight_ahead, rows_ahead);
    Slot weight_slot, row_slot;
    int last_weight = 0, last_rows = 0;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        barrier_wait(shared_address(weight_full + weight_slot.index), weight_slot.parity);
        barrier_wait(shared_address(rows_full + row_slot.index), row_slot.parity);
        wgmma_fence();
        const uint64 a = first_a + row_slot.index * (row_bytes / 16);
        const uint64 b = first_b + place_of(weight_slot.index) * (kWeightBytes / 16);
#pragma unroll
        for (int k = 0; k < kSwizzledColumns; k += kProductDepth) {
            Wgmma<T, kWidth>::product_shared(sum, a + 2 * k / 16, b + 2 * k / 16, 1);
        }
        wgmma_commit();
        if (refilled) {
            wgmma_wait();
            release(stage, weight_slot.index, row_slot.index);
        } else {
            wgmma_wait_but<1>();  // the stage before this one has been read
            if (stage > 0) release(stage - 1, last_weight, last_rows);
        }
        last_weight = weight_slot.index, last_rows = row_slot.index;
        weight_slot.advance(weight_ahead);
        row_slot.advance(rows_ahead);
    }
    wgmma_wait();
    if (!refilled && stages > 0) release(stages - 1, last_weight, last_rows);

    float2 total[kQuad * kItems][kHalves];
    if constexpr (kSplit == 1) {
#pragma unroll
        for (int i = 0; i < kQuad * kItems; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int first = 4 * min(i, kOctets - 1) + 2 * half;
                total[i][half] = make_float2(sum[first], sum[first + 1]);
            }
        }
    } else {
        auto received_place = [&](int from, int octet) {
            const int of_warp = group_warp % kPartWarps;
            return received + (((from * kGroups + group) * kPartWarps + of_warp) * kOctets + octet) * kWarpSize + lane;
        };
        const uint32 barrier = shared_address(&sums_full);
        auto keep = [&](int octet, int half) {
            Piece* place = received_place(part, octet);
#pragma unroll
            for (int i = 0; i < kHalves; ++i) {
                const int first = 4 * octet + 2 * (half + i);
                place->half[i] = make_float2(sum[first], sum[first + 1]);
            }
        };
        barrier_wait_cluster(shared_address(&room), 0);
#pragma unroll
        for (int half = 0; half < 2; half += kHalves) {
            const int to = kSplit == 8 ? 2 * group_warp + half : team;
            if (to == part) {
#pragma unroll
                for (int octet = 0; octet < kOctets; ++octet) keep(octet, half);
                barrier_arrive(barrier);
            } else if (16 * group_warp + 8 * half < rows) {
#pragma unroll
                for (int octet = 0; octet < kOctets; ++octet) {
                    const uint32 place = shared_address(received_place(part, octet));
                    const int i = 4 * octet + 2 * half;
                    if constexpr (kHalves == 1) send_to_rank(place, make_float2(sum[i], sum[i + 1]), barrier, to);
                    else send_to_rank(place, make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]), barrier, to * copies + member);
                }
            }
        }
        if (own_row - lane / 4 >= rows) return;
        barrier_wait_cluster(barrier, 0);
#pragma unroll
        for (int i = 0; i < kQuad * kItems; ++i) {
            const int octet = min(octet_of(i), kOctets - 1);  // what is read of others is not written
            Piece whole{};
#pragma unroll
            for (int from = 0; from < kSplit; ++from) {  // in a fixed order
                const Piece some = *received_place(from, octet);
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    whole.half[half].x += some.half[half].x, whole.half[half].y += some.half[half].y;
                }
            }
#pragma unroll
            for (int half = 0; half < kHalves; ++half) total[i][half] = whole.half[half];
        }
    }
    if (activation == kActivationRelu) {
#pragma unroll
        for (int i = 0; i < kHalves * kQuad * kItems; ++i) {
            float2& pair = total[i / kHalves][i % kHalves];
            pair = make_float2(activate(pair.x, kActivationRelu), activate(pair.y, kActivationRelu));
        }
    } else if (activation != kActivationNone) {  // all pass by one copy of the long code
#pragma unroll 1
        for (int turn = 0; turn < kQuad * kItems; ++turn) {
            float2 first[kHalves];
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                first[half] = make_float2(activate(total[0][half].x, activation), activate(total[0][half].y, activation));
            }
#pragma unroll
            for (int i = 0; i < kHalves * kQuad * kItems; ++i) {
                const int next = i / kHalves + 1, half = i % kHalves;
                total[next - 1][half] = next < kQuad * kItems ? total[next % (kQuad * kItems)][half] : first[half];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kQuad * kItems; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const float2 more = pair_of_bits<T>(addend[i][half]);
            total[i][half].x += more.x, total[i][half].y += more.y;
        }
    }
    if (features % kOctet == 0) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const int octet = octet_of(kQuad * item) + lane % 4, feature = group_feature + octet * kOctet;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                uint32 pair[kQuad];
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
                    pair_from_float(reinterpret_cast<typename PairOf<T>::type&>(pair[i]), total[kQuad * item + i][half]);
                }
                const uint4 whole = octet_of_lane(pair);
                if (own_row + 8 * half >= rows || octet >= kOctets || feature >= features) continue;
                *reinterpret_cast<uint4*>(y + row_place(half) + feature) = whole;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kQuad * kItems; ++i) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                if (own_row + 8 * half < rows) store_pair(y + row_place(half) + feature_of(i), total[i][half], count_of(i), even);
            }
        }
    }
}

}  // namespace trtc

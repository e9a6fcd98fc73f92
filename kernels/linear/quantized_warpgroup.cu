// Linear layer with integer or e4m3 weights for 17 to 64 rows on Hopper: y = act(x W^T + b) + residual.
//
// A warpgroup owns 64 rows of W ("features"): the 64-row operand of wgmma, taken from registers, where stored bytes become
// numbers while the product of the columns before still runs. The rows of x are the other operand, in shared memory, for
// all warpgroups of the block. The blocks of a cluster share K; each sends its sums to the one that finishes their rows.
//
// A thread copies the bytes of W that it reads back itself (see stream.cu), on their way before the wait for predecessors.
//
// The order of columns inside a product is free, but x and W must agree. wgmma gives a lane pairs 2 m and 2 m + 1 of every
// octet of columns (m: member, lane % 4), while 16 bytes of W hold whole pieces of 8 columns. So x is put into W's order:
// where pieces of four members lie, `arrange` puts four octets instead, octet j made of pair j of each piece. It does so in
// place, by warps that do nothing else. A slice is 64 columns of x, or four products; a unit is two of them.
#include "common/activation.cuh"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/reduce.cuh"
#include "common/tensor_copy.cuh"
#include "common/types.cuh"
#include "common/wgmma.cuh"
#include "linear/pairs.cuh"
#include "linear/weights.cuh"

namespace trtc {

constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kOctet = 8;     // rows of x that lie together in the sums of a warp
constexpr int kProducts = 4;  // of a slice
constexpr int kSliceColumns = kSwizzledColumns;
constexpr int kUnitSlices = 2;
constexpr int kUnitColumns = kUnitSlices * kSliceColumns;
constexpr int kArrangers = kUnitSlices;  // warps, of those that do not multiply; the last one copies
constexpr int kHelpers = kGroupWarps;
constexpr int kMaxRowStages = 8;
constexpr int kPieceBytes = 16;
constexpr int kStageRowBytes = 4 * kPieceBytes;  // of a row of W, for the members of a group of lanes

// The value, which the compiler then keeps instead of computing it again in every turn of a loop.
__device__ __forceinline__ uint32 kept(uint32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Registers of each thread of this warpgroup from here on; all its warps ask together.
template <int kRegisters, bool kMore>
__device__ __forceinline__ void take_registers() {
    if constexpr (kMore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

__device__ __forceinline__ uint4 load_shared(uint32 place) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(place)
                 : "memory");
    return words;
}

__device__ __forceinline__ uint32 word_of(const uint4& words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// The 16-byte piece of a slice that goes with piece `index` of a member's stored 16 bytes.
template <typename Weight>
__device__ __forceinline__ int slice_piece(int member, int index) {
    return (member * Weight::kMemberColumns + index * Weight::kPieceColumns) / 8;
}

// Puts rows of a slice of x, in the 128-byte swizzle, into the order of W; one warp. Each pass takes 16 rows, of which a lane
// has one, and of it one of two sets of four pieces.
template <int kPasses, typename Weight>
__device__ __forceinline__ void arrange(unsigned char* first_row, int lane) {
    constexpr int kPassBytes = 16 * kSwizzledRowBytes;
    uint4 piece[kPasses][4];
    unsigned char* place[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        place[i] = first_row + swizzled<kSwizzledRowBytes>(lane % 16, slice_piece<Weight>(i, lane / 16));
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < 4; ++i) piece[pass][i] = *reinterpret_cast<const uint4*>(place[i] + pass * kPassBytes);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int octet = 0; octet < 4; ++octet) {
            *reinterpret_cast<uint4*>(place[octet] + pass * kPassBytes) =
                make_uint4(word_of(piece[pass][0], octet), word_of(piece[pass][1], octet),
                           word_of(piece[pass][2], octet), word_of(piece[pass][3], octet));
        }
    }
}

// The operand of a slice's products: of two rows of W, 8 apart, what `arrange` pairs with x. slice: of the stored bytes.
template <typename T, typename Weight>
__device__ __forceinline__ void operand_of(uint32 (&a)[kProducts][4], const uint4 (&stored)[2],
                                           const GroupScales<T, Weight> (&scale)[2], int slice) {
    uint4 piece[2][2];
#pragma unroll
    for (int index = 0; index < 2; ++index) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int whole = 2 * slice + index;
            uint4 part = scale[row].weight(stored[row], whole);
            if constexpr (Weight::kGroups > 0) {
                const uint32 factor = pair_of(scale[row].scale(whole));
                part = make_uint4(multiply_pairs<T>(part.x, factor), multiply_pairs<T>(part.y, factor),
                                  multiply_pairs<T>(part.z, factor), multiply_pairs<T>(part.w, factor));
            }
            piece[index][row] = part;
        }
    }
    // A product reads two neighbouring pieces of x: octets of one set, or the same octet of both.
    constexpr bool kOneSet = Weight::kMemberColumns == 8;
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int index = kOneSet ? product / 2 : half, octet = kOneSet ? 2 * (product % 2) + half : product;
            a[product][2 * half] = word_of(piece[index][0], octet);
            a[product][2 * half + 1] = word_of(piece[index][1], octet);
        }
    }
}

template <int kTokens, int kSplit>
constexpr int kPartOctetsOf = (kTokens / kOctet + kSplit - 1) / kSplit;  // octets of rows that a part finishes

// The first of the features of a consumer's outputs, in its block: a pair, and another one 8 further.
__device__ __forceinline__ int pair_feature(int thread) { return thread / kWarpSize * 16 + thread % kWarpSize / 8 * 2; }

// Copies bias and row scale of a consumer's features from `feature` on, that are before `end`, to its 16 bytes.
template <typename T, typename Weight>
__device__ __forceinline__ void fetch_constants(uint32 place, const T* scales, const T* bias, int feature, int end) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int bytes = max(0, min(end - feature - 8 * half, 2)) * static_cast<int>(sizeof(T));
        const int from = bytes > 0 ? feature + 8 * half : 0;
        copy_async_4(place + 4 * half, bias + from, bias ? bytes : 0);
        if constexpr (Weight::kRowScales) copy_async_4(place + 8 + 4 * half, scales + from, bytes);
    }
}

// What becomes of the sums of a thread's rows of W: parts send them to each other, and each writes the rows of x it finishes.
// After an exchange between lanes of neighbouring features, a thread has of each octet one row and two pairs of features, 8
// apart. received: [kSplit][kGroups * kGroupWarps][kPartOctetsOf][32], whose bytes from other parts sums_full counts.
// own: this thread's 16 bytes at every kGroups * kGroupThreads * 16 of the ring of W, which is done with; behind it, at
// ring_bytes, lies what `fetch_constants` has put there.
template <typename T, int kTokens, int kGroups, int kSplit, typename Weight>
__device__ __forceinline__ void finish(float (&sum)[kTokens / 2], float4* received, const uint64& sums_full,
                                       unsigned char* own, int ring_bytes, T* y, const T* residual, int rows, int features,
                                       int features_per_block, int activation) {
    constexpr int kConsumerWarps = kGroups * kGroupWarps, kOctets = kTokens / kOctet;
    constexpr int kPartOctets = kPartOctetsOf<kTokens, kSplit>;
    const int thread = kept(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int part = kSplit == 1 ? 0 : cluster_rank(), first_feature = blockIdx.x / kSplit * features_per_block;
    const int feature = first_feature + pair_feature(thread), end = min(features, first_feature + features_per_block);
    const bool odd = lane / 4 % 2, aligned = features % 2 == 0;
    const int first_token = part * kPartOctets * kOctet + lane % 4 * 2 + odd;
    const T* from = residual + static_cast<size_t>(first_token) * features + feature;
    uint32 addend[kPartOctets][2];
    wait_for_predecessors();  // what follows reads the residual and writes y
#pragma unroll
    for (int i = 0; i < kPartOctets; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool valid = residual && first_token + i * kOctet < rows;
            addend[i][half] = load_bits(from + static_cast<size_t>(i * kOctet) * features + 8 * half,
                                        valid ? end - feature - 8 * half : 0, aligned);
        }
    }
    wgmma_wait();

    auto received_place = [&](int of, int i) { return ((of * kConsumerWarps + warp) * kPartOctets + i) * kWarpSize + lane; };
    if constexpr (kSplit > 1) {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            float4* place = received + received_place(part, octet % kPartOctets);
            const float4 some = make_float4(sum[4 * octet], sum[4 * octet + 1], sum[4 * octet + 2], sum[4 * octet + 3]);
            if (octet / kPartOctets == part) {
                *place = some;  // this thread alone reads it
            } else {
                send_to_rank(shared_address(place), some, shared_address(&sums_full), octet / kPartOctets);
            }
        }
        barrier_wait_cluster(shared_address(&sums_full), 0);
    }
    copy_async_wait<0>();
    const uint4 constants = *reinterpret_cast<const uint4*>(own + ring_bytes);
    float2 pair[kPartOctets][2];
#pragma unroll
    for (int i = 0; i < kPartOctets; ++i) {
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
        if constexpr (kSplit == 1) {
            total = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
        } else {
#pragma unroll
            for (int of = 0; of < kSplit; ++of) {  // in a fixed order
                const float4 some = received[received_place(of, i)];
                total.x += some.x, total.y += some.y, total.z += some.z, total.w += some.w;
            }
        }
        // x, y: two rows of x for feature octet_row; z, w: 8 features further.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 two = half ? make_float2(total.z, total.w) : make_float2(total.x, total.y);
            const float got = __shfl_xor_sync(~0u, odd ? two.x : two.y, 4);
            const float2 both = odd ? make_float2(got, two.y) : make_float2(two.x, got);
            const float2 shift = pair_of_bits<T>(half ? constants.y : constants.x);
            float2 factor = make_float2(1.f, 1.f);
            if constexpr (Weight::kRowScales) factor = pair_of_bits<T>(half ? constants.w : constants.z);
            pair[i][half] = make_float2(both.x * factor.x + shift.x, both.y * factor.y + shift.y);
        }
    }
    if (activation == kActivationRelu) {
#pragma unroll
        for (int i = 0; i < 2 * kPartOctets; ++i) {
            float2& two = pair[i / 2][i % 2];
            two = make_float2(activate(two.x, kActivationRelu), activate(two.y, kActivationRelu));
        }
    } else if (activation != kActivationNone) {  // through shared memory, so that there is one copy of the long code
        float4* room = reinterpret_cast<float4*>(own);
        constexpr int kNext = kGroups * kGroupThreads;
#pragma unroll
        for (int i = 0; i < kPartOctets; ++i) {
            room[i * kNext] = make_float4(pair[i][0].x, pair[i][0].y, pair[i][1].x, pair[i][1].y);
        }
#pragma unroll 1
        for (int i = 0; i < kPartOctets; ++i) {
            float* value = reinterpret_cast<float*>(room + i * kNext);
#pragma unroll 1
            for (int j = 0; j < 4; ++j) value[j] = activate(value[j], activation);
        }
#pragma unroll
        for (int i = 0; i < kPartOctets; ++i) {
            const float4 four = room[i * kNext];
            pair[i][0] = make_float2(four.x, four.y), pair[i][1] = make_float2(four.z, four.w);
        }
    }
#pragma unroll
    for (int i = 0; i < kPartOctets; ++i) {
        if (first_token + i * kOctet >= rows) continue;
        T* to = y + static_cast<size_t>(first_token + i * kOctet) * features + feature;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 more = pair_of_bits<T>(addend[i][half]);
            store_pair(to + 8 * half, make_float2(pair[i][half].x + more.x, pair[i][half].y + more.y),
                       end - feature - 8 * half, aligned);
        }
    }
}

// y, residual: [rows, features]; weight: [features, columns], as Weight stores it; bias: [features]; scales: as in tile.cu,
// but a group's scale is multiplied into its weights, rounded to T. bias and residual may be null; residual may be y.
// x_map: x [rows, columns] in boxes of kTokens rows of 64 columns, in 128-byte swizzle, zero beyond the matrix.
// columns is a multiple of 8, features_per_block of 8, up to 64 * kGroups, columns_per_block of 128. row_stages: units of x in
// its ring; all there are, or at least 2. Launched in clusters of kSplit blocks.
template <typename T, int kTokens, int kGroups, int kSplit, int kStages, typename Weight>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, kGroups == 1 ? 2 : 1)
    linear_quantized_warpgroup(T* y, const typename Weight::Stored* weight, const T* scales, const T* bias,
                               const T* residual, const __grid_constant__ TensorMap x_map, int rows, int features,
                               int columns, int features_per_block, int columns_per_block, int activation,
                               int row_stages) {
    constexpr int kConsumers = kGroups * kGroupThreads, kConsumerWarps = kGroups * kGroupWarps;
    constexpr int kOctets = kTokens / kOctet, kPartOctets = kPartOctetsOf<kTokens, kSplit>;
    constexpr uint32 kSliceBytes = kTokens * kSwizzledRowBytes, kUnitBytes = kUnitSlices * kSliceBytes;
    // A stage of W is 16 bytes of two rows for each thread: one slice, or a unit.
    constexpr int kStageSlices = 4 * 8 * Weight::kPieces / kSliceColumns, kUnitStages = kUnitSlices / kStageSlices;
    constexpr int kHalfBytes = kConsumers * kPieceBytes, kStageBytes = 2 * kHalfBytes, kRingBytes = kStages * kStageBytes;
    constexpr bool kGrouped = Weight::kGroups > 0;
    static_assert(kUnitSlices % kStageSlices == 0 && (!kGrouped || kUnitStages == 1) && kTokens % 16 == 0);
    static_assert(kStages >= 2 && 2 * kStages >= kPartOctets, "`finish` uses the ring");

    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) uint64 fetched[kMaxRowStages], arranged[kMaxRowStages], empty[kMaxRowStages], sums_full;
    allow_dependents();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int part = kSplit == 1 ? 0 : cluster_rank();
    const int first_feature = blockIdx.x / kSplit * features_per_block, first_column = part * columns_per_block;
    const int units = (max(0, min(columns_per_block, columns - first_column)) + kUnitColumns - 1) / kUnitColumns;
    // The ring of x, that of W, 16 bytes for each consumer, and the sums that parts send.
    const uint32 row_ring = shared_address(shared), weight_ring = row_ring + row_stages * kUnitBytes;
    unsigned char* own = shared + row_stages * kUnitBytes + threadIdx.x * kPieceBytes;  // in the ring of W
    float4* received = reinterpret_cast<float4*>(shared + row_stages * kUnitBytes + kRingBytes + kHalfBytes);

    const bool copying = threadIdx.x == kConsumers + (kHelpers - 1) * kWarpSize;
    if (copying) {
        prefetch_tensor_map(x_map);
        for (int slot = 0; slot < row_stages; ++slot) {
            barrier_init(shared_address(fetched + slot), 1);
            barrier_init(shared_address(arranged + slot), kArrangers);
            barrier_init(shared_address(empty + slot), kConsumerWarps);
        }
        barrier_init(shared_address(&sums_full), 1);
        barrier_init_fence();
    }
    cluster_arrive_relaxed();

    // What a consumer has of W: of rows `octet_row` and 8 further of its warp's 16, 16 bytes a stage. Of rows that the block
    // does not have, and beyond the last column, where x is zero, it reads its last ones.
    const uint32 stored_row = padded_columns<Weight>(columns) / Weight::kColumnsPerStored;  // bytes
    auto row_place = [&](int further) {
        const int place = first_feature + min(warp * 16 + lane / 4 + further, features_per_block - 1);
        return kept(min(place, features - 1) * stored_row);
    };
    const uint32 low_row = row_place(0), high_row = row_place(8);
    uint32 fetch_byte = first_column / Weight::kColumnsPerStored + lane % 4 * kPieceBytes;
    auto fetch_weight = [&](uint32 place, bool more) {
        const unsigned char* from = reinterpret_cast<const unsigned char*>(weight) + min(fetch_byte, stored_row - kPieceBytes);
        stream_async_16(place, from + low_row, more);
        stream_async_16(place + kHalfBytes, from + high_row, more);
        copy_async_commit();
        fetch_byte += kStageRowBytes;
    };
    // Scales of groups, which end where units do, are loaded to registers a unit ahead of their use.
    using Scales = GroupScales<T, Weight>;
    Scales scale[2], next_scale[2];
    uint32 block = first_column / kUnitColumns;
    const uint32 low_scales = low_row / kStageRowBytes, high_scales = high_row / kStageRowBytes;
    auto load_group_scales = [&](bool more) {
        const Scales* from = reinterpret_cast<const Scales*>(scales) + block;
        if (more) next_scale[0] = from[low_scales], next_scale[1] = from[high_scales];
        ++block;
    };
    if (warp < kConsumerWarps) {
        const int end = min(features, first_feature + features_per_block);
        const int feature = first_feature + pair_feature(threadIdx.x);
        fetch_constants<T, Weight>(shared_address(own + kRingBytes), scales, bias, feature, end);
#pragma unroll 1
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fetch_weight(shared_address(own) + stage * kStageBytes, stage < units * kUnitStages);
        }
        if constexpr (kGrouped) load_group_scales(units > 0);
    }
    cluster_wait();  // barriers of all blocks are there

    constexpr bool kMoves = kGroups == 4;  // registers, from helpers to consumers
    if (warp >= kConsumerWarps) {
        if constexpr (kMoves) take_registers<64, false>();
        Slot slot;
        if (copying) {
            const int own_octets = max(0, min(kOctets - part * kPartOctets, kPartOctets));
            const int bytes = (kSplit - 1) * kConsumerWarps * own_octets * kWarpSize * sizeof(float4);
            barrier_expect(shared_address(&sums_full), bytes);
            wait_for_predecessors();
#pragma unroll 1
            for (int unit = 0; unit < units; ++unit) {
                const uint32 barrier = shared_address(fetched + slot.index);
                if (unit >= row_stages) barrier_wait(shared_address(empty + slot.index), slot.parity ^ 1);
                barrier_expect(barrier, kUnitBytes);
#pragma unroll
                for (int slice = 0; slice < kUnitSlices; ++slice) {
                    copy_tensor(row_ring + slot.index * kUnitBytes + slice * kSliceBytes, x_map,
                                first_column + unit * kUnitColumns + slice * kSliceColumns, 0, barrier);
                }
                slot.advance(row_stages);
            }
        } else if (warp < kConsumerWarps + kArrangers) {
            constexpr int kPasses = kTokens / 16, kAtOnce = kPasses % 2 ? 1 : 2;
#pragma unroll 1
            for (int unit = 0; unit < units; ++unit) {
                barrier_wait(shared_address(fetched + slot.index), slot.parity);
                unsigned char* slice = shared + slot.index * kUnitBytes + (warp - kConsumerWarps) * kSliceBytes;
#pragma unroll
                for (int pass = 0; pass < kPasses; pass += kAtOnce) {
                    arrange<kAtOnce, Weight>(slice + pass * 16 * kSwizzledRowBytes, lane);
                }
                fence_for_wgmma();
                __syncwarp();
                if (lane == 0) barrier_arrive(shared_address(arranged + slot.index));
                slot.advance(row_stages);
            }
        }
        return;
    }
    if constexpr (kMoves) take_registers<104, true>();

    float sum[kTokens / 2] = {};
    {
        const uint64 first_b = matrix_descriptor<kSwizzledRowBytes>(row_ring);  // counts in pieces of 16 bytes
        const uint32 first_empty = kept(shared_address(empty)), first_arranged = kept(shared_address(arranged));
        uint32 a[kUnitSlices][kProducts][4];
        uint4 stored[2];
        Slot slot;
        uint32 release = 0;  // the barrier of the unit before this one
        const int released_above = lane == 0 ? row_stages - 1 : units;  // what will not be filled again is not announced
        const uint32 ring_end = kept(shared_address(own) + kRingBytes);
        uint32 place = ring_end - kRingBytes, free_place = ring_end - kStageBytes;
#pragma unroll 1
        for (int left = units; left > 0; --left) {
#pragma unroll
            for (int slice = 0; slice < kUnitSlices; ++slice) {
                if (slice % kStageSlices == 0) {
                    copy_async_wait<kStages - 2>();
                    stored[0] = load_shared(place);
                    stored[1] = load_shared(place + kHalfBytes);
                    fetch_weight(free_place, left * kUnitStages > slice / kStageSlices + kStages - 1);
                    free_place = place;
                    place += kStageBytes;
                    if (place == ring_end) place -= kRingBytes;
                    if constexpr (kGrouped) {
                        scale[0] = next_scale[0], scale[1] = next_scale[1];
                        load_group_scales(left > 1);
                    }
                }
                operand_of<T, Weight>(a[slice], stored, scale, slice % kStageSlices);
                if (slice == 0) barrier_wait(first_arranged + slot.index * sizeof(uint64), slot.parity);
                wgmma_fence();
                const uint64 b = first_b + (slot.index * kUnitBytes + slice * kSliceBytes) / kPieceBytes;
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    Wgmma<T, kTokens>::product_rows(sum, a[slice][product], b + 2 * product, 1);
                }
                wgmma_commit();
                wgmma_wait_but<1>();  // the slice before this one has been read
                if (slice == 0 && release && left > released_above) barrier_arrive(release);
            }
            release = first_empty + slot.index * sizeof(uint64);
            slot.advance(row_stages);
        }
    }
    finish<T, kTokens, kGroups, kSplit, Weight>(sum, received, sums_full, own, kRingBytes, y, residual, rows, features,
                                                features_per_block, activation);
}

}  // namespace trtc

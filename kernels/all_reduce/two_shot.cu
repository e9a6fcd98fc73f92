// Sum over the GPUs of a host in two steps, alone or with a residual and the norm of the sum:
//   total = sum of x over the ranks + residual;  normed = (total - mean) / sqrt(variance + epsilon) * scale + shift
// A row is cut into pieces, the GPUs' in turn. Each adds its pieces of all parts and gives the sums to the others, in lines
// (lines.cuh). A block makes a row at a time, a thread one vector of each piece; it has sent its part of the next row before it
// waits for this one. All GPUs make all norms, of the same bits.
#include "all_reduce/lines.cuh"
#include "common/norm_row.cuh"

namespace trtc {

template <typename T>
__device__ __forceinline__ void multiply(float (&value)[Vector<T>::kSize], uint4 bits) {
    float factor[Vector<T>::kSize];
    unpack(*reinterpret_cast<const Vector<T>*>(&bits), factor);
#pragma unroll
    for (int k = 0; k < Vector<T>::kSize; ++k) value[k] *= factor[k];
}

// total, x, normed, residual: `vectors` of 16 bytes, in rows of `row_vectors`, the last of which need not be whole without a norm;
// scale, shift: a row. total may be x or residual, which is the same on all ranks; normed (kNorms), total, residual, scale and
// shift may be null. A block has a team of eight threads for every seven vectors of a piece, and whole warps. Sums are float32 in
// the order of ranks, the residual last, rounded once. state: see Exchange; capacity: lines.
template <typename T, int kRanks, bool kNorms, bool kRms>
__global__ void __maxnreg__(kRanks > 4 ? 104 : 72)  // a block leaves room for one of the product that starts under it
    all_reduce_two_shot(T* normed, T* total, const T* x, const T* residual, const T* scale, const T* shift, MEMORY_PARAMETERS,
                        uint32* state, int rank, int vectors, int row_vectors, int capacity, float epsilon) {
    constexpr int kSize = Vector<T>::kSize;
    constexpr int kOwn = kRanks == 2 ? 2 : 1;  // pieces of each GPU
    constexpr int kPieces = kOwn * kRanks;
    __shared__ Moments warp_moments[2][kMaxNormWarps];
    Packet* const memory[kMaxRanks] = MEMORY_ARGUMENTS;
    Exchange<kRanks> exchange(capacity);
    const Lines<kRanks> lines{exchange};
    const int piece = (row_vectors + kPieces - 1) / kPieces;
    const int piece_lines = (piece + kLineVectors - 1) / kLineVectors;
    const int first = lines.team * kLineVectors;  // vector of a piece that begins this team's line
    const int own = first + lines.lane;           // and this thread's
    const bool holds = lines.lane < kLineVectors && own < piece;

    const auto end_of = [&](int row) { return min((row + 1) * row_vectors, vectors); };
    // Whether this thread has a vector of piece i of a row, and whether its team has one.
    const auto has = [&](int row, int i) { return holds && row * row_vectors + i * piece + own < end_of(row); };
    const auto team_has = [&](int row, int i) {
        return first < piece && row * row_vectors + i * piece + first < end_of(row);
    };
    const auto load = [&](const T* tensor, int row, int i) {
        const size_t at = row * row_vectors + i * piece + own;
        return has(row, i) ? __ldcg(reinterpret_cast<const uint4*>(tensor) + at) : uint4{};
    };
    const auto store = [&](T* tensor, int row, int i, uint4 bits) {
        const size_t at = row * row_vectors + i * piece + own;
        if (has(row, i)) store_vector(tensor + at * kSize, *reinterpret_cast<const Vector<T>*>(&bits));
    };
    // Where in a room the line of piece i begins.
    const auto place = [&](int row, int i) {
        return static_cast<uint32>((row * kOwn + i / kRanks) * piece_lines + lines.team) * kLineThreads;
    };
    // What others add: piece k % kOwn of peer k / kOwn.
    const auto piece_of = [&](int k) { return k % kOwn * kRanks + peer_of<kRanks>(rank, k / kOwn); };
    uint4 part[kPieces - kOwn];
    const auto load_part = [&](int row) {
#pragma unroll
        for (int k = 0; k < kPieces - kOwn; ++k) part[k] = load(x, row, piece_of(k));
    };
    const auto give_part = [&](int row) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kPieces - kOwn; ++k) {
            Packet* const to = memory_of<kRanks>(memory, peer_of<kRanks>(rank, k / kOwn));
            const int i = piece_of(k);
            lines.give(to + (lines.parts(rank) + place(row, i)), part[k], team_has(row, i));
        }
    };

    load_part(blockIdx.x);
    exchange.count(state);
    give_part(blockIdx.x);
    exchange.count_block(state);
    int turn = 0;
    for (int row = blockIdx.x; row * row_vectors < vectors; row += gridDim.x) {
        const int next = row + gridDim.x;
        if (next * row_vectors < vectors) {
            load_part(next);
            give_part(next);
        }
        uint4 mine[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const int i = k * kRanks + rank;
            const bool wants = team_has(row, i);
            const auto part_of = [&](int from) { return here + (lines.parts(from) + place(row, i)); };
            uint4 seen[kRanks] = {};
#pragma unroll
            for (int from = 0; from < kRanks; ++from) lines.look(seen[from], part_of(from), wants && from != rank);
            const uint4 own_part = load(x, row, i), added = residual ? load(residual, row, i) : uint4{};
            float sum[kSize] = {};
#pragma unroll
            for (int from = 0; from < kRanks; ++from) {
                lines.await(seen[from], part_of(from), wants && from != rank);
                add<T>(sum, from == rank ? own_part : seen[from]);
            }
            if (residual) add<T>(sum, added);
            mine[k] = bits_of(pack<T>(sum));
            __syncwarp();
#pragma unroll
            for (int other = 0; other < kRanks - 1; ++other) {
                Packet* const to = memory_of<kRanks>(memory, peer_of<kRanks>(rank, other));
                lines.give(to + (lines.sums(rank) + place(row, i)), mine[k], wants);
            }
        }
        const auto sum_from = [&](int i) { return here + (lines.sums(i % kRanks) + place(row, i)); };
        const auto wants_sum = [&](int i) { return i % kRanks != rank && team_has(row, i); };
        uint4 sums[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            sums[i] = mine[i / kRanks];
            lines.look(sums[i], sum_from(i), wants_sum(i));
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            lines.await(sums[i], sum_from(i), wants_sum(i));
            if (total) store(total, row, i, sums[i]);
        }

        if constexpr (kNorms) {
            int held = 0;
            float value[kPieces][kSize];
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                held += has(row, i);
                unpack(*reinterpret_cast<const Vector<T>*>(&sums[i]), value[i]);  // the norm is that of the sum as stored
            }
            const int columns = row_vectors * kSize;
            const Moments moments = block_moments<T, kPieces, kRms>(value, held, columns, warp_moments[turn]);
            const float inverse = rsqrtf(moments.deviation / columns + epsilon);
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                if (!has(row, i)) continue;
                const int at = i * piece + own;
#pragma unroll
                for (int j = 0; j < kSize; ++j) value[i][j] = (value[i][j] - moments.mean) * inverse;
                if (scale) multiply<T>(value[i], __ldg(reinterpret_cast<const uint4*>(scale) + at));
                if (shift) add<T>(value[i], __ldg(reinterpret_cast<const uint4*>(shift) + at));
                store(normed, row, i, bits_of(pack<T>(value[i])));
            }
            turn ^= 1;
        }
    }
}

}  // namespace trtc

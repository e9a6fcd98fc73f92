// One token per row of logits, drawn at random as the row's parameters say, and the step of a decode loop.
//
// T, the type of the logits: float, __half or __nv_bfloat16.
//
// Order: repetition, frequency and presence penalties, temperature, min_p, top_k (ties with the k-th stay),
// top_p, then the inverse of the cumulative distribution over the tokens in descending order (ties: lower
// index first) at one uniform number, Philox4x64-10 with key (seed, sample index) and counter
// `output_position` (Salmon et al., SC 2011).
//
// Nothing is sorted. Each filter keeps a prefix of the tokens in that order, and so does the drawn token end
// one: every step is a search for the first token at which a cumulative weight passes a target. A search
// descends a radix tree over (score, index), a histogram of weights per level, until few tokens are left,
// which are compared pair by pair: mostly after one level. Weights are integers (probability over the best
// one's, times 2^44), so sums do not depend on the order of additions and the token is the same in every
// launch.
//
// A row is divided among the blocks of a cluster (sm_90 and later; before, among one).

#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/types.cuh"
#include "sampling/loop_state.cuh"
#include "sampling/rank.cuh"

namespace trtc {

constexpr int kThreads = 512;  // 128 registers each: enough for exp in double
constexpr int kWarps = kThreads / 32;
constexpr int kMaxClusterSize = 8;
constexpr int kBatch = 8;       // tokens a thread loads at a time
constexpr int kIndexBits = 19;  // vocabularies up to 2^19
constexpr int kBins = 1024;
constexpr int kDigits = 4,
              kDigitBits = 12;  // a bin sums 12-bit digits in 32 bits: 2^19 tokens cannot overflow it
constexpr int kBinsPerThread = kBins / kThreads;
constexpr double kWeightOne = 17592186044416.0;  // 2^44: 2^19 of them fit 64 bits
constexpr uint64 kEverything = ~0ull;
constexpr int kCandidates = 512;  // that many tokens are compared pair by pair

// Levels of the radix tree over a place. The first is the score in steps of 1/32, which spreads the tokens
// evenly over the bins; then the score's bits, then the index.
constexpr int kLevelBits = 10, kLevels = 6, kScoreBits = 31;
constexpr float kBinsPerUnit = 32.0f;
static_assert(1 << kLevelBits == kBins, "bins of a level");
static_assert(kLevelBits * kLevels == kLevelBits + kScoreBits + kIndexBits, "the levels cover a place");

struct Candidate {
    uint64 place;
    uint64 weight;
};

struct Shared {
    uint32 digits[kDigits]
                 [kBins];     // this block's histogram as it grows: 64-bit additions would be retried loops
    uint32 counts[kBins];     // tokens with weight
    uint64 histogram[kBins];  // the weights when it is complete
    uint64 warp_sums[kWarps];
    Rank warp_ranks[kWarps];
    Rank block_ranks[kMaxClusterSize];
    int found_bin;
    int found_count;  // tokens with weight in that bin
    uint64 found_before;
    Candidate candidates[kCandidates];  // of rank 0: those of all blocks
    int num_candidates;
    uint64 found_place;
};

// The tokens of one row that this block looks after.
struct Range {
    int begin, end;
    uint32* keys;  // bits of the distance to the best score, as float: a smaller key is a better score
    uint64* weights;
};

__device__ __forceinline__ uint64 place_of(uint32 key, int index) {
    const uint32 bin = static_cast<uint32>(fminf(__uint_as_float(key) * kBinsPerUnit, kBins - 1));
    return static_cast<uint64>(bin) << (kScoreBits + kIndexBits) | static_cast<uint64>(key) << kIndexBits |
           static_cast<uint32>(index);
}

// Sums the blocks' histograms and finds the bin in which the running sum passes the target.
// target_of(total) is asked only when `total_wanted`, else `target` holds it.
template <typename TargetOf>
__device__ void find_bin(Shared& shared, uint64& target, bool total_wanted, TargetOf target_of) {
    const int blocks = cluster_size();
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        uint64 sum = 0;
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit)
            sum += static_cast<uint64>(shared.digits[digit][bin]) << digit * kDigitBits;
        shared.histogram[bin] = sum;
    }
    cluster_sync();                                  // every block's histogram is complete
    uint64 others[kMaxClusterSize][kBinsPerThread];  // all on their way before the first is used
#pragma unroll
    for (int block = 0; block < kMaxClusterSize; ++block) {
        const uint64* const other = in_rank(shared.histogram, min(block, blocks - 1));
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) others[block][i] = other[threadIdx.x * kBinsPerThread + i];
    }
    uint64 bins[kBinsPerThread] = {}, sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
#pragma unroll
        for (int block = 0; block < kMaxClusterSize; ++block)
            bins[i] += block < blocks ? others[block][i] : 0;
        sum += bins[i];
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64 inclusive = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64 other = __shfl_up_sync(~0u, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    if (lane == 31) shared.warp_sums[warp] = inclusive;
    __syncthreads();
    uint64 total = 0, before = inclusive - sum;
    for (int i = 0; i < kWarps; ++i) {
        if (i == warp) before += total;
        total += shared.warp_sums[i];
    }
    if (total_wanted) target = target_of(total);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        if (before <= target && target < before + bins[i]) {
            shared.found_bin = threadIdx.x * kBinsPerThread + i;
            shared.found_before = before;
            int count = 0;
            for (int block = 0; block < blocks; ++block)
                count += in_rank(shared.counts, block)[shared.found_bin];
            shared.found_count = count;
        }
        before += bins[i];
    }
    cluster_sync();  // the result is there, and no block reads another's histogram any more
}

// Calls visit(place, weight) for this block's tokens that have weight and are not after `limit`.
template <typename WeightOf, typename Visit>
__device__ __forceinline__ void for_each_token(const Range& range, uint64 limit, WeightOf weight_of,
                                               Visit visit) {
    for (int first = range.begin + threadIdx.x; first < range.end; first += kThreads * kBatch) {
        uint32 keys[kBatch];
        uint64 weights[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = min(first + i * kThreads, range.end - 1);
            keys[i] = range.keys[index];
            weights[i] = weight_of(index);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = first + i * kThreads;
            const uint64 place = place_of(keys[i], index);
            if (index < range.end && place <= limit && weights[i] > 0) visit(place, weights[i]);
        }
    }
}

// The candidate at which the running sum passes the target; the same in all blocks.
__device__ uint64 best_candidate(Shared& shared, uint64 target) {
    cluster_sync();  // rank 0 has them all
    if (cluster_rank() == 0) {
        const int count = shared.num_candidates;
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const Candidate candidate = shared.candidates[i];
            uint64 before = 0;
#pragma unroll 4
            for (int j = 0; j < count; ++j)
                before += shared.candidates[j].place < candidate.place ? shared.candidates[j].weight : 0;
            if (before <= target && target < before + candidate.weight)
                for (int block = 0; block < cluster_size(); ++block)
                    *in_rank(&shared.found_place, block) = candidate.place;
        }
    }
    cluster_sync();
    return shared.found_place;
}

// The place of the first token, in descending order, at which the sum of weight_of(index) over the tokens up
// to `limit` passes target_of(sum over all of them).
template <typename WeightOf, typename TargetOf>
__device__ uint64 search(Shared& shared, const Range& range, uint64 limit, WeightOf weight_of,
                         TargetOf target_of) {
    uint64 found = 0, target = 0;
    // Ends at the last level at the latest, whose bins hold one token each.
    for (int shift = kLevelBits * (kLevels - 1);; shift -= kLevelBits) {
        for (int i = threadIdx.x; i < kDigits * kBins; i += kThreads) shared.digits[i / kBins][i % kBins] = 0;
        for (int i = threadIdx.x; i < kBins; i += kThreads) shared.counts[i] = 0;
        if (threadIdx.x == 0) shared.num_candidates = 0;
        __syncthreads();
        for_each_token(range, limit, weight_of, [&](uint64 place, uint64 weight) {
            if (place >> (shift + kLevelBits) != found >> (shift + kLevelBits)) return;
            const int bin = place >> shift & (kBins - 1);
            atomicAdd(&shared.counts[bin], 1u);
#pragma unroll
            for (int digit = 0; digit < kDigits; ++digit) {
                const uint32 value = weight >> digit * kDigitBits & ((1 << kDigitBits) - 1);
                if (value) atomicAdd(&shared.digits[digit][bin], value);
            }
        });
        find_bin(shared, target, shift == kLevelBits * (kLevels - 1), target_of);
        target -= shared.found_before;
        found |= static_cast<uint64>(shared.found_bin) << shift;
        if (shared.found_count > kCandidates) continue;
        for_each_token(range, limit, weight_of, [&](uint64 place, uint64 weight) {
            if (place >> shift != found >> shift) return;
            const int slot = atomicAdd(in_rank(&shared.num_candidates, 0), 1);
            in_rank(shared.candidates, 0)[slot] = {place, weight};
        });
        return best_candidate(shared, target);
    }
}

// torch's arithmetic, operation by operation: no fused multiply-add. `state` is 2 * (times generated) + (in
// the prompt).
__device__ __forceinline__ float penalize(float score, int state, float repetition, float frequency,
                                          float presence) {
    if (state == 0) return score;
    score = score > 0.0f ? __fdiv_rn(score, repetition) : __fmul_rn(score, repetition);
    const int count = state >> 1;
    score = __fsub_rn(score, __fmul_rn(frequency, static_cast<float>(count)));
    return __fsub_rn(score, count > 0 ? presence : 0.0f);
}

// First 53 bits of word 0 of Philox4x64-10, as a number in [0, 1). numpy's generator counts up before its
// first block.
__device__ __forceinline__ double uniform(uint64 seed, uint64 sample_index, uint64 position) {
    uint64 c0 = position + 1, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        const uint64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ seed, c1 = low1, c2 = high0 ^ c3 ^ sample_index, c3 = low0;
        seed += 0x9E3779B97F4A7C15ull, sample_index += 0xBB67AE8584CAA73Bull;
    }
    return static_cast<double>(c0 >> 11) * (1.0 / 9007199254740992.0);
}

// The best score of the row and where it is, the same in all blocks.
__device__ Rank cluster_best(Shared& shared, Rank best) {
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) shared.warp_ranks[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = warp_best(threadIdx.x < kWarps ? shared.warp_ranks[threadIdx.x] : 0);
        if (static_cast<int>(threadIdx.x) < cluster_size())
            in_rank(shared.block_ranks, threadIdx.x)[cluster_rank()] = best;
    }
    cluster_sync();
    best = shared.block_ranks[0];
    for (int block = 1; block < cluster_size(); ++block) best = better(best, shared.block_ranks[block]);
    return best;
}

// logits: rows of `vocab_size` values, `row_stride` apart. temperature (0: greedy), min_p, top_p, repetition,
// frequency, presence: [rows] float; top_k: [rows], 0 or less keeps all; seeds: [rows]; sample_index: [rows].
// token_state: [rows, vocab_size], 2 * (times generated) + (1 if in the prompt), updated here; null: no
// penalties. keys, weights: scratch of [rows, vocab_size]. next_token becomes -1 where the row's best score
// is not finite. Grid (cluster size, rows).
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sample_tokens(const T* __restrict__ logits, long long row_stride, int vocab_size,
                  const float* temperatures, const float* min_ps, const int* top_ks, const float* top_ps,
                  const float* repetitions, const float* frequencies, const float* presences,
                  const uint64* seeds, const int* sample_indices, int* token_state, uint32* keys,
                  uint64* weights, LOOP_STATE_PARAMETERS) {
    __shared__ Shared shared;
    const LoopState state = LOOP_STATE_ARGUMENTS;
    const int row = blockIdx.y;
    const int chunk = (vocab_size + cluster_size() - 1) / cluster_size();
    const long long row_offset = static_cast<long long>(row) * vocab_size;
    const Range range{min(vocab_size, cluster_rank() * chunk), min(vocab_size, (cluster_rank() + 1) * chunk),
                      keys + row_offset, weights + row_offset};
    const bool reports = cluster_rank() == 0 && threadIdx.x == 0;
    cluster_sync();  // all blocks run: their shared memory may be written
    wait_for_predecessors();
    const LoopRow before = load_row(state, row);
    if (!before.is_used()) return;

    Rank best = 0;
#pragma unroll 4
    for (int index = range.begin + threadIdx.x; index < range.end; index += kThreads) {
        float score = to_float(logits[row * row_stride + index]);
        if (token_state)
            score = penalize(score, token_state[row_offset + index], repetitions[row], frequencies[row],
                             presences[row]);
        range.keys[index] = __float_as_uint(score);
        best = better(best, rank_of(score, index));
    }
    best = cluster_best(shared, best);
    const float best_score = value_of(best);
    const float temperature = temperatures[row];
    int token = isfinite(best_score) ? index_of(best) : -1;

    if (token >= 0 && temperature > 0.0f) {
        const double min_p = min_ps[row];
#pragma unroll 2
        for (int index = range.begin + threadIdx.x; index < range.end; index += kThreads) {
            const float score = __fdiv_rn(__uint_as_float(range.keys[index]) - best_score, temperature);
            const double weight = exp(static_cast<double>(score));
            range.keys[index] = __float_as_uint(score) & 0x7fffffffu;  // scores are at most 0
            range.weights[index] =
                weight >= min_p ? static_cast<uint64>(__double2ll_rn(weight * kWeightOne)) : 0;
        }
        uint64 limit = kEverything;
        const int top_k = top_ks[row];
        if (top_k > 0 && top_k < vocab_size) {
            const uint64 kth = search(
                shared, range, limit, [](int) { return 1ull; },
                [&](uint64) { return static_cast<uint64>(top_k - 1); });
            limit = kth | ((1ull << kIndexBits) - 1);  // and all that tie with it
        }
        const auto weight_of = [&](int index) { return range.weights[index]; };
        const float top_p = top_ps[row];
        if (top_p < 1.0f) {
            // The last token kept is the first at which the sum reaches top_p of the total.
            limit = search(shared, range, limit, weight_of, [&](uint64 total) {
                const uint64 wanted =
                    static_cast<uint64>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
                return wanted > 0 ? wanted - 1 : 0;
            });
        }
        const double u = uniform(seeds[row], sample_indices[row], before.output_position);
        const uint64 drawn = search(shared, range, limit, weight_of, [&](uint64 total) {
            const uint64 target = static_cast<uint64>(u * static_cast<double>(total));
            return target < total ? target : total - 1;
        });
        token = static_cast<int>(drawn & ((1ull << kIndexBits) - 1));
    }
    cluster_sync();  // no block is still reading the state
    if (reports) {
        if (token_state && token >= 0) token_state[row_offset + token] += 2;
        advance_row(state, row, before, token);
    }
}

}  // namespace trtc

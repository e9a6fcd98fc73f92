// What a decode loop that stays on the device carries from step to step, and its advance by one chosen token
// a row.
#pragma once

namespace trtc {

// Pointers may be null, except next_token. One entry per row (sequence) of the batch unless said otherwise.
struct LoopState {
    int* next_token;       // the token chosen in this step
    int* token_ids;        // the graph's input of that name: becomes the chosen token
    int* positions;        // the graph's input: + 1
    int* kv_length;        // the graph's input: + 1; a row with 0 is unused and stays as it is
    int* output_position;  // tokens generated before this one: + 1 (counter of the random numbers)
    int* history;  // [rows, history_length]: entry kv_length % history_length becomes the chosen token; may
                   // be pinned host memory, which the host reads while the device goes on
    int history_length;
};

// One row's state before the step.
struct LoopRow {
    int position = 0;
    int length = 0;
    int output_position = 0;
    bool has_length = false;

    // A row with kv_length 0 is unused.
    __device__ __forceinline__ bool is_used() const { return !has_length || length > 0; }
};

__device__ __forceinline__ LoopRow load_row(const LoopState& state, int row) {
    LoopRow before;
    before.has_length = state.kv_length != nullptr;
    if (state.positions) before.position = state.positions[row];
    if (state.kv_length) before.length = state.kv_length[row];
    if (state.output_position) before.output_position = state.output_position[row];
    return before;
}

// Called by one thread per row.
__device__ __forceinline__ void advance_row(const LoopState& state, int row, const LoopRow& before,
                                            int token) {
    state.next_token[row] = token;
    if (state.token_ids) state.token_ids[row] = token;
    if (state.positions) state.positions[row] = before.position + 1;
    if (state.output_position) state.output_position[row] = before.output_position + 1;
    if (state.kv_length) state.kv_length[row] = before.length + 1;
    if (state.history) {
        const long long start = static_cast<long long>(row) * state.history_length;
        state.history[start + before.length % state.history_length] = token;
    }
}

}  // namespace trtc

// The launcher passes each member as a kernel argument of its own.
#define LOOP_STATE_PARAMETERS                                                                            \
    int *next_token, int *token_ids, int *positions, int *kv_length, int *output_position, int *history, \
        int history_length
#define LOOP_STATE_ARGUMENTS \
    {next_token, token_ids, positions, kv_length, output_position, history, history_length}

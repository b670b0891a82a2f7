// The steps of GroupQueryAttention for one instruction set.

#include "attention_lanes.inl"
#include "attention_new_rows.inl"
#include "attention_attend.inl"

constexpr AttentionKernels ATTENTION = {take_token, attend_split, fold, finish, AttendScratch::bytes};

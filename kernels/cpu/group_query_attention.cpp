#include "group_query_attention.h"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "attention_job.h"
#include "attention_reference.h"
#include "memory.h"

#define RYZEN_VECTOR_CODE "group_query_attention.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t MOST_HEADS = 1 << 12;
constexpr int64_t MOST_POSITIONS = int64_t{1} << 30;  // positions are compared in 32 bits
constexpr int64_t FLOATS_PER_CALL = 1 << 14;          // less than this is not worth waking a thread for
constexpr int64_t TASKS_WANTED = 16;                  // with fewer blocks of query rows, splits become tasks too

const AttentionKernels& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::AVX512_VNNI: return avx512_vnni::ATTENTION;
    case Isa::AVX2_VNNI: return avx2_vnni::ATTENTION;
    case Isa::AVX2: return avx2::ATTENTION;
    case Isa::SCALAR: break;
  }
  return reference::ATTENTION;
}

void expect(const Tensor& tensor, const Shape& shape, const char* name) {
  if (tensor.shape != shape) refuse(name, " has the shape ", tensor.shape.text(), ", expected ", shape.text());
}

// Runs body(i) for i in [0, count): in tasks where there is work for several threads, else right here.
template <typename Body>
void spread(const Context& context, int64_t count, int64_t floats, const Body& body) {
  if (floats < FLOATS_PER_CALL) {
    for (int64_t i = 0; i < count; ++i) body(size_t(i));
  } else {
    context.parallel(size_t(count), body);
  }
}

struct QueryScratch;
struct PartialScratch;
struct StageScratch;
struct ThreadScratch;

}  // namespace

// One run: reads and checks everything, then does the work in steps.
struct GroupQueryAttention::Run {
  const GroupQueryAttention& op;
  const Context& context;
  AttentionJob job{};
  std::vector<Sequence> sequences;
  std::vector<float> inverses, expanded;
  std::vector<int> order;
  Tensor past_key, past_value, k_scale, v_scale;
  Shape present_shape, steps_shape;
  int64_t rows = 0;  // of the present buffers
  uint8_t *present_key = nullptr, *present_value = nullptr;
  float *present_k_steps = nullptr, *present_v_steps = nullptr;
  // A batch row whose oldest rows go: how many it holds before and after. What goes is still read where several
  // tokens come at once, so that keys and values are then gathered elsewhere first.
  struct Eviction {
    int64_t held, kept;
    bool staged;
  };
  std::vector<Eviction> evictions;

  Run(const GroupQueryAttention& op_, const Context& context_) : op(op_), context(context_) {}

  void read_tokens();
  void read_rotation();
  void read_cache();
  void read_scales();
  void read_lengths();
  void take_outputs();
  void move_rows();
  void lay_out();
  void attend();
  void keep_newest();

 private:
  int64_t resident(int64_t tokens) const;
  void move_head(int64_t row, int kv_head);
  std::pair<int64_t, int64_t> splits_of(int64_t row, int64_t block) const;
};

void GroupQueryAttention::Run::read_tokens() {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  job.heads = op.heads_, job.kv_heads = op.kv_heads_, job.group = op.heads_ / op.kv_heads_;
  if (query.shape.rank != 3) refuse("query has the shape ", query.shape.text(), ", expected three dimensions");
  job.batch = query.shape[0], job.tokens = query.shape[1];
  if (bool(key) != bool(value)) refuse("key and value must be both given or both absent");
  const int64_t sharing = key ? op.heads_ : op.heads_ + 2 * op.kv_heads_, width = query.shape[2];
  if (job.batch < 1 || job.tokens < 1 || width < 1 || width % sharing)
    refuse("query has the shape ", query.shape.text(), ", expected (batch, tokens, a multiple of ", sharing, ")");
  const int64_t dim = width / sharing;
  if (dim % 8 || dim > MOST_DIM) refuse("the head size is ", dim, ", expected a multiple of 8 up to ", MOST_DIM);
  if (job.batch > MOST_POSITIONS || job.tokens > MOST_POSITIONS)
    refuse("query has the shape ", query.shape.text(), ", which is too large");
  job.dim = int(dim);
  job.query = query.floats("query");
  job.query_stride = width;
  if (key) {
    const Shape expected = {job.batch, job.tokens, op.kv_heads_ * dim};
    expect(key, expected, "key");
    expect(value, expected, "value");
    job.key = key.floats("key"), job.value = value.floats("value");
    job.key_stride = op.kv_heads_ * dim;
  } else {
    job.key = job.query + op.heads_ * dim, job.value = job.key + op.kv_heads_ * dim;
    job.key_stride = width;
  }
  const Tensor q_norm = context.input(14), k_norm = context.input(15);
  if (bool(q_norm) != bool(k_norm)) refuse("q_norm_weight and k_norm_weight must be both given or both absent");
  if (q_norm) {
    expect(q_norm, {dim}, "q_norm_weight");
    expect(k_norm, {dim}, "k_norm_weight");
    job.q_norm = q_norm.floats("q_norm_weight"), job.k_norm = k_norm.floats("k_norm_weight");
  }
  job.norm_epsilon = op.norm_epsilon_;
  if (const Tensor sink = context.input(11)) {
    expect(sink, {op.heads_}, "head_sink");
    job.sink = sink.floats("head_sink");
  }
  if (context.input(9)) refuse("position_ids are not supported");
  if (context.input(10)) refuse("attention_bias is not supported");
  const float scale = op.scale_ != 0.0f ? op.scale_ : 1.0f / std::sqrt(float(dim));
  job.softcap = op.softcap_ * LOG2_E;
  job.query_factor = op.softcap_ > 0.0f ? scale / op.softcap_ : scale * LOG2_E;
  job.window = op.window_;
}

void GroupQueryAttention::Run::read_rotation() {
  const Tensor cos = context.input(7), sin = context.input(8);
  if (!op.rotate_) return;
  if (!cos || !sin) refuse("do_rotary is 1, but cos_cache or sin_cache is absent");
  if (cos.shape.rank != 2 || cos.shape[1] < 1 || cos.shape[1] > job.dim / 2)
    refuse("cos_cache has the shape ", cos.shape.text(), ", expected (positions, at most ", job.dim / 2, ")");
  expect(sin, cos.shape, "sin_cache");
  job.cos = cos.floats("cos_cache"), job.sin = sin.floats("sin_cache");
  job.half = int(cos.shape[1]);
  job.interleaved = op.interleaved_;
}

void GroupQueryAttention::Run::read_cache() {
  past_key = context.input(3), past_value = context.input(4);
  if (past_key.element != past_value.element)
    refuse("past_key has elements of type ", int(past_key.element), ", past_value of type ", int(past_value.element));
  const char* wanted = op.bits_ == 8 ? "int8 (3)" : op.bits_ == 4 ? "uint8 (2)" : "float (1) or float16 (10)";
  job.row_bytes = job.dim;
  switch (past_key.element) {
    case ORT_FLOAT: job.format = CacheFormat::F32, job.row_bytes *= 4; break;
    case ORT_FLOAT16: job.format = CacheFormat::F16, job.row_bytes *= 2; break;
    case ORT_INT8: job.format = CacheFormat::I8; break;
    case ORT_UINT8: job.format = CacheFormat::I4, job.row_bytes /= 2; break;
    default: refuse("past_key has elements of type ", int(past_key.element), ", expected ", wanted);
  }
  const int bits = job.format == CacheFormat::I8 ? 8 : job.format == CacheFormat::I4 ? 4 : 0;
  if (bits != op.bits_) refuse("past_key has elements of type ", int(past_key.element), ", expected ", wanted);
  const int64_t width = job.format == CacheFormat::I4 ? job.dim / 2 : job.dim;
  const Shape& shape = past_key.shape;
  const int64_t past_rows = shape.rank == 4 ? shape[2] : 0;
  expect(past_key, {job.batch, job.kv_heads, past_rows, width}, "past_key");
  expect(past_value, past_key.shape, "past_value");
  rows = past_rows;
}

// (kv_heads, dim) scales and what codes are multiplied with instead of divided by them: 1 for a scale of zero, as the
// original has it.
void GroupQueryAttention::Run::read_scales() {
  k_scale = context.input(12), v_scale = context.input(13);
  if (!op.quantized_) {
    if (k_scale || v_scale) refuse("k_scale or v_scale is given, but k_quant_type is NONE");
    return;
  }
  if (!k_scale || !v_scale) refuse("k_scale or v_scale is absent, but the cache is quantized");
  const int64_t count = int64_t(job.kv_heads) * job.dim;
  if (op.kv_group_) {
    if (job.dim % op.kv_group_) refuse("kv_group is ", op.kv_group_, ", expected a divisor of the head size ", job.dim);
    job.scale_group = op.kv_group_;
    const Shape expected = {job.batch, job.kv_heads, rows, job.dim / op.kv_group_};
    expect(k_scale, expected, "k_scale");
    expect(v_scale, expected, "v_scale");
    k_scale.floats("k_scale"), v_scale.floats("v_scale");
    return;
  }
  inverses.resize(size_t(2 * count));
  expanded.resize(op.per_channel_ ? 0 : size_t(2 * count));
  const float* scales[2];
  for (int i = 0; i < 2; ++i) {
    const Tensor& given = i ? v_scale : k_scale;
    const char* name = i ? "v_scale" : "k_scale";
    scales[i] = given.floats(name);
    if (op.per_channel_) {
      expect(given, {1, job.kv_heads, 1, job.dim}, name);
    } else {
      if (given.shape.count() != 1) refuse(name, " has the shape ", given.shape.text(), ", expected one number");
      std::fill_n(expanded.data() + i * count, count, scales[i][0]);
      scales[i] = expanded.data() + i * count;
    }
    float* inverse = inverses.data() + i * count;
    for (int64_t c = 0; c < count; ++c) inverse[c] = scales[i][c] != 0.0f ? 1.0f / scales[i][c] : 1.0f;
  }
  job.k_scale = scales[0], job.v_scale = scales[1];
  job.k_inverse = inverses.data(), job.v_inverse = inverses.data() + count;
}

// Stored rows after so many tokens, where the oldest are dropped: it follows from their number alone.
int64_t GroupQueryAttention::Run::resident(int64_t tokens) const {
  if (tokens <= rows) return tokens;
  const int64_t dropped = rows - op.window_ + 1;
  return tokens - dropped * ((tokens - rows + dropped - 1) / dropped);
}

void GroupQueryAttention::Run::read_lengths() {
  const Tensor lengths = context.input(5), total = context.input(6);
  expect(lengths, {job.batch}, "seqlens_k");
  if (total.shape.count() != 1)
    refuse("total_sequence_length has the shape ", total.shape.text(), ", expected one number");
  const int32_t* last = lengths.as<const int32_t>(ORT_INT32, "seqlens_k");
  const int64_t longest = *total.as<const int32_t>(ORT_INT32, "total_sequence_length");
  if (longest < 1 || longest > MOST_POSITIONS)
    refuse("total_sequence_length is ", longest, ", expected a number from 1");
  if (job.cos && longest > context.input(7).shape[0])
    refuse("cos_cache has ", context.input(7).shape[0], " positions, total_sequence_length is ", longest);
  if (op.rolling_) {
    if (rows < op.window_) refuse("past_key holds ", rows, " rows, expected at least the window of ", op.window_);
  } else if (longest > rows) {
    if (longest != rows + job.tokens)
      refuse("total_sequence_length is ", longest, ", expected at most the ", rows,
             " rows of past_key, or all of them and ", job.tokens, " new ones");
    rows = longest;
  }
  const bool first_prompt = job.tokens == longest;
  sequences.resize(size_t(job.batch));
  evictions.resize(size_t(job.batch));
  for (int64_t row = 0; row < job.batch; ++row) {
    const int64_t seen = int64_t{last[row]} + 1;
    // Rows of a first prompt may be shorter than the longest: what is behind their ends is computed and means nothing.
    const int64_t past = first_prompt ? 0 : seen - job.tokens;
    if (seen < 1 || seen > longest || past < 0)
      refuse("seqlens_k[", row, "] is ", last[row], ", expected a number from ", first_prompt ? 0 : job.tokens - 1,
             " to ", longest - 1);
    Sequence& sequence = sequences[size_t(row)];
    const int64_t held = op.rolling_ ? resident(past) : past;
    const int64_t kept = op.rolling_ ? resident(past + job.tokens) : past + job.tokens;
    const bool evicts = held + job.tokens != kept, staged = evicts && job.tokens > 1;
    evictions[size_t(row)] = {held, kept, staged};
    sequence.past = past;
    sequence.rows = staged ? held + job.tokens : kept;
    sequence.first = past + job.tokens - sequence.rows;
    sequence.append_at = sequence.rows - job.tokens;
  }
}

void GroupQueryAttention::Run::take_outputs() {
  const int64_t width = past_key.shape[3];
  present_shape = {job.batch, job.kv_heads, rows, width};
  job.output = context.output<float>(0, {job.batch, job.tokens, int64_t(job.heads) * job.dim});
  present_key = context.output<uint8_t>(1, present_shape);
  present_value = context.output<uint8_t>(2, present_shape);
  if (!job.output || !present_key || !present_value) refuse("output, present_key and present_value must be used");
  if (!job.scale_group) return;
  steps_shape = {job.batch, job.kv_heads, rows, job.dim / job.scale_group};
  present_k_steps = context.output<float>(3, steps_shape), present_v_steps = context.output<float>(4, steps_shape);
  if (!present_k_steps || !present_v_steps) refuse("present_k_scale and present_v_scale must be used with kv_group");
}

// What is kept of one buffer's rows for one (batch row, KV head): from past's buffer to where the new rows will follow.
// Rows that nothing has written become zeros in a buffer of present's own.
static void move_buffer(const uint8_t* past, uint8_t* to, bool own, int64_t row_bytes, int64_t from, int64_t count,
                        int64_t capacity) {
  const uint8_t* source = past + from * row_bytes;
  if (source != to && count) std::memmove(to, source, size_t(count * row_bytes));
  if (own) std::memset(to + count * row_bytes, 0, size_t((capacity - count) * row_bytes));
}

void GroupQueryAttention::Run::move_head(int64_t row, int kv_head) {
  const Sequence& sequence = sequences[size_t(row)];
  const Eviction& eviction = evictions[size_t(row)];
  const int64_t past_rows = past_key.shape[2], past_head = row * job.kv_heads + kv_head;
  const int64_t step_count = job.scale_group ? job.dim / job.scale_group : 0;
  const int64_t count = sequence.append_at, from = eviction.held - count;
  auto move = [&](const Tensor& past, const void* present, uint8_t* to, int64_t head_bytes, int64_t row_bytes) {
    const uint8_t* source = static_cast<const uint8_t*>(past.data) + past_head * past_rows * row_bytes;
    const bool own = past.data != present && !eviction.staged;
    move_buffer(source, to + kv_head * head_bytes, own, row_bytes, from, count, rows);
  };
  move(past_key, present_key, sequence.keys, sequence.head_bytes, job.row_bytes);
  move(past_value, present_value, sequence.values, sequence.head_bytes, job.row_bytes);
  if (!step_count) return;
  const int64_t step_bytes = step_count * int64_t{sizeof(float)};
  const int64_t head_bytes = sequence.head_steps * int64_t{sizeof(float)};
  move(k_scale, present_k_steps, reinterpret_cast<uint8_t*>(sequence.key_steps), head_bytes, step_bytes);
  move(v_scale, present_v_steps, reinterpret_cast<uint8_t*>(sequence.value_steps), head_bytes, step_bytes);
}

// Says where every batch row's keys and values lie in this run, and brings the old ones there.
void GroupQueryAttention::Run::move_rows() {
  const int64_t step_count = job.scale_group ? job.dim / job.scale_group : 0;
  const int64_t step_bytes = step_count * int64_t{sizeof(float)};
  int64_t staged_bytes = 0;
  bool moves = past_key.data != present_key || past_value.data != present_value ||
               (step_count && (k_scale.data != present_k_steps || v_scale.data != present_v_steps));
  for (int64_t row = 0; row < job.batch; ++row) {
    const Eviction& eviction = evictions[size_t(row)];
    const Sequence& sequence = sequences[size_t(row)];
    moves = moves || eviction.held != sequence.append_at || eviction.staged;
    if (eviction.staged) staged_bytes += 2 * whole_lines(job.kv_heads * sequence.rows * (job.row_bytes + step_bytes));
  }
  uint8_t* stage = staged_bytes ? scratch<StageScratch>(size_t(staged_bytes)) : nullptr;
  for (int64_t row = 0; row < job.batch; ++row) {
    Sequence& sequence = sequences[size_t(row)];
    const bool staged = evictions[size_t(row)].staged;
    const int64_t head_rows = staged ? sequence.rows : rows, before = row * job.kv_heads * rows;
    sequence.head_bytes = head_rows * job.row_bytes;
    sequence.head_steps = head_rows * step_count;
    if (!staged) {
      sequence.keys = present_key + before * job.row_bytes, sequence.values = present_value + before * job.row_bytes;
      if (step_count) {
        sequence.key_steps = present_k_steps + before * step_count;
        sequence.value_steps = present_v_steps + before * step_count;
      }
      continue;
    }
    const int64_t code_bytes = job.kv_heads * sequence.head_bytes;
    const int64_t bytes = whole_lines(job.kv_heads * head_rows * (job.row_bytes + step_bytes));
    sequence.keys = stage, sequence.values = stage + bytes;
    sequence.key_steps = reinterpret_cast<float*>(sequence.keys + code_bytes);
    sequence.value_steps = reinterpret_cast<float*>(sequence.values + code_bytes);
    stage += 2 * bytes;
  }
  job.sequences = sequences.data();
  if (!moves) return;
  const int64_t heads = job.batch * job.kv_heads;
  spread(context, heads, heads * rows * job.row_bytes / 4, [&](size_t head) {
    move_head(int64_t(head) / job.kv_heads, int(int64_t(head) % job.kv_heads));
  });
}

// Rotates and stores the new tokens, and lays out their queries.
void GroupQueryAttention::Run::lay_out() {
  job.integers = op.isa_ == Isa::AVX512_VNNI && job.k_scale && job.dim <= MOST_INTEGER_DIM;
  if (job.integers) {
    order.resize(size_t(job.dim));
    avx512_vnni::value_order(job.format, job.dim, order.data());
    job.value_order = order.data();
  }
  job.query_rows = job.tokens * job.group;
  job.blocks = (job.query_rows + MOST_LANES - 1) / MOST_LANES;
  const int64_t lanes = (job.blocks - 1) * MOST_LANES + job.lanes_of(job.blocks - 1);
  job.query_bytes = whole_lines(lanes * job.lane_bytes());
  const int64_t bytes = job.batch * job.kv_heads * job.query_bytes;
  job.queries = scratch<QueryScratch>(size_t(bytes));
  if (job.query_rows % MOST_LANES != job.lanes_of(job.blocks - 1) % MOST_LANES) {
    // Lanes without a query row.
    const int64_t last = (job.blocks - 1) * MOST_LANES * job.lane_bytes();
    for (int64_t head = 0; head < job.batch * job.kv_heads; ++head) {
      std::memset(job.queries + head * job.query_bytes + last, 0, size_t(job.query_bytes - last));
    }
  }
  const AttentionKernels& kernels = kernels_for(op.isa_);
  const int64_t count = job.batch * job.tokens, width = int64_t(job.heads + 2 * job.kv_heads) * job.dim;
  spread(context, count, count * width, [&](size_t token) {
    kernels.take_token(job, int64_t(token) / job.tokens, int64_t(token) % job.tokens);
  });
}

// The splits in which a block of query rows sees any key, first and behind the last.
std::pair<int64_t, int64_t> GroupQueryAttention::Run::splits_of(int64_t row, int64_t block) const {
  const Sequence& sequence = sequences[size_t(row)];
  const int64_t first_token = block * MOST_LANES / job.group;
  const int64_t last_token = (block * MOST_LANES + job.rows_of(block) - 1) / job.group;
  const int64_t position = sequence.past + first_token;
  const int64_t begin = job.window && position >= job.window ? position - job.window + 1 - sequence.first : 0;
  const int64_t end = sequence.past + last_token + 1 - sequence.first;
  return {begin / SPLIT_KEYS, (end + SPLIT_KEYS - 1) / SPLIT_KEYS};
}

void GroupQueryAttention::Run::attend() {
  const AttentionKernels& kernels = kernels_for(op.isa_);
  const int64_t bytes = kernels.scratch_bytes(job.dim);
  const int64_t partial_bytes = whole_lines(Partial::floats(MOST_LANES, job.dim) * int64_t{sizeof(float)});
  const int64_t units = job.batch * job.kv_heads * job.blocks;
  // The longest rows first, so that no thread is left with one of them at the end.
  struct Unit {
    int64_t row, block;
    int kv_head;
  };
  auto unit_of = [&](int64_t index) {
    const int64_t heads = job.batch * job.kv_heads, head = index % heads, block = job.blocks - 1 - index / heads;
    return Unit{head / job.kv_heads, block, int(head % job.kv_heads)};
  };
  auto partial_at = [](uint8_t* data, int lanes) { return Partial::at(reinterpret_cast<float*>(data), lanes); };

  if (units >= TASKS_WANTED) {
    context.parallel(size_t(units), [&](size_t index) {
      const Unit unit = unit_of(int64_t(index));
      const int lanes = job.lanes_of(unit.block);
      uint8_t* room = scratch<ThreadScratch>(size_t(bytes + 2 * partial_bytes));
      const Partial total = partial_at(room + bytes, lanes), part = partial_at(room + bytes + partial_bytes, lanes);
      const auto [first, end] = splits_of(unit.row, unit.block);
      for (int64_t split = first; split < end; ++split) {
        kernels.attend_split(job, unit.row, unit.kv_head, unit.block, split, room, split == first ? total : part);
        if (split != first) kernels.fold(lanes, job.dim, total, part);
      }
      kernels.finish(job, unit.row, unit.kv_head, unit.block, total);
    });
    return;
  }
  struct Task {
    int64_t unit, split;
  };
  std::vector<Task> tasks;
  for (int64_t index = 0; index < units; ++index) {
    const auto [first, end] = splits_of(unit_of(index).row, unit_of(index).block);
    for (int64_t split = first; split < end; ++split) tasks.push_back({index, split});
  }
  uint8_t* partials = scratch<PartialScratch>(tasks.size() * size_t(partial_bytes));
  context.parallel(tasks.size(), [&](size_t index) {
    const Unit unit = unit_of(tasks[index].unit);
    uint8_t* room = scratch<ThreadScratch>(size_t(bytes));
    kernels.attend_split(job, unit.row, unit.kv_head, unit.block, tasks[index].split, room,
                         partial_at(partials + int64_t(index) * partial_bytes, job.lanes_of(unit.block)));
  });
  size_t index = 0;
  for (int64_t at = 0; at < units; ++at) {
    const Unit unit = unit_of(at);
    const int lanes = job.lanes_of(unit.block);
    const Partial total = partial_at(partials + int64_t(index) * partial_bytes, lanes);
    for (++index; index < tasks.size() && tasks[index].unit == at; ++index) {
      kernels.fold(lanes, job.dim, total, partial_at(partials + int64_t(index) * partial_bytes, lanes));
    }
    kernels.finish(job, unit.row, unit.kv_head, unit.block, total);
  }
}

// Where several tokens pushed out old ones: the newest rows, from where they were gathered into the present buffers.
// Behind them are zeros in a buffer of present's own, as in `move_buffer`.
void GroupQueryAttention::Run::keep_newest() {
  for (int64_t row = 0; row < job.batch; ++row) {
    const Eviction& eviction = evictions[size_t(row)];
    if (!eviction.staged) continue;
    const Sequence& sequence = sequences[size_t(row)];
    const int64_t dropped = sequence.rows - eviction.kept, step_count = job.scale_group ? job.dim / job.scale_group : 0;
    for (int64_t head = 0; head < job.kv_heads; ++head) {
      auto keep = [&](const Tensor& past, const void* staged, int64_t head_bytes, int64_t row_bytes, void* present) {
        const uint8_t* from = static_cast<const uint8_t*>(staged) + head * head_bytes + dropped * row_bytes;
        uint8_t* to = static_cast<uint8_t*>(present) + (row * job.kv_heads + head) * rows * row_bytes;
        std::memcpy(to, from, size_t(eviction.kept * row_bytes));
        if (past.data == present) return;
        std::memset(to + eviction.kept * row_bytes, 0, size_t((rows - eviction.kept) * row_bytes));
      };
      keep(past_key, sequence.keys, sequence.head_bytes, job.row_bytes, present_key);
      keep(past_value, sequence.values, sequence.head_bytes, job.row_bytes, present_value);
      if (!step_count) continue;
      const int64_t unit = int64_t{sizeof(float)};
      keep(k_scale, sequence.key_steps, sequence.head_steps * unit, step_count * unit, present_k_steps);
      keep(v_scale, sequence.value_steps, sequence.head_steps * unit, step_count * unit, present_v_steps);
    }
  }
}

GroupQueryAttention::GroupQueryAttention(const Info& info)
    : isa_(chosen_isa(info.text("isa", "auto"))),
      heads_(int(info.integer("num_heads", 0, 1, MOST_HEADS))),
      kv_heads_(int(info.integer("kv_num_heads", 0, 1, MOST_HEADS))),
      bits_(0),
      kv_group_(int(info.integer("kv_group", 0, 0, MOST_DIM))),
      scale_(info.number("scale", 0.0f)),
      softcap_(info.number("softcap", 0.0f)),
      norm_epsilon_(info.number("qk_norm_epsilon", 1e-6f)),
      window_(info.integer("local_window_size", -1, -1, MOST_POSITIONS)),
      rotate_(info.integer("do_rotary", 0, 0, 1)),
      interleaved_(info.integer("rotary_interleaved", 0, 0, 1)),
      rolling_(info.integer("sliding_window_cache", 0, 0, 1)) {
  if (heads_ % kv_heads_)
    refuse("num_heads is ", heads_, ", expected a multiple of kv_num_heads, which is ", kv_heads_);
  if (window_ == 0) refuse("local_window_size is 0, expected -1 or a number from 1");
  window_ = std::max<int64_t>(window_, 0);
  if (rolling_ && !window_) refuse("sliding_window_cache is 1, but there is no local_window_size");
  if (!std::isfinite(scale_)) refuse("scale is ", scale_, ", expected a finite number");
  if (!std::isfinite(softcap_) || softcap_ < 0.0f) refuse("softcap is ", softcap_, ", expected a number from 0");
  if (!(norm_epsilon_ >= 0.0f && norm_epsilon_ <= 1.0f))
    refuse("qk_norm_epsilon is ", norm_epsilon_, ", expected a number from 0 to 1");
  if (info.integer("smooth_softmax", 0) > 0) refuse("smooth_softmax is not supported");
  if (info.integer("qk_output", 0) != 0) refuse("qk_output is not supported");
  if (info.integer("causal", 1) != 1) refuse("attention that is not causal is not supported");
  const std::string keys = info.text("k_quant_type", "NONE"), values = info.text("v_quant_type", "NONE");
  if (keys != values) refuse("k_quant_type is ", keys, " and v_quant_type is ", values, ", expected the same for both");
  if (keys != "NONE" && keys != "PER_CHANNEL" && keys != "PER_TENSOR")
    refuse("k_quant_type is ", keys, ", expected NONE, PER_TENSOR or PER_CHANNEL");
  quantized_ = keys != "NONE", per_channel_ = keys == "PER_CHANNEL";
  const int64_t bits = info.integer("kv_cache_bit_width", 0);
  if (quantized_ && bits != 8 && bits != 4) refuse("kv_cache_bit_width is ", bits, ", expected 8 or 4");
  if (quantized_) bits_ = int(bits);
  if (kv_group_ && !quantized_) refuse("kv_group is ", kv_group_, ", but k_quant_type is NONE");
}

void GroupQueryAttention::compute(Context& context) const {
  Run run(*this, context);
  run.read_tokens();
  run.read_rotation();
  run.read_cache();
  run.read_scales();
  run.read_lengths();
  run.take_outputs();
  run.move_rows();
  run.lay_out();
  run.attend();
  run.keep_newest();
}

}  // namespace ryzen

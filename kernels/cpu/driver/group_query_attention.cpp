#include "checks.h"
#include "runtime.h"

namespace driver {
namespace {

enum Input : size_t {
  QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, POSITION_IDS, BIAS, SINK, K_SCALE, V_SCALE,
  Q_NORM, K_NORM
};
enum Output : size_t { OUT, PRESENT_KEY, PRESENT_VALUE, PRESENT_K_SCALE, PRESENT_V_SCALE };
enum class Form { F32, F16, I8, I4 };

struct Case {
  int64_t heads, kv_heads, dim, tokens, rows;
  std::vector<int64_t> past;  // for each row of the batch
  Form form = Form::F32;
  bool packed = false, norms = false, sink = false, interleaved = false, per_channel = true, rolling = false;
  int64_t half = 0, window = 0, kv_group = 0;
  float softcap = 0.0f;

  int64_t batch() const { return int64_t(past.size()); }
  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return form == Form::I4 ? dim / 2 : dim; }
  bool quantized() const { return form == Form::I8 || form == Form::I4; }
  int64_t longest() const { return *std::max_element(past.begin(), past.end()) + tokens; }
  // How many rows are stored after `seen` tokens.
  int64_t resident(int64_t seen) const {
    if (!rolling || seen <= rows) return seen;
    const int64_t dropped = rows - window + 1;
    return seen - dropped * ((seen - rows + dropped - 1) / dropped);
  }
};

Value cache_of(const Case& c, Random& random) {
  const Dims dims = {c.batch(), c.kv_heads, c.rows, c.width()};
  if (c.form == Form::F32) return random.normals(dims);
  if (c.form == Form::I8) return random.integers<int8_t>(dims, 256);
  if (c.form == Form::I4) return random.integers<uint8_t>(dims, 256);
  return random.halves(dims);
}

Value scale_of(const Case& c, Random& random) {
  const float size = c.form == Form::I4 ? 0.3f : 0.02f;
  Dims dims = {1};
  if (c.per_channel) dims = {1, c.kv_heads, 1, c.dim};
  if (c.kv_group) dims = {c.batch(), c.kv_heads, c.rows, c.dim / c.kv_group};
  std::vector<float> scales(size_t(count(dims)));
  for (float& scale : scales) scale = size * (1.0f + float(random.below(100)) / 100.0f);
  return tensor<float>(dims, scales);
}

Node node_of(const Case& c, Random& random) {
  Node node;
  node.op = "GroupQueryAttention";
  node.attributes = {{"num_heads", c.heads},
                     {"kv_num_heads", c.kv_heads},
                     {"local_window_size", c.window ? c.window : -1},
                     {"softcap", c.softcap},
                     {"do_rotary", int64_t{c.half > 0}},
                     {"rotary_interleaved", int64_t{c.interleaved}},
                     {"sliding_window_cache", int64_t{c.rolling}},
                     {"kv_group", c.kv_group}};
  if (c.quantized()) {
    const std::string kind = c.per_channel ? "PER_CHANNEL" : "PER_TENSOR";
    node.attributes["k_quant_type"] = kind;
    node.attributes["v_quant_type"] = kind;
    node.attributes["kv_cache_bit_width"] = int64_t{c.form == Form::I8 ? 8 : 4};
  }
  node.inputs.resize(K_NORM + 1);
  node.inputs[QUERY] = random.normals({c.batch(), c.tokens, (c.heads + (c.packed ? 2 * c.kv_heads : 0)) * c.dim});
  if (!c.packed) node.inputs[KEY] = random.normals({c.batch(), c.tokens, c.kv_heads * c.dim});
  if (!c.packed) node.inputs[VALUE] = random.normals({c.batch(), c.tokens, c.kv_heads * c.dim});
  node.inputs[PAST_KEY] = cache_of(c, random);
  node.inputs[PAST_VALUE] = cache_of(c, random);
  std::vector<int32_t> lengths;
  for (int64_t past : c.past) lengths.push_back(int32_t(past + c.tokens - 1));
  node.inputs[SEQLENS_K] = tensor<int32_t>({c.batch()}, lengths);
  node.inputs[TOTAL] = tensor<int32_t>({1}, {int32_t(c.longest())});
  if (c.half) node.inputs[COS] = random.normals({c.longest(), c.half});
  if (c.half) node.inputs[SIN] = random.normals({c.longest(), c.half});
  if (c.sink) node.inputs[SINK] = random.normals({c.heads});
  if (c.quantized()) node.inputs[K_SCALE] = scale_of(c, random);
  if (c.quantized()) node.inputs[V_SCALE] = scale_of(c, random);
  if (c.norms) node.inputs[Q_NORM] = random.normals({c.dim});
  if (c.norms) node.inputs[K_NORM] = random.normals({c.dim});
  node.outputs = {true, true, true};
  if (c.kv_group) node.outputs = {true, true, true, true, true};
  return node;
}

using Row = std::vector<double>;

// One head of a new token's query, normalised and rotated.
Row query_at(const Case& c, const Node& node, int64_t b, int64_t t, int64_t head) {
  const Value& query = node.inputs[QUERY];
  const float* from = data<float>(query) + (b * c.tokens + t) * query->dims[2] + head * c.dim;
  Row q(from, from + c.dim);
  if (c.norms) {
    double squares = 0.0;
    for (double x : q) squares += x * x;
    for (int64_t i = 0; i < c.dim; ++i)
      q[size_t(i)] *= double(data<float>(node.inputs[Q_NORM])[i]) / std::sqrt(squares / double(c.dim) + 1e-6);
  }
  for (int64_t i = 0; i < c.half; ++i) {
    const double cos = data<float>(node.inputs[COS])[(c.past[size_t(b)] + t) * c.half + i];
    const double sin = data<float>(node.inputs[SIN])[(c.past[size_t(b)] + t) * c.half + i];
    double &x = q[size_t(c.interleaved ? 2 * i : i)], &y = q[size_t(c.interleaved ? 2 * i + 1 : c.half + i)];
    const double turned = x * cos - y * sin;
    y = x * sin + y * cos;
    x = turned;
  }
  return q;
}

// A stored row: what it stands for. `scale` has the token's own scales, or those of all.
Row stored_at(const Case& c, const Value& cache, const Value& scale, int64_t b, int64_t head, int64_t row) {
  Row out;
  const int64_t line = (b * c.kv_heads + head) * c.rows + row;
  for (int64_t i = 0; i < c.dim; ++i) {
    if (c.form == Form::F32) out.push_back(data<float>(cache)[line * c.dim + i]);
    if (c.form == Form::F16) out.push_back(half_value(data<uint16_t>(cache)[line * c.dim + i]));
    if (!c.quantized()) continue;
    const int code = c.form == Form::I8 ? data<int8_t>(cache)[line * c.dim + i]
                                        : (data<uint8_t>(cache)[(line * c.dim + i) / 2] >> (i % 2 * 4) & 15) - 8;
    int64_t at = c.per_channel ? head * c.dim + i : 0;
    if (c.kv_group) at = (line * c.dim + i) / c.kv_group;
    out.push_back(code * double(data<float>(scale)[at]));
  }
  return out;
}

double dot(const Row& a, const Row& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Attention over the rows as they were stored; false where a query saw rows that are stored no longer.
bool attention(const Case& c, const Node& node, const std::vector<Value>& out, std::vector<double>& wanted) {
  const Value k_scale = c.kv_group ? out[PRESENT_K_SCALE] : node.inputs[K_SCALE];
  const Value v_scale = c.kv_group ? out[PRESENT_V_SCALE] : node.inputs[V_SCALE];
  for (int64_t b = 0; b < c.batch(); ++b) {
    const int64_t seen = c.past[size_t(b)] + c.tokens, first = seen - c.resident(seen);
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t position = c.past[size_t(b)] + t;
      const int64_t begin = c.window ? std::max<int64_t>(0, position - c.window + 1) : 0;
      if (begin < first) return false;
      for (int64_t head = 0; head < c.heads; ++head) {
        const Row q = query_at(c, node, b, t, head);
        double total = 0.0;
        Row sum(size_t(c.dim), 0.0);
        for (int64_t at = begin; at <= position; ++at) {
          double score = dot(q, stored_at(c, out[PRESENT_KEY], k_scale, b, head / c.group(), at - first));
          score /= std::sqrt(double(c.dim));
          if (c.softcap > 0.0f) score = double(c.softcap) * std::tanh(score / double(c.softcap));
          const double weight = std::exp(score);
          const Row value = stored_at(c, out[PRESENT_VALUE], v_scale, b, head / c.group(), at - first);
          for (size_t i = 0; i < sum.size(); ++i) sum[i] += weight * value[i];
          total += weight;
        }
        if (c.sink) total += std::exp(double(data<float>(node.inputs[SINK])[head]));
        for (double x : sum) wanted.push_back(x / total);
      }
    }
  }
  return true;
}

// In a buffer of present's own, rows behind the last are zeros and not what the memory held before.
void expect_zeros_behind(const Case& c, const Value& present, const std::string& name) {
  const int64_t rows = present->dims[2];
  const size_t bytes = present->block->size() / size_t(c.batch() * c.kv_heads * rows);
  for (int64_t head = 0; head < c.batch() * c.kv_heads; ++head) {
    const int64_t kept = c.resident(c.past[size_t(head / c.kv_heads)] + c.tokens);
    const uint8_t *begin = present->block->data() + size_t(head * rows + kept) * bytes,
                  *end = present->block->data() + size_t((head + 1) * rows) * bytes;
    if (std::any_of(begin, end, [](uint8_t byte) { return byte != 0; }))
      fail(name + ": rows behind the last are not zeros");
  }
}

void check_case(const Case& c, Random& random) {
  const Node node = node_of(c, random);
  const std::string what = "heads=" + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) +
                           " dim=" + std::to_string(c.dim) + " tokens=" + std::to_string(c.tokens) +
                           " rows=" + std::to_string(c.rows) + " form=" + std::to_string(int(c.form)) +
                           " kv_group=" + std::to_string(c.kv_group) + " window=" + std::to_string(c.window);
  run_everywhere(node, what, Across::MAY_DIFFER, [&](const std::vector<Value>& out, const std::string& name) {
    for (size_t i = PRESENT_KEY; i < out.size(); ++i) expect_zeros_behind(c, out[i], name);
    std::vector<double> wanted;
    if (!attention(c, node, out, wanted)) return;
    double error = 0.0, size = 0.0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      error += std::pow(double(data<float>(out[OUT])[i]) - wanted[i], 2);
      size += wanted[i] * wanted[i];
    }
    // Integer paths round queries and weights to 15 and 16 bits; others are in float.
    const double allowed = c.quantized() && !c.kv_group ? 1e-7 : 1e-10;
    if (!(error <= allowed * size)) fail(name + ": its error is " + std::to_string(error / size) + " of the signal");
    for (int64_t b = 0; b < c.batch() && !c.rolling; ++b) {  // old rows are where they were
      for (int64_t head = 0; head < c.kv_heads; ++head) {
        const size_t bytes = out[PRESENT_KEY]->block->size() / size_t(c.batch() * c.kv_heads * c.rows);
        const size_t at = size_t((b * c.kv_heads + head) * c.rows) * bytes;
        const size_t length = size_t(c.past[size_t(b)]) * bytes;
        for (size_t i : {0, 1}) {
          const uint8_t* before = node.inputs[PAST_KEY + i]->block->data() + at;
          if (std::memcmp(out[PRESENT_KEY + i]->block->data() + at, before, length))
            fail(name + ": rows that were stored before have changed");
        }
      }
    }
  });
}

void check_hostile(Random& random) {
  const Case c = {4, 2, 16, 2, 12, {3, 5}, Form::I8, false, true, true, false, true, false, 8, 6};
  const Node good = node_of(c, random);
  const int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (const char* name : {"num_heads", "kv_num_heads", "kv_group", "do_rotary", "rotary_interleaved",
                           "sliding_window_cache", "local_window_size"}) {
    for (int64_t value : {least, int64_t{-2}, most}) expect_refused(good.with(name, value), name);
  }
  expect_refused(good.with("num_heads", int64_t{5}), "num_heads");
  expect_refused(good.with("num_heads", int64_t{8}), "key has");
  expect_refused(good.with("num_heads", int64_t{2}), "key has");
  expect_refused(good.with("kv_num_heads", int64_t{4}), "key");
  expect_refused(good.without("num_heads"), "num_heads");
  expect_refused(good.with("local_window_size", int64_t{0}), "local_window_size");
  expect_refused(good.with("kv_cache_bit_width", int64_t{5}), "kv_cache_bit_width");
  expect_refused(good.with("kv_cache_bit_width", int64_t{4}), "past_key");
  expect_refused(good.with("kv_group", int64_t{3}), "kv_group");
  expect_refused(good.with("kv_group", int64_t{8}), "k_scale");
  expect_refused(good.with("k_quant_type", std::string("NONE")), "quant_type");
  expect_refused(good.with("softcap", -1.0f), "softcap");
  expect_refused(good.with("scale", std::numeric_limits<float>::infinity()), "scale");
  expect_refused(good.with("isa", std::string("best")), "isa");
  auto ints = [](const std::vector<int32_t>& values) { return tensor<int32_t>({int64_t(values.size())}, values); };
  for (int32_t length : {-1, 0, 12, 1 << 30, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()})
    expect_refused(good.with_input(SEQLENS_K, ints({4, length})), "seqlens_k");
  expect_refused(good.with_input(SEQLENS_K, ints({4})), "seqlens_k");
  expect_refused(good.with_input(SEQLENS_K, random.normals({2})), "seqlens_k");
  expect_refused(good.with_input(SEQLENS_K, nullptr), "seqlens_k");
  for (int32_t total : {-1, 0, 13, 15, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()})
    expect_refused(good.with_input(TOTAL, ints({total})), "");
  expect_refused(good.with_input(TOTAL, ints({})), "total_sequence_length");
  expect_refused(good.with_input(TOTAL, random.normals({1})), "total_sequence_length");
  expect_refused(good.with_input(QUERY, random.normals({2, 2, 63})), "query");
  expect_refused(good.with_input(QUERY, random.normals({2, 2, 0})), "query");
  expect_refused(good.with_input(QUERY, random.normals({2, 128})), "query");
  expect_refused(good.with_input(QUERY, with_dims(good.inputs[QUERY], {-2, -2, 64})), "query");
  expect_refused(good.with_input(QUERY, with_dims(good.inputs[QUERY], {int64_t{1} << 40, 2, 64})), "query");
  expect_refused(good.with_input(QUERY, nullptr), "query");
  expect_refused(good.with_input(KEY, nullptr), "key");
  expect_refused(good.with_input(VALUE, random.normals({2, 1, 32})), "value");
  for (size_t index : {PAST_KEY, PAST_VALUE}) {
    expect_refused(good.with_input(index, nullptr), "past");
    expect_refused(good.with_input(index, random.normals({2, 2, 12, 16})), "past");
    expect_refused(good.with_input(index, random.integers<int8_t>({2, 2, 11, 16}, 256)), "");
    expect_refused(good.with_input(index, random.integers<int8_t>({2, 2, 12, 15}, 256)), "past");
    expect_refused(good.with_input(index, random.integers<int8_t>({1, 2, 12, 16}, 256)), "past");
  }
  for (size_t index : {COS, SIN}) {
    expect_refused(good.with_input(index, nullptr), "cos_cache");
    expect_refused(good.with_input(index, random.normals({6, 8})), "_cache");
    expect_refused(good.with_input(index, random.normals({7, 9})), "_cache");
    expect_refused(good.with_input(index, random.normals({56})), "_cache");
  }
  expect_refused(good.with_input(SINK, random.normals({2})), "head_sink");
  for (size_t index : {K_SCALE, V_SCALE}) {
    expect_refused(good.with_input(index, nullptr), "scale");
    expect_refused(good.with_input(index, random.normals({1, 2, 1, 15})), "scale");
    expect_refused(good.with_input(index, random.integers<int32_t>({1, 2, 1, 16}, 9)), "scale");
  }
  for (size_t index : {Q_NORM, K_NORM}) {
    expect_refused(good.with_input(index, nullptr), "norm_weight");
    expect_refused(good.with_input(index, random.normals({15})), "norm_weight");
  }
  expect_refused(good.with_input(POSITION_IDS, random.integers<int64_t>({2, 2}, 3)), "position_ids");
  expect_refused(good.with_input(BIAS, random.normals({1, 1, 2, 7})), "attention_bias");
}

}  // namespace

void check_group_query_attention() {
  Random random(5);
  for (Form form : {Form::F32, Form::F16, Form::I8, Form::I4}) {
    for (int64_t dim : {8, 24, 64, 80}) {
      const bool packed = random.below(2), norms = random.below(2), sink = random.below(2), turn = random.below(2);
      check_case({2, 1, dim, 1, 7, {6}, form, packed, norms, sink, turn, true, false, dim / 2}, random);
      check_case({6, 2, dim, 3, 40, {0, 36, 17}, form, !packed, !norms, !sink, !turn, false, false, 4, 9}, random);
      check_case({3, 3, dim, 19, 19, {0}, form, packed, false, false, false, true, false, 0, 0, 0, 5.0f}, random);
      check_case({4, 2, dim, 1, 9, {3, 23}, form, false, false, false, false, true, true, 4, 6}, random);
      check_case({4, 2, dim, 5, 9, {3, 23}, form, false, false, false, false, true, true, 4, 6}, random);
      if (form != Form::I8 && form != Form::I4) continue;
      check_case({4, 1, dim, 2, 21, {4, 19}, form, packed, norms, sink, turn, true, false, 4, 0, 8}, random);
      check_case({4, 1, dim, 3, 9, {2, 23}, form, packed, norms, sink, turn, true, true, 4, 6, 8}, random);
    }
    check_case({8, 1, 16, 7, 700, {650, 3}, form}, random);  // several splits, tokens and blocks
    check_case({2, 2, 264, 1, 131, {129}, form}, random);
  }
  check_hostile(random);
}

}  // namespace driver

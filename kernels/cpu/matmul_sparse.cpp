#include "matmul_sparse.h"

#include <emmintrin.h>

#include <cmath>
#include <cstring>
#include <thread>

#include "round_activations.h"

#define RYZEN_VECTOR_CODE "matmul_sparse.inl"
#include "each_isa.h"

namespace ryzen {
namespace {

constexpr int64_t FEW_ROWS = 4;     // that are multiplied with active channels alone, measured
constexpr int64_t MOST_TILES = 44;  // of a strip, whose sums of a row then fit the first cache
constexpr int64_t TILES_PER_TASK = 4;  // to finish
constexpr int64_t TASKS_PER_CORE = 4;  // so that a thread that lost its core to somebody else holds nobody up

void choose_strips(StripedWeights& w, int64_t panels) {
  const int64_t tiles = (panels + w.tile_panels() - 1) / w.tile_panels();
  w.strips = (tiles + MOST_TILES - 1) / MOST_TILES;
  w.tiles = (tiles + w.strips - 1) / w.strips;
}

// --- packing: out of panels into strips, and back

// A panel's blocks to their places in its strip, of which `panel` is the number there.
void scatter_panel(const StripedWeights& w, const PackedWeights& form, const uint8_t* from, int64_t panel,
                   uint8_t* strip) {
  const int split = w.split(), mask = (1 << w.bits) - 1;
  const int64_t tile = panel / w.tile_panels(), first = panel % w.tile_panels() * PANEL;
  for (int64_t b = 0; b < w.blocks; ++b, from += form.block_bytes()) {
    auto* scales = reinterpret_cast<float*>(strip) + w.scales_at(tile, b);
    for (int kind = 0; kind < w.kinds(); ++kind) {
      for (int place = 0; place < PANEL; ++place)
        std::memcpy(scales + kind * w.tile_outputs() + w.place(first + place),
                    from + (kind * PANEL + place) * sizeof(float), sizeof(float));
    }
    for (int64_t k = 0; k < w.block; ++k) {
      const int64_t quad = k / 4;
      uint8_t* channel = strip + w.codes_at() + (b * w.block + k) * w.channel_bytes();
      for (int h = 0; h < HALVES; ++h) {
        const uint8_t* tile = from + form.tiles_at() + (quad / split * HALVES + h) * 64 + k % 4;
        const int64_t half = panel * HALVES + h;
        uint8_t* to = channel + half / split * 16;
        const int down = int(quad % split) * w.bits, up = int(half % split) * w.bits;
        for (int lane = 0; lane < LANE_ROWS; ++lane) to[lane] |= uint8_t((tile[lane * 4] >> down & mask) << up);
      }
    }
  }
}

StripedWeights stripe(const NBitsNode& node) {
  StripedWeights w;
  w.bits = node.bits;
  w.zeros = node.zeros != nullptr;
  w.block = node.block;
  w.blocks = node.blocks;
  choose_strips(w, node.panels());
  const PackedWeights form = node.form();
  const std::shared_ptr<uint8_t[]> data = allocate_weights(size_t(w.strips * w.strip_bytes()));
  in_two_threads(w.strips * w.strip_bytes(), w.strips, [&](int64_t begin, int64_t end) {
    const Bytes panel = allocate(size_t(form.panel_bytes()));
    for (int64_t strip = begin; strip < end; ++strip) {
      uint8_t* to = data.get() + strip * w.strip_bytes();
      std::memset(to, 0, size_t(w.strip_bytes()));
      for (int64_t i = 0; i < w.panels() && strip * w.panels() + i < form.panels; ++i) {
        node.pack_panel(strip * w.panels() + i, panel.get());
        scatter_panel(w, form, panel.get(), i, to);
      }
    }
  });
  w.data = data;
  return w;
}

// Sixteen bytes of each of four channels, `stride` apart, byte by byte.
void weave(const uint8_t* from, int64_t stride, __m128i (&out)[4]) {
  __m128i in[4];
  for (int c = 0; c < 4; ++c) in[c] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c * stride));
  const __m128i low01 = _mm_unpacklo_epi8(in[0], in[1]), high01 = _mm_unpackhi_epi8(in[0], in[1]);
  const __m128i low23 = _mm_unpacklo_epi8(in[2], in[3]), high23 = _mm_unpackhi_epi8(in[2], in[3]);
  out[0] = _mm_unpacklo_epi16(low01, low23);
  out[1] = _mm_unpackhi_epi16(low01, low23);
  out[2] = _mm_unpacklo_epi16(high01, high23);
  out[3] = _mm_unpackhi_epi16(high01, high23);
}

// The codes of one block of the panels in a tile of a strip; `to` is where the first panel's block begins.
template <int BITS>
void gather_codes(const StripedWeights& w, const PackedWeights& form, const uint8_t* codes, uint8_t* to) {
  constexpr int SPLIT = 8 / BITS;
  const __m128i mask = _mm_set1_epi8(char((1 << BITS) - 1));
  const int64_t stride = w.channel_bytes();
  for (int chunk = 0; chunk < 4; ++chunk) {
    for (int64_t tile = 0; tile < w.block / (4 * SPLIT); ++tile) {
      __m128i woven[SPLIT][4];
      for (int q = 0; q < SPLIT; ++q) weave(codes + chunk * 16 + (tile * SPLIT + q) * 4 * stride, stride, woven[q]);
      for (int s = 0; s < SPLIT; ++s) {
        const int half = chunk * SPLIT + s;
        uint8_t* place = to + half / HALVES * form.panel_bytes() + form.tiles_at() + (tile * HALVES + half % HALVES) * 64;
        for (int i = 0; i < 4; ++i) {
          __m128i quads = _mm_setzero_si128();
          for (int q = 0; q < SPLIT; ++q) {
            const __m128i part = _mm_and_si128(_mm_srli_epi16(woven[q][i], s * BITS), mask);
            quads = _mm_or_si128(quads, _mm_slli_epi16(part, q * BITS));
          }
          _mm_storeu_si128(reinterpret_cast<__m128i*>(place + i * 16), quads);
        }
      }
    }
  }
}

// The panels in a tile of a strip as the dense product reads them.
void gather_panels(const StripedWeights& w, const PackedWeights& form, int64_t strip, int64_t tile, uint8_t* to) {
  const uint8_t* from = w.strip(strip);
  for (int64_t b = 0; b < w.blocks; ++b, to += form.block_bytes()) {
    const float* scales = reinterpret_cast<const float*>(from) + w.scales_at(tile, b);
    for (int64_t panel = 0; panel < w.tile_panels(); ++panel) {
      auto* numbers = reinterpret_cast<float*>(to + panel * form.panel_bytes());
      for (int kind = 0; kind < w.kinds(); ++kind) {
        for (int place = 0; place < PANEL; place += 4)
          std::memcpy(numbers + kind * PANEL + place,
                      scales + kind * w.tile_outputs() + w.place(panel * PANEL + place), 4 * sizeof(float));
      }
    }
    const uint8_t* codes = from + w.codes_at() + b * w.block * w.channel_bytes() + tile * 64;
    switch (w.bits) {
      case 2: gather_codes<2>(w, form, codes, to); break;
      case 4: gather_codes<4>(w, form, codes, to); break;
      default: gather_codes<8>(w, form, codes, to);
    }
  }
}

// --- the active channels

// `codes` (rows, width), each row's in order.
ActiveChannels find_active(const RoundedRows& x, const int8_t* codes, int64_t rows) {
  const int64_t width = x.width(), most = width / STREAMS;  // blocks are whole groups
  struct Active;
  const int64_t channel_bytes = whole_lines(most * STREAMS * int64_t(sizeof(int32_t)));
  const int64_t ends_bytes = whole_lines(x.blocks * int64_t(sizeof(int32_t)));
  uint8_t* room = scratch<Active>(size_t(channel_bytes + ends_bytes + most * STREAMS * rows));
  auto* channels = reinterpret_cast<int32_t*>(room);
  auto* ends = reinterpret_cast<int32_t*>(room + channel_bytes);
  auto* active = reinterpret_cast<int8_t*>(room + channel_bytes + ends_bytes);
  auto place = [&](int64_t number, int64_t row) -> int8_t& {
    return active[(number / STREAMS * rows + row) * STREAMS + number % STREAMS];
  };
  int64_t found = 0;
  for (int64_t b = 0; b < x.blocks; ++b) {
    const int64_t before = found;
    for (int64_t k = b * x.block; k < (b + 1) * x.block; ++k) {
      int any = 0;
      channels[found] = int32_t(k);
      for (int64_t row = 0; row < rows; ++row) {
        place(found, row) = codes[row * width + k];
        any |= codes[row * width + k];
      }
      found += any != 0;
    }
    for (; found > before && found % STREAMS; ++found) {
      channels[found] = channels[found - 1];
      for (int64_t row = 0; row < rows; ++row) place(found, row) = 0;
    }
    ends[b] = int32_t(found / STREAMS);
  }
  return {rows, ends, channels, active, x.steps, x.sums};
}

SparsePath sparse_path(Isa isa, int bits) {
  switch (isa) {
    case Isa::AVX512_VNNI: return avx512_vnni::sparse_path(bits);
    case Isa::AVX2_VNNI: return avx2_vnni::sparse_path(bits);
    case Isa::AVX2: return avx2::sparse_path(bits);
    case Isa::SCALAR: break;
  }
  return {};
}

float read_threshold(const Info& info) {
  const float threshold = info.number("threshold", 0.0f);
  if (!(threshold >= 0.0f) || std::isinf(threshold)) refuse("threshold is ", threshold, ", expected 0 or more");
  return threshold;
}

enum Input : size_t { A, B, SCALES, ZERO_POINTS, G_IDX, BIAS, RESIDUAL };

}  // namespace

SparseMatMulNBits::SparseMatMulNBits(const Info& info) : SparseMatMulNBits(info, NBitsNode(info)) {}

SparseMatMulNBits::SparseMatMulNBits(const Info& info, const NBitsNode& node)
    : depth_(node.depth),
      columns_(node.columns()),
      activation_(node.activation),
      gated_(node.gated),
      path_(product_path(node.isa)),
      sparse_(sparse_path(node.isa, node.bits)),
      threshold_(read_threshold(info)),
      dense_(node.form()),
      weights_(stripe(node)),
      bias_(node.packed_bias(weights_.strips * weights_.panels())) {}

void SparseMatMulNBits::round_row(const float* x, int64_t group, int8_t* codes, float* steps, int32_t* sums) const {
  struct Kept;
  auto* kept = reinterpret_cast<float*>(scratch<Kept>(size_t(depth_) * sizeof(float)));
  for (int64_t k = 0; k < depth_; ++k) kept[k] = std::fabs(x[k]) < threshold_ ? 0.0f : x[k];
  path_.round_row(kept, depth_, dense_.blocks, dense_.block, group, codes, steps, sums);
}

void SparseMatMulNBits::few_rows(Context& context, const float* x, int64_t rows, const Epilogue& epilogue) const {
  const int64_t blocks = weights_.blocks, width = blocks * weights_.block;
  struct Rounded;
  uint8_t* room = scratch<Rounded>(size_t(whole_lines(rows * width)) + 2 * size_t(rows * blocks) * sizeof(float));
  auto* codes = reinterpret_cast<int8_t*>(room);
  auto* steps = reinterpret_cast<float*>(room + whole_lines(rows * width));
  auto* sums = reinterpret_cast<int32_t*>(steps + rows * blocks);
  for (int64_t row = 0; row < rows; ++row)
    round_row(x + row * depth_, 1, codes + row * width, steps + row * blocks, sums + row * blocks);
  const ActiveChannels active = find_active({weights_.block, blocks, codes, steps, sums}, codes, rows);
  struct Sums;
  const int64_t block_sums = rows * weights_.outputs(), strip_sums = blocks * block_sums;
  auto* totals = reinterpret_cast<int32_t*>(scratch<Sums>(size_t(weights_.strips * strip_sums) * sizeof(int32_t)));
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t some = std::max<int64_t>(1, weights_.strips * blocks / (cores * TASKS_PER_CORE));
  const int64_t chunks = (blocks + some - 1) / some;
  context.parallel(size_t(weights_.strips * chunks), [&](size_t task) {
    const int64_t strip = int64_t(task) / chunks, begin = int64_t(task) % chunks * some;
    sparse_.add_blocks(weights_, active, strip, begin, std::min(begin + some, blocks),
                       totals + strip * strip_sums + begin * block_sums);
  });
  const int64_t parts = (weights_.tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
  context.parallel(size_t(weights_.strips * parts), [&](size_t task) {
    const int64_t strip = int64_t(task) / parts, begin = int64_t(task) % parts * TILES_PER_TASK;
    sparse_.finish_tiles(weights_, active, strip, begin, std::min(begin + TILES_PER_TASK, weights_.tiles),
                         totals + strip * strip_sums, epilogue);
  });
}

void SparseMatMulNBits::many_rows(Context& context, const float* x, int64_t rows, const Epilogue& epilogue) const {
  const RoundedRows activations = round_in_groups(
      context, rows, dense_.block, dense_.blocks,
      [&](int64_t row, int64_t group, int8_t* codes, float* steps, int32_t* sums) {
        round_row(x + row * depth_, group, codes, steps, sums);
      });
  context.parallel(size_t(weights_.strips * weights_.tiles), [&](size_t task) {
    const int64_t strip = int64_t(task) / weights_.tiles, tile = int64_t(task) % weights_.tiles;
    PackedWeights panels = dense_;
    panels.first = strip * weights_.panels() + tile * weights_.tile_panels();
    const int64_t end = std::min(panels.first + weights_.tile_panels(), dense_.panels);
    if (panels.first >= end) return;
    struct Panels;
    uint8_t* room = scratch<Panels>(size_t(weights_.tile_panels() * dense_.panel_bytes()));
    gather_panels(weights_, dense_, strip, tile, room);
    panels.data = std::shared_ptr<const uint8_t[]>(std::shared_ptr<void>(), room);  // owned by this thread
    path_.multiply_panels(panels, activations, rows, panels.first, end, epilogue);
  });
}

void SparseMatMulNBits::compute(Context& context) const {
  const Tensor x = context.input(A), residual = context.input(RESIDUAL);
  if (x.shape.rank == 0 || x.shape.back() != depth_)
    refuse("A has the shape ", x.shape.text(), ", expected its last dimension to be ", depth_);
  const int64_t rows = x.shape.count() / depth_;
  Shape shape = x.shape;
  shape.dims[shape.rank - 1] = columns_;
  if (residual && residual.shape != shape)
    refuse("residual has the shape ", residual.shape.text(), ", expected ", shape.text());
  Epilogue epilogue;
  epilogue.activation = activation_;
  epilogue.gated = gated_;
  epilogue.bias = reinterpret_cast<const float*>(bias_.get());
  epilogue.residual = residual ? residual.floats("residual") : nullptr;
  epilogue.out = context.output<float>(0, shape);
  epilogue.columns = columns_;
  if (rows == 0) return;
  const bool few = rows <= FEW_ROWS && sparse_.add_blocks != nullptr;
  (few ? few_rows(context, x.floats("A"), rows, epilogue) : many_rows(context, x.floats("A"), rows, epilogue));
}

}  // namespace ryzen

// Rounding of activations to 8 bits in vectors; round_activations.h, which is to be included before, says what it does.

// Rounds x[0, count) to codes[0, count) and zeroes codes[count, block).
INLINE void round_block(const float* x, int count, int block, int8_t* codes, float* step) {
  const int whole = count / LANES * LANES;
  // Magnitudes are compared as integers, in which a NaN is above every number and therefore not lost.
  I32 largest_yet = i32(0);
  for (int i = 0; i < whole; i += LANES) largest_yet = max(largest_yet, magnitude_bits(load(x + i)));
  if (whole < count) largest_yet = max(largest_yet, magnitude_bits(load(x + whole, count - whole)));
  const int32_t bits = largest(largest_yet);
  float maximum;
  __builtin_memcpy(&maximum, &bits, sizeof maximum);
  const Rounding rounding = rounding_for(maximum);
  *step = rounding.step;

  int done = 0;
  if (rounding.inverse != 0.0f) {
    const F32 inverse = f32(rounding.inverse);
    for (; done < whole; done += LANES) store_bytes(codes + done, to_i32(load(x + done) * inverse));
    if (whole < count) store_bytes(codes + whole, to_i32(load(x + whole, count - whole) * inverse), count - whole);
    done = count;
  }
  if (done < block) __builtin_memset(codes + done, 0, size_t(block - done));
}

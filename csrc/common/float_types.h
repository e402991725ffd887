// The element types that kernels read and write, as plain bits, and their scalar conversions. All
// arithmetic is done in float.

#pragma once

#include <stdint.h>
#include <string.h>

namespace pruneops {

enum class FloatType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

static inline int64_t element_size(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

static inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

static inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24 is exact in float.
  const float value_f = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return float_from_bits(sign | bits_of_float(value_f));
}

static inline void from_float(float value, float* out) { *out = value; }

// Round to nearest even; NaN stays a (quiet) NaN.
static inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void from_float(float value, Half* out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    result = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal half
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 puts the subnormal half's last place at the float's last place: the addition
    // rounds.
    result = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | result);
}

}  // namespace pruneops

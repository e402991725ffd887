// Checks against CuTe, which is known to drive the hardware right, what csrc takes for granted
// about it: where a swizzled tile has its elements, the bits that name operands, how the stand-in
// for the tensor cores reads these bits, and which thread holds which element. The tiles are those
// of the kernels, from their table. Host code; needs the headers of CUTLASS and of CUDA.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma_ext.hpp>
#include <cute/tensor.hpp>

#include "attention/cuda/flash_tiles.h"
#include "common/sm90_operands.h"
#include "common/sm90_panels.h"
#include "cuda_on_host/sm90_operand_bits.h"

// CuTe says on standard output that a host has no addresses of shared memory, and goes on with 0,
// which is what is wanted here. Results are told on the error output.
#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

namespace gmma = cute::SM90::GMMA;
using cute::Int;
using cute::Shape;
using Element = cutlass::bfloat16_t;
using gmma::Major;

// CuTe's product of 64 rows with kColumns columns; with b [kColumns, 16] rows as rows, a in shared
// memory, or b's rows as the inner dimension, a in registers.
template <int kColumns>
struct Product;
#define PRODUCT(columns)                                                             \
  template <>                                                                        \
  struct Product<columns> {                                                          \
    using Rows = gmma::MMA_64x##columns##x16_F32BF16BF16_SS<Major::K, Major::K>;     \
    using Columns = gmma::MMA_64x##columns##x16_F32BF16BF16_RS<Major::K, Major::MN>; \
  }
PRODUCT(64);
PRODUCT(80);
PRODUCT(96);
PRODUCT(112);
PRODUCT(128);
#undef PRODUCT

// CuTe's pattern of a panel of this width.
template <int kWidth, Major kMajor>
auto pattern() {
  if constexpr (kWidth == 64) {
    return gmma::Layout_SW128_Atom<Element, kMajor>{};
  } else if constexpr (kWidth == 32) {
    return gmma::Layout_SW64_Atom<Element, kMajor>{};
  } else {
    return gmma::Layout_SW32_Atom<Element, kMajor>{};
  }
}

// The whole tile, [rows, columns] or [columns, rows]: the same memory.
template <class Tile>
auto rows_layout() {
  return cute::tile_to_shape(pattern<Tile::kWidth, Major::K>(),
                             Shape<Int<Tile::kRows>, Int<Tile::kColumns>>{});
}
template <class Tile>
auto columns_layout() {
  return cute::tile_to_shape(pattern<Tile::kWidth, Major::MN>(),
                             Shape<Int<Tile::kColumns>, Int<Tile::kRows>>{},
                             cute::Step<cute::_2, cute::_1>{});
}

// The byte of an element, for a tile at byte 0: the swizzle of a layout in shared memory is of
// bytes.
template <class Layout>
size_t place(const Layout& layout, int i, int j) {
  return static_cast<size_t>(layout.layout_a()(layout.layout_b()(i, j) * int{sizeof(Element)}));
}

template <class Tile>
void tile_lies_as_cutes() {
  const auto rows = rows_layout<Tile>();
  const auto columns = columns_layout<Tile>();
  for (int row = 0; row < Tile::kRows; ++row) {
    for (int column = 0; column < Tile::kColumns; ++column) {
      const auto offset = static_cast<size_t>(Tile::offset(row, column));
      CHECK(offset == place(rows, row, column));
      CHECK(offset == place(columns, column, row));
    }
  }
  // Copies with the swizzle of so many bytes permute by the same pattern.
  constexpr auto kSwizzle = cute::detail::get_tma_swizzle_bits(
      cute::get_swizzle_t<decltype(pattern<Tile::kWidth, Major::K>())>{});
  CHECK(Tile::kRowBytes == (kSwizzle == cute::TMA::SmemSwizzleBits::B128  ? 128
                            : kSwizzle == cute::TMA::SmemSwizzleBits::B64 ? 64
                                                                          : 32));
}

// What the bits of CuTe and of csrc say, and that the stand-in reads the right elements by them.
//   place_of(row, k)  where the element of the operand [rows, 16] is
template <class Place>
void check_operand(uint64_t of_cute, uint64_t ours, int rows, bool transposed,
                   const Place& place_of) {
  CHECK(of_cute == ours);
  const cuda_on_host::OperandBits bits(ours);
  CHECK(bits.only_known && bits.swizzle != 0);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) CHECK(bits.address(row, k, transposed) == place_of(row, k));
  }
}

// The names CuTe gives to the parts of a tile in shared memory, [1, parts of rows, steps].
template <class Layout>
auto in_shared(const Layout& layout) {
  alignas(1024) static Element memory[1];
  return cute::make_tensor(cute::make_smem_ptr(memory), layout);
}

// Rows of a tile as rows: 64 of them as a, all as b.
template <class Tile>
void rows_operands_are_cutes() {
  const auto layout = rows_layout<Tile>();
  if constexpr (Tile::kRows % 64 == 0) {
    const auto product = cute::make_tiled_mma(typename Product<64>::Rows{});
    const auto names = product.get_slice(0).partition_fragment_A(in_shared(layout));
    for (int part = 0; part < Tile::kRows / 64; ++part) {
      for (int step = 0; step < Tile::kColumns / 16; ++step) {
        check_operand(
            names(0, part, step).desc_, pruneops::rows_operand_bits<Tile>(0, 64 * part, step), 64,
            false, [&](int row, int k) { return place(layout, 64 * part + row, 16 * step + k); });
      }
    }
  }
  const auto product = cute::make_tiled_mma(typename Product<Tile::kRows>::Rows{});
  const auto names = product.get_slice(0).partition_fragment_B(in_shared(layout));
  for (int step = 0; step < Tile::kColumns / 16; ++step) {
    check_operand(names(0, 0, step).desc_, pruneops::rows_operand_bits<Tile>(0, 0, step),
                  Tile::kRows, false,
                  [&](int row, int k) { return place(layout, row, 16 * step + k); });
  }
}

// Rows of a tile as the inner dimension of b.
template <class Tile>
void columns_operands_are_cutes() {
  const auto layout = columns_layout<Tile>();
  const auto product = cute::make_tiled_mma(typename Product<Tile::kColumns>::Columns{});
  const auto names = product.get_slice(0).partition_fragment_B(in_shared(layout));
  for (int step = 0; step < Tile::kRows / 16; ++step) {
    uint64_t of_cute = names(0, 0, step).desc_;
    if (Tile::kPanels == 1) {
      // The distance to the next panel means nothing where there is none.
      constexpr uint64_t kDistance = uint64_t{0x3fff} << 16;
      of_cute =
          (of_cute & ~kDistance) | (pruneops::columns_operand_bits<Tile>(0, step) & kDistance);
    }
    check_operand(of_cute, pruneops::columns_operand_bits<Tile>(0, step), Tile::kColumns, true,
                  [&](int column, int k) { return place(layout, column, 16 * step + k); });
  }
}

// CuTe's layouts give the place of an element as row + 64 column.
template <class Layout>
void check_fragment(const Layout& layout, int count) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < count; ++i) {
      CHECK(layout(thread, i) ==
            pruneops::fragment_row(thread, i) + 64 * pruneops::fragment_column(thread, i));
    }
  }
}

template <int kColumns>
void fragments_are_cutes() {
  using Traits = cute::MMA_Traits<typename Product<kColumns>::Columns>;
  check_fragment(typename Traits::CLayout{}, kColumns / 2);
  // a [64, 16] in registers is spread like 16 columns of d, in pairs.
  check_fragment(typename Traits::ALayout{}, 8);
}

// Whatever part it has in a product.
template <int kRows, int kHeadDim>
void check_tile() {
  using Tile = pruneops::PanelTile<kRows, kHeadDim>;
  tile_lies_as_cutes<Tile>();
  rows_operands_are_cutes<Tile>();
  columns_operands_are_cutes<Tile>();
  fragments_are_cutes<kRows>();
}

template <int kHeadDim>
void check_head_dim() {
  check_tile<64, kHeadDim>();  // of one warpgroup
  check_tile<pruneops::forward_tile_sm90(kHeadDim).keys, kHeadDim>();
  check_tile<pruneops::kKeyGradientTileSm90.held, kHeadDim>();
  check_tile<pruneops::kKeyGradientTileSm90.step, kHeadDim>();
  check_tile<pruneops::kQueryGradientTileSm90.step, kHeadDim>();
  fragments_are_cutes<kHeadDim>();
}

}  // namespace

int main() {
  check_head_dim<64>();
  check_head_dim<80>();
  check_head_dim<96>();
  check_head_dim<128>();
  std::fprintf(stderr, "all as CuTe has it\n");
  return 0;
}

// The instructions of Intel AMX in software: a handler of the signal that a processor without them
// raises carries out what the program was about to execute, and lets it go on behind it.
//
// So the machine code that a processor with AMX runs is what is tested, from the encoding of each
// instruction to the memory that it reads. After Intel's Software Developer's Manual, volume 2:
// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSSD/TDPBSUD/TDPBUSD/TDPBUUD and
// TDPBF16PS, and their exception classes AMX-E1 to AMX-E6. What a processor would refuse ends the
// process with a word about it.
#include <immintrin.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace {

constexpr int num_tiles = 8, max_rows = 16, max_row_bytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t data[max_rows][max_row_bytes] = {};
};

struct Tiles {
  bool configured = false;
  Tile of[num_tiles];
};

thread_local Tiles tiles;

// As amx_processor.py's FAULTS and INSTRUCTIONS name them.
enum Fault { none, last_row, last_input, signed_bytes, swapped_pairs, doubled_stride, kept_sums };
enum Instruction { configure, release, zero, load, store_, multiply_bytes, multiply_bf16 };
std::atomic<int> fault{none};
std::atomic<int64_t> executed[7];

[[noreturn]] void refuse(const char* why) {
  const char* parts[] = {"a processor with AMX refuses: ", why, "\n"};
  for (const char* part : parts) {
    if (write(STDERR_FILENO, part, strlen(part)) < 0) break;
  }
  abort();
}

// An instruction that VEX encodes, and what its operands are.
struct Decoded {
  int opcode, prefix;  // none, 66, F3, F2
  bool in_memory;
  int reg, rm, vvvv;
  const uint8_t* address;
  int64_t stride;
  bool has_index;
  int length;
};

int64_t read_register(const ucontext_t& context, int number) {
  static constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[order[number]];
}

// False where it is not the encoding of an AMX instruction: VEX.128.0F38.W0, three bytes.
bool decode(const uint8_t* code, const ucontext_t& context, Decoded& to) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const int extend_reg = ~code[1] >> 7 & 1, extend_index = ~code[1] >> 6 & 1;
  const int extend_base = ~code[1] >> 5 & 1;
  const uint8_t modrm = code[4];
  const int mod = modrm >> 6;
  to.opcode = code[3];
  to.prefix = code[2] & 3;
  to.vvvv = ~code[2] >> 3 & 15;
  to.reg = (modrm >> 3 & 7) | extend_reg << 3;
  to.rm = (modrm & 7) | extend_base << 3;
  to.in_memory = mod != 3;
  to.has_index = false;
  to.stride = 0;
  to.address = nullptr;
  to.length = 5;
  if (!to.in_memory) return true;
  int64_t address = 0, displacement = 0;
  bool has_base = true, relative = false;
  int base = to.rm;
  if ((modrm & 7) == 4) {
    const uint8_t sib = code[to.length++];
    const int index = (sib >> 3 & 7) | extend_index << 3;
    base = (sib & 7) | extend_base << 3;
    to.has_index = index != 4;
    if (to.has_index) to.stride = read_register(context, index) * (int64_t{1} << (sib >> 6));
    has_base = !(mod == 0 && (sib & 7) == 5);
  } else if (mod == 0 && (modrm & 7) == 5) {
    has_base = false;
    relative = true;
  }
  if (mod == 1) {
    displacement = static_cast<int8_t>(code[to.length]);
    to.length += 1;
  } else if (mod == 2 || !has_base) {
    int32_t wide;
    memcpy(&wide, code + to.length, sizeof wide);
    displacement = wide;
    to.length += 4;
  }
  if (has_base) address = read_register(context, base);
  if (relative) address = reinterpret_cast<int64_t>(code) + to.length;
  to.address = reinterpret_cast<const uint8_t*>(address + displacement);
  return true;
}

void load_configuration(const uint8_t* from) {
  uint8_t bytes[64];
  memcpy(bytes, from, sizeof bytes);
  for (int i = 2; i < 16; ++i) {
    if (bytes[i] != 0) refuse("a configuration with reserved bytes");
  }
  if (bytes[0] != 1 || bytes[1] != 0) refuse("a palette that is not 1, or a row to begin at");
  Tiles fresh;
  fresh.configured = true;
  for (int tile = 0; tile < 16; ++tile) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + tile * 2, sizeof row_bytes);
    const int rows = bytes[48 + tile];
    if (tile >= num_tiles) {
      if (rows != 0 || row_bytes != 0) refuse("shapes of tiles that palette 1 has not");
      continue;
    }
    if (rows > max_rows || row_bytes > max_row_bytes) refuse("a tile that is too large");
    if ((rows == 0) != (row_bytes == 0)) refuse("a tile with rows or columns alone");
    fresh.of[tile].rows = rows;
    fresh.of[tile].row_bytes = row_bytes;
  }
  tiles = fresh;
}

Tile& tile_of(int number) {
  if (number >= num_tiles) refuse("a ninth tile");
  Tile& tile = tiles.of[number];
  if (!tiles.configured || tile.rows == 0) refuse("a tile that has no shape");
  if (tile.row_bytes % 4 != 0) refuse("rows of no whole elements");
  return tile;
}

void load_tile(Tile& to, const Decoded& from) {
  memset(to.data, 0, sizeof to.data);
  const int64_t stride = fault == doubled_stride ? from.stride * 2 : from.stride;
  for (int row = 0; row < to.rows; ++row) {
    if (fault == doubled_stride && row * 2 >= to.rows) break;
    memcpy(to.data[row], from.address + row * stride, static_cast<size_t>(to.row_bytes));
  }
}

void store_tile(const Tile& from, const Decoded& to) {
  for (int row = 0; row < from.rows; ++row) {
    if (fault == last_row && row == from.rows - 1) break;
    auto* at = const_cast<uint8_t*>(to.address) + row * to.stride;
    memcpy(at, from.data[row], static_cast<size_t>(from.row_bytes));
  }
}

void check_shapes(const Tile& c, const Tile& a, const Tile& b) {
  if (&c == &a || &c == &b || &a == &b) refuse("a product of a tile with itself");
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows) {
    refuse("a product of tiles that do not fit");
  }
}

// The members of each element of B, so that those of a row lie side by side: two of bf16, or four.
template <typename Value, int members>
struct Members {
  alignas(64) Value of[max_rows][members][max_row_bytes / 4];
};

void add_products_of_bytes(Tile& c, const Tile& a, const Tile& b, bool a_signed, bool b_signed) {
  const auto value = [](uint8_t byte, bool with_sign) {
    return with_sign ? int32_t{static_cast<int8_t>(byte)} : int32_t{byte};
  };
  if (fault == signed_bytes) b_signed = !b_signed;
  const int inputs = fault == last_input ? b.rows - 1 : b.rows;
  Members<int32_t, 4> weights;
  for (int k = 0; k < inputs; ++k) {
    for (int byte = 0; byte < max_row_bytes; ++byte) {
      weights.of[k][byte % 4][byte / 4] = value(b.data[k][byte], b_signed);
    }
  }
  for (int m = 0; m < c.rows; ++m) {
    int32_t sums[max_row_bytes / 4];
    memcpy(sums, c.data[m], sizeof sums);
    for (int k = 0; k < inputs; ++k) {
      for (int i = 0; i < 4; ++i) {
        const int32_t factor = value(a.data[m][k * 4 + i], a_signed);
        for (int n = 0; n < max_row_bytes / 4; ++n) sums[n] += factor * weights.of[k][i][n];
      }
    }
    memcpy(c.data[m], sums, static_cast<size_t>(c.row_bytes));
  }
}

float to_float(const uint8_t* bf16) {
  uint16_t half;
  memcpy(&half, bf16, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A row of C, with first and second members of pairs in sums of their own. Subnormal numbers are 0
// on the way in and out, and rounding is to the nearest even one: the caller has set MXCSR so.
[[gnu::noinline]] void add_row_of_bf16(Tile& c, const Tile& a, const Members<float, 2>& weights,
                                       int m, int inputs) {
  float first[max_row_bytes / 4] = {}, second[max_row_bytes / 4] = {}, sums[max_row_bytes / 4];
  for (int k = 0; k < inputs; ++k) {
    const float x = to_float(&a.data[m][k * 4]), y = to_float(&a.data[m][k * 4 + 2]);
    for (int n = 0; n < max_row_bytes / 4; ++n) {
      first[n] = __builtin_fmaf(x, weights.of[k][0][n], first[n]);
      second[n] = __builtin_fmaf(y, weights.of[k][1][n], second[n]);
    }
  }
  memcpy(sums, c.data[m], sizeof sums);
  for (int n = 0; n < max_row_bytes / 4; ++n) sums[n] = sums[n] + (first[n] + second[n]);
  memcpy(c.data[m], sums, static_cast<size_t>(c.row_bytes));
}

void add_products_of_bf16(Tile& c, const Tile& a, const Tile& b) {
  const int inputs = fault == last_input ? b.rows - 1 : b.rows;
  const int swapped = fault == swapped_pairs;
  Members<float, 2> weights;
  for (int k = 0; k < inputs; ++k) {
    for (int half = 0; half < max_row_bytes / 2; ++half) {
      weights.of[k][(half + swapped) % 2][half / 2] = to_float(&b.data[k][half * 2]);
    }
  }
  const unsigned before = _mm_getcsr();
  constexpr unsigned all_masked = 0x1f80, denormals_are_zero = 0x0040, flush_to_zero = 0x8000;
  _mm_setcsr(all_masked | denormals_are_zero | flush_to_zero);
  for (int m = 0; m < c.rows; ++m) add_row_of_bf16(c, a, weights, m, inputs);
  _mm_setcsr(before);
}

void count(Instruction instruction) {
  executed[instruction].fetch_add(1, std::memory_order_relaxed);
}

// False where it is no instruction of AMX.
bool execute(const Decoded& it) {
  enum { plain = 0, p66 = 1, pf3 = 2, pf2 = 3 };
  if (it.opcode == 0x49 && it.in_memory && it.prefix == plain && it.reg == 0) {
    load_configuration(it.address);
    count(configure);
  } else if (it.opcode == 0x49 && !it.in_memory && it.prefix == plain && it.rm == 0) {
    tiles = Tiles();
    count(release);
  } else if (it.opcode == 0x49 && !it.in_memory && it.prefix == pf2) {
    Tile& tile = tile_of(it.reg);
    if (fault != kept_sums) memset(tile.data, 0, sizeof tile.data);
    count(zero);
  } else if (it.opcode == 0x4b && it.in_memory && it.prefix != plain) {
    if ((it.rm & 7) != 4) refuse("a tile in memory without a stride");
    Tile& tile = tile_of(it.reg);
    if (it.prefix == pf3) {
      store_tile(tile, it);
      count(store_);
    } else {
      load_tile(tile, it);
      count(load);
    }
  } else if ((it.opcode == 0x5c && it.prefix == pf3) || it.opcode == 0x5e) {
    if (it.in_memory) return false;
    Tile& c = tile_of(it.reg);
    const Tile &a = tile_of(it.rm), &b = tile_of(it.vvvv);
    check_shapes(c, a, b);
    if (it.opcode == 0x5c) {
      add_products_of_bf16(c, a, b);
      count(multiply_bf16);
    } else {
      add_products_of_bytes(c, a, b, it.prefix >= pf3, it.prefix == pf2 || it.prefix == p66);
      count(multiply_bytes);
    }
  } else {
    return false;
  }
  return true;
}

void handle(int number, siginfo_t*, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  auto& at = context.uc_mcontext.gregs[REG_RIP];
  Decoded decoded;
  if (decode(reinterpret_cast<const uint8_t*>(at), context, decoded) && execute(decoded)) {
    at += decoded.length;
    return;
  }
  signal(number, SIG_DFL);  // another invalid instruction: it happens again, and ends the process
}

}  // namespace

extern "C" {

void amx_install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

void amx_break(int kind) { fault = kind; }

int64_t amx_executed(int instruction) { return executed[instruction]; }

// The product of tiles given as arrays, for a comparison with another implementation: of pairs of
// bf16, or of bytes. c: [rows, 16], a: [rows, inputs * 4 bytes], b: [inputs, 16 * 4 bytes].
void amx_multiply(void* c, const void* a, const void* b, int rows, int inputs, int kind) {
  Tile tile_c, tile_a, tile_b;
  tile_c.rows = tile_a.rows = rows;
  tile_c.row_bytes = tile_b.row_bytes = max_row_bytes;
  tile_a.row_bytes = inputs * 4;
  tile_b.rows = inputs;
  for (int row = 0; row < rows; ++row) {
    memcpy(tile_c.data[row], static_cast<const uint8_t*>(c) + row * 64, 64);
    memcpy(tile_a.data[row], static_cast<const uint8_t*>(a) + row * inputs * 4,
           static_cast<size_t>(inputs) * 4);
  }
  memcpy(tile_b.data, b, static_cast<size_t>(inputs) * 64);
  if (kind < 4) {
    add_products_of_bytes(tile_c, tile_a, tile_b, kind & 2, kind & 1);
  } else {
    add_products_of_bf16(tile_c, tile_a, tile_b);
  }
  memcpy(c, tile_c.data, static_cast<size_t>(rows) * 64);
}

}  // extern "C"

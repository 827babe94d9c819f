// The kernels that one instruction set offers, as the library hands them out.
//
// Every source but those of build.py's BASELINE_SOURCES is compiled once per instruction set into
// the namespace meshserve::MESHSERVE_ISA; kernels_table.cpp fills one table from what it finds
// there. library.py mirrors the table field by field.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshserve {

class Team;
struct AttentionArgs;
struct RotaryKvArgs;
struct SampleArgs;
struct ProgramSpec;
struct StepInput;
struct EncoderSpec;
struct EncoderInput;

struct Kernels {
  size_t size;      // sizeof(Kernels), for the caller to compare with its own idea of it
  const char* isa;  // a name of build.py's INSTRUCTION_SETS
  // attention_calls.h
  Team* (*make_team)(int32_t threads, const int32_t* processors);
  void (*free_team)(Team* team);
  void (*run_rotary_kv)(Team* team, const RotaryKvArgs* layers, int32_t num_layers);
  void (*run_attention)(Team* team, const AttentionArgs* layers, int32_t num_layers);
  // program.h
  void* (*make_program)(Team* team, const ProgramSpec* spec);
  int32_t (*run_program)(void* program, const StepInput* input);
  void (*free_program)(void* program);
  // sampling.h
  size_t (*sampling_scratch_bytes)(const SampleArgs* args);
  void (*run_sampling)(Team* team, const SampleArgs* args, void* scratch);
  // encoder.h
  void* (*make_encoder)(Team* team, const EncoderSpec* spec);
  int32_t (*run_encoder)(void* encoder, const EncoderInput* input);
  void (*free_encoder)(void* encoder);
};

}  // namespace meshserve

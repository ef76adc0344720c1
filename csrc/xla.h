// The XLA custom call of the core.
#pragma once

namespace lopt {

// Address of the XLA FFI handler of `small_fc_step`: attributes and operands are described in xla.cc, beside
// their decoding, and in lopt_fast/jax/call.py, which writes them.
void* xla_small_fc_handler();

}  // namespace lopt

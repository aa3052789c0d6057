// The proof of a bundle: decisions by the identities of tokens, then outputs (engines/bundle/decisions.py and proof.py tell the rules).
#pragma once

#include "manifest.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {

// The tensors of a bundle's proof, with the shapes that the manifest says. Throws Error when one is missing or another.
Tensors read_proof(const Manifest&);

// values: what the file gives here for the proof's input, its decisions among them.
Proof judge(const Manifest&, const Tensors& proof, const Tensors& values);

}  // namespace tokexport

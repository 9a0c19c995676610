"""Answers each line `PATH ID ID …` on standard input with the logits that llama.cpp computes for a GGUF file.

An answer is the vocabulary's size as a little-endian uint32, then float32 logits, one row for each token. Needs
llama-cpp-python. Keys and values are kept in float32, so that what differs from another engine are the products alone.
"""

import ctypes
import struct
import sys

import llama_cpp as llama


def logits(path, ids):
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, 256, 256
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp cannot run {path}")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
        batch.seq_id[at][0] = 0
    if llama.llama_decode(context, batch) != 0:
        sys.exit(f"llama.cpp cannot read tokens with {path}")
    rows = ctypes.string_at(llama.llama_get_logits(context), 4 * vocabulary * len(ids))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return struct.pack("<I", vocabulary) + rows


for line in sys.stdin:
    path, *ids = line.split()
    sys.stdout.buffer.write(logits(path, [int(token) for token in ids]))
    sys.stdout.buffer.flush()

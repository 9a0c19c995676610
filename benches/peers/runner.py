"""Runs llama.cpp for the comparison: answers each line on standard input with one line of JSON.

    runner.py MODEL.gguf THREADS              ready, then: prompt N | generate N -> {"seconds": s}
    runner.py --quantize F16.gguf OUT TYPE    TYPE is TQ2_0, TQ1_0 or Q4_0; token embeddings become Q6_K
"""

import ctypes
import json
import sys
import time

import llama_cpp as llama

TYPES = {
    "TQ2_0": llama.LLAMA_FTYPE_MOSTLY_TQ2_0,
    "TQ1_0": llama.LLAMA_FTYPE_MOSTLY_TQ1_0,
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
}
Q6_K = 14


@llama.llama_log_callback
def silent(level, text, data):
    pass


def quantize(source, target, kind):
    params = llama.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.token_embedding_type = params.output_tensor_type = Q6_K
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        sys.exit(f"llama.cpp cannot quantise {source} to {kind}")


def tokens(count, vocabulary):
    """The same tokens as ternion's runner."""
    return [((i * 0x9E3779B97F4A7C15) % (1 << 64) >> 32) % vocabulary for i in range(1, count + 1)]


def serve(path, threads):
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    memory = llama.llama_get_memory(context)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    print(json.dumps({"ready": True}), flush=True)

    def decode(part):
        array = (llama.llama_token * len(part))(*part)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(part))) != 0:
            sys.exit("llama_decode failed")
        llama.llama_get_logits_ith(context, -1)  # waits for the result

    for line in sys.stdin:
        what, count = line.split()
        text = tokens(int(count), vocabulary)
        llama.llama_memory_clear(memory, True)
        start = time.perf_counter()
        if what == "prompt":
            decode(text)
        else:
            for token in text:
                decode([token])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if sys.argv[1] == "--quantize":
        quantize(*sys.argv[2:5])
    else:
        serve(sys.argv[1], int(sys.argv[2]))

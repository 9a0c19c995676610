"""Answers each line `PATH ID ID …` on standard input with what `transformers` computes for a Hugging Face directory.

An answer is the number of columns as a little-endian uint32, then float32 rows, one for each token: logits, or the last
norm's output of a model without a head. Needs torch, transformers and accelerate.
"""

import json
import os
import struct
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the quantiser's functions are compiled otherwise, for which there is no need

import torch
import transformers
from transformers.integrations.bitnet import BitLinear


def rows(path, ids):
    name = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    # The model's own `float` refuses quantised models, parts of which stay bfloat16 otherwise.
    torch.nn.Module.float(model)
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.dtype = torch.float32
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    rows = output.logits if hasattr(output, "logits") else output.last_hidden_state
    rows = rows[0].float().contiguous().numpy()
    return struct.pack("<I", rows.shape[1]) + rows.astype("<f4").tobytes()


for line in sys.stdin:
    path, *ids = line.split()
    sys.stdout.buffer.write(rows(path, [int(token) for token in ids]))
    sys.stdout.buffer.flush()

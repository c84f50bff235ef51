"""Compare an exported model here with the same folder in an environment that has transformers and no swarmtrain.

    python benchmarks/export_elsewhere.py FOLDER --python OTHER/bin/python

FOLDER is an export. Half of it runs in this environment: tokens of the held-out text, whole and in windows of the
context, and our logits. The other half runs under OTHER, in a folder of its own, by what a reader of the documentation
types: `AutoModelForCausalLM`, `AutoTokenizer`, `generate`. Prints the largest difference of logits, absolute and
relative to the largest logit, in fp32; whether all tokens are equal; and whether both decode to the text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

THEIRS = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import swarmtrain
except ImportError:
    swarmtrain = None
assert swarmtrain is None, "this environment has swarmtrain"
folder, given = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text, ours = open(given + "/text.txt", newline="").read(), load_file(given + "/ours.safetensors")
tokens = tokenizer(text)["input_ids"]
with torch.no_grad():
    logits = torch.cat([model(window[None]).logits[0] for window in ours["windows"]])
sample = model.generate(**tokenizer("def ", return_tensors="pt"), do_sample=False, max_new_tokens=20)
print(json.dumps({
    "versions": {each.__name__: each.__version__ for each in (transformers, torch)},
    "class": type(model).__name__,
    "tokens": len(tokens),
    "tokens_equal": tokens == ours["tokens"].tolist(),
    "text_comes_back": tokenizer.decode(tokens) == text,
    "largest_logit": float(ours["logits"].abs().max()),
    "largest_difference": float((logits - ours["logits"]).abs().max()),
    "relative": float((logits - ours["logits"]).abs().max() / ours["logits"].abs().max()),
    "writes": tokenizer.decode(sample[0]),
}))
"""


def main() -> None:
    """Write our half, run the other one, and print its answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, help="interpreter of an environment with transformers alone")
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    from swarmtrain.model.export import load_exported
    from swarmtrain.peer.checkpoints.export import Sampling, sample_text, tokenizer_of

    exported = load_exported(arguments.folder)
    text = exported.held_out[:60_000].decode(errors="ignore")
    tokens = torch.tensor(tokenizer_of(exported).encode(text.encode()).astype("int64"))
    T = exported.model.context_tokens
    windows = tokens[: len(tokens) // T * T].view(-1, T)[: arguments.windows].clone()
    with torch.no_grad():
        logits = torch.cat([exported.model(window[None])[0] for window in windows])
    with tempfile.TemporaryDirectory() as given:
        (Path(given) / "text.txt").write_bytes(text.encode())
        save_file({"tokens": tokens, "windows": windows, "logits": logits}, f"{given}/ours.safetensors")
        command = [arguments.python, "-I", "-c", THEIRS, str(arguments.folder.resolve()), given]
        found = json.loads(subprocess.run(command, cwd=given, capture_output=True, text=True, check=True).stdout)
    found["writes_the_same"] = sample_text(exported, "def ", Sampling(20, 0.0, seed=0)) == found["writes"]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

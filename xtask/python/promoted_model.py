"""A promoted directory in the packages that people load models with.

Called with the program `towline` and an empty folder. Trains and promotes a small model, serves it, and prints JSON: what
the safetensors package reads, and how far the log-probs of transformers are from those that the server gives.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import LlamaForCausalLM

TOWLINE, FOLDER = sys.argv[1], Path(sys.argv[2])
PROMPTS = ["3141>1134", "9876>6789", "0000>0000", "2718>1278"]
# Both compute in 32 bits, with sums in another order.
ALLOWED = 1e-5


def served_logprobs(url, tokens):
    body = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["logprobs"]["token_logprobs"][1:]


def own_logprobs(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    chosen = torch.tensor(tokens[1:])
    return torch.log_softmax(logits, -1)[torch.arange(len(chosen)), chosen].tolist()


def main():
    store = str(FOLDER / "store")
    train = [TOWLINE, "train", "--json", "--store", store, "--job", "promoted", "--steps", "40"]
    subprocess.run(train + ["--output-model-id", "promoted"], check=True, stdout=subprocess.DEVNULL)
    model_dir = Path(store) / "models" / "promoted"
    tensors, elements = 0, 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                assert torch.isfinite(tensor).all(), name
                tensors, elements = tensors + 1, elements + tensor.numel()

    model, info = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    unused = [key for key, names in info.items() if names and key != "missing_keys"]
    assert not unused, info
    model.eval()
    serve = [TOWLINE, "serve", "engine", "--json", "--store", store, "--port", "0", "--promoted", "promoted"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        gap = 0.0
        for prompt in PROMPTS:
            tokens = list(prompt.encode())
            pairs = zip(own_logprobs(model, tokens), served_logprobs(url, tokens), strict=True)
            gap = max(gap, *(abs(ours - theirs) for ours, theirs in pairs))
    finally:
        server.kill()
        server.wait()
    print(
        json.dumps(
            {
                "tensors": tensors,
                "elements": elements,
                "missing": sorted(info["missing_keys"]),
                "logprob_gap": gap,
                "allowed": ALLOWED,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            }
        )
    )


main()

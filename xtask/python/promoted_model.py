"""A promoted directory in the packages that people load models with.

Called with the program `towline` and an empty folder. Trains and promotes a small model and a LoRA adapter, serves them,
and prints JSON: what the safetensors package reads, and how far the log-probs of transformers and peft are from those
that the server gives.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import LlamaForCausalLM

TOWLINE, FOLDER = sys.argv[1], Path(sys.argv[2])
PROMPTS = ["3141>1134", "9876>6789", "0000>0000", "2718>1278"]


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


def towline(*arguments):
    command = [TOWLINE, *arguments, "--json", "--store", str(FOLDER / "store")]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def gap(model, promoted):
    """The largest distance between the log-probs of `model` and those that a server of `promoted` gives."""
    model.eval()
    serve = [TOWLINE, "serve", "engine", "--json", "--store", str(FOLDER / "store"), "--port", "0"]
    server = subprocess.Popen([*serve, "--promoted", promoted], stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        largest = 0.0
        for prompt in PROMPTS:
            tokens = list(prompt.encode())
            pairs = zip(own_logprobs(model, tokens), served_logprobs(url, tokens), strict=True)
            largest = max(largest, *(abs(ours - theirs) for ours, theirs in pairs))
        return largest
    finally:
        server.kill()
        server.wait()


def load(folder):
    """A directory in transformers, every tensor of it used and none missing."""
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def main():
    models = FOLDER / "store" / "models"
    towline("train", "--job", "full", "--steps", "40", "--output-model-id", "full")
    tensors, elements = 0, 0
    for path in sorted((models / "full").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                assert torch.isfinite(tensor).all(), name
                tensors, elements = tensors + 1, elements + tensor.numel()
    full = gap(load(models / "full"), "full")

    # An adapter, and the base that it names.
    rank = ["--lora-rank", "4", "--learning-rate", "1e-2"]
    towline("train", "--job", "lora", "--steps", "20", *rank, "--output-model-id", "addon")
    config = json.loads((models / "addon" / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"].replace("/", ":")
    towline("promote", base, "--output-model-id", "base")
    base = load(models / "base")
    before = own_logprobs(base, list(PROMPTS[0].encode()))
    adapted = PeftModel.from_pretrained(base, models / "addon")
    after = own_logprobs(adapted, list(PROMPTS[0].encode()))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1, "the adapter changes nothing"
    print(
        json.dumps(
            {
                "tensors": tensors,
                "elements": elements,
                "logprob_gap": full,
                "adapter_logprob_gap": gap(adapted, "addon"),
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "torch": torch.__version__,
            }
        )
    )


main()

"""How engines that are not installed here read a PEFT folder: their rules, from their public sources, in a few lines.

A rule takes the configuration, the tensors of :func:`read` and a plain model, and returns what it adds to each weight.
"""

import json
from collections import defaultdict

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def read(folder):
    """The configuration, and A and B of each layer by its full name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs = defaultdict(dict)
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs[name][factor] = tensor
    return config, pairs


def vllm(config, pairs, model):
    """One scale for all layers (vllm/lora/peft_helper.py and lora_weights.py); patterns are not read."""
    assert not config["modules_to_save"]
    assert all(pair["A"].shape[0] <= config["r"] for pair in pairs.values())  # copied into a buffer of rank r
    return {name: config["lora_alpha"] / config["r"] * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def llama_cpp(config, pairs, model):
    """alpha by the rank of the tensor (llama.cpp, src/llama-adapter.h, get_scale); patterns are not converted."""
    return {name: config["lora_alpha"] / pair["B"].shape[1] * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def tgi(config, pairs, model):
    """A projection is stacked over all layers of the model, ranks padded to 8, or dropped if one layer has none of it.

    text-generation-inference, server/text_generation_server/adapters/lora.py, prepare_weights.
    """
    stacks = defaultdict(list)
    for name in pairs:
        stacks[name.rpartition(".")[2]].append(name)
    whole = {leaf: names for leaf, names in stacks.items() if len(names) == model.config.num_hidden_layers}
    for names in whole.values():
        torch.stack([F.pad(pairs[name]["A"], (0, 0, 0, max(0, 8 - len(pairs[name]["A"])))) for name in names])
    return vllm(config, {name: pairs[name] for names in whole.values() for name in names}, model)


@torch.no_grad()
def apply(rule, folder, plain):
    """Add what an engine makes of a folder to the weights of a plain model."""
    for name, delta in rule(*read(folder), plain).items():
        plain.get_submodule(name).weight += delta
    return plain

"""Adapters as training leaves them: sparse, some ranks gone, some layers gone, and a head that moved."""

import torch

import lit_sparse as ls

SORA = ls.SoRA("all-linear", rank=4, alpha=6, threshold=0.1)
ROSELORA = ls.RoseLoRA("all-linear", rank=3, density=0.1)
GATED = ls.GatedRoseLoRA("all-linear", rank=4, threshold=0.1, density=0.2)
HARD_CONCRETE = ls.HardConcreteLoRA("all-linear", rank=4, penalty_weight=0.1)
METHODS = {"SoRA": SORA, "RoseLoRA": ROSELORA, "GatedRoseLoRA": GATED, "HardConcreteLoRA": HARD_CONCRETE}


@torch.no_grad()
def as_trained(model, method=SORA):
    """Inject into ``model`` and set what training would: layers in turn keep none, one, two, … of their ranks."""
    adapters = ls.inject(model, method)
    generator = torch.Generator().manual_seed(1)

    def random(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    for number, adapter in enumerate(adapters.values()):
        adapter.lora_A.copy_(random(adapter.lora_A) * 0.3)
        adapter.lora_B_t.copy_(random(adapter.lora_B_t) * 0.3)
        if hasattr(method, "density"):
            for matrix in (adapter.lora_A, adapter.lora_B_t):
                matrix.mul_(ls.functional.top_fraction_mask(random(matrix).abs(), method.density, 1))
        if adapter.gate is not None:
            adapter.gate.copy_(random(adapter.gate))
            closed = 0.0 if adapter.gate_function is None else -9.0
            adapter.gate.view(adapter.copies, -1)[:, number % (adapter.rank + 1) :] = closed
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own:
            parameter.copy_(random(parameter) * 0.3)
    return model.eval()


@torch.no_grad()
def logits(model, inputs):
    """Of a batch, or of token ids."""
    return model.eval()(**inputs if isinstance(inputs, dict) else {"input_ids": inputs}).logits


def save_checkpoint(module, file, std=0.1):
    """A checkpoint file as the Trainer writes it, without training; B is drawn with deviation ``std``."""
    module.configure_model()
    with torch.no_grad():
        for _, adapter in ls.adapters_in(module):
            torch.nn.init.normal_(adapter.lora_B_t, std=std)
    kept = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(kept)
    torch.save(kept, file)
    return str(file)

"""Export the quickstart runs as a user does, and hold the folders to what the README says of them."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.data import quickstart
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.table import text_table

TEXTS = 64


def export(run: Path, form: str, *options: str) -> Path:
    folder = run / "_".join(("export", form, *options))
    command = [
        "lit-sparse",
        "export",
        "--ckpt_path",
        str(run / "checkpoints" / "last.ckpt"),
        "--format",
        form,
        *options,
    ]
    done = subprocess.run([*command, "--output", str(folder)], check=True, capture_output=True, text=True)
    print(done.stdout.strip())
    return folder


def plain() -> torch.nn.Module:
    folder = quickstart.resolve("quickstart://all-MiniLM-L6-v2")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def state_of(text: str) -> str:
    (found,) = set(re.findall(r"[\d,]+ parameters in \d+ of \d+ ranks, [\d.]+ % of the adapted weights", text))
    return found


def main() -> None:
    runs = Path(sys.argv[1])
    data = ls.QuickstartReviews(tokenizer="quickstart://all-MiniLM-L6-v2", batch_size=TEXTS)
    data.setup("validate")
    batch = {k: v for k, v in next(iter(data.val_dataloader())).items() if k != "labels"}

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(**batch).logits

    kept = {}
    for name in ("sora", "roselora"):
        run = runs / f"quickstart_{name}" / "version_0"
        module = ls.SequenceClassification.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
        live = logits(module.model)
        folders = {form: export(run, form) for form in ("peft", "sparse", "delta", "merged")}
        unmerged = PeftModel.from_pretrained(plain(), folders["peft"])
        sparse, delta = plain(), plain()
        ls.load_adapter(sparse, folders["sparse"])
        ls.load_adapter(delta, folders["delta"])
        states = {state_of(text_table(read_adapters(source))) for source in (run, folders["peft"], folders["sparse"])}
        states |= {state_of((folder / "README.md").read_text(encoding="utf-8")) for folder in folders.values()}
        print(f"{name:9} {' or '.join(sorted(states))}")
        kept[f"{name}'s logs, folders and cards hold the same"] = len(states) == 1
        found = {
            "PEFT": logits(unmerged),
            "PEFT, merged": logits(unmerged.merge_and_unload()),
            "sparse": logits(sparse),
            "delta": logits(delta),
            "merged": logits(AutoModelForSequenceClassification.from_pretrained(folders["merged"])),
        }
        for form, values in found.items():
            difference = float((values - live).abs().max())
            print(f"{name:9} {form:13} differs by {difference:.1e} on {TEXTS} reviews")
            kept[f"{name} as {form} within 1e-5"] = difference <= 1e-5
        adapters = dict(ls.adapters_in(module.model))
        if name == "sora":
            remaining = sum(int((a.gate != 0).sum()) * (a.in_features + a.out_features) for a in adapters.values())
            head = sum(p.numel() for p in module.model.classifier.parameters())
            ragged = export(run, "peft", "--layout=ragged")
            content = (ragged / "adapter_model.safetensors").read_bytes()
            header = 8 + int.from_bytes(content[:8], "little")  # names and shapes, as safetensors lays a file out
            values = len(content) - header
            tensors = len(load_file(ragged / "adapter_model.safetensors"))
            print(
                f"{name:9} ragged PEFT file of {len(content):,} bytes: {values:,} of values for {remaining + head:,} "
                f"parameters, {header:,} of names and shapes for {tensors} tensors"
            )
            kept["SoRA's ragged PEFT file holds 4 bytes for each parameter"] = values == 4 * (remaining + head)
            kept["SoRA's ragged PEFT file names a tensor in 150 bytes at most"] = header <= 150 * tensors
        else:
            before = plain().state_dict()
            after = load_file(folders["merged"] / "model.safetensors")
            deltas = {f"{layer}.weight": adapter.delta_weight() for layer, adapter in adapters.items()}
            changed = {n: after[n] != w for n, w in before.items() if n in after and not n.startswith("classifier.")}
            # A change may be too small for float32 to tell the sum from the weight.
            wanted = {
                n: before[n] + deltas[n] != before[n] if n in deltas else torch.zeros_like(c)
                for n, c in changed.items()
            }
            count, support = (sum(int(t.count_nonzero()) for t in found.values()) for found in (changed, deltas))
            print(f"{name:9} merged: {count:,} entries differ from the base model's file, the support has {support:,}")
            kept["RoseLoRA's merged file differs in the support only"] = all(
                torch.equal(changed[n], wanted[n]) for n in changed
            )
    broken = [promise for promise, held in kept.items() if not held]
    if broken:
        sys.exit(f"broken: {'; '.join(broken)}")


if __name__ == "__main__":
    main()

"""How large the file of a patch (format delta) is beside the values in it, and how long its places take.

Run:  python benchmarks/patch_size.py [--json FILE]

Patches of all linear layers of MiniLM's encoder. SHiRA and LIFT choose their entries by the pretrained weights, or by
chance; the patch of RoseLoRA is that of examples/adapters/reviews-roselora. The values of the others are random, which
changes no size. Writing and reading of ten million places, 2 % of a weight, is timed once.
"""

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path

import tables
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from variants import provenance, write_json

import lit_sparse as ls
from lit_sparse.data.quickstart import resolve
from lit_sparse.functional.rice import decoded, encoded
from lit_sparse.interchange.patches import Entries, Patch, patch_of, tensors_of

ADAPTER = Path(__file__).parents[1] / "examples" / "adapters" / "reviews-roselora"
METHODS = {
    **{f"SHiRA, random, {share:.0%}": ls.SHiRA(changed=share, mask="random") for share in (0.01, 0.02, 0.05)},
    **{f"SHiRA, magnitude, {share:.0%}": ls.SHiRA(changed=share, mask="magnitude") for share in (0.01, 0.02, 0.05)},
    "LIFT, 5%": ls.LIFT(),
}


def patches(plain: nn.Module) -> dict[str, Patch]:
    made = {}
    for name, method in METHODS.items():
        adapters = ls.inject(copy.deepcopy(plain), method)
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.values.normal_()
        made[name] = patch_of(adapters)
    trained = ls.from_pretrained(ADAPTER).model
    made["RoseLoRA, density 8%"] = patch_of(dict(ls.adapters_in(trained)))
    return made


def sizes(patch: Patch, weights: int) -> dict[str, float]:
    """Bits of a place, their entropy if places were random, and bytes of the file by bytes of its values."""
    entries = sum(part.count for part in patch.values())
    share = entries / weights
    row = {"share": share, "entries": entries}
    row["entropy"] = -(math.log2(share) + (1 / share - 1) * math.log2(1 - share))
    row["bits"] = 8 * sum(t.nbytes for n, t in tensors_of(patch).items() if n.endswith(".places")) / entries
    for dtype in (torch.float32, torch.bfloat16):
        cast = {name: Entries(part.indices, part.values.to(dtype)) for name, part in patch.items()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            save_file(tensors_of(cast), file)
            row[str(dtype).removeprefix("torch.")] = file.stat().st_size / (entries * dtype.itemsize)
    return row


def seconds(count: int = 10_000_000, share: float = 0.02) -> dict[str, float]:
    places = torch.empty(count, dtype=torch.float64).geometric_(share).long().cumsum(0) - 1
    start = time.process_time()
    code = encoded(places)
    middle = time.process_time()
    assert torch.equal(decoded(code, count), places)
    return {"write": middle - start, "read": time.process_time() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(resolve("quickstart://all-MiniLM-L6-v2"))
    weights = sum(adapter.weight.numel() for adapter in ls.inject(copy.deepcopy(plain), ls.LoRA()).values())
    results = {name: sizes(patch, weights) for name, patch in patches(plain).items()}
    content = {**provenance(), "results": results, "seconds": seconds()}
    print(tables.of_patch_size(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()

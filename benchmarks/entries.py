"""Ways to multiply by a frozen weight with few changed entries, and to find the gradient of these entries.

Run:  python benchmarks/entries.py [--rounds 15] [--density 0.02 0.05] [--json FILE]

float32, 2,048 tokens, entries at random places. Every round times each way once, in a shuffled order; the
figures are medians of CPU time. DeltaLinear computes "added" and "dense, gathered".
"""

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable

import tables
import torch
from torch import Tensor
from variants import provenance, write_json

from lit_sparse.adapters.delta import changed_weight

SHAPES = ((768, 768), (384, 1536))
TOKENS = 2048


def ways(rows: int, columns: int, density: float) -> dict[str, Callable[[], Tensor]]:
    weight, x, grad = torch.randn(rows, columns), torch.randn(TOKENS, columns), torch.randn(TOKENS, rows)
    places = torch.randperm(rows * columns)[: int(density * rows * columns)].sort().values
    values, indices = torch.randn(len(places)), places.int()
    spots = torch.stack([places // columns, places % columns])
    sparse = torch.sparse_coo_tensor(spots, values, (rows, columns)).to_sparse_csr()
    empty = torch.sparse_csr_tensor(
        sparse.crow_indices(), sparse.col_indices(), torch.zeros_like(values), (rows, columns)
    )

    def gathered() -> Tensor:
        mine, theirs = grad.t().contiguous(), x.t().contiguous()
        parts = zip(spots[0].split(512), spots[1].split(512), strict=True)
        return torch.cat([(mine[row] * theirs[column]).sum(1) for row, column in parts])

    return {
        "forward: the frozen weight alone": lambda: x @ weight.t(),
        "forward: added to a copy of the weight": lambda: x @ changed_weight(weight, values, indices, x.dtype).t(),
        "forward: frozen product + CSR product": lambda: (x @ weight.t()).add_((sparse @ x.t()).t()),
        "gradient: dense product, gathered": lambda: (grad.t() @ x).flatten().index_select(0, indices),
        "gradient: torch.sparse.sampled_addmm": lambda: torch.sparse.sampled_addmm(empty, grad.t(), x, beta=0.0),
        "gradient: products of gathered rows": gathered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--density", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # sparse tensors are in beta
    results: dict[str, dict[str, float]] = {}
    for shape, density in itertools.product(SHAPES, options.density):
        made = ways(*shape, density)
        times: dict[str, list[float]] = {name: [] for name in made}
        for number in range(options.rounds + 2):
            for name in random.sample(list(made), len(made)):
                start = time.process_time()
                made[name]()
                if number >= 2:
                    times[name].append(1000 * (time.process_time() - start))
        for name, own in times.items():
            results.setdefault(name, {})[f"{shape[0]} × {shape[1]}, {density:.0%}"] = statistics.median(own)
    content = {**provenance(), **vars(options), "results": results}
    print(tables.of_entries(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()

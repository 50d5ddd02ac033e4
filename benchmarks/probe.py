"""One attack in a process of its own, which the parts start and memory of benchmarks.speed measure.

    python -m benchmarks.probe start --dataset digits
    python -m benchmarks.probe memory --dataset digits

start   prints the seconds from `import torch` until the first batch is ready, and ends there
memory  trains for 20 steps, evaluates, saves, and prints two peaks in MiB: of the process, and of
        the memory that torch allocated on the GPU

What follows are options of attack/badnet.py.
"""

import itertools
import resource
import sys
import time

import torch

STEPS = 20


def main(part, words):
    begin = time.perf_counter()  # torch is imported, and nothing else
    from antidote_bench.attack import badnet
    from antidote_bench.utils import parsing, train

    def first_batch(network, batches, *_):
        next(batches)
        print("seconds", time.perf_counter() - begin, flush=True)
        sys.exit(0)

    train_epoch = train.train_epoch

    def few_steps(network, batches, rates, weights, *rest):
        batches = itertools.islice(batches, STEPS)
        return train_epoch(network, batches, rates[:STEPS], weights[:STEPS], *rest)

    train.train_epoch = {"start": first_batch, "memory": few_steps}[part]
    badnet.main(parsing.parse(badnet.Config, words))
    allocated = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    print("peaks", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, allocated)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

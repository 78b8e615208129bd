"""A teacher's table in the space of the network that has followed it.

    python benchmarks/box/mapped.py RUN DATA TABLE

RUN was trained with a model as teacher, whose embeddings it keeps in ``teacher.npz``. By least
squares on some of the training images they are mapped to those of RUN's own network. So mapped,
they tell people apart by what the labels have taught the network, and a training that starts from
it (``fit --start-from RUN --teacher TABLE``) needs no map of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sphereface2.data import embedding_table
from sphereface2.data.opening import open_source
from sphereface2.embedder import Embedder
from sphereface2.training import teacher

IMAGES = 3000
"""On which the map is found."""
RIDGE = 1e-2


def main(run: Path, data: Path, out: Path) -> None:
    source, table = open_source(data), embedding_table.read(run / teacher.FILE)
    numbers = {source.name(index): index for index in range(len(source))}
    indices = np.array([numbers[name] for name in table.names.tolist()])
    targets, _ = table.rows(source, indices, 0.0)
    inputs = np.concatenate([targets, np.ones((len(targets), 1), np.float32)], 1)
    some = np.random.default_rng(0).permutation(len(indices))[:IMAGES]
    ours = Embedder.load(run).embed_source(source, indices[some])
    gram = inputs[some].T @ inputs[some] + RIDGE * np.eye(inputs.shape[1])
    mapped = embedding_table.unit(inputs @ np.linalg.solve(gram, inputs[some].T @ ours))
    about = {"input": source.fingerprint()}
    embedding_table.write_npz(out, table.names.tolist(), mapped.astype(np.float16), about)
    print(f"{out}: cosine {(mapped[some] * ours).sum(1).mean():.3f} to the network's own")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

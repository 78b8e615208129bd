"""A network with its preprocessing, batches and threads: images in, embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.errors import UserError
from sphereface2.images import is_one, read_image
from sphereface2.machine import cores, keep_freed_memory

if TYPE_CHECKING:
    import torch

    from sphereface2.backbones.base import Backbone
    from sphereface2.data.pairs import PairSet
    from sphereface2.data.source import Source

Progress = Callable[[int], None]
"""Takes the number of images done since the last call."""
Change = Callable[[np.ndarray, int], np.ndarray]
"""Makes another image of a set's decoded image and its index there, as `data.hardening` does."""


class Embedder:
    """Embeds images, the pairs of a verification set, or a whole source.

    A torch network and an ONNX Runtime session are used in the same way; with the latter torch is
    not imported. One pool of threads reads and decodes images while the network computes. It ends
    with `close`, or when the Embedder is deleted. Threads may share an Embedder, and it pickles.

    Args:
        network: a backbone, which is used in evaluation mode and in float32, or an exported one.
        flip: add the embedding of the mirror image before normalising.
        batch_size: images in one forward pass, 1 or more.
        device: where to compute: cpu, cuda, cuda:1, mps, "auto" for the best there is; by default
            where the network is.
        threads: that read and decode images; by default one a core, at most 8.
        read: makes a decoded image of what is given; by default `images.read_image`.

    Attributes:
        network: what was given, on its device.

    Raises:
        UserError: a batch size below 1, weights that are not float32, or a device that an exported
            network cannot use.

    Example:
        >>> import numpy as np
        >>> from sphereface2 import backbones
        >>> embedder = Embedder(backbones.build("sfnet4", embedding_dim=64, width=0.25))
        >>> embedder.embed([np.zeros((112, 112, 3), np.uint8)]).shape
        (1, 64)
    """

    def __init__(
        self,
        network: Backbone | OnnxNetwork,
        *,
        flip: bool = True,
        batch_size: int = 128,
        device: str | torch.device | None = None,
        threads: int | None = None,
        read: Callable[[Any], np.ndarray] = read_image,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be 1 or more, not {batch_size}")
        self.network = network
        self.flip = flip
        self.batch_size = batch_size
        self.read = read
        self._threads = threads or min(8, cores())
        self._engine: _Engine = (
            _OnnxEngine(network, device)
            if isinstance(network, OnnxNetwork)
            else _TorchEngine(network, device)
        )
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="embedder")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        flip: bool = True,
        batch_size: int = 128,
        threads: int | None = None,
        read: Callable[[Any], np.ndarray] = read_image,
    ) -> Embedder:
        """Load a trained network.

        Args:
            path: a run folder, a model folder, its ``model.safetensors``, or an ``.onnx`` file.
            device: cpu, cuda, mps; by default the best there is.
            flip, batch_size, threads, read: of the class.

        Raises:
            UserError: there is no network at ``path``, it is damaged, or there is no such device.
        """
        folder = bundle.resolve(path).resolve()
        return cls(
            OnnxNetwork(folder) if folder.suffix == ".onnx" else bundle.load(folder),
            flip=flip,
            batch_size=batch_size,
            device=device or "auto",
            threads=threads,
            read=read,
        )

    @property
    def embedding_dim(self) -> int:
        """Length d of an embedding."""
        return self.network.embedding_dim

    @property
    def metadata(self) -> dict[str, Any]:
        """Free-form facts that travel with the network: data, head, training."""
        return self.network.metadata

    @property
    def device(self) -> str:
        """Where the network computes, for instance ``cpu`` or ``cuda:0``."""
        return self._engine.device

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of weights, architecture and preprocessing.

        It is the same after saving, on another machine and on another device.
        """
        if isinstance(self.network, OnnxNetwork):
            return self.network.fingerprint
        return bundle.fingerprint(self.network)

    def embed(
        self,
        images: Iterable[Any],
        *,
        read: Callable[[Any], np.ndarray] | None = None,
        name: Callable[[int], str] | None = None,
        unreadable: list[int] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Embed images: float32 (N, d), rows of length 1, in the order given.

        Images are read a batch ahead of the network, so a lazy iterable costs the memory of two
        batches.

        Args:
            images: what `images.read_image` takes: encoded images (bytes), decoded ones (uint8
                RGB, (H, W, 3)), paths; their sizes may differ. With ``read``, whatever it takes.
            read: makes a decoded image of one of ``images``, in a thread of the pool.
            name: names image ``i`` in an error message. Without it the error of a ``read`` of the
                caller's is passed on as it is.
            unreadable: without it an unreadable image is an error; with it the image's index is
                appended here and its row left out of the result.
            progress: called after each batch.

        Raises:
            UserError: an image cannot be read, one image was given in place of several, or the
                network gives NaN or infinity.
        """
        if read is None and is_one(images):
            raise UserError("one image was given, where a list of images is expected")
        rows: list[np.ndarray] = []
        if isinstance(self._engine, _TorchEngine) and self.device == "cpu":
            keep_freed_memory()
        with self._engine.evaluating():
            for first, futures in self._batches(iter(images), read or self.read):
                batch = []
                for index, future in enumerate(futures, first):
                    try:
                        batch.append(future.result())
                    except (OSError, UserError) as error:
                        if unreadable is not None:
                            unreadable.append(index)
                        elif read is not None and name is None:
                            raise
                        else:
                            label = name(index) if name else f"image {index}"
                            raise UserError(f"{label} cannot be read: {error}") from error
                if batch:
                    rows.append(self._engine.forward(batch, self.flip, None))
                if progress is not None:
                    progress(len(futures))
        return np.concatenate(rows) if rows else np.zeros((0, self.embedding_dim), np.float32)

    def forward(self, images: list[np.ndarray], *, threads: int | None = None) -> np.ndarray:
        """Embed decoded images, uint8 RGB (H, W, 3), in one pass: float32 (B, d), of length 1.

        Args:
            images: the batch.
            threads: cores that this pass on the CPU uses, for callers that run several passes at
                once. PyTorch keeps it for the calling thread's later passes; ONNX Runtime holds
                the weights once for each number.

        Raises:
            UserError: the network gives NaN or infinity.
        """
        with self._engine.evaluating():
            return self._engine.forward(images, self.flip, threads)

    def embed_pairs(
        self, pair_set: PairSet, *, change: Change | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Embed the N images of a verification set: float32 (N, d).

        Args:
            pair_set: the set.
            change: of each image, after it was read.
            progress: called after each batch.

        Raises:
            UserError: an image cannot be read. Leaving it out would change the protocol.
        """
        images = pair_set.images
        return self.embed(
            range(len(images)),
            read=lambda index: self._changed(images[index], index, change),
            name=pair_set.image_name,
            progress=progress,
        )

    def embed_source(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        unreadable: list[int] | None = None,
        change: Change | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Embed a labelled set: float32 (N, d).

        Args:
            source: of `open_source`.
            indices: of the images wanted, in this order; by default all.
            unreadable: as of `embed`; positions in ``indices``.
            change: of each image, after it was read.
            progress: called after each batch.

        Raises:
            UserError: an image cannot be read and ``unreadable`` is not given; it names the image.
                Or ``indices`` that the source does not have.
        """
        from sphereface2.data.source import check_indices

        count = len(source)
        chosen = np.arange(count) if indices is None else check_indices(indices, count)
        return self.embed(
            chosen,
            read=lambda index: self._changed(source.read(int(index)), int(index), change),
            name=lambda position: source.name(int(chosen[position])),
            unreadable=unreadable,
            progress=progress,
        )

    def _changed(self, image: Any, index: int, change: Change | None) -> np.ndarray:
        decoded = self.read(image)
        return decoded if change is None else change(decoded, index)

    def close(self) -> None:
        """End the threads. The Embedder cannot be used afterwards."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_pool"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="embedder")

    def __repr__(self) -> str:
        kind = getattr(self.network, "config", {}).get("name", "ONNX Runtime")
        return (
            f"Embedder({kind}, {self.embedding_dim} dimensions, {self.device}, flip={self.flip}, "
            f"batch_size={self.batch_size})"
        )

    def _batches(
        self, images: Iterator[Any], read: Callable[[Any], np.ndarray]
    ) -> Iterator[tuple[int, list[Future[np.ndarray]]]]:
        """Batches that are being read, each with the index of its first image.

        The next batch is read while the caller works on this one.
        """

        def submit() -> list[Future[np.ndarray]]:
            return [self._pool.submit(read, image) for image in islice(images, self.batch_size)]

        first, ahead = 0, []
        current = submit()
        try:
            while current:
                ahead = submit()
                yield first, current
                first, current = first + len(current), ahead
        finally:  # after an error nothing of the caller's images is in use any more
            for future in (left := [*current, *ahead]):
                future.cancel()
            wait(left)


class _Engine(Protocol):
    """What computes: batches of decoded images to normalised embeddings."""

    @property
    def device(self) -> str:
        """Where it computes."""

    def evaluating(self) -> Any:
        """A context in which the network is in evaluation mode."""

    def forward(self, images: list[np.ndarray], flip: bool, threads: int | None) -> np.ndarray:
        """uint8 RGB (H, W, 3) each to float32 (B, d), rows of length 1."""


# Networks that are computing, each with the number of its users and its modules that were in
# training mode: it stays in evaluation mode while any thread, of any Embedder, is inside.
_computing: dict[Any, tuple[int, list[Any]]] = {}
_computing_lock = Lock()


class _TorchEngine:
    def __init__(self, network: Backbone, device: str | torch.device | None) -> None:
        if device is not None:
            from sphereface2.device import resolve

            network = network.to(resolve(str(device)))
        for parameter in network.parameters():
            if str(parameter.dtype) != "torch.float32":
                raise UserError(
                    f"the network has weights of {parameter.dtype}, and embeddings are computed in "
                    "float32: give network.float()"
                )
        self.network = network

    @property
    def device(self) -> str:
        return str(next(self.network.parameters()).device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        network = self.network
        with _computing_lock:
            users, trained = _computing.get(network, (0, []))
            if not users and (trained := [one for one in network.modules() if one.training]):
                network.eval()
            _computing[network] = users + 1, trained
        try:
            yield
        finally:
            with _computing_lock:
                users, trained = _computing.pop(network)
                if users > 1:
                    _computing[network] = users - 1, trained
                else:
                    for module in trained:  # others may have been frozen by themselves
                        module.training = True

    def forward(self, images: list[np.ndarray], flip: bool, threads: int | None) -> np.ndarray:
        import torch
        from torch.nn.functional import normalize

        from sphereface2.device import exact_convolutions

        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        preprocess = self.network.preprocessing
        with torch.inference_mode():
            if len({image.shape for image in images}) == 1:
                pixels = torch.from_numpy(np.stack(images)).to(self.device)
                inputs = preprocess(pixels.permute(0, 3, 1, 2))
            else:
                inputs = torch.cat(
                    [
                        preprocess(torch.tensor(image, device=self.device).permute(2, 0, 1)[None])
                        for image in images
                    ]
                )
            with torch.autocast(inputs.device.type, enabled=False), exact_convolutions():
                embeddings = self.network(inputs).float()
                if flip:
                    embeddings = embeddings + self.network(inputs.flip(3)).float()
            if not torch.isfinite(embeddings).all():
                raise UserError(_NOT_FINITE)
            return normalize(embeddings).cpu().numpy()


class _OnnxEngine:
    device = "cpu"

    def __init__(self, network: OnnxNetwork, device: object) -> None:
        if device is not None and str(device) not in ("cpu", "auto"):
            raise UserError(
                f"an exported network computes on the CPU, not on {device}: leave out the device, "
                "or give the run that it was exported from"
            )
        self.network = network

    def evaluating(self) -> Any:
        return nullcontext()

    def forward(self, images: list[np.ndarray], flip: bool, threads: int | None) -> np.ndarray:
        inputs = self.network.preprocessing.arrays(images)
        embeddings = self.network(inputs, threads=threads)
        if flip:
            mirrored = np.ascontiguousarray(inputs[..., ::-1])
            embeddings = embeddings + self.network(mirrored, threads=threads)
        if not np.isfinite(embeddings).all():
            raise UserError(_NOT_FINITE)
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings / np.maximum(lengths, 1e-12)


_NOT_FINITE = "the network gives NaN or infinite embeddings: its weights are unusable"

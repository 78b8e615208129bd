"""A loss of this package in a LightningModule: it is a part of the module like any other.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from letters import DIM, classes, letters, network, verify
from sphereface2 import heads


class Recogniser(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = network()
        self.head = heads.SphereFace2(DIM, classes, r=4.0, m=0.3, loss_weight=10.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = self.head(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Prototypes follow the embeddings, hence their higher rate.
        prototypes = {"params": self.head.parameters(), "lr": 0.02}
        return torch.optim.AdamW([{"params": self.network.parameters()}, prototypes], lr=0.002)


def main(epochs: int = 3) -> float:
    """Equal error rate on letters of other scripts."""
    seen, unseen = letters()
    module = Recogniser(classes(seen))
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(seen, 128, shuffle=True, drop_last=True))
    return verify(module.network.cpu(), unseen)[0]


if __name__ == "__main__":
    print(f"equal error rate {main():.2%}")

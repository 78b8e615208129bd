"""A loss of this package under Hugging Face's Trainer, which wants a model that returns its loss.

pip install transformers accelerate
python examples/huggingface_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from letters import DIM, classes, letters, network, verify
from sphereface2 import heads


class Recogniser(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = network()
        self.head = heads.SphereFace2(DIM, classes, r=4.0, m=0.3, loss_weight=10.0)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = self.network(images)
        return {"loss": self.head(embeddings, labels), "embeddings": embeddings}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def main(epochs: int = 3) -> float:
    """Equal error rate on letters of other scripts."""
    seen, unseen = letters()
    model = Recogniser(classes(seen))
    # Prototypes follow the embeddings, hence their higher rate.
    prototypes = {"params": model.head.parameters(), "lr": 0.02}
    optimizer = torch.optim.AdamW([{"params": model.network.parameters()}, prototypes], lr=0.002)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=128,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
        )
        trainer = Trainer(
            model, settings, collate, train_dataset=seen, optimizers=(optimizer, None)
        )
        trainer.train()
    return verify(model.network.cpu(), unseen)[0]


if __name__ == "__main__":
    print(f"equal error rate {main():.2%}")

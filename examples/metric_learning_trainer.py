"""A loss of this package in the training loop of pytorch-metric-learning, in place of its own.

pip install pytorch-metric-learning
python examples/metric_learning_trainer.py
"""

from __future__ import annotations

import torch
from pytorch_metric_learning import trainers

from letters import DIM, classes, letters, network, verify
from sphereface2 import heads


def main(epochs: int = 3, loss: str = "sphereface2") -> float:
    """Equal error rate on letters of other scripts."""
    seen, unseen = letters()
    net = network()
    options = {"r": 4.0, "m": 0.3, "loss_weight": 10.0} if loss == "sphereface2" else {}
    head = heads.build(loss, DIM, classes(seen), **options)
    trainer = trainers.MetricLossOnly(
        models={"trunk": net},
        loss_funcs={"metric_loss": head},
        optimizers={
            "trunk_optimizer": torch.optim.AdamW(net.parameters(), lr=0.002),
            "metric_loss_optimizer": torch.optim.AdamW(head.parameters(), lr=0.02),
        },
        dataset=seen,
        batch_size=128,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    trainer.train(num_epochs=epochs)
    return verify(net, unseen)[0]


if __name__ == "__main__":
    print(f"equal error rate {main():.2%}")

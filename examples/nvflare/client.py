"""The user's own training script: nothing in it knows of compression."""

from __future__ import annotations

import argparse

import nvflare.client as flare
import torch
import torch.nn.functional as F
from model import Digits, accuracy, split


def main() -> None:
    """Train whenever the server asks for it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    images, labels = split("train")
    flare.init()
    shard = int(flare.get_site_name().split("-")[1]) - 1
    images, labels = images[shard :: arguments.clients], labels[shard :: arguments.clients]
    model = Digits()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        score = accuracy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        steps = 0
        for _ in range(2):
            for batch in torch.randperm(len(images)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                steps += 1
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": score},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


if __name__ == "__main__":
    main()
